"""The weight stream without a GPU: who goes this way, what is launched, which weights come when.

Device code is run as plain Python here, with `gl`, barriers and copies replaced, so the arithmetic
under test is the kernel's own. Legend: N outputs, K inputs, R rows of a tile, P programs.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch

from draftnorm.kernels import stream_copies, stream_layouts, weight_stream
from draftnorm.kernels.projection import Rotary
from draftnorm.kernels.rms_norm import INTERPRETED
from draftnorm.kernels.weight_stream import (
    COUNTERS,
    SHARED_MEMORY,
    StreamBuffers,
    StreamWeights,
    ring_slots,
    stream_layer,
)
from draftnorm.model import decode_step, streamed_layers
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.decode_step import NORMS, DecodeStep
from draftnorm.model.streamed_layers import can_stream
from draftnorm.model.transformer import Transformer

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not run Gluon")

GPU = torch.device("cuda")
WIDE = ModelConfig(
    vocab_size=1000, hidden_size=2048, intermediate_size=8192, num_layers=2, num_heads=32,
    num_kv_heads=8, head_size=64,
)  # fmt: skip


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(hidden_size=3072, num_heads=24, head_size=128),
        dict(hidden_size=4096, intermediate_size=14336, head_size=128),
        dict(num_kv_heads=1),
        dict(windows=(None, 100), tie_embeddings=True, architecture="mistral"),
        dict(num_heads=64, head_size=80),  # attention wider than the residual stream
    ],
)
def test_plain_wide_dense_layers_stream(changes: dict, hopper: None) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert can_stream(replace(WIDE, **changes), dtype, GPU)


@pytest.mark.parametrize(
    "changes",
    [
        dict(architecture="mixtral", num_experts=4, experts_per_token=2, expert_size=8192),
        dict(qkv_bias=True),
        dict(output_bias=True),
        dict(mlp_bias=True),
        dict(qk_norm=True),
        dict(hidden_size=1024),  # narrow
        dict(hidden_size=2560),  # no multiple of 1,024: the residual stream,
        dict(intermediate_size=8704),  # the feed-forward width,
        dict(num_heads=24),  # attention
        dict(num_heads=256, head_size=8),  # half a head is no tile
        dict(hidden_size=5120),  # rows of x leave no room for a ring of weights
        dict(hidden_size=8192),
    ],
)
def test_other_layers_do_not(changes: dict, hopper: None) -> None:
    assert not can_stream(replace(WIDE, **changes), torch.bfloat16, GPU)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_devices_do_not(capability, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert not can_stream(WIDE, torch.bfloat16, GPU)


def test_a_cpu_is_not_even_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: 1 / 0)
    assert not can_stream(WIDE, torch.bfloat16, torch.device("cpu"))


def test_other_dtypes_do_not(hopper: None) -> None:
    assert not can_stream(WIDE, torch.float32, GPU)


@pytest.mark.parametrize("D", [1024, 2048, 3072, 4096])
def test_the_rings_take_what_there_is(D: int) -> None:
    for few in (True, False):
        by_rows = {ring_slots(D, rows) for rows in (range(1, 9) if few else range(9, 17))}
        ((slots, input_slots),) = by_rows
        R = 8 if few else 16
        assert input_slots * 512 >= D  # a tile's rows stay for all tiles
        row_bytes, weight_bytes, norm_bytes = input_slots * 512 * R * 2, 16 * 512 * 2, D * 2
        scratch = 8 * 16 * R * 4  # through which the slabs' sums meet, fp32
        barriers = 2 * 8 * (slots + input_slots) + 4 * slots + 4 * 8
        used = slots * weight_bytes + row_bytes + norm_bytes + scratch + barriers
        assert used <= SHARED_MEMORY
        assert used + weight_bytes > SHARED_MEMORY - 4096
        assert slots >= 4  # two pairs: one under way, one being read


class Copies:
    """Runs the weights' part of a program at a time; notes what it copies and tells of tiles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
        self.places: list[tuple[str, list[int]]] = []
        self.tiles: list[int] = []
        self.tickets = self.program = 0
        parts = "_stream_tile _stream_tickets _stream_weights weights_part"
        for name in f"empty_slot full_pair of_pair _wait_for_pair {parts}".split():
            monkeypatch.setattr(stream_copies, name, getattr(stream_copies, name).fn)
        nothing = SimpleNamespace(wait=lambda *_: None, expect=lambda *_: None,
                                  arrive=lambda *_, **__: None)  # fmt: skip
        monkeypatch.setattr(stream_copies, "mbarrier", nothing)
        monkeypatch.setattr(stream_copies, "thread_barrier", lambda: None)
        copy = SimpleNamespace(async_copy_global_to_shared=self.copy)
        monkeypatch.setattr(stream_copies, "tma", copy)
        language = SimpleNamespace(
            constexpr=lambda x: x, int32=torch.int32, maximum=max, BlockedLayout=lambda *_: None,
            program_id=lambda _: self.program, num_programs=lambda _: programs,
            atomic_add=self.draw, full=lambda shape, value, *_: value,
        )  # fmt: skip
        monkeypatch.setattr(stream_copies, "gl", language)

    def index(self, slot: int) -> "Copies":
        return self

    def store(self, tile: int) -> None:
        self.tiles.append(int(tile))

    def __add__(self, counter: int) -> "Copies":
        return self

    def draw(self, *_: object, **__: object) -> torch.Tensor:
        self.tickets += 1
        return torch.tensor(self.tickets - 1)

    def copy(self, weight: SimpleNamespace, place: list[int], *_: object) -> None:
        self.places.append((weight.name, [int(i) for i in place]))


SIZES = dict(D=1024, F=2048, H=8, G=2, HALF=64)


@pytest.mark.parametrize("programs", [1, 7, 132, 300])
def test_every_weight_is_copied_once_and_in_the_order_of_its_use(programs, monkeypatch) -> None:
    D, F, H, G, HALF = SIZES.values()
    shapes = {  # outputs, inputs, how far the second eight rows of a tile lie from the first
        "o": (D, 2 * H * HALF, 8),
        "gate_up": (2 * F, D, F),
        "down": (D, F, 8),
        "qkv": ((H + 2 * G) * 2 * HALF, D, HALF),
    }
    copies = Copies(monkeypatch, programs)
    block = SimpleNamespace(nbytes=0)
    tensors = [SimpleNamespace(name=name, block_type=block) for name in shapes]
    copied: dict[str, list[torch.Tensor]] = {name: [] for name in shapes}
    ids = {name: torch.arange(N * K, dtype=torch.int32).view(N, K) for name, (N, K, _) in
           shapes.items()}  # fmt: skip
    views = {}
    for name, (_, _, pairs) in shapes.items():
        tiles = weight_stream._tiles_of(ids[name].to(torch.bfloat16), pairs)
        assert tiles.block_shape == [8, 2, 8, 64]
        views[name] = ids[name].as_strided(tiles.shape, tiles.strides)
    for copies.program in [*range(programs)] * 2:  # a second launch draws on from the same counter
        copies.places.clear()
        stream_copies.weights_part(
            *tensors, (copies, copies, copies, 9), copies, copies, copies, **SIZES, FIRST=0, LAST=3,
        )  # fmt: skip
        order = [list(shapes).index(name) for name, _ in copies.places]
        assert order == sorted(order)
        for name, group in itertools.groupby(copies.places, key=lambda place: place[0]):
            N, K, pairs = shapes[name]
            of_tile = K // 512
            places = [place for _, place in group]
            assert len(places) % of_tile == 0
            for i, (a, b, line, c) in enumerate(places):
                assert (a, b, c) == (i % of_tile * 8, 0, 0)  # left to right, slab 0 first
                slot = views[name][a : a + 8, :, line : line + 8].reshape(8, 16, 64)
                first = int(slot[0, 0, 0]) // K
                rows = torch.cat([torch.arange(8), torch.arange(8) + pairs]) + first
                expected = ids[name][rows, a * 64 : a * 64 + 512].view(16, 8, 64)
                assert torch.equal(slot, expected.transpose(0, 1))
                copied[name].append(slot.flatten())
    for name, (N, K, _) in shapes.items():
        counts = torch.bincount(torch.cat(copied[name]), minlength=N * K)
        assert (counts == 2).all()
    # What the products are told: each tile of gate/up once, and each program of its end.
    assert sorted(copies.tiles) == sorted([*range(F // 8), *[F // 8] * programs] * 2)


def elements(layout, warps: int) -> Iterator[tuple[tuple[int, int], tuple[int, ...]]]:
    """((warp, lane), place) of each register, registers in their order."""

    def places(bases: list[list[int]]) -> list[numpy.ndarray]:
        found = [numpy.zeros(len(layout.shape), dtype=int)]
        for basis in bases:
            found += [place ^ numpy.array(basis) for place in found]
        return found

    assert len(places(layout.lane_bases)) == 32 and len(places(layout.warp_bases)) == warps
    for warp, of_warp in enumerate(places(layout.warp_bases)):
        for lane, of_lane in enumerate(places(layout.lane_bases)):
            for register in places(layout.reg_bases):
                yield (warp, lane), tuple(map(int, register ^ of_lane ^ of_warp))


LAYOUTS: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "slabs": (stream_layouts.slabs_layout, (8, 16)),
    "tile": (stream_layouts.tile_layout, (16,)),
    "half": (stream_layouts.half_layout, (8,)),
    "columns": (stream_layouts.columns_layout, (16,)),
}


def threads_of(layout, warps: int = 8) -> dict[tuple[int, int], list[tuple[int, ...]]]:
    threads: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for thread, place in elements(layout, warps):
        threads.setdefault(thread, []).append(place)
    shape = [range(size) for size in layout.shape]
    held = set(itertools.chain.from_iterable(threads.values()))
    assert held == set(itertools.product(*shape))  # every element, and nothing beside
    for places in threads.values():
        assert len(set(places)) == len(places)
    return threads


@pytest.mark.parametrize("R", [8, 16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_summed_lies_in_one_thread(name: str, R: int) -> None:
    make, shape = LAYOUTS[name]
    layout = make(R)
    assert tuple(layout.shape) == (*shape, R)
    for places in threads_of(layout).values():
        rows = {place[-1] for place in places}
        assert len(rows) == 1
        if name == "slabs":  # all slabs of an output and of what meets it in a pair
            outputs = {place[1] for place in places}
            assert len(outputs) == 2 and max(outputs) - min(outputs) == 8
            assert len(places) == 16
        elif name == "tile":
            outputs = sorted(place[0] for place in places)
            assert len(outputs) == 2 and outputs[1] - outputs[0] == 8
        elif name == "columns":
            assert len(places) == 16


@pytest.mark.parametrize("R", [8, 16])
def test_rows_are_copied_16_bytes_a_thread_and_128_a_row(R: int) -> None:
    layout = stream_layouts.inputs_layout(R)
    threads = threads_of(layout, warps=2)
    copies: dict[tuple[int, int], set] = {}
    for (warp, _), places in threads.items():
        for i in range(0, len(places), 8):
            slab, row, column = places[i]
            assert column % 8 == 0
            assert places[i : i + 8] == [(slab, row, column + j) for j in range(8)]
            copies.setdefault((warp, i), set()).add((slab, row))
    assert all(len(lines) == 4 for lines in copies.values())


@pytest.mark.parametrize("R", [8, 16])
@pytest.mark.parametrize("NODES", [32, 64, 128, 256])
def test_nodes_of_a_row_are_summed_in_a_thread_and_then_in_a_thread(R: int, NODES: int) -> None:
    for places in threads_of(stream_layouts.nodes_layout(R, NODES)).values():
        for i in range(0, len(places), NODES // 32):
            row, node = places[i]
            assert places[i : i + NODES // 32] == [(row, node + j) for j in range(NODES // 32)]
    for places in threads_of(stream_layouts.rows_layout(R)).values():
        assert len(places) == 32 and len({row for row, _ in places}) == 1


def tree(values: numpy.ndarray) -> numpy.ndarray:
    """rms_norm's sum of the last axis, padded with zeros to a power of two; fp32."""
    width = 1 << (values.shape[-1] - 1).bit_length()
    padding = [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])]
    values = numpy.pad(values, padding)
    while values.shape[-1] > 1:
        values = values[..., 0::2] + values[..., 1::2]
    return values[..., 0]


@pytest.mark.parametrize("D", [1024, 2048, 3072, 4096])
def test_squares_are_summed_in_the_order_of_rms_norm(D: int, monkeypatch) -> None:
    language = SimpleNamespace(
        static_range=lambda n: range(int(n)),
        reshape=lambda x, shape: x.reshape([int(n) for n in shape]),
        split=lambda x: (x[..., 0], x[..., 1]),
    )
    monkeypatch.setattr(stream_layouts, "gl", language)
    sum_neighbours = stream_layouts.sum_neighbours.fn
    rng = numpy.random.default_rng(D)
    squares = numpy.square(rng.standard_normal((8, D)), dtype=numpy.float32)
    # As the phases call it: a node of 16 columns a tile, nodes in a thread, then the threads'.
    nodes = sum_neighbours(squares.reshape(8, D // 16, 16), 4)
    NODES = 1 << (D // 16 - 1).bit_length()
    nodes = numpy.pad(nodes, [(0, 0), (0, NODES - D // 16)])
    sums = sum_neighbours(nodes.reshape(8, 32, NODES // 32), NODES.bit_length() - 6)
    total = sum_neighbours(sums.reshape(1, 8, 32), 5).reshape(8)
    assert numpy.array_equal(total, tree(squares))
    assert not numpy.array_equal(total, squares.sum(1))  # whose order is another


def test_products_are_in_the_order_of_their_use() -> None:
    o, gate_up, down, qkv = (torch.zeros(1) for _ in range(4))
    weights = StreamWeights(qkv=qkv, down=down, gate_up=gate_up, o=o)
    assert [id(w) for w in weights.products()] == [id(w) for w in (o, gate_up, down, qkv)]
    assert StreamWeights(qkv=qkv).products() == [qkv]


class Launches:
    """In place of the kernel: what it would be launched with, by name."""

    def __init__(self) -> None:
        self.found: list[dict] = []
        self.names = weight_stream._weight_stream_kernel.arg_names

    def __getitem__(self, grid: tuple[int]) -> Callable:
        def launch(*arguments: object, **options: object) -> None:
            self.found.append(dict(zip(self.names, arguments, strict=True)) | options
                              | {"grid": grid})  # fmt: skip

        return launch


@pytest.fixture
def kernel(hopper: None, monkeypatch: pytest.MonkeyPatch) -> Launches:
    launches = Launches()
    monkeypatch.setattr(weight_stream, "_weight_stream_kernel", launches)
    return launches


def launch_alone(weights: StreamWeights, rows: int = 1, *, fused: bool = True) -> None:
    D, F, H, G, K = 1024, 1024, 8, 2, 128
    empty = lambda *shape: torch.empty(shape, dtype=torch.bfloat16)  # noqa: E731
    buffers = StreamBuffers(
        x=empty(64, D), squares=torch.empty(64, D // 16), normed=empty(64, D), gated=empty(64, F),
        attended=empty(64, H * K), q=empty(64, H, K),
        counters=torch.zeros(COUNTERS, dtype=torch.int64),
    )  # fmt: skip
    places = torch.zeros(64, dtype=torch.int32)
    rotary = Rotary(
        cos=torch.empty(64, K // 2), sin=torch.empty(64, K // 2), positions_M=places,
        slots_M=places, rows_per_sequence=1, keys=empty(1, G, 64, K), values=empty(1, G, 64, K),
    )  # fmt: skip
    stream_layer(weights, buffers, rows=rows, rotary=rotary, fused=fused,
                 pdl={"PDL": True, "launch_pdl": True})  # fmt: skip


def test_phases_of_a_launch_must_be_neighbours(kernel: Launches) -> None:
    weight = torch.empty(2048, 1024, dtype=torch.bfloat16)
    for present in itertools.product([False, True], repeat=4):
        names = [n for n, p in zip(("o", "gate_up", "down", "qkv"), present, strict=True) if p]
        weights = StreamWeights(**dict.fromkeys(names, weight))
        if names and "".join(map(str, map(int, present))).strip("0").count("0") == 0:
            launch_alone(weights)
            launch = kernel.found.pop()
            first, last = present.index(True), 3 - present[::-1].index(True)
            assert (launch["FIRST"], launch["LAST"]) == (first, last)
        elif names:
            with pytest.raises(AssertionError, match="neighbours"):
                launch_alone(weights)


def test_normalised_rows_of_two_norms_have_no_buffer(kernel: Launches) -> None:
    weight = torch.empty(2048, 1024, dtype=torch.bfloat16)
    weights = StreamWeights(gate_up=weight, down=weight, qkv=weight)
    launch_alone(weights)
    with pytest.raises(AssertionError):
        launch_alone(weights, fused=False)


@pytest.mark.parametrize(
    "rows,tiles",
    [
        (1, [1]),
        (8, [8]),
        (9, [9]),
        (16, [16]),
        (17, [16, 1]),
        (40, [16, 16, 8]),
        (58, [16] * 3 + [10]),
    ],
)
def test_each_launch_sees_16_rows_or_the_rest(rows: int, tiles: list[int], kernel) -> None:
    weight = torch.empty(2048, 1024, dtype=torch.bfloat16)
    launch_alone(StreamWeights(o=weight, gate_up=weight), rows=rows)
    assert [launch["M"] for launch in kernel.found] == tiles
    for i, launch in enumerate(kernel.found):
        assert launch["grid"] == (132,) and launch["launch_pdl"]
        assert launch["first_row"] == 16 * i and launch["R"] == (8 if tiles[i] <= 8 else 16)
        assert (launch["SLOTS"], launch["X_SLOTS"]) == ring_slots(1024, tiles[i])
        for name in ("x", "attended", "gated", "normed", "squares", "q", "position", "slot"):
            of_rows = launch[f"{name}_ptr"]
            assert of_rows.storage_offset() == 16 * i * of_rows.stride(0)
        counters = launch["counter_ptr"]
        assert counters is kernel.found[0]["counter_ptr"] and len(counters) == COUNTERS


QKV, O_PROJ, MLP = ("qkv",), ("o",), ("gate_up", "down")


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_launches_every_phase_of_every_layer_in_order(
    rows: int, norm: str, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(WIDE, num_layers=3, windows=())
    model = Transformer(config, device="meta", dtype=torch.bfloat16)
    monkeypatch.setattr(decode_step, "INTERPRETED", True)  # let it be built without a GPU
    monkeypatch.setattr(decode_step, "pdl_options", lambda _: {"PDL": True, "launch_pdl": True})
    monkeypatch.setattr(decode_step, "can_stream", lambda *_: True)
    events: list[tuple] = []

    def note_attention(out, q, keys, *_: object, rows: int, eager: bool, **__: object) -> None:
        assert eager
        events.append(("attend", id(keys)))

    def note_stream(weights: StreamWeights, buffers, *, rotary, fused: bool, pdl, **options: int):
        assert options == dict(rows=rows) and fused == (norm == "fused") and pdl["launch_pdl"]
        assert rotary.rows_per_sequence == rows
        keys = id(rotary.keys) if weights.qkv is not None else None
        events.append((*(id(w) for w in weights.products()), keys))

    def note_norm(x, weight, eps: float, *, inference_mode: bool):
        assert len(x) == rows and inference_mode == (norm == "inference")
        events.append(("norm", id(weight)))
        return x, None

    for name in ("embed", "choose", "project"):
        monkeypatch.setattr(decode_step, name, lambda *_, **__: None)
    monkeypatch.setattr(decode_step, "decode_attention", note_attention)
    monkeypatch.setattr(streamed_layers, "stream_layer", note_stream)
    monkeypatch.setattr(streamed_layers, "rms_norm_forward", note_norm)
    monkeypatch.setattr(decode_step, "rms_norm_forward", lambda x, *_, **__: (x, None))
    cache = KVCache(config, capacity=64, device="meta", dtype=torch.bfloat16)
    step = DecodeStep(model, cache, rows=40, norm=norm)
    expected: list[tuple] = []

    def phases(layer: int, names: tuple[str, ...]) -> None:
        layers = model.model.layers
        attention = layers[layer].self_attn
        weights = {"o": attention.o_proj, "gate_up": layers[layer].mlp.gate_up_proj,
                   "down": layers[layer].mlp.down_proj}  # fmt: skip
        keys = None
        if "qkv" in names:
            where = layer + 1
            weights["qkv"] = layers[where].self_attn.qkv_proj
            keys = id(cache.keys[where])
        expected.append((*(id(weights[name].weight) for name in names), keys))

    def normalize(layer: int, name: str) -> None:
        if norm != "fused":
            expected.append(("norm", id(getattr(model.model.layers[layer], name).weight)))

    normalize(0, "input_layernorm")
    phases(-1, QKV)
    for layer in range(3):
        expected.append(("attend", id(cache.keys[layer])))
        after = QKV if layer < 2 else ()
        if norm == "fused":
            phases(layer, O_PROJ + MLP + after)
            continue
        phases(layer, O_PROJ)
        normalize(layer, "post_attention_layernorm")
        phases(layer, MLP)
        if after:
            normalize(layer + 1, "input_layernorm")
            phases(layer, QKV)
    step.launch(rows, 2)
    assert events == expected

"""The weight stream on Hopper: its definition in float64, a row's bits, order, whole models.

Legend: M rows, K inputs, N outputs, F feed-forward width, D hidden size, H query heads, G key/value
heads, S cache slots, B sequences, T rows of each. Programs of this kernel wait for each other, so a
mistake in it may hang: the file ends its process after two minutes.
"""

import faulthandler
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from fake_model import ScriptedDrafter
from torch import Tensor
from torch.nn.functional import silu
from triton import knobs

from draftnorm import SamplingConfig, generate, speculate
from draftnorm.kernels.compilation import compile_kernels
from draftnorm.kernels.decode_norm import pdl_options
from draftnorm.kernels.projection import Rotary
from draftnorm.kernels.rms_norm import rms_norm_forward
from draftnorm.kernels.weight_stream import (
    StreamBuffers,
    StreamWeights,
    stream_layer,
    stream_layer_reference,
)
from draftnorm.model import streamed_layers
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.decode_step import NORMS, DecodeStep
from draftnorm.model.transformer import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a GPU of compute capability 9",
    ),
]

BF16, FP16 = torch.bfloat16, torch.float16
EPS = 1e-5
UNTOUCHED = 7.0
SEQUENCES, CAPACITY, CONTEXT = 3, 64, 500  # of a cache, and positions that rotary has
ALL_ROWS = 64
LADDER = [*range(1, 18), 31, 33, 64]


@pytest.fixture(autouse=True, scope="module")
def watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        stderr = os.dup(2)
    faulthandler.dump_traceback_later(120, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(stderr)


@dataclass(frozen=True)
class Shape:
    D: int
    F: int
    H: int
    G: int
    K: int
    dtype: torch.dtype = BF16


SHAPES = {
    # More rows of `down` than its ring holds: fetched again for each tile.
    "long": Shape(1024, 5120, 16, 4, 64),
    # Attention wider than the residual stream, and one key/value head.
    "wide": Shape(1024, 2048, 16, 1, 128),
    # The ring holds 8 rows of `down`, not 16; fp16; no grouping.
    "half": Shape(2048, 3072, 16, 16, 128, FP16),
}
O_PROJ, MLP, QKV = ("o",), ("norm", "gate_up", "down"), ("next_norm", "qkv")
PHASES = {
    "o": O_PROJ, "gate_up": MLP[:2], "down": MLP[2:], "qkv": QKV, "layer": O_PROJ + MLP + QKV,
}  # fmt: skip


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def make_weights(shape: Shape) -> StreamWeights:
    D, F, H, G, K = shape.D, shape.F, shape.H, shape.G, shape.K

    def weight(seed: int, N: int, inputs: int) -> Tensor:
        return random(N, inputs, seed=seed, dtype=torch.float32).mul(inputs**-0.5).to(shape.dtype)

    def norm(seed: int) -> tuple[Tensor, float]:
        return random(D, seed=seed, dtype=torch.float32).mul(0.2).add(1).to(shape.dtype), EPS

    return StreamWeights(
        o=weight(1, D, H * K), norm=norm(2), gate_up=weight(3, 2 * F, D), down=weight(4, D, F),
        next_norm=norm(5), qkv=weight(6, (H + 2 * G) * K, D),
    )  # fmt: skip


def sums_of_squares(x: Tensor) -> Tensor:
    """Of each 16 columns, neighbours first, as `rms_norm` sums."""
    sums = x.float().square()
    for _ in range(4):
        sums = sums[:, 0::2] + sums[:, 1::2]
    return sums


class Run:
    """Rows of x and of attention's result through some phases, all other memory marked."""

    def __init__(self, shape: Shape, weights: StreamWeights, x: Tensor, attended: Tensor,
                 gated: Tensor, *, T: int = 1, places: Tensor | None = None,
                 pdl: bool = True) -> None:  # fmt: skip
        M, (D, F, H, G, K) = len(x), (shape.D, shape.F, shape.H, shape.G, shape.K)
        self.weights, self.rows, self.T = weights, M, T
        self.pdl = pdl_options(x.device) if pdl else {"PDL": False}
        room = -(-M // 16) * 16

        def marked(*sizes: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.full((room, *sizes), UNTOUCHED, dtype=dtype, device="cuda")

        self.buffers = StreamBuffers(
            x=marked(D), squares=marked(D // 16, dtype=torch.float32), normed=marked(D),
            gated=marked(F), attended=marked(H * K), q=marked(H, K),
            counters=torch.zeros(3, 8, dtype=torch.int32, device="cuda"),
        )  # fmt: skip
        self.buffers.x[:M], self.buffers.attended[:M] = x, attended
        self.buffers.gated[:M] = gated
        self.buffers.squares[:M] = sums_of_squares(x)
        places = torch.arange(M, device="cuda") if places is None else places
        angles = random(CONTEXT, K // 2, seed=9, dtype=torch.float32)
        B = max(-(-M // T), SEQUENCES)
        size = (2, B, G, max(CAPACITY, M), K)
        cache = torch.full(size, UNTOUCHED, dtype=shape.dtype, device="cuda")
        self.rotary = Rotary(
            cos=angles.cos(), sin=angles.sin(), positions_M=(places * 7 % CONTEXT).int(),
            slots_M=places.int(), rows_per_sequence=T, keys=cache[0], values=cache[1],
        )  # fmt: skip

    def launch(self, phases: tuple[str, ...], index: int = 0, *, fused: bool = True) -> "Run":
        chosen = StreamWeights(**{name: getattr(self.weights, name) for name in phases})
        for first_row in range(0, self.rows, 16):
            rows = min(16, self.rows - first_row)
            stream_layer(self.buffers.x, chosen, self.buffers, rows=rows, first_row=first_row,
                         index=index, rotary=self.rotary, fused=fused, pdl=self.pdl)  # fmt: skip
            index += 1
        return self

    def kv(self) -> Tensor:
        """What each row has put into the cache, [2, M, G, K]."""
        sequence = torch.arange(self.rows, device="cuda") // self.T
        slots = self.rotary.slots_M.long()
        caches = torch.stack([self.rotary.keys, self.rotary.values])
        return caches[:, sequence, :, slots].transpose(0, 1)

    def outputs(self) -> list[Tensor]:
        """Per row: x, its sums of squares, gated, q, and keys and values."""
        buffers, M = self.buffers, self.rows
        wholes = buffers.x, buffers.squares, buffers.gated, buffers.q
        return [*(whole[:M] for whole in wholes), *self.kv()]


def inputs(shape: Shape, M: int) -> tuple[Tensor, Tensor, Tensor]:
    widths = shape.D, shape.H * shape.K, shape.F
    return tuple(
        random(ALL_ROWS, width, seed=20 + width, dtype=shape.dtype)[:M] for width in widths
    )


@pytest.fixture(scope="module")
def compiled() -> dict[str, StreamWeights]:
    """Weights of all shapes; their kernels are compiled side by side."""
    weights = {name: make_weights(shape) for name, shape in SHAPES.items()}

    def launch_all() -> None:
        for name, shape in SHAPES.items():
            for M in (8, 16):
                run = Run(shape, weights[name], *inputs(shape, M))
                for phases in PHASES.values() if name == "long" else (PHASES["layer"],):
                    run.launch(phases)
                if name == "long":
                    for phases in (O_PROJ, MLP[1:], QKV):
                        run.launch(phases, fused=False)

    compile_kernels(launch_all)
    torch.cuda.synchronize()
    return weights


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x Wᵀ in float64, and how far fp32 sums in the kernel's order may lie from it.

    A sum of K products is K / 256 instructions on each of 16 accumulators, in each 16 products, and
    then 5 additions; tensor cores cut where others round, so each may be off by 2⁻²³.
    """
    x, weight = x.double(), weight.double()
    depth = x.shape[1] / 256 + 16 + 5
    return x @ weight.T, depth * 2**-23 * (x.abs() @ weight.abs().T)


def assert_within(actual: Tensor, expected: Tensor, error: Tensor) -> None:
    """Up to `error` off before a last operation in fp32, then rounded to its dtype.

    2⁻²⁵ is half of fp16's least number.
    """
    bound = error + (rounding(actual.dtype) + 2**-24) * (expected.abs() + error) + 2**-25
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("M", [1, 5, 8, 9, 16, 40])
def test_each_phase_is_its_definition(compiled, M: int) -> None:
    shape, weights = SHAPES["long"], compiled["long"]
    H, G, K = shape.H, shape.G, shape.K
    x, attended, gated = inputs(shape, M)

    def run(phases: str) -> Run:
        return Run(shape, weights, x, attended, gated).launch(PHASES[phases])

    for phase, rows, weight in (("o", attended, weights.o), ("down", gated, weights.down)):
        buffers = run(phase).buffers
        expected, error = product(rows, weight)
        assert_within(buffers.x[:M], x.double() + expected, error)
        exact = buffers.x[:M].double().square().view(M, -1, 16).sum(-1)
        assert ((buffers.squares[:M] - exact).abs() <= 16 * 2**-24 * exact).all()

    normed, _ = rms_norm_forward(x, *weights.norm, inference_mode=True)
    both, errors = product(normed, weights.gate_up)
    (gate, up), (gate_error, up_error) = both.chunk(2, 1), errors.chunk(2, 1)
    # silu is at most 1.1 times as steep as its argument; exp and division: some 2⁻²¹.
    error = 1.1 * gate_error * (up.abs() + up_error) + silu(gate).abs() * up_error
    expected = silu(gate) * up
    assert_within(run("gate_up").buffers.gated[:M], expected, error + 2**-20 * expected.abs())

    normed, _ = rms_norm_forward(x, *weights.next_norm, inference_mode=True)
    heads, error = (y.view(M, -1, 2, K // 2) for y in product(normed, weights.qkv))
    turned = run("qkv")
    at = turned.rotary.positions_M.long()
    cos, sin = (t[at].double()[:, None] for t in (turned.rotary.cos, turned.rotary.sin))
    low, high = heads.unbind(2)
    rotated = torch.stack([low * cos - high * sin, high * cos + low * sin], 2)
    # Each half of a turned head is a sum of both, times at most 1, in two roundings.
    error = error.sum(2, keepdim=True) + 2**-23 * heads.abs().sum(2, keepdim=True)
    q, k, v = rotated[:, :H], rotated[:, H : H + G], heads[:, H + G :]
    actual = turned.buffers.q[:M], *turned.kv()
    for ours, expected, bound in zip(
        actual, (q, k, v), error.expand_as(heads).split([H, G, G], 1), strict=True
    ):
        assert_within(ours.flatten(2), expected.flatten(2), bound.flatten(2))


@pytest.mark.parametrize("M", [1, 5, 8, 9, 16, 40])
@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_is_its_definition(compiled, name: str, M: int) -> None:
    shape, weights = SHAPES[name], compiled[name]
    x, attended, gated = inputs(shape, M)
    T = 5 if M % 5 == 0 else 1
    run = Run(shape, weights, x, attended, torch.full_like(gated, torch.nan), T=T)
    run.launch(PHASES["layer"], index=1)
    wide = {
        key: (getattr(weights, key)[0].double(), EPS)
        if "norm" in key
        else getattr(weights, key).double()
        for key in PHASES["layer"]
    }
    x, qkv = stream_layer_reference(x.double(), attended.double(), StreamWeights(**wide))
    # Lengths of rows: one rounding after o, two in a norm, one of gated, whose two factors both
    # carry the three before (silu's slope is 1.1), one after down; for qkv two more and its own.
    assert relative(run.buffers.x[:M], x) < 9 * rounding(shape.dtype)
    q = run.buffers.q[:M].double()
    heads = torch.cat([q, run.kv()[0].double()], 1).square()
    turned = qkv.view(M, -1, 2, shape.K // 2)[:, : shape.H + shape.G].square()
    # Turning keeps the length of each pair.
    pairs = heads.view(M, shape.H + shape.G, 2, -1).sum(2).sqrt()
    assert relative(pairs.flatten(1), turned.sum(2).sqrt().flatten(1)) < 12 * rounding(shape.dtype)
    values = qkv[:, -shape.G * shape.K :]
    assert relative(run.kv()[1].flatten(1), values) < 12 * rounding(shape.dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row, in length."""
    return ((actual.double() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


@pytest.mark.parametrize("T,M", [(1, 3), (5, 15), (13, 39)])
def test_keys_and_values_go_where_they_belong_and_nothing_else_is_written(compiled, T, M) -> None:
    shape, weights = SHAPES["long"], compiled["long"]
    # Slots of a sequence in no order, as branches of a tree have them.
    generator = torch.Generator().manual_seed(T)
    slots = [torch.randperm(CAPACITY, generator=generator)[:T] for _ in range(M // T)]
    run = Run(shape, weights, *inputs(shape, M), T=T, places=torch.cat(slots).cuda())
    run.launch(PHASES["layer"], index=1)
    straight = Run(shape, weights, *inputs(shape, M), places=torch.cat(slots).cuda())
    straight.launch(PHASES["layer"], index=1)
    assert torch.equal(run.kv(), straight.kv())
    assert not (run.kv() == UNTOUCHED).all(-1).any()
    sequences = torch.arange(M, device="cuda") // T
    for cache in (run.rotary.keys, run.rotary.values):
        cache[sequences, :, run.rotary.slots_M.long()] = UNTOUCHED
        assert (cache == UNTOUCHED).all()
    buffers = run.buffers
    for rows in (buffers.x, buffers.squares, buffers.gated, buffers.q):
        assert (rows[M:] == UNTOUCHED).all()
    assert (buffers.normed == UNTOUCHED).all()


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_has_the_same_bits_in_any_company(compiled, name: str) -> None:
    shape, weights = SHAPES[name], compiled[name]
    everything = inputs(shape, ALL_ROWS)
    places = torch.arange(ALL_ROWS, device="cuda")
    expected = Run(shape, weights, *everything).launch(PHASES["layer"], index=1).outputs()
    assert not any(output.isnan().any() for output in expected)
    for M in LADDER:
        for first in {0, ALL_ROWS - M, min(7, ALL_ROWS - M)}:
            rows = slice(first, first + M)
            run = Run(shape, weights, *(x[rows] for x in everything), places=places[rows])
            run.launch(PHASES["layer"], index=1)
            for ours, theirs in zip(run.outputs(), expected, strict=True):
                assert torch.equal(ours, theirs[rows]), (M, first)


@pytest.mark.parametrize("M", [1, 16, 33])
def test_pieces_of_a_layer_have_the_bits_of_the_whole(compiled, M: int) -> None:
    """As do the lower rungs of the ladder, where another kernel normalises."""
    shape, weights = SHAPES["long"], compiled["long"]
    x, attended, gated = inputs(shape, M)
    expected = Run(shape, weights, x, attended, gated).launch(PHASES["layer"], index=1).outputs()
    for pdl in (True, False):
        run = Run(shape, weights, x, attended, gated, pdl=pdl)
        run.buffers.counters.fill_(99)
        run.launch(QKV)  # which needs no counters, and zeroes those of the next
        tiles = index = -(-M // 16)
        for phases, norm in ((O_PROJ, None), (MLP[1:], weights.norm), (QKV, weights.next_norm)):
            if norm:
                normed, _ = rms_norm_forward(run.buffers.x[:M], *norm, inference_mode=True)
                run.buffers.normed[:M] = normed
            run.launch(phases, index, fused=False)
            index += tiles
        for ours, theirs in zip(run.outputs(), expected, strict=True):
            assert torch.equal(ours, theirs)


MODEL = dict(
    vocab_size=1000, hidden_size=1024, intermediate_size=5120, num_layers=2, num_heads=16,
    num_kv_heads=4, head_size=64, context=2048, initializer_range=0.06,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def narrow_layers_may() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed_layers, "LEAST_WIDTH", 1024)
        yield


@pytest.fixture(scope="module", params=["full", "window"])
def model(request: pytest.FixtureRequest) -> Transformer:
    windows = {"full": (), "window": (None, 100)}[request.param]
    config = ModelConfig(**MODEL, windows=windows)
    model = Transformer(config, device="cuda", dtype=BF16).init_weights(seed=1)
    for norm in NORMS:  # compile all that the tests launch, side by side
        step = DecodeStep(model, new_cache(model), rows=40, norm=norm)
        step.prepare([1, 5, 40], [1], range(1, 2))
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 1000, (1200,), generator=torch.Generator().manual_seed(2)).cuda()


def new_cache(model: Transformer, batch: int = 1) -> KVCache:
    return KVCache(model.config, batch=batch, capacity=1200, device="cuda", dtype=BF16)


# Across the borders of attention's splits: the first at 128, at 1,024 they grow.
@pytest.mark.parametrize("start,end", [(100, 164), (1000, 1064)])
def test_verify_rows_are_decode_rows_and_leave_the_same_cache(model, tokens, start, end) -> None:
    cache = new_cache(model)
    model.prefill(tokens[:start], cache)
    step = DecodeStep(model, cache, rows=33)
    assert step.streamed_layers
    alone = [step.forward(tokens[None, t : t + 1])[0].clone() for t in range(start, end)]
    alone = torch.cat(alone)
    layers = [layer[:, :, :end].clone() for layer in cache.keys + cache.values]
    runs = [dict(T=T) for T in (2, 5, 8, 9, 16, 33)]
    runs += [dict(T=5, pdl=False), dict(T=1, norm="inference"), dict(T=3, norm="train")]
    for options in runs:
        cache.rollback(start)
        T = options.pop("T")
        step = DecodeStep(model, cache, rows=33, **options)
        for t in range(start, end + 1 - T, T):
            assert torch.equal(step.forward(tokens[None, t : t + T])[0], alone[t - start :][:T])
        length = cache.lengths[0]
        for ours, expected in zip(cache.keys + cache.values, layers, strict=True):
            assert torch.equal(ours[:, :, start:length], expected[:, :, start:length])
    # The readable way rounds to bf16 at the same places and a few more, sums in another order.
    cache.rollback(start)
    readable = torch.cat([model.decode(tokens[None, t : t + 16], cache)[0]
                          for t in range(start, end, 16)])  # fmt: skip
    assert relative(alone, readable.double()) < 0.02


def test_the_three_rungs_have_equal_bits_at_any_number_of_rows(model, tokens) -> None:
    for T in (1, 8, 20):
        logits = []
        for norm in NORMS:
            cache = new_cache(model)
            model.prefill(tokens[:90], cache)
            logits.append(DecodeStep(model, cache, rows=20, norm=norm).forward(tokens[None, :T]))
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_a_sequence_of_a_batch_has_the_bits_it_has_alone(model, tokens) -> None:
    starts, blocks = (5, 120), tokens[600:720].view(2, 3, 20)
    together = new_cache(model, batch=2)
    caches = [new_cache(model) for _ in starts]
    for b, start in enumerate(starts):
        model.prefill(tokens[:start], together, sequence=b)
        model.prefill(tokens[:start], caches[b])
    both = DecodeStep(model, together, rows=40)
    steps = [DecodeStep(model, cache, rows=40) for cache in caches]
    for i, T in enumerate((20, 5, 1)):  # 40 rows: the second sequence begins within a tile
        logits = both.forward(blocks[:, i, :T])
        for b, step in enumerate(steps):
            assert torch.equal(step.forward(blocks[b : b + 1, i, :T])[0], logits[b])


def test_a_stream_is_forward_steps_and_so_are_two_streams_in_turns(model, tokens) -> None:
    expected = []
    cache = new_cache(model)
    model.prefill(tokens[:100], cache)
    step, token = DecodeStep(model, cache), torch.tensor([[7]])
    for _ in range(60):
        token = step.forward(token).argmax(-1)
        expected.append(int(token))
    cache.rollback(100)
    assert list(step.stream([7], 60)) == expected
    # Two at once, each on a stream of its own, must neither hang nor differ.
    others = []
    for _ in range(2):
        cache = new_cache(model)
        model.prefill(tokens[:100], cache)
        step = DecodeStep(model, cache)
        step._graph(1, step._tier(161), plain=True)
        others.append((torch.cuda.Stream(), step.stream([7], 60)))
    torch.cuda.synchronize()
    found: list[list[int]] = [[], []]
    for _ in range(60):
        for output, (stream, steps) in zip(found, others, strict=True):
            with torch.cuda.stream(stream):
                output.append(next(steps))
    torch.cuda.synchronize()
    assert found == [expected, expected]


def test_dependent_launch_is_ordered_over_many_replays(model, tokens) -> None:
    """Each replay's logits, keys and values of the last rows are compared on the device."""
    runs = []
    for pdl in (True, False):
        cache = new_cache(model)
        model.prefill(tokens[:100], cache)
        step = DecodeStep(model, cache, rows=40, pdl=pdl)
        for T, replays in ((1, 5000), (5, 2000), (40, 500)):
            first = step.forward(tokens[None, 100 : 100 + T])[0].clone()
            tier, places = step._tier(100 + T), slice(100, 100 + T)
            layers = cache.keys + cache.values
            written = [layer[:, :, places].clone() for layer in layers]
            differ = torch.zeros((), dtype=torch.bool, device="cuda")
            with torch.inference_mode():
                for i in range(replays):
                    step._run(T, tier, plain=False)
                    if i % 8 == 7:  # seven of eight follow each other closely
                        differ |= (step.logits[:T] != first).any()
                        for layer, expected in zip(layers, written, strict=True):
                            differ |= (layer[:, :, places] != expected).any()
            assert not differ
            runs.append(first)
            cache.rollback(100)
    half = len(runs) // 2
    for with_pdl, without in zip(runs[:half], runs[half:], strict=True):
        assert torch.equal(with_pdl, without)
    assert all(torch.equal(few[0], many[0]) for few, many in pairwise(runs[:half]))


def half_right(output: Sequence[int]) -> ScriptedDrafter:
    """Knows what comes, and says something else every third time."""
    start = 3

    def guess(tokens: list[int], length: int) -> list[int]:
        known = output[len(tokens) - start :][:length]
        return [t if (i + len(tokens)) % 3 else (t + 1) % 1000 for i, t in enumerate(known)]

    return ScriptedDrafter(guess)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_speculation_changes_no_token(model, temperature: float) -> None:
    options = dict(
        max_new_tokens=150, ignore_eos=True, sampling=SamplingConfig(temperature=temperature)
    )
    plain = generate(model, None, [5, 6, 7], **options)
    expected = plain.result().token_ids  # crosses the first border of attention's splits
    assert plain.decoder.engine.streamed_layers
    for length in (2, 4, 15):
        for draft in ("ngram", half_right(expected)):
            run = speculate(model, None, [5, 6, 7], draft=draft, draft_length=length, **options)
            result = run.result()
            assert result.token_ids == expected
            if draft != "ngram":
                assert 0 < result.speculation.accepted < result.speculation.drafted


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("draft", [None, "ngram"])
def test_after_the_first_token_nothing_is_compiled_and_nothing_allocated(
    model, draft, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(
        max_new_tokens=300, ignore_eos=True, sampling=SamplingConfig(temperature=temperature)
    )
    if draft:
        run = speculate(model, None, [5, 6, 7], draft=draft, **options)
    else:
        run = generate(model, None, [5, 6, 7], **options)
    next(run)
    graphs = len(run.decoder.engine.graphs)
    late: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda *, repr, **_: late.append(repr))
    for _ in run:
        if len(run._transcript.output) >= 100:
            break
    before = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]
    assert len(list(run)) > 0
    assert late == []
    assert len(run.decoder.engine.graphs) == graphs
    after = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]
    assert after == before

"""The weight stream on Hopper: its definition in float64, a row's bits, order, whole models.

Legend: M rows, T rows of a sequence. Programs of this kernel wait for each other, so a mistake in
it may hang: the file ends its process after two minutes.
"""

import faulthandler
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from fake_model import ScriptedDrafter
from steady import check_nothing_is_compiled_and_nothing_allocated, plain_tokens
from stream_support import (
    ALL_ROWS,
    BF16,
    MLP,
    O_PROJ,
    PHASES,
    QKV,
    SHAPES,
    Run,
    check_each_phase,
    check_layer,
    check_pieces,
    check_places,
    inputs,
    make_weights,
    relative,
)
from torch import Tensor

from draftnorm import SamplingConfig, generate, speculate
from draftnorm.kernels.compilation import compile_kernels
from draftnorm.kernels.weight_stream import StreamWeights
from draftnorm.model import streamed_layers
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.decode_run import DecodeRun
from draftnorm.model.decode_step import NORMS, DecodeStep
from draftnorm.model.transformer import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a GPU of compute capability 9",
    ),
]

LADDER = [*range(1, 18), 31, 33, 64]


@pytest.fixture(autouse=True, scope="module")
def watchdog(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Ends the process where a kernel waits for ever: `arm` gives a test two minutes from now."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        stderr = os.dup(2)

    def arm() -> None:
        faulthandler.dump_traceback_later(120, exit=True, file=stderr)

    arm()  # the module's own fixtures launch, too
    yield arm
    faulthandler.cancel_dump_traceback_later()
    os.close(stderr)


@pytest.fixture(autouse=True)
def two_minutes(watchdog: Callable[[], None]) -> None:
    watchdog()


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


@pytest.mark.parametrize("M", [1, 5, 8, 9, 16, 40])
def test_each_phase_is_its_definition(compiled, M: int) -> None:
    check_each_phase(SHAPES["long"], compiled["long"], M)


@pytest.mark.parametrize("M", [1, 5, 8, 9, 16, 40])
@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_is_its_definition(compiled, name: str, M: int) -> None:
    check_layer(SHAPES[name], compiled[name], M)


@pytest.mark.parametrize("T,M", [(1, 3), (5, 15), (13, 39)])
def test_keys_and_values_go_where_they_belong_and_nothing_else_is_written(compiled, T, M) -> None:
    check_places(SHAPES["long"], compiled["long"], T, M)


@pytest.mark.parametrize("M", [1, 16, 33])
def test_pieces_of_a_layer_have_the_bits_of_the_whole(compiled, M: int) -> None:
    check_pieces(SHAPES["long"], compiled["long"], M)


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_has_the_same_bits_in_any_company(compiled, name: str) -> None:
    shape, weights = SHAPES[name], compiled[name]
    everything = inputs(shape, ALL_ROWS)
    places = torch.arange(ALL_ROWS, device="cuda")
    expected = Run(shape, weights, *everything).launch(PHASES["layer"]).outputs()
    assert not any(output.isnan().any() for output in expected)
    for M in LADDER:
        for first in {0, ALL_ROWS - M, min(7, ALL_ROWS - M)}:
            rows = slice(first, first + M)
            run = Run(shape, weights, *(x[rows] for x in everything), places=places[rows])
            run.launch(PHASES["layer"])
            for ours, theirs in zip(run.outputs(), expected, strict=True):
                assert torch.equal(ours, theirs[rows]), (M, first)


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
        shapes = [(1, "asked"), (5, "asked"), (40, "asked"), (1, "cycle")]
        step.prepare(shapes, range(1, 2))
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
    # The readable way rounds to bf16 at the same places and a few more, sums in another order. On a
    # CPU, bf16, its worst row here is 0.025 off fp32: two ways may be twice that apart.
    cache.rollback(start)
    readable = torch.cat([model.decode(tokens[None, t : t + 16], cache)[0]
                          for t in range(start, end, 16)])  # fmt: skip
    assert relative(alone, readable.double()) < 0.05


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
    assert plain_tokens(step, 7, 60) == expected
    # Two at once, each on a stream of its own, must neither hang nor differ.
    others = []
    for _ in range(2):
        cache = new_cache(model)
        step = DecodeStep(model, cache)
        step.prepare([(1, "cycle")], range(100, 162))  # captures write to the first positions
        model.prefill(tokens[:100], cache)
        others.append((torch.cuda.Stream(), DecodeRun(step).cycles([7], 60)))
    torch.cuda.synchronize()
    found: list[list[int]] = [[], []]
    for _ in range(60):
        for output, (stream, steps) in zip(found, others, strict=True):
            with torch.cuda.stream(stream):
                output += next(steps).tokens
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
            places = slice(100, 100 + T)
            layers = cache.keys + cache.values
            written = [layer[:, :, places].clone() for layer in layers]
            differ = torch.zeros((), dtype=torch.bool, device="cuda")
            with torch.inference_mode():
                for i in range(replays):
                    step.run(T, 100 + T, "asked")
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
    """Knows what comes, and says something else every fourth time, out of step with any cycle."""
    start = 3

    def guess(tokens: list[int], length: int) -> list[int]:
        known = output[len(tokens) - start :][:length]
        return [t if (i + len(tokens)) % 4 else (t + 1) % 1000 for i, t in enumerate(known)]

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
    check_nothing_is_compiled_and_nothing_allocated(run, monkeypatch)

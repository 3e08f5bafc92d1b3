"""generate and speculate over DecodeStep, in Triton's interpreter: what a GPU runs, but for graphs.

`open_step` gives a CPU the readable path; here it is told to build a DecodeStep, on CPU tensors.
"""

import dataclasses
import gc
import weakref
from functools import partial

import pytest
import torch
from decode_support import needs_run_time_loops
from fake_model import ScriptedDrafter, fake_tokenizer

from draftnorm.decoding import drafters, generation
from draftnorm.decoding.generation import generate
from draftnorm.decoding.sampling import Sampler, SamplingConfig
from draftnorm.decoding.speculation import speculate
from draftnorm.kernels.cycle import LENGTH
from draftnorm.model import open_step
from draftnorm.model.config import ModelConfig
from draftnorm.model.decode_step import DecodeStep
from draftnorm.model.transformer import Transformer

pytestmark = needs_run_time_loops

PROMPT, NEW = [5, 3, 5, 3, 5], 7


def tiny(seed: int, **fields) -> Transformer:
    config = dict(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2,
        num_kv_heads=1, head_size=8, initializer_range=0.4,
    )  # fmt: skip
    return Transformer(ModelConfig(**config | fields)).init_weights(seed)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[DecodeStep]:
    """The steps that decoders opened, in order."""
    opened: list[DecodeStep] = []

    def opened_step(model, cache, steps, *, lengths, progress, **own) -> DecodeStep:
        opened.append(DecodeStep(model, cache, **own))
        return opened[-1]

    monkeypatch.setattr(generation, "open_step", opened_step)
    monkeypatch.setattr(drafters, "open_step", opened_step)
    return opened


def readable(model: Transformer, **options) -> tuple[tuple[int, ...], list[int]]:
    """Tokens and cache lengths of the CPU's own path."""
    run = generate(model, None, PROMPT, **options)
    return run.result().token_ids, run.decoder.cache.lengths


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_plain_and_speculative_are_the_readable_path(temperature: float, request) -> None:
    target, draft = tiny(1), tiny(2)
    options = dict(max_new_tokens=NEW, sampling=SamplingConfig(temperature=temperature, seed=3))
    expected, lengths = readable(target, **options)
    request.getfixturevalue("steps")
    runs = [generate(target, None, PROMPT, **options)]
    cases = (("ngram", 3), (target, 4), (target, "auto"), (draft, 1), (draft, "auto"))
    for drafter, length in cases:
        runs.append(speculate(target, None, PROMPT, draft=drafter, draft_length=length, **options))
    for run in runs:
        assert run.result().token_ids == expected
        assert run.decoder.cache.lengths == lengths
    for run in runs[2:4]:  # its own drafts are always right, and none is thrown away unseen
        assert run.result().speculation.acceptance_rate == 1.0


def test_a_drafter_of_ones_own_is_driven_by_the_host(request) -> None:
    target, options = tiny(1), dict(max_new_tokens=9)
    expected, lengths = readable(target, **options)
    steps = request.getfixturevalue("steps")
    drafter = ScriptedDrafter(lambda tokens, n: list(expected[len(tokens) - len(PROMPT) :][:n]))
    run = speculate(target, None, PROMPT, draft=drafter, draft_length=3, **options)
    assert run.result().token_ids == expected
    assert run.decoder.cache.lengths == lengths
    assert run.result().speculation.acceptance_rate == 1.0
    plain = speculate(target, None, PROMPT, draft=ScriptedDrafter(lambda *_: []), **options)
    assert plain.result().token_ids == expected
    assert steps[1].under_way is False


def test_a_draft_that_cannot_read_a_token_is_asked_no_more(request) -> None:
    target, draft = tiny(1, vocab_size=40), tiny(2, vocab_size=33)
    with torch.no_grad():
        target.lm_head.weight[34] *= 3  # padding of the target's, which it says now and then
    options = dict(max_new_tokens=NEW)
    expected, _ = readable(target, **options)
    assert 34 in expected[:-1]
    request.getfixturevalue("steps")
    tokenizer = fake_tokenizer([f"<{i}>" for i in range(32)])
    run = speculate(target, tokenizer, PROMPT, draft=draft, draft_length=2, **options)
    run.decoder._drafter.lost = False
    assert run.result().token_ids == expected
    first = expected.index(34)
    asked = [cycle.asked for cycle in run.decoder._cycles]
    assert asked[0] == 2 and not any(asked[first + 3 :]) and run.decoder._drafter.lost


def test_experts_are_counted_as_on_the_readable_path(request) -> None:
    sparse = dict(architecture="mixtral", num_experts=4, experts_per_token=2, expert_size=16)
    target, draft = tiny(1, **sparse), tiny(2)
    options = dict(max_new_tokens=5, draft=draft, draft_length=2)  # blocks of three: one tile
    expected = speculate(target, None, PROMPT, **options).result()
    request.getfixturevalue("steps")
    result = speculate(target, None, PROMPT, **options).result()
    assert result.token_ids == expected.token_ids
    assert 2 <= result.speculation.experts_per_layer == expected.speculation.experts_per_layer


def test_a_target_and_its_draft_may_decode_in_different_ways(steps, monkeypatch) -> None:
    """A target with fp32 weights, or too large for the kernels' tilings, has a small draft."""
    target, draft = tiny(1), tiny(2, head_size=12)
    monkeypatch.setattr(generation, "open_step", open_step.open_step)
    expected, lengths = readable(target, max_new_tokens=NEW)
    run = speculate(target, None, PROMPT, draft=draft, draft_length=2, max_new_tokens=NEW)
    assert len(steps) == 1 and not isinstance(run.decoder.engine, DecodeStep)
    assert (run.result().token_ids, run.decoder.cache.lengths) == (expected, lengths)
    assert run.result().compile_seconds == 0.0  # the draft's, in the interpreter


def test_what_a_draft_that_cannot_join_needs_is_prepared_too(request, monkeypatch) -> None:
    """One in fp32, or on another device, proposes to the host, which has blocks verified."""
    target, draft, prepared = tiny(1), tiny(2), []
    expected, _ = readable(target, max_new_tokens=NEW)
    request.getfixturevalue("steps")
    monkeypatch.setattr(drafters, "open_step", open_step.open_step)
    monkeypatch.setattr(DecodeStep, "prepare", lambda _, steps, *__: prepared.append(steps))
    run = speculate(target, None, PROMPT, draft=draft, draft_length=2, max_new_tokens=NEW)
    assert prepared == [[(T, "asked") for T in (1, 2, 3)]]
    assert run.result().token_ids == expected


def test_an_early_end_leaves_the_cache_as_the_readable_path_does(request) -> None:
    model = tiny(1)
    tokens, _ = readable(model, max_new_tokens=NEW)
    model.config = dataclasses.replace(model.config, eos_token_ids=(tokens[2],))
    expected = readable(model, max_new_tokens=NEW)
    assert len(expected[0]) == 3
    steps = request.getfixturevalue("steps")
    run = generate(model, None, PROMPT, max_new_tokens=NEW)
    assert (run.result().token_ids, run.decoder.cache.lengths) == expected
    assert steps[0].text.state[LENGTH] > expected[1][0]  # the device had gone on
    closed = generate(model, None, PROMPT, max_new_tokens=NEW, ignore_eos=True)
    next(closed), next(closed)
    closed.close()
    assert closed.result().token_ids == tokens[:2]
    assert closed.decoder.cache.lengths == [len(PROMPT) + 1]


def test_rejection_draws_what_the_readable_path_draws(request) -> None:
    target, draft = tiny(1), tiny(2)
    options = dict(
        max_new_tokens=NEW, sampling=SamplingConfig(temperature=1.5, seed=1), draft=draft,
        draft_length=3, acceptance="rejection",
    )  # fmt: skip
    expected = speculate(target, None, PROMPT, **options).result()
    request.getfixturevalue("steps")
    result = speculate(target, None, PROMPT, **options).result()
    assert result.token_ids == expected.token_ids
    assert result.speculation.accepted == expected.speculation.accepted


def test_a_draft_catches_up_with_what_it_was_not_asked_for(steps: list[DecodeStep]) -> None:
    model, text = tiny(1), [i * i % 32 for i in range(40)]
    for told, missed in ((20, 1), (20, 20), (3, 10)):
        late, ready = (
            drafters.ModelDrafter(model, Sampler(SamplingConfig()), vocabulary=32, capacity=64)
            for _ in range(2)
        )
        late.prefill(text[:told])
        late.catch_up(text[told : told + missed])
        ready.prefill(text[: told + missed])
        assert late.propose(4) == ready.propose(4)


def test_ids_past_the_vocabulary_are_never_chosen(steps: list[DecodeStep]) -> None:
    model = tiny(1, vocab_size=40)
    with torch.no_grad():
        model.lm_head.weight[32:] *= 100  # padding that would win about every second time
    for sampling in (SamplingConfig(), SamplingConfig(temperature=1.0)):
        for vocabulary in (32, 40):
            drafter = drafters.ModelDrafter(
                model, Sampler(sampling), vocabulary=vocabulary, capacity=16
            )
            drafter.prefill(PROMPT)
            drafts, _ = drafter.propose(6)
            assert len(drafts) == 6
            assert (max(drafts) < 32) == (vocabulary == 32)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_broken_weights_are_an_error(temperature: float, steps: list[DecodeStep]) -> None:
    model = tiny(1)
    options = dict(sampling=SamplingConfig(temperature=temperature), max_new_tokens=4)
    for draft in (None, "ngram"):
        run = (
            speculate(model, None, PROMPT, draft=draft, **options)
            if draft
            else generate(model, None, PROMPT, **options)
        )
        next(run)
        for values in run.decoder.cache.values:
            values.fill_(torch.nan)
        with pytest.raises(ValueError, match="logits at position 6 hold NaN"):
            next(run)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("path", ["kernels", "readable"])
def test_one_broken_logit_is_the_same_error(
    path: str, value: float, temperature: float, request
) -> None:
    if path == "kernels":
        request.getfixturevalue("steps")
    options = dict(sampling=SamplingConfig(temperature=temperature), max_new_tokens=4)
    for start in (generate, speculate):
        model = tiny(1)
        run = start(model, None, PROMPT, **options)
        next(run)
        head_VD = model.head_VD().detach()
        # Whatever the sign of what they meet: one logit is infinite, the other excluded.
        head_VD[30, 0], head_VD[31, 0] = value, -value
        with pytest.raises(ValueError, match="logits at position 6 hold NaN or infinity"):
            next(run)


@pytest.mark.parametrize("end", ["done", "closed", "failed", "unread"])
def test_nothing_outlives_a_generation(end: str, steps: list[DecodeStep]) -> None:
    """Its cache and graphs are gigabytes, and must not wait for the garbage collector."""
    target, draft = tiny(1), tiny(2)
    gc.collect()
    gc.disable()
    try:
        for start in (generate, partial(speculate, draft=draft)):
            run = start(target, None, PROMPT, max_new_tokens=NEW)
            if end != "unread":
                next(run), next(run)
            if end == "done":
                run.result()
            elif end == "closed":
                run.close()
            elif end == "failed":
                run.decoder.cache.values[0].fill_(torch.nan)
                with pytest.raises(ValueError, match="NaN"):
                    run.result()
            owned = [weakref.ref(run), weakref.ref(run.decoder)]
            owned += [weakref.ref(x) for step in steps for x in (step, step.cache, step.text.state)]
            steps.clear()
            del run
            assert [ref() for ref in owned] == [None] * len(owned)
    finally:
        gc.enable()

"""Cycles that a device works off by itself, in Triton's interpreter: tokens, drafts, look-up."""

import random

import pytest
import torch
from decode_support import NO_PDL, needs_run_time_loops
from families import BASE

from draftnorm.decoding.drafters import NgramDrafter
from draftnorm.decoding.sampling import Sampler, SamplingConfig
from draftnorm.kernels import cycle
from draftnorm.kernels.head import NO_TOKEN, choose
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.decode_run import DecodeRun
from draftnorm.model.decode_step import DecodeStep
from draftnorm.model.transformer import Transformer

pytestmark = needs_run_time_loops
PROMPT = [1, 2, 3, 1, 2]


def make_model(seed: int) -> Transformer:
    return Transformer(ModelConfig(**BASE | dict(num_layers=1))).init_weights(seed=seed)


def readable_tokens(model: Transformer, count: int, sampler: Sampler) -> list[int]:
    cache = KVCache(model.config, capacity=64)
    logits_V, tokens = model.prefill(PROMPT, cache), list(PROMPT)
    for _ in range(count):
        tokens.append(sampler.sample(logits_V, len(tokens)))
        logits_V = model.decode([tokens[-1:]], cache)[0, -1]
    return tokens


def open_run(
    model: Transformer, drafts: Transformer | str, sampler: Sampler, capacity: int = 48
) -> DecodeRun:
    settings, cache = sampler.settings(), KVCache(model.config, capacity=capacity)
    model.prefill(PROMPT, cache)
    ngrams = range(1, 4) if drafts == "ngram" else None
    target = DecodeStep(model, cache, settings=settings, ngrams=ngrams)
    if isinstance(drafts, str):
        return DecodeRun(target)
    draft_cache = KVCache(drafts.config, capacity=capacity)
    drafts.prefill(PROMPT, draft_cache)
    return DecodeRun(target, DecodeStep(drafts, draft_cache, settings=settings, text=target.text))


@pytest.mark.parametrize(
    ("drafts", "sampling"),
    [
        ("none", dict(temperature=0.9)),
        ("ngram", dict()),
        ("other", dict(temperature=0.9, top_k=9)),
        ("itself", dict()),
    ],
)
def test_a_run_has_the_tokens_of_plain_decoding(drafts: str, sampling: dict) -> None:
    model, sampler = make_model(3), Sampler(SamplingConfig(seed=5, **sampling))
    expected = readable_tokens(model, 12, sampler)
    run = open_run(model, {"other": make_model(8), "itself": model}.get(drafts, drafts), sampler)
    lengths = iter([3, 0, 0, 2, 1, 4] * 5)
    tokens, results = expected[: len(PROMPT) + 1], []
    ask = None if drafts == "none" else lambda: next(lengths)
    for result in run.cycles(tokens, 11, ask):
        results.append(result)
        tokens += result.tokens
        assert run.target.cache.lengths == [len(tokens) - 1]
    assert tokens[: len(expected)] == expected
    assert len(tokens) <= len(expected) + 4
    assert run.target.passes == len(results)
    if drafts == "itself":
        assert [len(r.tokens) for r in results[:4]] == [4, 1, 1, 3]
        assert all(len(r.tokens) == 1 + r.asked == 1 + r.drafted for r in results)
    if drafts == "ngram":
        assert all(r.drafted in (0, r.asked) for r in results)
        assert any(r.drafted for r in results)


def test_a_run_ends_with_the_room_and_the_drafts_with_the_drafters_context() -> None:
    model, sampler = make_model(3), Sampler(SamplingConfig())
    run = open_run(model, model, sampler, capacity=12)
    tokens = readable_tokens(model, 1, sampler)
    with pytest.raises(ValueError, match="do not fit"):
        next(run.cycles(tokens, 8))
    assert run.target.cache.lengths == [5]
    results = list(run.cycles(tokens, 7, lambda: 15))  # as many as fit the cache
    assert [r.asked for r in results] == [6]
    run = open_run(model, model, sampler, capacity=32)
    run.drafter.cache.capacity = 8
    results = list(run.cycles(tokens, 9, lambda: 2))
    assert [r.asked for r in results] == [2, 0, 0, 0, 0, 0, 0]


def test_a_batch_cannot_run() -> None:
    model = make_model(3)
    step = DecodeStep(model, KVCache(model.config, batch=2, capacity=8))
    with pytest.raises(ValueError, match="one sequence, the cache holds 2"):
        DecodeRun(step)


def test_a_text_is_looked_up_as_the_drafter_for_the_cpu_does_it() -> None:
    rng = random.Random(0)
    for n, tokens in [(1, 2), (2, 1), (9, 1), (30, 2), (60, 4), (60, 9), (200, 3), (4100, 40)]:
        history = [rng.randrange(tokens) for _ in range(n)]
        text = cycle.Text.allocate(n + 16, torch.device("cpu"))
        text.tokens[:n] = torch.tensor(history)
        text.tokens[n:] = 99  # what lies behind must not matter
        text.state[cycle.LENGTH] = n - 1
        drafter = NgramDrafter(longest=8, shortest=2)
        drafter.prefill(history)
        cycle.look_up(text, drafts=15, lengths=drafter.lengths, pdl=NO_PDL)
        expected, _ = drafter.propose(15)
        assert text.state[cycle.FOUND] == len(expected)
        assert text.tokens[n : n + len(expected)].tolist() == expected


@pytest.mark.parametrize("found", [4, 2])  # drafts that there are
@pytest.mark.parametrize(
    ("drafts", "accepted"), [([7, 8, 9, 5], 4), ([7, 8, 1, 5], 2), ([0, 8, 9, 5], 0)]
)
def test_a_verify_commits_what_it_chose(drafts: list[int], accepted: int, found: int) -> None:
    choices, n, accepted = [7, 8, 9, 5, NO_TOKEN], 3, min(accepted, found)
    text = cycle.Text.allocate(32, torch.device("cpu"))
    text.tokens[: n + 4] = torch.tensor([4, 4, 4, *drafts])
    text.state[[cycle.LENGTH, cycle.DRAFT_LENGTH, cycle.FOUND]] = torch.tensor(
        [n - 1, n + 2, found], dtype=torch.int32
    )
    best = torch.tensor([[0.0, -1.0]] * 4 + [[torch.nan, 0.0]])
    ids = torch.tensor([[choice, 20] for choice in choices], dtype=torch.int32)
    chosen = torch.zeros(5, dtype=torch.int32)
    choose(chosen, (best, ids), rows=5, pdl=NO_PDL, text=text, end="cycle")
    block = choices[: accepted + 1]
    line = text.blocks[0].tolist()
    assert line[: accepted + 2] == [*block, cycle.NONE]
    assert line[cycle.DRAFTS] == found and cycle.OPEN not in line
    assert text.tokens[: n + len(block)].tolist() == [4, 4, 4, *(max(t, 0) for t in block)]
    assert text.state[cycle.LENGTH] == n + accepted
    assert text.state[cycle.DRAFT_LENGTH] == min(n + 2, n + accepted - 1)
    assert (text.blocks[1:] == cycle.OPEN).all()

"""Cycles that a device works off by itself, in Triton's interpreter: tokens, rollback, look-up."""

import pytest
from decode_support import needs_run_time_loops
from families import BASE

from draftnorm.decoding.sampling import Sampler, SamplingConfig
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.decode_run import DecodeRun
from draftnorm.model.decode_step import DecodeStep
from draftnorm.model.transformer import Transformer

pytestmark = needs_run_time_loops
PROMPT = [1, 2, 3, 1, 2]


def make_model(seed: int) -> Transformer:
    return Transformer(ModelConfig(**BASE | dict(num_layers=1))).init_weights(seed=seed)


def expected_tokens(model: Transformer, count: int, sampler: Sampler) -> list[int]:
    cache = KVCache(model.config, capacity=64)
    logits_V, tokens = model.prefill(PROMPT, cache), list(PROMPT)
    for _ in range(count):
        tokens.append(sampler.sample(logits_V, len(tokens)))
        logits_V = model.decode([tokens[-1:]], cache)[0, -1]
    return tokens


def open_run(
    model: Transformer, draft: Transformer | str | None, sampler: Sampler, first: int
) -> DecodeRun:
    """Behind the prompt and its first token."""
    settings = sampler.settings()
    cache = KVCache(model.config, capacity=48)
    model.prefill(PROMPT, cache)
    ngrams = range(1, 4) if draft == "ngram" else None
    target = DecodeStep(model, cache, settings=settings, ngrams=ngrams)
    drafter = None
    if isinstance(draft, Transformer):
        draft_cache = KVCache(draft.config, capacity=48)
        draft.prefill(PROMPT, draft_cache)
        drafter = DecodeStep(draft, draft_cache, settings=settings, text=target.text)
    return DecodeRun(target, drafter)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("drafts", ["none", "ngram", "other", "itself"])
def test_a_run_has_the_tokens_of_plain_decoding(drafts: str, temperature: float) -> None:
    model, sampler = make_model(3), Sampler(SamplingConfig(temperature=temperature, seed=5))
    expected = expected_tokens(model, 20, sampler)
    draft = {"other": make_model(8), "itself": model}.get(drafts, drafts)
    run = open_run(model, draft, sampler, expected[len(PROMPT)])
    lengths = iter([3, 0, 0, 2, 5, 1, 0, 4] * 5)
    tokens = expected[: len(PROMPT) + 1]
    results = []
    for result in run.cycles(tokens, 19, (lambda: next(lengths)) if drafts != "none" else None):
        results.append(result)
        tokens += result.tokens
        assert run.target.cache.lengths == [len(tokens) - 1]
    assert tokens[: len(expected)] == expected
    assert len(tokens) < len(expected) + 16
    if drafts == "itself":
        assert all(len(r.tokens) == 1 + r.asked == 1 + r.drafted for r in results)
        assert [r.asked for r in results][:5] == [3, 0, 0, 2, 5]
        assert [r.fed for r in results][:5] == [False, False, False, True, False]
    if drafts == "ngram":
        assert {r.drafted for r in results} - {0} and all(
            r.drafted in (0, r.asked) for r in results
        )

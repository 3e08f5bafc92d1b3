"""A whole decode step in Triton's interpreter: every family against the readable model."""

import pytest
import torch
from decode_support import needs_run_time_loops
from families import BASE, FAMILIES
from steady import plain_tokens

from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.decode_run import DecodeRun
from draftnorm.model.decode_step import NORMS, DecodeStep
from draftnorm.model.transformer import Transformer

pytestmark = needs_run_time_loops


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_and_verify_match_the_readable_model(family: str) -> None:
    model = Transformer(ModelConfig(**BASE | FAMILIES[family])).init_weights(seed=3)
    tokens = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    expected_cache, cache = (KVCache(model.config, batch=2, capacity=30) for _ in range(2))
    starts = (11, 8)
    for b, start in enumerate(starts):
        model.prefill(tokens[b, :start], expected_cache, sequence=b)
    for ours, theirs in zip(
        cache.keys + cache.values, expected_cache.keys + expected_cache.values, strict=True
    ):
        ours.fill_(torch.nan)  # what is not written must not matter
        for b, start in enumerate(starts):
            ours[b, :, :start] = theirs[b, :, :start]
    cache.lengths = list(starts)
    step = DecodeStep(model, cache, rows=16)
    for T in (1, 3):
        block = torch.stack([tokens[b, cache.lengths[b] :][:T] for b in range(2)])
        expected = model.decode(block, expected_cache)
        logits = step.forward(block)
        # fp32 through two layers; logits are of size 1 to 10.
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert step.chosen == expected.argmax(-1).flatten().tolist()
    for b, length in enumerate(cache.lengths):
        for ours, theirs in zip(
            cache.keys + cache.values, expected_cache.keys + expected_cache.values, strict=True
        ):
            torch.testing.assert_close(
                ours[b, :, :length], theirs[b, :, :length], rtol=1e-4, atol=1e-4
            )


def test_a_block_without_room_leaves_the_step_as_it_was() -> None:
    model = Transformer(ModelConfig(**BASE | dict(num_layers=1))).init_weights(seed=3)
    step = DecodeStep(model, KVCache(model.config, batch=2, capacity=3))
    step.forward([[1, 2], [3, 4]])
    chosen, inputs = step.chosen, step.inputs.clone()
    with pytest.raises(ValueError, match="do not fit"):
        step.forward([[5, 6], [7, 8]])
    assert step.cache.lengths == [2, 2] and not step.under_way
    assert step.chosen == chosen and torch.equal(step.inputs, inputs)  # and none is waited for


def test_a_step_is_waited_for_only_if_nobody_has_read_what_it_chose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Transformer(ModelConfig(**BASE | dict(num_layers=1))).init_weights(seed=3)
    step, waits = DecodeStep(model, KVCache(model.config, capacity=20)), []
    # What the device was told last is still there when it is waited for: it may not be copied yet.
    monkeypatch.setattr(step, "synchronize", lambda: waits.append(int(step.told[0])))
    for token in (1, 2):
        step.forward([[token]])
        assert len(step.chosen) == 1
    assert len(list(DecodeRun(step).cycles([3], 2))) == 2
    step.forward([[4]])
    assert waits == []
    step.forward([[5]])
    assert waits == [4]
    next(DecodeRun(step).cycles([6], 3))  # closed early
    step.forward([[7]])
    assert len(waits) == 3
    next(DecodeRun(step).cycles([6], 3))
    assert len(waits) == 4


@pytest.mark.parametrize("norm", NORMS)
def test_greedy_follows_the_readable_model(norm: str) -> None:
    model = Transformer(ModelConfig(**BASE | dict(num_layers=1))).init_weights(seed=3)
    cache, expected_cache = (KVCache(model.config, capacity=7) for _ in range(2))
    for c in (cache, expected_cache):
        model.prefill([1, 2, 3], c)
    expected, token = [], 4
    for _ in range(3):
        token = int(model.decode([[token]], expected_cache).argmax())
        expected.append(token)
    step = DecodeStep(model, cache, norm=norm)
    assert next(DecodeRun(step).cycles([4], 3)).tokens == expected[:1]
    assert cache.lengths == [4]  # closed early, with steps under way: their tokens are nobody's
    assert step.chosen == [] and step.under_way
    assert plain_tokens(step, expected[0], 2) == expected[1:]
    assert cache.lengths == [6]
    with pytest.raises(ValueError, match="do not fit"):
        plain_tokens(step, 1, 2)

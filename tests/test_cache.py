"""KVCache: lengths, capacity, rollback."""

import pytest
import torch

from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=8,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=2,
)


def test_sequences_have_their_own_lengths() -> None:
    cache = KVCache(CONFIG, batch=2, capacity=8)
    assert cache.extend(5, 1) == range(5)
    assert cache.extend(2, 1) == range(5, 7)
    assert cache.lengths == [0, 7]
    cache.rollback(3, 1)
    assert cache.extend(1, 1) == range(3, 4)


def test_shapes() -> None:
    cache = KVCache(CONFIG, batch=2, capacity=8, dtype=torch.bfloat16)
    assert len(cache.keys) == len(cache.values) == 3
    assert cache.keys[0].shape == (2, 2, 64, 2)


@pytest.mark.parametrize("capacity", [1, 7, 64, 65])
def test_heads_and_slots_are_aligned_alike(capacity: int) -> None:
    """A library's bits may depend on alignment: here a key's depends on its position alone."""
    cache = KVCache(CONFIG, batch=3, capacity=capacity, dtype=torch.bfloat16)
    for tensor in cache.keys + cache.values:
        assert tensor.is_contiguous() and tensor.shape[2] >= capacity
        assert {tensor[b, g].data_ptr() % 64 for b in range(3) for g in range(2)} == {0}


def test_a_cache_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 2 * 3 * (2 * 64 * 2) * 4  # keys and values, layers, [G, S, K], bytes of fp32
    monkeypatch.setattr("draftnorm.model.cache.free_bytes", lambda device: needed)
    KVCache(CONFIG, capacity=64)
    with pytest.raises(ValueError, match="a cache of 65 tokens needs 12,288 bytes on cpu, 6,144"):
        KVCache(CONFIG, capacity=65)


def test_errors_are_one_line() -> None:
    cache = KVCache(CONFIG, capacity=4)
    cache.extend(3)
    for mistake in (lambda: cache.extend(2), lambda: cache.rollback(4), lambda: cache.rollback(-1)):
        with pytest.raises(ValueError) as error:
            mistake()
        assert "\n" not in str(error.value)
    assert cache.lengths == [3]
    with pytest.raises(ValueError, match="capacity"):
        KVCache(CONFIG, capacity=0)

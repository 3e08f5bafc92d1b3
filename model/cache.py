"""KVCache: keys and values of every layer, with a length for every sequence.

Shapes: B sequences, G key/value heads, S capacity in tokens, rounded up to 64, K head size.
Rollback is setting a length. Positions at or past it are never read and get overwritten, so nothing
is copied or cleared. A sliding window is a mask over the same cache, not a ring, which keeps
rollback across a window's border trivially right.
"""

import torch

from draftnorm.model.config import ModelConfig


class KVCache:
    """`keys[layer]` and `values[layer]` are [B, G, S, K]; `lengths[b]` counts tokens."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int = 1,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(
                f"a cache needs batch and capacity of at least 1: {batch=} {capacity=}"
            )
        # A library's bits may depend on how its operands are aligned. With heads a multiple of 64
        # bytes apart, that of a key depends on its position, not on capacity, slot or head.
        shape = (batch, config.num_kv_heads, -(-capacity // 64) * 64, config.head_size)
        self.capacity = capacity
        self.lengths = [0] * batch
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in config.windows]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in config.windows]

    def rollback(self, length: int, sequence: int = 0) -> None:
        """Forget all but the first `length` tokens of a sequence."""
        if not 0 <= length <= self.lengths[sequence]:
            raise ValueError(
                f"cannot roll back to {length}: the sequence has {self.lengths[sequence]} tokens"
            )
        self.lengths[sequence] = length

    def extend(self, count: int, sequence: int = 0) -> range:
        """Claim the next `count` positions of a sequence and return them."""
        start = self.lengths[sequence]
        if start + count > self.capacity:
            raise ValueError(
                f"{count} tokens after {start} do not fit the cache of {self.capacity} positions"
            )
        self.lengths[sequence] = start + count
        return range(start, start + count)

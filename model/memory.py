"""What decoding needs in memory, known from config.json before a weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from draftnorm.model.cache import cache_bytes, free_bytes
from draftnorm.model.config import ModelConfig

# Bytes for the buffers of steps and a chunk of a prompt. Tests on a GPU hold us to it.
WORK = 300_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeed:
    """Bytes that a request takes on a device, beside what is free there."""

    weights: int
    cache: int
    capacity: int  # of the cache, in tokens
    free: int

    @classmethod
    def of(
        cls, configs: Sequence[ModelConfig], capacity: int, device: torch.device, dtype: torch.dtype
    ) -> "MemoryNeed":
        """For models that are not loaded yet, each with a cache of `capacity` or its context."""
        return cls(
            weights=sum(config.parameters for config in configs) * dtype.itemsize,
            cache=sum(cache_bytes(c, 1, min(capacity, c.context), dtype) for c in configs),
            capacity=capacity,
            free=free_bytes(device),
        )

    @property
    def total(self) -> int:
        return self.weights + self.cache + WORK

    def check(self) -> None:
        """Raise ValueError, naming the number to lower, if it is more than is free."""
        if self.total <= self.free:
            return
        lower = "the context or the number of new tokens"
        if self.weights + WORK > self.free:
            lower = "the size of the dtype or of the model"
        raise ValueError(
            f"out of memory: {self}: weights {_gb(self.weights)}, a cache of {self.capacity:,} "
            f"tokens {_gb(self.cache)}, {_gb(WORK)} to work with; lower {lower}"
        )

    def __str__(self) -> str:
        return f"needs {_gb(self.total)} of {_gb(self.free)} free"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"

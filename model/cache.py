"""KVCache: keys and values of every layer, with a length for every sequence.

Shapes: B sequences, G key/value heads, S capacity in tokens, rounded up to 64, K head size.
Rollback is setting a length. Positions at or past it are never read and get overwritten, so nothing
is copied or cleared. A sliding window is a mask over the same cache, not a ring, which keeps
rollback across a window's border trivially right.
"""

import math
import os
import re
from pathlib import Path

import torch

from draftnorm.model.config import ModelConfig


class KVCache:
    """`keys[layer]` and `values[layer]` are [B, G, S, K]; `lengths[b]` counts tokens.

    `experts_touched` counts what `Transformer.decode` touched with it in `expert_layer_passes`, one
    a sparse layer and tile of rows. Raises ValueError if it does not fit the free memory.
    """

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
        shape = _shape(config, batch, capacity)
        needed = cache_bytes(config, batch, capacity, dtype)
        free = free_bytes(torch.device(device))
        if needed > free:  # Linux would promise it all the same, and kill us once we wrote
            raise ValueError(
                f"out of memory: a cache of {capacity:,} tokens needs {needed:,} bytes on "
                f"{device}, {free:,} are free; ask for fewer tokens or a smaller context"
            )
        self.capacity = capacity
        self.lengths = [0] * batch
        self.experts_touched = self.expert_layer_passes = 0
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

    def extend_all(self, count: int) -> list[range]:
        """The same for every sequence; if one has no room, none is extended."""
        fullest_first = sorted(range(len(self.lengths)), key=lambda b: -self.lengths[b])
        spans = {b: self.extend(count, b) for b in fullest_first}
        return [spans[b] for b in range(len(self.lengths))]


def _shape(config: ModelConfig, batch: int, capacity: int) -> tuple[int, ...]:
    # A library's bits may depend on how its operands are aligned. With heads a multiple of 64
    # bytes apart, that of a key depends on its position, not on capacity, slot or head.
    return batch, config.num_kv_heads, -(-capacity // 64) * 64, config.head_size


def cache_bytes(config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype) -> int:
    """What the keys and values of a KVCache take."""
    return 2 * len(config.windows) * math.prod(_shape(config, batch, capacity)) * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Free memory of the device; on the CPU what Linux or the container gives without swapping."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # not Linux: all the memory there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = int(re.search(r"MemAvailable: +(\d+)", meminfo.read_text())[1]) * 1024
    limit, statistics = (Path("/sys/fs/cgroup", f"memory.{name}") for name in ("max", "stat"))
    if limit.is_file() and (bound := limit.read_text().strip()).isdigit():  # in a container
        taken = int(re.search(r"^anon (\d+)", statistics.read_text())[1])
        free = min(free, int(bound) - taken)
    return free

"""What benchmarks of a GPU share: the device's clock, its read bandwidth and its product rate.

On the CPU (Triton's interpreter, in tests) everything works on toy sizes by the host's clock.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

READ_BYTES = 2**33  # far past the L2; a quarter of the free memory if that is less
PRODUCT_SIZE = 8192
# Elements and warps of a program that reads: which is best differs between GPUs.
READ_TILES = ((4096, 4), (8192, 8), (16384, 8), (16384, 16))


@triton.jit
def _read_kernel(largest_ptr, data_ptr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)  # int64: 8 GiB are 2³¹ elements
    values = tl.load(data_ptr + block * BLOCK + tl.arange(0, BLOCK))
    tl.store(largest_ptr + block, tl.max(values, axis=0))


def read(data: Tensor, largest: Tensor, *, block: int = 8192, warps: int = 8) -> None:
    """Read int32 `data` once: `largest[i]` becomes the maximum of its i-th `block` elements."""
    _read_kernel[(data.numel() // block,)](largest, data, block, num_warps=warps)


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of reading a large buffer once, by the best of several kernels."""
    size = 2**16
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] // 4
        size = min(READ_BYTES, free // 2**16 * 2**16)
    # Random, as weights are: power, and with it the clock, depends on the bits that toggle.
    data = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    largest = data.new_empty(size // 4 // READ_TILES[0][0])
    ours = (partial(read, data, largest, block=block, warps=warps) for block, warps in READ_TILES)
    readers = (data.amax, *ours)
    return size / min(statistics.median(device_seconds(reader, 10)) for reader in readers)


def product_rate(device: torch.device) -> float:
    """Floating-point operations a second of a square bf16 product by torch."""
    n = PRODUCT_SIZE if device.type == "cuda" else 64
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / statistics.median(device_seconds(lambda: torch.mm(a, b, out=out), 10))


def device_seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds on the device of each of `repeats` runs, after two untimed ones."""
    if not torch.cuda.is_available():
        return wall_seconds(work, repeats)
    work()
    work()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return seconds


def replay_seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    """Device seconds of replays of `work` as a graph; of itself where there is no GPU.

    What it returns is kept meanwhile, so that no two outputs among it share memory.
    """
    if not torch.cuda.is_available():
        return device_seconds(work, repeats)
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()
    seconds = device_seconds(graph.replay, repeats)
    del kept
    return seconds


def wall_seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    """The host's seconds of each of `repeats` runs, the device idle before and after."""
    work()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

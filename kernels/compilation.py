"""Compiling ahead, all kernels of some work in parallel, and launching them at little cost.

Triton compiles a kernel at its first launch, one after the other. Here the work launches them once
with a hook that notes what is missing and drops that launch; what was noted is then compiled in
threads, as LLVM and ptxas, where most of the time goes, run outside of Python's lock.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

__all__ = ["OutOfResources", "Progress", "compile_kernels", "launch"]

_COMPILED: dict[tuple, Any] = {}  # a cache: never changes a result

# Called with what is being done, how much of it is done, and out of how much.
Progress = Callable[[str, int, int], None]


def compile_kernels(work: Callable[[], None], progress: Progress | None = None) -> int:
    """Compile the kernels that `work` would compile one by one; returns their number.

    `work` is run: its library calls and launches of kernels that are compiled already are real, so
    its results are garbage and its memory must be nobody's.
    """
    missing: dict[tuple[Any, str], str] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        missing[fn.jit_function, compile["key"]] = compile["specialization_data"]
        return True  # Triton then neither compiles nor launches

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        work()
    finally:
        knobs.runtime.jit_cache_hook = before
    if not missing:
        return 0
    device = torch.cuda.current_device()  # a thread of its own would take the first
    with ThreadPoolExecutor(
        min(len(missing), os.cpu_count() or 1),
        initializer=torch.cuda.set_device,
        initargs=(device,),
    ) as pool:
        jobs = [pool.submit(kernel.preload, data) for (kernel, _), data in missing.items()]
        for done, job in enumerate(as_completed(jobs), start=1):
            job.result()
            if progress:
                progress("compiling kernels", done, len(jobs))
    return len(missing)


def launch(
    kernel: Any, grid: tuple, args: tuple, *, key: tuple | None, warps: int, pdl: bool = False
) -> None:
    """`kernel[grid](*args)`, from the second time with this `key` on without Triton's dispatch.

    That inspects and hashes every argument, 7 µs of host time a launch, to learn what the key must
    imply: device (first), kernel, types, constants, and which addresses and strides are multiples
    of 16. With None nothing is remembered.
    """
    compiled = _COMPILED.get(key)
    if compiled is None:
        compiled = kernel[grid](*args, num_warps=warps, launch_pdl=pdl)
        if key is not None:
            _COMPILED[key] = compiled  # None in the interpreter, and while compiling ahead
    else:  # what compiled[grid](*args) does, less a profiler's hooks: unused, a fifth of the call
        stream = driver.active.get_current_stream(key[0])
        handle = (compiled.function, compiled.packed_metadata)
        compiled.run(*grid, stream, *handle, None, None, None, *args)

"""Compiling ahead: all kernels that some work will launch, in parallel, before it runs.

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
from triton.runtime.errors import OutOfResources

__all__ = ["OutOfResources", "Progress", "compile_kernels"]

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

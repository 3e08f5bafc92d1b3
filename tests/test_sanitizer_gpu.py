"""compute-sanitizer over every kernel, on a GPU."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from draftnorm.kernels import weight_stream

HERE = Path(__file__).resolve().parent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or shutil.which("compute-sanitizer") is None,
        reason="needs a CUDA device and compute-sanitizer",
    ),
]
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a GPU of compute capability 9",
)


def sanitize(tool: str, part: str) -> tuple[str, set[tuple[str, int]]]:
    """What the tool says of a part of sanitized.py, and the lines of ours that it names.

    Kernels of libraries have no lines. racecheck names cuDNN's attention, too, in prefill.
    """
    result = subprocess.run(
        ["compute-sanitizer", "--tool", tool, sys.executable, HERE / "sanitized.py", part],
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "\ndone\n" in result.stdout, result.stdout + result.stderr
    named = re.findall(r"access at .* in (?:\S*/)?(\S+):(\d+)", result.stdout)
    return result.stdout, {(file, int(line)) for file, line in named}


@pytest.mark.parametrize("part", ["norms", "steps", "attention", "cycles"])
def test_memcheck_finds_nothing(part: str) -> None:
    said, _ = sanitize("memcheck", part)
    assert "SUMMARY: 0 errors" in said, said


@pytest.mark.parametrize("part", ["norms", "steps", "attention", "cycles"])
def test_racecheck_names_nothing_of_ours(part: str) -> None:
    said, lines = sanitize("racecheck", part)
    assert "RACECHECK SUMMARY" in said and not lines, said


@hopper
def test_memcheck_finds_nothing_in_streamed_layers() -> None:
    assert "SUMMARY: 0 errors" in sanitize("memcheck", "stream")[0]


@hopper
def test_racecheck_names_only_how_triton_tells_warps_their_parts() -> None:
    """And names that of any kernel in parts that share a barrier, so it is no fault of this one.

    That each of these accesses is ordered by barriers of all threads, test_weight_stream_compiled
    shows.
    """
    lines, first = inspect.getsourcelines(weight_stream._weight_stream_kernel.fn)
    own = {
        ("weight_stream.py", first + i)
        for i, line in enumerate(lines)
        if line.startswith("def ") or "gl.warp_specialize(" in line
    }
    assert sanitize("racecheck", "stream")[1] <= own
    assert sanitize("racecheck", "parts")[1]

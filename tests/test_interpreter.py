"""Runs tests/interpreter in a process of its own, where Triton interprets kernels on the CPU.

TRITON_INTERPRET is read when a kernel is decorated, so it cannot be switched on in this process.
"""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_in_the_interpreter():
    tests = Path(__file__).parent
    files = sorted(str(path) for path in (tests / "interpreter").glob("test_*.py"))
    assert files
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=tests.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout

"""Runs tests/interpreter in a process of its own, where Triton interprets kernels on the CPU.

TRITON_INTERPRET is read when a kernel is decorated, so it cannot be switched on in this process.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parent


def run(file: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_kernels_in_the_interpreter() -> None:
    """One process a file, as many at a time as there are cores; the interpreter uses one."""
    files = (TESTS / "interpreter").glob("test_*.py")
    longest_first = sorted(files, key=lambda file: -file.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(run, longest_first))
    assert results
    for result in results:
        assert result.returncode == 0, result.stdout + result.stderr
        assert " passed" in result.stdout

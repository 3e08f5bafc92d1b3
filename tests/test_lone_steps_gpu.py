"""Steps of several processes that take turns on a Hopper keep their bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a GPU of compute capability 9",
    ),
]


def test_steps_of_processes_that_take_turns_keep_their_bits() -> None:
    """One in a thousand differed while a slot of weights was let go with loads under way."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, HERE / "lone_steps.py", "20", str(seed)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for seed in range(6)
    ]  # fmt: skip
    try:
        for process in running:
            said = process.communicate(timeout=120)[0]
            assert process.returncode == 0
            steps, wrong = map(int, said.split())
            assert steps > 500
            assert wrong == 0
    finally:
        for process in running:
            process.kill()

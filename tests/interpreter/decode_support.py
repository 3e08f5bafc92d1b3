"""What the decode kernels' interpreter tests share."""

import numpy
import pytest
import torch
import triton
from torch import Tensor

from draftnorm.kernels.projection import Workspace

# Triton before 3.7 cannot loop over a run-time scalar with numpy 2.4 in its interpreter.
needs_run_time_loops = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4),
    reason="the interpreter of Triton 3.6 needs numpy < 2.4 for loops over run-time scalars",
)
NO_PDL = {"PDL": False}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def workspace(parts: int, rows: int, N: int) -> Workspace:
    # Poisoned: whoever reads a partial sum that nobody wrote gets NaN.
    padded = -(-rows // 16) * 16
    return Workspace(
        partials=torch.full((parts * padded * N,), torch.nan),
        tickets=torch.zeros(N * padded, dtype=torch.int32),
    )


def assert_close(actual: Tensor, expected: Tensor, K: int) -> None:
    """fp32 sums of K products in any order: K + 8 roundings (epilogue) of the largest values."""
    bound = (K + 8) * 2**-24 * expected.abs().max().clamp_min(1.0) * 4
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= bound

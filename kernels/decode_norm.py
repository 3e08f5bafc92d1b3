"""RMSNorm of a decode step in two halves, with the bits of `rms_norm`.

Legend: M rows, K columns, R rows of a tile.

The kernel that produces a row sees only a few of its columns, the kernel that needs it normalised
should not have to reduce it again. So the producer leaves the sums of squares of aligned blocks of
16 columns. They are nodes of the summation tree of `rms_norm` (neighbours first), and whoever
finishes the tree gets its rstd, bit for bit: a product's prologue, where a program holds whole
rows, or `normalize`, a short kernel, where the product is a pipelined loop over K.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftnorm.kernels.operands import sum_slabs, wait_and_trigger
from draftnorm.kernels.rms_norm import finish_rstd, has_pdl

SQUARES = 16  # columns of a block
_SQUARES: tl.constexpr = tl.constexpr(SQUARES)


@triton.jit
def square_sums(y_WR):
    """Sums of squares of aligned blocks of 16 columns: fp32 [W, R] -> [W / 16, R]."""
    W: tl.constexpr = y_WR.shape[0]
    R: tl.constexpr = y_WR.shape[1]
    squares = tl.reshape(tl.fma(y_WR, y_WR, 0.0), [W // _SQUARES, _SQUARES, R])
    return sum_slabs(tl.permute(squares, (1, 0, 2)))


@triton.jit
def load_squares(squares_ptr, rows, row_ok, K: tl.constexpr):
    """What the producer of these rows left: fp32 [R, K / 16], padded with zeros to a power of two.

    `finish_rstd` rounds alike, whether it has these or the squares themselves.
    """
    BLOCKS: tl.constexpr = (K + _SQUARES - 1) // _SQUARES
    block = tl.arange(0, triton.next_power_of_2(BLOCKS))[None, :]
    mask = row_ok[:, None] & (block < BLOCKS)
    return tl.load(squares_ptr + rows[:, None] * BLOCKS + block, mask=mask, other=0.0)


@triton.jit
def normed(x, rstd, scale):
    """Rounded as `rms_norm` rounds: once normalised, and once scaled."""
    y = (x.to(tl.float32) * rstd).to(x.dtype).to(tl.float32)
    return (y * scale.to(tl.float32)).to(x.dtype)


@triton.jit(do_not_specialize=["eps"])
def _normalize_kernel(
    y_ptr, x_ptr, weight_ptr, squares_ptr, eps,
    K: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = column < K
    scale = tl.load(weight_ptr + column, mask=mask, other=0.0)
    wait_and_trigger(PDL)
    place = row[:, None] * K + column[None, :]
    squares = load_squares(squares_ptr, row, row >= 0, K)
    x = tl.load(x_ptr + place, mask=mask[None, :], other=0.0)
    rstd = finish_rstd(squares, eps, K)
    tl.store(y_ptr + place, normed(x, rstd[:, None], scale[None, :]), mask=mask[None, :])


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """RMSNorm of the input: weight [K] and the input's square sums, fp32 [M, ceil(K / 16)]."""

    weight: Tensor
    squares: Tensor
    eps: float


def pdl_options(device: torch.device) -> dict[str, bool]:
    """Launch options: programmatic dependent launch where the device has it (sm_90 and later)."""
    pdl = has_pdl(device)
    return {"PDL": pdl, "launch_pdl": pdl}


def normalize(y_MK: Tensor, x_MK: Tensor, norm: Norm, *, rows: int, pdl: dict[str, bool]) -> None:
    """Launch the second half by itself: x, y [M, K]. Nothing is allocated."""
    K = x_MK.shape[1]
    block_k = min(max(triton.next_power_of_2(K), SQUARES), 1024)
    _normalize_kernel[(rows, triton.cdiv(K, block_k))](
        y_MK, x_MK, norm.weight, norm.squares, norm.eps, K, block_k, **pdl
    )

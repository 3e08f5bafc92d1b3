"""The gate of a feed-forward layer: y = silu(g) · u, silu(g) = g / (1 + exp(-g)) (Shazeer 2020).

Shapes: M rows, F feed-forward width. A row of 2F, as one product leaves it, holds g and then u.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu

from draftnorm.kernels.compilation import launch

BLOCK_F = 1024


def gated_reference(both_M2F: Tensor) -> Tensor:
    """The definition, differentiable, on any device: [M, 2F] -> [M, F]."""
    gate_MF, up_MF = both_M2F.chunk(2, dim=-1)
    return silu(gate_MF) * up_MF


@triton.jit
def _gated_kernel(y_ptr, both_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # int64: row · 2F passes 2³¹ at 65,536 rows of 28,672
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_ptrs = both_ptr + row * (2 * F) + f
    gate = tl.load(gate_ptrs, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + F, mask=f < F, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * F + f, y.to(y_ptr.dtype.element_ty), mask=f < F)


def gated_forward(both_M2F: Tensor) -> Tensor:
    """Launch the kernel on a contiguous [M, 2F] -> [M, F]: fp32 within, rounded once."""
    assert both_M2F.is_contiguous()
    M, F = both_M2F.shape[0], both_M2F.shape[1] // 2
    y_MF = both_M2F.new_empty(M, F)
    key = (both_M2F.get_device(), "gated", both_M2F.dtype, F, both_M2F.data_ptr() % 16)
    grid = (M, -(-F // BLOCK_F), 1)  # triton.cdiv takes the host 1.5 µs
    launch(_gated_kernel, grid, (y_MF, both_M2F, F, BLOCK_F), key=key, warps=4)
    return y_MF


def gated(both_M2F: Tensor) -> Tensor:
    """[M, 2F] -> [M, F]: by the kernel on CUDA unless autograd records, else by PyTorch."""
    if both_M2F.is_cuda and not (torch.is_grad_enabled() and both_M2F.requires_grad):
        return gated_forward(both_M2F)
    return gated_reference(both_M2F)

"""Residual add and RMSNorm in one pass: summed = x + residual, y = rms_norm(summed); writes both.

Legend: M rows (every leading dimension), D hidden, R rows a program holds.
The sum is rounded to the input's dtype before it is normalised, by the row function of rms_norm.py:
y and summed have the bits of the two separate operations, which read and write one tensor more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from draftnorm.kernels.operands import wait_and_trigger
from draftnorm.kernels.rms_norm import (
    MANY_ROWS,
    check_rows,
    has_pdl,
    launch_shape,
    normalize_rows,
    rms_norm,
    rms_norm_backward,
    row_columns,
)


@triton.jit(do_not_specialize=["M"])
def _residual_rms_norm_kernel(
    y_ptr, summed_ptr, x_ptr, residual_ptr, weight_ptr, rstd_ptr, x_stride, residual_stride, M, eps,
    D: tl.constexpr, R: tl.constexpr, OFFSET: tl.constexpr, MODE: tl.constexpr,
    STORE_RSTD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_and_trigger(PDL)
    rows_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    columns_1D = row_columns(D)
    mask_RD = (rows_R < M)[:, None] & (columns_1D < D)
    x_ptrs = x_ptr + rows_R[:, None] * x_stride + columns_1D
    residual_ptrs = residual_ptr + rows_R[:, None] * residual_stride + columns_1D
    x_RD = tl.load(x_ptrs, mask=mask_RD, other=0.0).to(tl.float32)
    residual_RD = tl.load(residual_ptrs, mask=mask_RD, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    summed_RD = (x_RD + residual_RD).to(dtype)
    y_RD, rstd_R = normalize_rows(summed_RD.to(tl.float32), weight_ptr, eps, dtype, D, OFFSET, MODE)
    out_RD = rows_R[:, None] * D + columns_1D
    tl.store(summed_ptr + out_RD, summed_RD, mask=mask_RD)
    tl.store(y_ptr + out_RD, y_RD.to(dtype), mask=mask_RD)
    if STORE_RSTD:
        tl.store(rstd_ptr + rows_R, rstd_R, mask=rows_R < M)


def residual_rms_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    casting_mode: str = "llama",
    inference_mode: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel: x, residual [..., D], weight [D] or None -> (y, summed, rstd [M] or [0]).

    y and summed are like x, rstd is fp32. Any row strides. Raises ValueError for what
    `rms_norm_forward` refuses, and if x and residual differ in shape, dtype or device.
    """
    for tensor in (x, residual):
        check_rows(tensor, weight, casting_mode, None)
    if (x.shape, x.dtype, x.device) != (residual.shape, residual.dtype, residual.device):
        raise ValueError(
            f"x and residual differ: {x.shape=}, {residual.shape=}, {x.dtype=}, {residual.dtype=}"
        )
    D = x.shape[-1]
    x_MD, residual_MD = x.reshape(-1, D), residual.reshape(-1, D)
    M = x_MD.shape[0]
    y, summed = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    rstd_M = x.new_empty(0 if inference_mode else M, dtype=torch.float32)
    if M:
        R, warps = launch_shape(D, M >= MANY_ROWS, None)
        pdl = has_pdl(x.get_device())
        _residual_rms_norm_kernel[(triton.cdiv(M, R),)](
            y, summed, x_MD, residual_MD, weight, None if inference_mode else rstd_M,
            x_MD.stride(0), residual_MD.stride(0), M, float(eps), D, R, offset,
            casting_mode, not inference_mode, pdl, num_warps=warps, launch_pdl=pdl,
        )  # fmt: skip
    return y, summed, rstd_M


class _ResidualRMSNorm(torch.autograd.Function):
    # summed feeds both the norm and the next residual, so its two gradients add up.
    @staticmethod
    def forward(ctx, x, residual, weight, eps, options):
        y, summed, rstd_M = residual_rms_norm_forward(x, residual, weight, eps, **options)
        ctx.save_for_backward(summed, weight, rstd_M)
        ctx.options = options
        return y, summed

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsummed):
        dx, dweight = rms_norm_backward(dy, *ctx.saved_tensors, **ctx.options)
        dx += dsummed
        return dx, dx, dweight, None, None


def residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    casting_mode: str = "llama",
    inference_mode: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """x, residual [..., D], weight [D] or None -> (rms_norm(x + residual), x + residual).

    Dispatch and `inference_mode` as in `rms_norm`, and the same bits as the two operations apart.
    """
    options = {"offset": offset, "casting_mode": casting_mode}
    if not x.is_cuda:
        summed = x + residual
        return rms_norm(summed, weight, eps, inference_mode=inference_mode, **options), summed
    records = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, residual, weight)
    )
    if inference_mode and records:
        raise ValueError("inference_mode=True keeps no rstd, but autograd records: use no_grad()")
    if inference_mode or (inference_mode is None and not records):
        options["inference_mode"] = True
        y, summed, _ = residual_rms_norm_forward(x, residual, weight, eps, **options)
        return y, summed
    return _ResidualRMSNorm.apply(x, residual, weight, eps, options)

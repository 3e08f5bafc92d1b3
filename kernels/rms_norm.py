"""RMSNorm: y = x / sqrt(mean(x²) + eps) · (offset + w), row by row (Zhang & Sennrich 2019).

Legend: M rows (every leading dimension), D hidden, R rows a program holds, P programs.
`rstd_M` = 1 / sqrt(mean(x²) + eps) is what training keeps for the backward pass. Inference never
reads it: `inference_mode` neither allocates it nor compiles its store.

Casting modes (the names are Liger's; statistics are summed in fp32 in all of them):
  llama  normalise in fp32, round to the input's dtype, multiply by the weight in that dtype
  gemma  everything in fp32, one rounding at the end (Gemma checkpoints want offset=1)
  none   rstd too is rounded to the input's dtype, as are both products after it

The row function. A row's squares are summed by the binary tree over its columns, neighbours first:
(((x0² + x1²) + (x2² + x3²)) + ...), padded with zeros to a power of two. Each addition has two
operands, so no layout can reorder it: one row a program, many rows a program, any number of
warps and a fused prologue that imports `finish_rstd` give equal bits. The sum of an
aligned block of 2^n columns is a node of the tree: it may be computed elsewhere and added later.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from draftnorm.kernels.compilation import launch
from draftnorm.kernels.operands import log2, prefetch_l2, wait_and_trigger

CASTING_MODES = ("llama", "gemma", "none")
ROW_MODES = (None, "row", "block")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HIDDEN = 32_768  # one program holds a whole row in registers
MANY_ROWS = 2048
MAX_BACKWARD_PROGRAMS = 1024
_FIRST_WAVE: tl.constexpr = tl.constexpr(1056)  # programs that may start early: 8 on each of 132
INTERPRETED = triton.knobs.runtime.interpret  # fixed at import, as @triton.jit itself is


def rms_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> Tensor:
    """The definition, differentiable, on any device: x [..., D], weight [D] or None -> y like x.

    Statistics are in fp32 or the input's precision if that is higher; tests use it in float64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    y = x * rstd.to(x.dtype) if casting_mode == "none" else x_wide * rstd
    compute = wide if casting_mode == "gemma" else x.dtype
    if weight is not None:
        factor = weight.to(compute)
        y = y.to(compute) * (factor + offset if offset else factor)
    return y.to(x.dtype)


@triton.jit
def row_columns(D: tl.constexpr):
    """Columns of a row, padded to a power of two: [1, 2^LEVELS]."""
    return tl.arange(0, triton.next_power_of_2(D))[None, :]


@triton.jit
def sum_row(values_RD):
    """Sum fp32 [R, 2^LEVELS] over columns by the module's tree -> [R]."""
    R: tl.constexpr = values_RD.shape[0]
    LEVELS: tl.constexpr = log2(values_RD.shape[1])
    for level in tl.static_range(LEVELS):
        pairs = tl.reshape(values_RD, [R, 1 << (LEVELS - level - 1), 2])
        if level == 8:
            # A warp loads 256 columns of 16 bits, so these pairs may lie in two warps. `split` puts
            # both into one thread, and what is left into one warp: one barrier, not one a level.
            left, right = tl.split(pairs)
            values_RD = left + right
        else:
            values_RD = tl.sum(pairs, axis=2)
    return tl.reshape(values_RD, [R])


@triton.jit
def finish_rstd(squares, eps, D: tl.constexpr):
    """1 / sqrt(mean + eps) of rows of D numbers, given nodes of their trees [R, …] -> fp32 [R]."""
    square_sum_R = sum_row(squares)
    # Inductor passes Python floats as fp64: unpinned, eps would drag the whole chain along.
    return tl.rsqrt(tl.fma(square_sum_R, 1.0 / D, tl.cast(eps, tl.float32)))


@triton.jit
def load_factor(weight_ptr, dtype, D: tl.constexpr, OFFSET: tl.constexpr, MODE: tl.constexpr):
    """offset + w, each rounded to `dtype` unless the mode is gemma -> fp32 [1, 2^LEVELS]."""
    columns_1D = row_columns(D)
    factor_1D = tl.load(weight_ptr + columns_1D, mask=columns_1D < D, other=0.0)
    rounded = tl.float32 if MODE == "gemma" else dtype
    return (factor_1D.to(rounded).to(tl.float32) + OFFSET).to(rounded).to(tl.float32)


@triton.jit
def normalize_rows(
    x_RD, weight_ptr, eps, dtype, D: tl.constexpr, OFFSET: tl.constexpr, MODE: tl.constexpr
):
    """Normalise fp32 rows of `dtype` values -> (y fp32 [R, 2^LEVELS], rstd fp32 [R])."""
    # fma(x, x, 0) keeps the square from being contracted into the first addition of the tree,
    # which rounds differently wherever both operands happen to lie in one thread.
    rstd_R = finish_rstd(tl.fma(x_RD, x_RD, 0.0), eps, D)
    scale_R = rstd_R.to(dtype).to(tl.float32) if MODE == "none" else rstd_R
    rounded = tl.float32 if MODE == "gemma" else dtype
    y_RD = (x_RD * scale_R[:, None]).to(rounded).to(tl.float32)
    if weight_ptr is not None:
        y_RD *= load_factor(weight_ptr, dtype, D, OFFSET, MODE)
    return y_RD, rstd_R


@triton.jit
def _rms_norm_row_kernel(
    y_ptr, x_ptr, weight_ptr, rstd_ptr, x_stride, eps,
    D: tl.constexpr, OFFSET: tl.constexpr, MODE: tl.constexpr, STORE_RSTD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_and_trigger(PDL)  # before every load: even the weight may be an optimiser's latest write
    row = tl.program_id(0).to(tl.int64)  # row · stride passes 2³¹ at 65,536 rows of 32,768
    # A tile of one row: a vector expanded after its load would be moved through shared memory.
    columns_1D = row_columns(D)
    mask_1D = columns_1D < D
    x_1D = tl.load(x_ptr + row * x_stride + columns_1D, mask=mask_1D, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    y_1D, rstd_1 = normalize_rows(x_1D, weight_ptr, eps, dtype, D, OFFSET, MODE)
    tl.store(y_ptr + row * D + columns_1D, y_1D.to(dtype), mask=mask_1D)
    if STORE_RSTD:
        tl.store(rstd_ptr + row + tl.arange(0, 1), rstd_1)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_block_kernel(
    y_ptr, x_ptr, weight_ptr, rstd_ptr, x_stride, M, eps,
    D: tl.constexpr, R: tl.constexpr, OFFSET: tl.constexpr, MODE: tl.constexpr,
    STORE_RSTD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    if PDL:
        # Into the L2, where all multiprocessors meet: what the kernel before still writes is newer
        # there. Only who starts while it runs gains, as norms behind each other do; and only whole
        # lines pay.
        LINE: tl.constexpr = 1024 // x_ptr.dtype.element_ty.primitive_bitwidth
        if triton.next_power_of_2(D) == D and D > LINE and tl.program_id(0) < _FIRST_WAVE:
            row_ptrs = x_ptr + tl.minimum(rows_R, M - 1)[:, None] * x_stride
            prefetch_l2(row_ptrs + tl.arange(0, D // LINE)[None, :] * LINE)
    wait_and_trigger(PDL)
    columns_1D = row_columns(D)
    mask_RD = (rows_R < M)[:, None] & (columns_1D < D)
    x_ptrs = x_ptr + rows_R[:, None] * x_stride + columns_1D
    x_RD = tl.load(x_ptrs, mask=mask_RD, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    y_RD, rstd_R = normalize_rows(x_RD, weight_ptr, eps, dtype, D, OFFSET, MODE)
    tl.store(y_ptr + rows_R[:, None] * D + columns_1D, y_RD.to(dtype), mask=mask_RD)
    if STORE_RSTD:
        tl.store(rstd_ptr + rows_R, rstd_R, mask=rows_R < M)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_backward_kernel(
    dx_ptr, dweight_partial_ptr, dy_ptr, x_ptr, weight_ptr, rstd_ptr, dy_stride, x_stride, M,
    D: tl.constexpr, R: tl.constexpr, OFFSET: tl.constexpr, MODE: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """With x̂ = x · rstd and g = dy · (offset + w):  dx = rstd · (g − x̂ · mean(g · x̂)),
    dw = Σ over rows of dy · x̂, of which each program stores its own share."""
    program = tl.program_id(0).to(tl.int64)
    columns_1D = row_columns(D)
    dtype = x_ptr.dtype.element_ty
    if weight_ptr is not None:
        factor_1D = load_factor(weight_ptr, dtype, D, OFFSET, MODE)
        dweight_RD = tl.zeros([R, triton.next_power_of_2(D)], tl.float32)
    for tile in range(TILES):
        rows_R = (program * TILES + tile) * R + tl.arange(0, R)
        mask_RD = (rows_R < M)[:, None] & (columns_1D < D)
        x_ptrs = x_ptr + rows_R[:, None] * x_stride + columns_1D
        dy_ptrs = dy_ptr + rows_R[:, None] * dy_stride + columns_1D
        x_RD = tl.load(x_ptrs, mask=mask_RD, other=0.0).to(tl.float32)
        g_RD = tl.load(dy_ptrs, mask=mask_RD, other=0.0).to(tl.float32)
        rstd_R = tl.load(rstd_ptr + rows_R, mask=rows_R < M, other=0.0)
        x_hat_RD = x_RD * rstd_R[:, None]
        if weight_ptr is not None:
            dweight_RD += g_RD * x_hat_RD
            g_RD *= factor_1D
        projection_R = sum_row(g_RD * x_hat_RD) * (1.0 / D)
        dx_RD = rstd_R[:, None] * (g_RD - x_hat_RD * projection_R[:, None])
        tl.store(dx_ptr + rows_R[:, None] * D + columns_1D, dx_RD.to(dtype), mask=mask_RD)
    if weight_ptr is not None:
        dweight_1D = tl.sum(dweight_RD, axis=0)[None, :]
        tl.store(dweight_partial_ptr + program * D + columns_1D, dweight_1D, mask=columns_1D < D)


@cache
def launch_shape(D: int, many_rows: bool, row_mode: str | None) -> tuple[int, int]:
    """(rows a program R, warps) of a launch; the rule is `rms_norm_forward`'s."""
    if row_mode == "block" or (row_mode is None and many_rows and D <= 1024):
        return max(triton.next_power_of_2(triton.cdiv(2048, D)), 2), 4
    if many_rows:
        return 1, min(2 ** round(math.log2(max(D / 512, 1))), 16)
    return 1, 1 if D <= 768 else min(triton.next_power_of_2(D) // 256, 16)


@cache
def has_pdl(device: int | torch.device) -> bool:
    """Whether programmatic dependent launch works: sm_90 and later, not in the interpreter."""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


def check_rows(x: Tensor, weight: Tensor | None, casting_mode: str, row_mode: str | None) -> None:
    """Raise ValueError for what the kernels cannot run."""
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(
            f"the launchers run Triton kernels and need CUDA tensors, got {x.device=}: call "
            "rms_norm, or set TRITON_INTERPRET=1 before the first import of triton"
        )
    D = x.shape[-1] if x.dim() else 0
    if x.dtype not in DTYPES or not 1 <= D <= MAX_HIDDEN:
        raise ValueError(f"need float [..., 1 to {MAX_HIDDEN}] rows, got {x.dtype=}, {x.shape=}")
    if x.stride()[-1] != 1 and D > 1:
        raise ValueError(f"the last dimension must be contiguous, got {x.stride()=}")
    if casting_mode not in CASTING_MODES or row_mode not in ROW_MODES:
        raise ValueError(
            f"{casting_mode=} not in {CASTING_MODES} or {row_mode=} not in {ROW_MODES}"
        )
    if weight is None:
        return
    if weight.shape != (D,) or weight.device != x.device or not weight.is_contiguous():
        raise ValueError(f"need a contiguous weight [{D}] beside x, got {weight.shape=}, "
                         f"{weight.stride()=}, {weight.device=}, {x.device=}")  # fmt: skip


def _forward(x, weight, eps, offset, casting_mode, row_mode, store):
    """Launch a forward kernel on checked arguments -> (y, rstd_M or, unless `store`, None)."""
    D = x.shape[-1]
    M, stride, device = x.numel() // D, D, x.get_device()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd_M = x.new_empty(M, dtype=torch.float32) if store else None
    if M == 0:
        return y, rstd_M
    if not x.is_contiguous():  # else the rows need no view, which takes the host as long as y
        x = x.reshape(-1, D)
        stride = x.stride()[0]
    R, warps = launch_shape(D, M >= MANY_ROWS, row_mode)
    pdl, eps = has_pdl(device), float(eps)
    constants = (offset, casting_mode, store, pdl)
    if R == 1:
        kernel, grid = _rms_norm_row_kernel, (M, 1, 1)
        args = (y, x, weight, rstd_M, stride, eps, D, *constants)
    else:
        kernel, grid = _rms_norm_block_kernel, (-(-M // R), 1, 1)
        args = (y, x, weight, rstd_M, stride, M, eps, D, R, *constants)
    dtype, bits = (None, 0) if weight is None else (weight.dtype, weight.data_ptr())
    odd = (bits | x.data_ptr() | stride) % 16 or stride >= 2**31
    key = None if odd else (device, x.dtype, dtype, D, R, warps, *constants)
    launch(kernel, grid, args, key=key, warps=warps, pdl=pdl)
    return y, rstd_M


def rms_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    casting_mode: str = "llama",
    inference_mode: bool = False,
    row_mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel: x [..., D] float, weight [D] or None -> (y like x, rstd fp32 [M] or [0]).

    x may have any row stride (`wide[..., :D]` is not copied). Never recorded by autograd.
    `inference_mode` leaves rstd empty. Raises ValueError for what the kernels cannot run.

    `row_mode` "row" runs one row a program, "block" several, with equal bits. None takes blocks of
    about 2,048 elements from 2,048 rows on while D <= 1,024, as one row a program is then bound by
    the rate at which programs start (measured on an H200, NOTES.md). A row alone wants one warp up
    to D = 768 and 8 columns a thread above; many rows want 16.
    """
    check_rows(x, weight, casting_mode, row_mode)
    y, rstd_M = _forward(x, weight, eps, offset, casting_mode, row_mode, not inference_mode)
    return y, x.new_empty(0, dtype=torch.float32) if inference_mode else rstd_M


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    *,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `rms_norm_forward`: dy like x, rstd fp32 [M] -> (dx like x, dweight or None).

    Roundings of the forward pass count as the identity. Deterministic: programs sum the weight's
    gradient over their own rows, one sum adds them. Raises ValueError also for an empty rstd.
    """
    check_rows(x, weight, casting_mode, None)
    D = x.shape[-1]
    x_MD, dy_MD = x.reshape(-1, D), dy.reshape(-1, D)
    M = x_MD.shape[0]
    if dy.shape != x.shape or rstd.numel() != M:
        raise ValueError(f"need dy like x, rstd a row: {dy.shape=}, {x.shape=}, {rstd.shape=}")
    if dy_MD.stride(1) != 1:  # autograd's choice, not the caller's: sum() expands a scalar
        dy_MD = dy_MD.contiguous()
    block = triton.next_power_of_2(D)
    R = max(2048 // block, 1)
    tiles = triton.next_power_of_2(triton.cdiv(max(M, 1), R * MAX_BACKWARD_PROGRAMS))
    programs = triton.cdiv(M, R * tiles)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight_PD = None if weight is None else x.new_empty((programs, D), dtype=torch.float32)
    if M:
        _rms_norm_backward_kernel[(programs,)](
            dx, dweight_PD, dy_MD, x_MD, weight, rstd, dy_MD.stride(0), x_MD.stride(0), M,
            D, R, offset, casting_mode, tiles, num_warps=min(max(block // 512, 4), 32),
        )  # fmt: skip
    return dx, None if weight is None else dweight_PD.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """Training mode: the forward stores rstd, the backward uses it."""

    @staticmethod
    def forward(ctx, x, weight, settings):  # in one tuple: `apply` inspects every argument
        y, rstd_M = _forward(x, weight, *settings, None, True)
        ctx.save_for_backward(x, weight, rstd_M)
        ctx.settings = settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        _, offset, mode = ctx.settings
        gradients = rms_norm_backward(dy, *ctx.saved_tensors, offset=offset, casting_mode=mode)
        return *gradients, None


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    casting_mode: str = "llama",
    inference_mode: bool | None = None,
) -> Tensor:
    """RMSNorm over the last dimension: x [..., D], weight [D] or None -> y like x.

    CUDA tensors go to the kernels, all others to PyTorch; both are differentiable. `inference_mode`
    None means training mode exactly when autograd records the call; True where it would record
    is a ValueError. On one device a row's bits do not depend on the other rows of the call.
    """
    records = torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad)
    )
    if inference_mode is None:
        inference_mode = not records
    elif inference_mode and records:
        raise ValueError("inference_mode=True keeps no rstd, but autograd records: use no_grad()")
    if not x.is_cuda:
        if casting_mode not in CASTING_MODES or not x.is_floating_point():
            raise ValueError(f"{casting_mode=} not in {CASTING_MODES}, or {x.dtype=} not a float")
        if weight is not None and weight.shape != x.shape[-1:]:
            raise ValueError(f"need a weight [{x.shape[-1]}], got {weight.shape=}")
        # Without roundings between, all modes are torch's definition: the same bits as the
        # reference from one call, which a decode step on the CPU makes 61 times.
        if x.dtype == torch.float32 and not offset and (weight is None or weight.dtype == x.dtype):
            return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
        return rms_norm_reference(x, weight, eps, offset=offset, casting_mode=casting_mode)
    check_rows(x, weight, casting_mode, None)
    settings = (eps, offset, casting_mode)
    if inference_mode:
        return _forward(x, weight, *settings, None, False)[0]
    return _RMSNorm.apply(x, weight, settings)

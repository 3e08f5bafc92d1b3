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
warps and a fused prologue that imports `sum_row` and `row_rstd` give equal bits. The sum of an
aligned block of 2^n columns is a node of the tree: it may be computed elsewhere and added later.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CASTING_MODES = ("llama", "gemma", "none")
MAX_HIDDEN = 32_768  # one program holds a whole row in registers
MAX_BACKWARD_PROGRAMS = 1024
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
def sum_row(values_RD, R: tl.constexpr, LEVELS: tl.constexpr):
    """Sum fp32 [R, 2^LEVELS] over columns by the tree of the module's docstring -> [R]."""
    for level in tl.static_range(LEVELS):
        pairs = tl.reshape(values_RD, [R, 1 << (LEVELS - level - 1), 2])
        if level == 8:
            # 256 columns are what the lanes of a warp load. The next pairs may lie in two warps;
            # `split` brings both into one thread, so the compiler gathers what is left into one
            # warp by a single exchange through shared memory: one barrier, not one a level.
            left, right = tl.split(pairs)
            values_RD = left + right
        else:
            values_RD = tl.sum(pairs, axis=2)
    return tl.reshape(values_RD, [R])


@triton.jit
def row_rstd(x_RD, eps, D: tl.constexpr, R: tl.constexpr, LEVELS: tl.constexpr):
    """1 / sqrt(mean(x²) + eps) of fp32 rows [R, 2^LEVELS] with zeros past column D -> fp32 [R]."""
    # fma(x, x, 0) keeps the square from being contracted into the first addition of the tree,
    # which rounds differently wherever both operands happen to lie in one thread.
    square_sum_R = sum_row(tl.fma(x_RD, x_RD, 0.0), R, LEVELS)
    # Inductor passes Python floats as fp64: unpinned, eps would drag the whole chain along.
    return tl.rsqrt(tl.fma(square_sum_R, 1.0 / D, tl.cast(eps, tl.float32)))


@triton.jit
def load_factor(
    weight_ptr, columns, D: tl.constexpr, OFFSET: tl.constexpr, dtype, MODE: tl.constexpr
):
    """offset + w, each rounded to `dtype` unless the mode is gemma -> fp32 [columns]."""
    factor = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    if MODE != "gemma":
        factor = factor.to(dtype).to(tl.float32)
    if OFFSET != 0.0:
        factor += OFFSET
        if MODE != "gemma":
            factor = factor.to(dtype).to(tl.float32)
    return factor


@triton.jit
def scale_row(x_RD, rstd_R, dtype, MODE: tl.constexpr):
    """The normalised rows before the weight, rounded as the casting mode says -> fp32 [R, D]."""
    if MODE == "none":
        rstd_R = rstd_R.to(dtype).to(tl.float32)
    y_RD = x_RD * rstd_R[:, None]
    if MODE != "gemma":
        y_RD = y_RD.to(dtype).to(tl.float32)
    return y_RD


@triton.jit
def normalize_rows(
    x_RD,
    weight_ptr,
    columns,
    eps,
    dtype,
    D: tl.constexpr,
    R: tl.constexpr,
    LEVELS: tl.constexpr,
    OFFSET: tl.constexpr,
    MODE: tl.constexpr,
):
    """Normalise fp32 rows of `dtype` values -> (y fp32 [R, 2^LEVELS], rstd fp32 [R])."""
    rstd_R = row_rstd(x_RD, eps, D, R, LEVELS)
    y_RD = scale_row(x_RD, rstd_R, dtype, MODE)
    if weight_ptr is not None:
        y_RD *= load_factor(weight_ptr, columns, D, OFFSET, dtype, MODE)[None, :]
    return y_RD, rstd_R


@triton.jit
def _rms_norm_row_kernel(
    y_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    x_stride,
    eps,
    D: tl.constexpr,
    LEVELS: tl.constexpr,
    OFFSET: tl.constexpr,
    MODE: tl.constexpr,
    STORE_RSTD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row · stride passes 2³¹ at 65,536 rows of 32,768
    columns = tl.arange(0, 1 << LEVELS)
    mask = columns < D
    x_D = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    y_1D, rstd_1 = normalize_rows(
        x_D[None, :], weight_ptr, columns, eps, dtype, D, 1, LEVELS, OFFSET, MODE
    )
    tl.store(y_ptr + row * D + columns[None, :], y_1D.to(dtype), mask=mask[None, :])
    if STORE_RSTD:
        tl.store(rstd_ptr + row + tl.arange(0, 1), rstd_1)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_block_kernel(
    y_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    x_stride,
    M,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    LEVELS: tl.constexpr,
    OFFSET: tl.constexpr,
    MODE: tl.constexpr,
    STORE_RSTD: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    columns = tl.arange(0, 1 << LEVELS)
    mask = (rows < M)[:, None] & (columns < D)[None, :]
    x_ptrs = x_ptr + rows[:, None] * x_stride + columns[None, :]
    x_RD = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    y_RD, rstd_R = normalize_rows(x_RD, weight_ptr, columns, eps, dtype, D, R, LEVELS, OFFSET, MODE)
    tl.store(y_ptr + rows[:, None] * D + columns[None, :], y_RD.to(dtype), mask=mask)
    if STORE_RSTD:
        tl.store(rstd_ptr + rows, rstd_R, mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_backward_kernel(
    dx_ptr,
    dweight_partial_ptr,
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dy_stride,
    x_stride,
    M,
    D: tl.constexpr,
    R: tl.constexpr,
    LEVELS: tl.constexpr,
    OFFSET: tl.constexpr,
    MODE: tl.constexpr,
    TILES: tl.constexpr,
):
    """With x̂ = x · rstd and g = dy · (offset + w):  dx = rstd · (g − x̂ · mean(g · x̂)),
    dw = Σ over rows of dy · x̂, of which each program stores its own share."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, 1 << LEVELS)
    dtype = x_ptr.dtype.element_ty
    if weight_ptr is not None:
        factor_1D = load_factor(weight_ptr, columns, D, OFFSET, dtype, MODE)[None, :]
        dweight_D = tl.zeros([1 << LEVELS], tl.float32)
    for tile in range(TILES):
        rows = (program * TILES + tile) * R + tl.arange(0, R)
        mask = (rows < M)[:, None] & (columns < D)[None, :]
        x_ptrs = x_ptr + rows[:, None] * x_stride + columns[None, :]
        dy_ptrs = dy_ptr + rows[:, None] * dy_stride + columns[None, :]
        x_RD = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        g_RD = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        rstd_R = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        if weight_ptr is not None:
            dweight_D += tl.sum(g_RD * scale_row(x_RD, rstd_R, dtype, MODE), axis=0)
            g_RD *= factor_1D
        x_hat_RD = x_RD * rstd_R[:, None]
        projection_R = sum_row(g_RD * x_hat_RD, R, LEVELS) * (1.0 / D)
        dx_RD = rstd_R[:, None] * (g_RD - x_hat_RD * projection_R[:, None])
        tl.store(dx_ptr + rows[:, None] * D + columns[None, :], dx_RD.to(dtype), mask=mask)
    if weight_ptr is not None:
        tl.store(dweight_partial_ptr + program * D + columns, dweight_D, mask=columns < D)


@cache
def launch_shape(D: int, many_rows: bool, row_mode: str | None) -> tuple[int, int, int]:
    """(rows a program R, tree levels, warps) of a launch; the rule is `rms_norm_forward`'s."""
    levels = (D - 1).bit_length()
    if row_mode == "block" or (row_mode is None and many_rows and D <= 1024):
        return max(4096 >> levels, 2), levels, 4
    return 1, levels, min(max(1 << levels >> 9, 1), 16)


def _check(x: Tensor, weight: Tensor | None, casting_mode: str, row_mode: str | None) -> None:
    """Raise ValueError for what the kernels cannot run."""
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(
            f"the launchers run Triton kernels and need CUDA tensors, got {x.device=}: call "
            "rms_norm, or set TRITON_INTERPRET=1 before the first import of triton"
        )
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_HIDDEN:
        raise ValueError(f"the last dimension must be 1 to {MAX_HIDDEN}, got {x.shape=}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"the last dimension must be contiguous, got {x.stride()=}")
    if casting_mode not in CASTING_MODES:
        raise ValueError(f"{casting_mode=} is not one of {CASTING_MODES}")
    if row_mode not in (None, "row", "block"):
        raise ValueError(f"{row_mode=} is neither None, 'row' nor 'block'")
    if weight is not None and (
        weight.shape != x.shape[-1:] or weight.device != x.device or not weight.is_contiguous()
    ):
        raise ValueError(
            f"weight must be contiguous, [{x.shape[-1]}] and on {x.device}, "
            f"got {weight.shape=}, {weight.stride()=}, {weight.device=}"
        )


def _forward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    casting_mode: str,
    row_mode: str | None,
    rstd_M: Tensor | None,
) -> Tensor:
    """Launch one of the forward kernels; `rstd_M` None compiles its store out."""
    D = x.shape[-1]
    x_MD = x if x.dim() == 2 else x.reshape(-1, D)
    M = x_MD.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if M == 0:
        return y
    R, levels, warps = launch_shape(D, M >= 4096, row_mode)
    stride, store = x_MD.stride(0), rstd_M is not None
    if R == 1:
        _rms_norm_row_kernel[(M,)](
            y, x_MD, weight, rstd_M, stride, eps, D, levels, offset, casting_mode, store,
            num_warps=warps,
        )  # fmt: skip
    else:
        _rms_norm_block_kernel[(triton.cdiv(M, R),)](
            y, x_MD, weight, rstd_M, stride, M, eps, D, R, levels, offset, casting_mode, store,
            num_warps=warps,
        )  # fmt: skip
    return y


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
    With `inference_mode` rstd is empty. `row_mode` "row" runs one row a program, "block" several;
    both give the same bits. Raises ValueError for shapes, devices or modes it cannot run.
    """
    _check(x, weight, casting_mode, row_mode)
    rows = 0 if inference_mode else x.numel() // x.shape[-1]
    rstd_M = torch.empty(rows, dtype=torch.float32, device=x.device)
    stored = None if inference_mode else rstd_M
    return _forward(x, weight, eps, offset, casting_mode, row_mode, stored), rstd_M


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

    Roundings of the forward pass are taken as the identity. Deterministic: each program sums the
    weight's gradient over its own rows in fp32, and one sum adds the programs' shares.
    Raises ValueError as the forward does, and for the empty rstd of an inference-mode forward.
    """
    _check(x, weight, casting_mode, None)
    D = x.shape[-1]
    x_MD, dy_MD = x.reshape(-1, D), dy.reshape(-1, D)
    M = x_MD.shape[0]
    if dy.shape != x.shape or rstd.numel() != M:
        raise ValueError(
            f"need dy like x and one rstd a row: {dy.shape=}, {x.shape=}, {rstd.shape=}"
        )
    if dy_MD.stride(1) != 1:  # autograd's choice, not the caller's: sum() expands a scalar
        dy_MD = dy_MD.contiguous()
    levels = (D - 1).bit_length()
    R = max(2048 >> levels, 1)
    tiles = triton.next_power_of_2(triton.cdiv(M, R * MAX_BACKWARD_PROGRAMS))
    programs = triton.cdiv(M, R * tiles)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight_PD = None
    if weight is not None:
        dweight_PD = torch.empty((programs, D), dtype=torch.float32, device=x.device)
    if M:
        _rms_norm_backward_kernel[(programs,)](
            dx, dweight_PD, dy_MD, x_MD, weight, rstd, dy_MD.stride(0), x_MD.stride(0), M,
            D, R, levels, offset, casting_mode, tiles, num_warps=min(max(1 << levels >> 9, 4), 32),
        )  # fmt: skip
    return dx, None if weight is None else dweight_PD.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """Training mode: the forward stores rstd, the backward uses it."""

    @staticmethod
    def forward(ctx, x_MD, weight, eps, offset, casting_mode):
        y_MD, rstd_M = rms_norm_forward(x_MD, weight, eps, offset=offset, casting_mode=casting_mode)
        ctx.save_for_backward(x_MD, weight, rstd_M)
        ctx.options = {"offset": offset, "casting_mode": casting_mode}
        return y_MD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MD):
        return *rms_norm_backward(dy_MD, *ctx.saved_tensors, **ctx.options), None, None, None


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
        raise ValueError(
            "inference_mode=True keeps no rstd, but autograd records this call: "
            "use torch.no_grad() or inference_mode=None"
        )
    if not x.is_cuda:
        if casting_mode not in CASTING_MODES:
            raise ValueError(f"{casting_mode=} is not one of {CASTING_MODES}")
        # Without roundings between, all modes are torch's definition: the same bits as the
        # reference from one call, which a decode step on the CPU makes 61 times.
        if x.dtype == torch.float32 and not offset and (weight is None or weight.dtype == x.dtype):
            return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
        return rms_norm_reference(x, weight, eps, offset=offset, casting_mode=casting_mode)
    if inference_mode:
        _check(x, weight, casting_mode, None)
        return _forward(x, weight, eps, offset, casting_mode, None, None)
    y_MD = _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps, offset, casting_mode)
    return y_MD.view(x.shape)

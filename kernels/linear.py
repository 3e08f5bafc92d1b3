"""Products: y = x Wᵀ + b, or that plus a residual; of few rows, with bits of one row's own.

Shapes: M rows, K inputs, N outputs.

A library picks its algorithm, hence its summation order, from the number of rows, so that a token
verified among five rows gets other bits than the same token decoded alone. Decoding therefore runs
in tiles of a fixed number of rows, padded: every call has the same shape, and a row's bits depend
on that row alone. The padding is free or better, because few-row products are bound by reading the
weight (measured, NOTES.md).
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def row_tile(device: torch.device, dtype: torch.dtype) -> int:
    """Rows of one decode pass: as many as cost little more than one.

    16 on a GPU (one MMA tile), 4 on a CPU in fp32, and 8 in bf16 if the CPU multiplies bf16 itself
    (AVX512-BF16). Otherwise half precision costs a full pass a row there, and the tile is one row.
    """
    if device.type == "cuda":
        return 16
    if dtype == torch.float32:
        return 4
    return 8 if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() else 1


def block_linear(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, residual_MN: Tensor | None = None
) -> Tensor:
    """`F.linear`, plus `residual_MN`, into which a GPU adds the product where nothing records."""
    if residual_MN is None:
        return linear(x_MK, weight_NK, bias_N)
    if x_MK.is_cuda and bias_N is None and not torch.is_grad_enabled():
        return residual_MN.addmm_(x_MK, weight_NK.t())
    return residual_MN + linear(x_MK, weight_NK, bias_N)


def tile_linear(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, residual_MN: Tensor | None = None
) -> Tensor:
    """`block_linear` of one tile; `x_MK` has exactly `row_tile` rows and is contiguous."""
    if x_MK.is_cuda or x_MK.dtype != torch.float32:
        return block_linear(x_MK, weight_NK, bias_N, residual_MN)
    # MKL is several times faster with the weight on the left and few columns on the right.
    y_MN = torch.mm(weight_NK, x_MK.t()).t().contiguous()
    y_MN = y_MN if bias_N is None else y_MN.add_(bias_N)
    return y_MN if residual_MN is None else y_MN.add_(residual_MN)

"""Mixture of experts: each row goes through its A best of E gated feed-forward networks.

Shapes: M rows, D hidden, F expert width, E experts, A experts a row.
out = Σ_a w_a · down_e(silu(gate_e x) · up_e x), e = the row's a-th expert, summed in slot order.
Sources: Shazeer et al. 2017; Jiang et al. 2024 (Mixtral: softmax, then top-k, then renormalise).
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear, silu

from draftnorm.kernels.gated import gated
from draftnorm.kernels.linear import tile_linear


def route(logits_ME: Tensor, experts: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """A row's experts, best first (ties to the lowest id), and their fp32 weights: both [M, A]."""
    scores_ME, ids_ME = torch.sort(
        torch.softmax(logits_ME.float(), dim=-1), dim=-1, descending=True, stable=True
    )
    weights_MA, ids_MA = scores_ME[:, :experts], ids_ME[:, :experts]
    if renormalize:
        weights_MA = weights_MA / weights_MA.sum(dim=-1, keepdim=True)
    return ids_MA, weights_MA


def experts_reference(
    x_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The definition: every expert on every row, then the weighted sum of the chosen ones."""
    gate_MEF, up_MEF = torch.einsum("md,efd->mef", x_MD, gate_up_E2FD).chunk(2, dim=-1)
    y_MED = torch.einsum("mef,edf->med", silu(gate_MEF) * up_MEF, down_EDF)
    y_MAD = y_MED.gather(1, ids_MA[:, :, None].expand(-1, -1, x_MD.shape[1]))
    return (y_MAD * weights_MA[:, :, None]).sum(dim=1)


def grouped_experts(
    x_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Rows sorted by expert, one product an expert; differentiable, for prefill and training."""
    (M, A), D = ids_MA.shape, x_MD.shape[1]
    sorted_ids, order = ids_MA.flatten().sort(stable=True)  # of the M·A (row, slot) pairs
    # Not bincount, for which the host waits: a training step is bound by its launches.
    experts_E = torch.arange(gate_up_E2FD.shape[0], device=ids_MA.device)
    ends_E = torch.searchsorted(sorted_ids, experts_E, right=True, out_int32=True)
    pairs = x_MD[:, None].expand(M, A, D).reshape(M * A, D)
    both = _product_by_expert(_Permute.apply(pairs, order), gate_up_E2FD, ends_E)
    y = _product_by_expert(gated(both), down_EDF, ends_E)
    y_MAD = _Permute.apply(y, torch.argsort(order)).view(M, A, D)
    return (y_MAD * weights_MA[:, :, None].to(y.dtype)).sum(dim=1)


def tile_experts(
    x_MD: Tensor,
    ids_MA: Tensor,
    weights_MA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    rows: int,
) -> tuple[Tensor, int]:
    """One decode tile of which the first `rows` are real; also returns how many experts it read.

    Each expert that a real row chose computes the whole tile, so that the shape of its products,
    and with it the bits of a row, do not depend on who else is in the tile.
    """
    ids = ids_MA[:rows].tolist()
    chosen = sorted({expert for row in ids for expert in row})
    y_UMD = []
    for expert in chosen:
        both = tile_linear(x_MD, gate_up_E2FD[expert])
        y_UMD.append(tile_linear(gated(both), down_EDF[expert]))
    place = {expert: u for u, expert in enumerate(chosen)}
    ids += [[chosen[0]] * ids_MA.shape[1]] * (len(x_MD) - rows)  # padding rows read something
    places_MA = torch.tensor([[place[expert] for expert in row] for row in ids], device=x_MD.device)
    rows_M1 = torch.arange(len(x_MD), device=x_MD.device)[:, None]
    y_MAD = torch.stack(y_UMD)[places_MA, rows_M1] * weights_MA[:, :, None].to(x_MD.dtype)
    out_MD = y_MAD[:, 0]
    for slot in range(1, y_MAD.shape[1]):
        out_MD = out_MD + y_MAD[:, slot]
    return out_MD, len(chosen)


def _product_by_expert(x_PK: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """x · Wᵀ where rows up to ends[0] belong to expert 0, those from there to ends[1] to 1 …"""
    if x_PK.is_cuda and x_PK.dtype == torch.bfloat16:
        return grouped_mm(x_PK, weight_ENK.transpose(1, 2), offs=ends_E)
    parts = x_PK.tensor_split(ends_E[:-1].tolist())
    return torch.cat([linear(x, w) for x, w in zip(parts, weight_ENK, strict=True)])


class _Permute(torch.autograd.Function):
    """Rows in another order. Its backward is the inverse order: a gather, no atomic additions."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x[order]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return gradient[torch.argsort(order)], None

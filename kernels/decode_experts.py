"""Routing of a decode step: which experts the rows touch, and with what weight.

Legend: M rows, E experts, A experts a row, U experts touched, R = 16 rows of a tile.

One program, no host: softmax of the router's logits, the A largest (ties to the lowest id),
optionally renormalised, and the list of touched experts in order of id. The expert's products are
`projection`'s, with one grid line a listed expert, so that each touched weight is read once, and
the results of a row's experts are summed in order of id. A row's weights come from its own logits
and an expert that it did not choose adds exact zeros: its bits do not depend on the other rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftnorm.kernels.operands import wait_and_trigger

_ROWS: tl.constexpr = tl.constexpr(16)


@triton.jit(do_not_specialize=["M", "capacity"])
def _route_kernel(
    chosen_ptr, routing_ptr, logits_ptr, M, capacity,
    E: tl.constexpr, A: tl.constexpr, BLOCK_E: tl.constexpr, RENORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_and_trigger(PDL)
    expert = tl.arange(0, BLOCK_E)
    touched_E = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, M, _ROWS):
        row = first + tl.arange(0, _ROWS)
        mask = (row < M)[:, None] & (expert < E)[None, :]
        logits = tl.load(
            logits_ptr + row[:, None] * E + expert[None, :], mask=mask, other=float("-inf")
        )
        largest_R = tl.max(tl.where((row < M)[:, None], logits, 0.0), axis=1)
        scores = tl.exp(logits - largest_R[:, None])
        scores = tl.where(mask, scores / tl.sum(scores, axis=1)[:, None], -1.0)
        picked = scores < -1.0  # none yet
        for _ in tl.static_range(A):
            left = tl.where(picked, -1.0, scores)
            best_R = tl.max(left, axis=1)
            id_R = tl.min(tl.where(left == best_R[:, None], expert[None, :], E - 1), axis=1)
            picked |= expert[None, :] == id_R[:, None]
        weights = tl.where(picked, scores, 0.0)
        if RENORMALIZE:
            weights = weights / tl.sum(weights, axis=1)[:, None]
        picked &= mask
        place = routing_ptr + expert[None, :] * capacity + row[:, None]
        tl.store(place, weights, mask=mask)
        touched_E = tl.maximum(touched_E, tl.max(picked.to(tl.int32), axis=0))
    index_E = tl.cumsum(touched_E, axis=0)
    tl.store(chosen_ptr + index_E, expert, mask=touched_E > 0)  # the first goes to place 1
    tl.store(chosen_ptr, tl.sum(touched_E, axis=0))


def route_rows(
    chosen: Tensor,
    routing_EM: Tensor,
    logits_ME: Tensor,
    *,
    rows: int,
    experts: int,
    renormalize: bool,
    pdl: dict[str, bool],
) -> None:
    """Launch: fp32 logits [M, E] -> `chosen` int32 [1 + E], the number of touched experts and then
    their ids in order; `routing_EM` fp32 [E, capacity], an expert's weight in a row or 0.
    """
    E = logits_ME.shape[1]
    _route_kernel[(1,)](
        chosen, routing_EM, logits_ME, rows, routing_EM.shape[1],
        E, experts, triton.next_power_of_2(E), renormalize, **pdl,
    )  # fmt: skip


def route_rows_reference(
    logits_ME: Tensor, experts: int, *, renormalize: bool
) -> tuple[list[int], Tensor]:
    """The definition: touched experts in order, and the weights [E, M]."""
    scores_ME = torch.softmax(logits_ME, dim=-1)
    ids_MA = torch.sort(scores_ME, dim=-1, descending=True, stable=True).indices[:, :experts]
    picked_MA = scores_ME.gather(1, ids_MA)
    if renormalize:
        picked_MA = picked_MA / picked_MA.sum(dim=-1, keepdim=True)
    routing_ME = torch.zeros_like(scores_ME).scatter(1, ids_MA, picked_MA)
    return sorted(set(ids_MA.flatten().tolist())), routing_ME.t()

"""Attention of a decode step over the cache: few query rows, many keys, split by absolute position.

Legend: B sequences (or tree paths), T rows of each, M = B·T rows, H query heads, G key/value heads,
K head size, S cache slots, R = 16 rows of a tile: rows of one sequence × the heads of one group.

A program handles one split of 512 keys at an absolute multiple for one tile; each of its warps has
a slab of every block of keys and a running softmax of its own. Keys and values go from their loads
to the matrix instruction in registers (operands.py), those of the first block before the wait.
Slabs, then the splits of an aligned group of 16, then groups are joined in a fixed order, and what
a row does not see adds exact zeros. So its bits depend on its own position, keys and window alone:
not on the rows beside it, not on how many splits the grid has room for. The last program of a group
to finish joins it.

A row at position p sees keys max(0, p - window + 1) … p; the new rows' keys are in the cache
already. Position p lives in slot p or, in a tree, where `path_slots` [B, path length] says: the
slots of a path's positions from `path_start[b]` on. Keys thus stay in order of position, whatever
branch a row is on.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from draftnorm.kernels.attention import attention_reference
from draftnorm.kernels.operands import arrive, eights, operand, sum_slabs

ROWS = 16
SPLIT = 512
GROUP_SPLITS = 16  # splits joined at a time
BLOCK_S, SLABS = 64, 4  # keys of a block, of which registers hold two; its slabs, one a warp
_ROWS: tl.constexpr = tl.constexpr(ROWS)
_GROUP_SPLITS: tl.constexpr = tl.constexpr(GROUP_SPLITS)


@triton.jit
def _rescale(new_max, old_max):
    """exp2(old - new), 0 where nothing was seen yet (both may be -inf)."""
    return tl.where(old_max == float("-inf"), 0.0, tl.exp2(old_max - new_max))


@triton.jit
def _queries(r, tile, b, T, group, HEADS: tl.constexpr, HEAD_TILES: tl.constexpr, H: tl.constexpr):
    """Of the rows r of a tile: which rows of the step they are, which lines of q, and if any."""
    HEADS_IN_TILE: tl.constexpr = min(HEADS, _ROWS)
    ROWS_IN_TILE: tl.constexpr = _ROWS // HEADS_IN_TILE
    t = tile * ROWS_IN_TILE + r // HEADS_IN_TILE
    head = tl.program_id(1) % HEAD_TILES * _ROWS + r % HEADS_IN_TILE
    ok = (r < ROWS_IN_TILE * HEADS_IN_TILE) & (t < T) & (head < HEADS)
    row = (b * T + t).to(tl.int64)
    return row, row * H + group * HEADS + head, ok


@triton.jit
def _load_lines(ptr, base, s, begin, end, dim, path, K: tl.constexpr):
    """Keys or values at those positions s that are in begin … end - 1, zeros at the others."""
    slot = s
    slots_ptr, start_ptr, length, b = path
    if slots_ptr is not None:
        step = s - tl.load(start_ptr + b)
        on_path = (step >= 0) & (step < length)
        slot = tl.load(slots_ptr + b * length + step, mask=on_path, other=0)
        slot = tl.where(step >= 0, slot, s)
    mask = (s >= begin) & (s < end) & (dim < K)
    return tl.load(ptr + base + slot.to(tl.int64) * K + dim, mask=mask, other=0.0)


@triton.jit
def _attend(
    q_LRK, k_LNK, v_LNK, s_LN, position_R, scale, acc_LRK, max_LR, sum_LR, WINDOW: tl.constexpr
):
    """One block of keys into the running softmax of each slab: nothing leaves its warp."""
    scores = tl.dot(q_LRK, tl.permute(k_LNK, (0, 2, 1)), input_precision="ieee") * scale
    seen = s_LN[:, None, :] <= position_R[None, :, None]
    if WINDOW > 0:
        seen &= s_LN[:, None, :] > position_R[None, :, None] - WINDOW
    scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(max_LR, tl.max(scores, axis=2))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf - -inf is NaN
    p = tl.exp2(scores - shift[:, :, None])
    keep = _rescale(shift, max_LR)
    acc_LRK = acc_LRK * keep[:, :, None]
    acc_LRK = tl.dot(p.to(v_LNK.dtype), v_LNK, acc_LRK, input_precision="ieee")
    return acc_LRK, new_max, sum_LR * keep + tl.sum(p, axis=2)


@triton.jit
def _store_part(acc_ptr, extremes_ptr, part, acc_RK, max_R, sum_R, row_ok, dim, K: tl.constexpr):
    """Leave one part of a tile for the program that joins: acc [16, K], maximum and sum [2, 16]."""
    r = tl.arange(0, _ROWS)
    place = acc_ptr + (part * _ROWS + r)[:, None] * K + dim[None, :]
    tl.store(place, acc_RK, mask=row_ok[:, None] & (dim < K)[None, :])
    tl.store(extremes_ptr + part * (2 * _ROWS) + r, max_R)
    tl.store(extremes_ptr + part * (2 * _ROWS) + _ROWS + r, sum_R)


@triton.jit
def _join(acc_ptr, extremes_ptr, first, last, row_ok, dim, K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Join parts first … last, an aligned block of four at a time, so that their loads overlap."""
    r = tl.arange(0, _ROWS)
    max_R = tl.full([_ROWS], float("-inf"), tl.float32)
    sum_R = tl.zeros([_ROWS], tl.float32)
    acc_RK = tl.zeros([_ROWS, BLOCK_D], tl.float32)
    for start in range(first // 4 * 4, last + 1, 4):
        # A part that is not there weighs exp2(-inf) = 0 and adds exact zeros.
        # .cg: other programs wrote these, so this one's L1 must not answer.
        part = start + tl.arange(0, 4)
        live = ((part >= first) & (part <= last))[:, None]
        extremes = extremes_ptr + part[:, None] * (2 * _ROWS) + r[None, :]
        max_PR = tl.load(extremes, mask=live, other=float("-inf"), cache_modifier=".cg")
        sum_PR = tl.load(extremes + _ROWS, mask=live, other=0.0, cache_modifier=".cg")
        place = acc_ptr + (part[:, None] * _ROWS + r[None, :])[:, :, None] * K + dim[None, None, :]
        mask = (live & row_ok[None, :])[:, :, None] & (dim < K)[None, None, :]
        acc_PRK = tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(max_R, tl.max(max_PR, axis=0))
        weight_PR, keep_R = _rescale(new_max[None, :], max_PR), _rescale(new_max, max_R)
        sum_R = sum_R * keep_R + tl.sum(sum_PR * weight_PR, axis=0)
        joined_RK = sum_slabs(acc_PRK * weight_PR[:, :, None], 4, _ROWS, BLOCK_D)
        acc_RK = acc_RK * keep_R[:, None] + joined_RK
        max_R = new_max
    return acc_RK, max_R, sum_R


@triton.jit
def _store_out(out_ptrs, acc_RK, sum_R, mask):
    out_RK = acc_RK / tl.where(sum_R == 0.0, 1.0, sum_R)[:, None]
    tl.store(out_ptrs, out_RK.to(out_ptrs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "S", "sequence_lines", "path_length", "scale"])
def _decode_attention_kernel(
    out_ptr, q_ptr, key_ptr, value_ptr, position_ptr, T, S, sequence_lines, scale,
    path_slots_ptr, path_start_ptr, path_length,
    acc_ptr, extremes_ptr, ticket_ptr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, L: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = H // G
    HEAD_TILES: tl.constexpr = (HEADS + _ROWS - 1) // _ROWS
    row_tiles = tl.cdiv(T, _ROWS // min(HEADS, _ROWS))
    b, tile = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles
    group = tl.program_id(1) // HEAD_TILES
    split, splits = tl.program_id(2), tl.num_programs(2)
    r, dim = tl.arange(0, _ROWS), tl.arange(0, BLOCK_D)
    row, line_R, row_ok = _queries(r, tile, b, T, group, HEADS, HEAD_TILES, H)
    base = (b.to(tl.int64) * sequence_lines + group * S) * K

    # What kernels before the last one wrote may be read before the wait: the last one has waited
    # for them before it let this one start. So positions, and keys of earlier steps.
    position_R = tl.load(position_ptr + row, mask=row_ok, other=-1)
    begin = tl.load(position_ptr + b * T)  # from here on keys are the last kernel's
    last_key = tl.max(position_R)
    last_split = last_key // SPLIT
    first_split = 0
    if WINDOW > 0:
        first_seen = tl.min(tl.where(row_ok, position_R, last_key)) - WINDOW + 1
        first_split = tl.maximum(first_seen, 0) // SPLIT
    end = tl.minimum(split * SPLIT + SPLIT, last_key + 1)

    # A block is L slabs of N neighbours, one slab a warp. Operands are loaded where the matrix
    # instruction wants them, as in a projection: keys by `operand`; of the values a thread takes
    # 8 neighbouring dimensions of every key whose weight it will hold.
    N: tl.constexpr = BLOCK_S // L
    C: tl.constexpr = BLOCK_D // 32
    D: tl.constexpr = BLOCK_D // 64
    slab = tl.arange(0, L)[None, :, None, None, None] * N + split * SPLIT
    s_K = slab + eights(N)
    dim_K = (tl.arange(0, C)[:, None] * 32 + tl.arange(0, 32)[None, :])[None, None, :, None, :]
    pair = tl.arange(0, 4)[:, None] * 2 + tl.arange(0, N // 4)[None, :] % 2
    s_V = slab + (pair + tl.arange(0, N // 4)[None, :] // 2 * 8)[:, None, :, None, None]
    dim_V = (tl.arange(0, D)[:, None] * 64 + tl.arange(0, 64)[None, :])[None, None, None, :, :]
    old = tl.minimum(end, begin)
    path = (path_slots_ptr, path_start_ptr, path_length, b)
    k = _load_lines(key_ptr, base, s_K, 0, old, dim_K, path, K)
    v = _load_lines(value_ptr, base, s_V, 0, old, dim_V, path, K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    if (split < first_split) | (split > last_split):
        return
    _, line_Q, ok_Q = _queries(eights(_ROWS), tile, b, T, group, HEADS, HEAD_TILES, H)
    place_Q = tl.broadcast_to(line_Q * K + dim_K, [8, L, C, _ROWS // 8, 32])
    q = tl.load(q_ptr + place_Q, mask=ok_Q & (dim_K < K), other=0.0)
    if begin < tl.minimum(end, split * SPLIT + BLOCK_S):  # the first block has new keys
        new_k = _load_lines(key_ptr, base, s_K, begin, end, dim_K, path, K)
        new_v = _load_lines(value_ptr, base, s_V, begin, end, dim_V, path, K)
        k, v = tl.where(s_K < begin, k, new_k), tl.where(s_V < begin, v, new_v)

    q_LRK = operand(q, _ROWS, BLOCK_D * L, L)
    max_LR = tl.full([L, _ROWS], float("-inf"), tl.float32)
    sum_LR = tl.zeros([L, _ROWS], tl.float32)
    acc_LRK = tl.zeros([L, _ROWS, BLOCK_D], tl.float32)
    s_LN = tl.arange(0, L)[:, None] * N + tl.arange(0, N)[None, :]
    for start in tl.range(split * SPLIT, end, BLOCK_S, num_stages=1):
        ahead = start - split * SPLIT + BLOCK_S
        next_k = _load_lines(key_ptr, base, s_K + ahead, 0, end, dim_K, path, K)
        next_v = _load_lines(value_ptr, base, s_V + ahead, 0, end, dim_V, path, K)
        k_LNK = operand(k, N, BLOCK_D * L, L)
        v = tl.reshape(v, [4, L, N // 8, 2, D, 8, 8])
        v_LNK = tl.reshape(tl.permute(v, (1, 2, 0, 3, 4, 6, 5)), [L, N, BLOCK_D])
        acc_LRK, max_LR, sum_LR = _attend(
            q_LRK, k_LNK, v_LNK, start + s_LN, position_R, scale, acc_LRK, max_LR, sum_LR, WINDOW
        )
        k, v = next_k, next_v
    acc_LRK = tl.permute(tl.reshape(acc_LRK, [L, _ROWS, D, 8, 8]), (0, 1, 2, 4, 3))
    acc_LRK = tl.reshape(acc_LRK, [L, _ROWS, BLOCK_D])

    max_R = tl.max(max_LR, axis=0)
    weight_LR = _rescale(max_R[None, :], max_LR)
    sum_R = tl.sum(sum_LR * weight_LR, axis=0)
    acc_RK = sum_slabs(acc_LRK * weight_LR[:, :, None], L, _ROWS, BLOCK_D)

    out_ptr += line_R[:, None] * K + dim[None, :]
    out_mask = row_ok[:, None] & (dim < K)[None, :]
    if first_split == last_split:
        _store_out(out_ptr, acc_RK, sum_R, out_mask)
        return
    # Join the splits of a group, then the groups.
    line = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    groups = tl.cdiv(splits, _GROUP_SPLITS)
    acc_ptr += line.to(tl.int64) * (splits + groups) * _ROWS * K
    extremes_ptr += line.to(tl.int64) * (splits + groups) * 2 * _ROWS
    ticket_ptr += line * (groups + 1)
    my_group = split // _GROUP_SPLITS
    first = tl.maximum(first_split, my_group * _GROUP_SPLITS)
    last = tl.minimum(last_split, my_group * _GROUP_SPLITS + _GROUP_SPLITS - 1)
    _store_part(acc_ptr, extremes_ptr, split, acc_RK, max_R, sum_R, row_ok, dim, K)
    if arrive(ticket_ptr + my_group) != last - first:
        return
    tl.store(ticket_ptr + my_group, 0)
    acc_RK, max_R, sum_R = _join(acc_ptr, extremes_ptr, first, last, row_ok, dim, K, BLOCK_D)
    first, last = first_split // _GROUP_SPLITS, last_split // _GROUP_SPLITS
    if first == last:
        _store_out(out_ptr, acc_RK, sum_R, out_mask)
        return
    acc_ptr += splits * _ROWS * K
    extremes_ptr += splits * 2 * _ROWS
    _store_part(acc_ptr, extremes_ptr, my_group, acc_RK, max_R, sum_R, row_ok, dim, K)
    if arrive(ticket_ptr + groups) != last - first:
        return
    tl.store(ticket_ptr + groups, 0)
    acc_RK, max_R, sum_R = _join(acc_ptr, extremes_ptr, first, last, row_ok, dim, K, BLOCK_D)
    _store_out(out_ptr, acc_RK, sum_R, out_mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWorkspace:
    """Parts on their way to being joined: fp32 and zeroed int32 buffers of `workspace_sizes`."""

    acc: Tensor
    extremes: Tensor
    tickets: Tensor


def workspace_sizes(
    sequences: int, rows: int, H: int, G: int, K: int, splits: int
) -> tuple[int, int, int]:
    """Elements of an AttentionWorkspace for `sequences` of `rows` new tokens and `splits`."""
    lines = math.prod(_tiles(sequences, rows, H, G))
    groups = triton.cdiv(splits, GROUP_SPLITS)
    parts = lines * (splits + groups)
    return parts * ROWS * K, parts * 2 * ROWS, lines * (groups + 1)


def _tiles(sequences: int, rows: int, H: int, G: int) -> tuple[int, int]:
    """Programs of one split: tiles of rows, tiles of heads."""
    heads = H // G
    return sequences * triton.cdiv(rows, ROWS // min(heads, ROWS)), G * triton.cdiv(heads, ROWS)


def decode_attention(
    out_MHK: Tensor,
    q_MHK: Tensor,
    keys: Tensor,
    values: Tensor,
    positions_M: Tensor,
    *,
    rows: int,
    splits: int,
    workspace: AttentionWorkspace,
    pdl: dict[str, bool],
    window: int | None = None,
    path_slots: Tensor | None = None,
    path_start: Tensor | None = None,
) -> None:
    """Attend from `rows` new tokens of each sequence to its cache [B, G, S, K], into `out_MHK`.

    `positions_M` int32: rows of one sequence are neighbours, in order of position. `splits` is the
    room of the grid, ceil((largest position + 1) / SPLIT) or more. With `path_slots` int32 [B, N]
    and `path_start` int32 [B], B paths share the cache of one sequence. Nothing is allocated.
    """
    _, H, K = q_MHK.shape
    _, G, S, _ = keys.shape
    sequences = len(path_start) if path_start is not None else keys.shape[0]
    _decode_attention_kernel[(*_tiles(sequences, rows, H, G), splits)](
        out_MHK, q_MHK, keys, values, positions_M, rows, S,
        0 if path_start is not None else G * S, K**-0.5 * math.log2(math.e),
        path_slots, path_start, path_slots.shape[1] if path_slots is not None else 0,
        workspace.acc, workspace.extremes, workspace.tickets,
        H, G, K, window or 0, max(triton.next_power_of_2(K), 64), SPLIT, BLOCK_S, SLABS,
        num_warps=SLABS, **pdl,
    )  # fmt: skip


def decode_attention_reference(
    q_MHK: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: list[int],
    *,
    rows: int,
    window: int | None = None,
) -> Tensor:
    """The definition, a sequence at a time; `rows` new tokens from position `starts[b]` on."""
    out = []
    for b, start in enumerate(starts):
        q_THK = q_MHK[b * rows : (b + 1) * rows]
        k_SGK, v_SGK = (x[b, :, : start + rows].transpose(0, 1) for x in (keys, values))
        out.append(attention_reference(q_THK, k_SGK, v_SGK, start=start, window=window))
    return torch.cat(out)

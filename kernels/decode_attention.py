"""Attention of a decode step over the cache: few query rows, many keys, split by absolute position.

Legend: B sequences (or tree paths), T rows of each, M = B·T rows, H query heads, G key/value heads,
K head size, S cache slots, R rows of a tile, rows of one sequence × the heads of one group: 8 where
programs of 256 keys, or one split, then all find a place at once, else 16, the same instructions
twice.

Splits begin at absolute positions and grow with them, from 128 keys to 1,024 (`TIERS`): where a
context is short, many short ones are done soonest; where it is long, each costs its program a join,
during which the memory idles. A program walks over a share of neighbouring ones for one tile, of as
many keys as the next program's where contexts are long, and leaves a part of each; each of its
warps has a slab of every block of keys and a running softmax of its own. Where shares are long the
L2 evicts keys first: before the next step reads them, all weights have passed. Keys and values go
from their loads to the matrix instruction in registers (operands.py), those of the first blocks
before the wait. A block's registers are loaded again as soon as it is done, and travel as words: of
16-bit numbers that live from one turn of a loop to the next the compiler makes pairs anew, at the
end of a turn, where it waits for their loads. Slabs, then the splits of an aligned group of 8, then
groups are joined in a fixed order (attention_parts.py), and what a row does not see adds exact
zeros. So its bits depend on its own position, keys and window alone: not on the rows beside it, not
on how many splits the grid has room for. The last program of a group to finish joins it. Up to 256
positions nothing goes by way of memory: of two splits one program of twice the warps, half of them
for each, takes both at once and joins them in registers, in the same order (tiles of 8 rows, K up
to 128).

A row at position p sees keys max(0, p - window + 1) … p; the new rows' keys are in the cache
already. Position p lives in slot p or, in a tree, where `path_slots` [B, path length] says: the
slots of a path's positions from `path_start[b]` on. Keys thus stay in order of position, whatever
branch a row is on.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from draftnorm.kernels.attention import attention_reference
from draftnorm.kernels.attention_parts import (
    LOWEST,
    join_pair,
    join_parts,
    join_slabs,
    store_out,
    store_part,
)
from draftnorm.kernels.operands import arrive, eights, operand, turned, wait_and_trigger

ROWS = 16
TIERS = ((0, 128), (1024, 256), (5120, 512), (17408, 1024))  # a position, a split's keys from there
SPLIT = TIERS[0][1]
GROUP_SPLITS = 8  # splits joined at a time: each tier but the last has whole groups of them
BLOCK_S, SLABS = 64, 4  # keys of a block; its slabs, one a warp
MOST_K = 128  # up to which registers hold two blocks, or two splits at once
# By rows of a tile, programs that find a place at once, about: two a multiprocessor, and small ones
# soon end. Of tiles of 16 rows a few more may wait: that costs less than shares twice as long.
PROGRAMS = {8: 272, 16: 288}
ONCE_WALK = 8  # a program's share, in splits of SPLIT keys, from which on the L2 evicts keys first


@cache
def count_splits(length: int) -> int:
    """Splits that the first `length` positions lie in; asked before every replay of a step."""
    tiers = pairwise((*TIERS, (length, 0)))
    return sum(-(-max(min(length, end) - first, 0) // keys) for (first, keys), (end, _) in tiers)


_ROWS: tl.constexpr = tl.constexpr(ROWS)
_GROUP_SPLITS: tl.constexpr = tl.constexpr(GROUP_SPLITS)
_MOST_DOUBLINGS: tl.constexpr = tl.constexpr(GROUP_SPLITS.bit_length() - 1)
_SPLIT, _BLOCK_S, _SLABS, _MOST_K = (tl.constexpr(x) for x in (SPLIT, BLOCK_S, SLABS, MOST_K))
# Of each tier its first position, its first split and the logarithm of a split's keys.
_TIERS: tl.constexpr = tl.constexpr(
    tuple((first, count_splits(first), keys.bit_length() - 1) for first, keys in TIERS)
)
_COUNT: tl.constexpr = tl.constexpr(len(TIERS))


@triton.jit
def _split_of(key):
    """The split that a position is in: by the tier that counts fewest, as splits only grow."""
    split = key >> _TIERS[0][2]
    for i in tl.static_range(1, _COUNT):
        split = tl.minimum(split, _TIERS[i][1] + ((key - _TIERS[i][0]) >> _TIERS[i][2]))
    return split


@triton.jit
def _first_of(split):
    """The position at which a split begins."""
    key = split << _TIERS[0][2]
    for i in tl.static_range(1, _COUNT):
        key = tl.maximum(key, _TIERS[i][0] + ((split - _TIERS[i][1]) << _TIERS[i][2]))
    return key


@triton.jit
def _share_begins(program, doublings):
    """The first split of a program: a share is 2^doublings of the shortest or as many keys.

    That is one split at least and no more than a group, and tiers have whole groups: so no share
    has splits of two groups.
    """
    each = tl.minimum(doublings, _MOST_DOUBLINGS)
    split, programs = program << each, 0
    for i in tl.static_range(1, _COUNT):
        programs += (_TIERS[i][1] - _TIERS[i - 1][1]) >> each
        each = doublings - (_TIERS[i][2] - _TIERS[0][2])
        each = tl.minimum(tl.maximum(each, 0), _MOST_DOUBLINGS)
        split = tl.minimum(split, _TIERS[i][1] + ((program - programs) << each))
    return split


@triton.jit
def _queries(
    r, tile, b, T, group, R: tl.constexpr, HEADS: tl.constexpr, HEAD_TILES: tl.constexpr,
    H: tl.constexpr,
):  # fmt: skip
    """Of the rows r of a tile: which rows of the step they are, which lines of q, and if any."""
    HEADS_IN_TILE: tl.constexpr = min(HEADS, R)
    ROWS_IN_TILE: tl.constexpr = R // HEADS_IN_TILE
    t = tile * ROWS_IN_TILE + r // HEADS_IN_TILE
    head = tl.program_id(1) % HEAD_TILES * R + r % HEADS_IN_TILE
    ok = (r < ROWS_IN_TILE * HEADS_IN_TILE) & (t < T) & (head < HEADS)
    row = (b * T + t).to(tl.int64)
    return row, row * H + group * HEADS + head, ok


@triton.jit
def _load_lines(
    ptr, s, last, live, dim, path, K: tl.constexpr, FULL: tl.constexpr, POLICY: tl.constexpr
):
    """Keys or values at positions s, the last one's at those past it; anything if not live."""
    s, dim = turned(tl.maximum(tl.minimum(s, last), 0)), turned(dim)
    slots_ptr, start_ptr, length, b = path
    if slots_ptr is not None:
        step = s - tl.load(start_ptr + b)
        on_path = (step >= 0) & (step < length)
        slot = tl.load(slots_ptr + b * length + step, mask=on_path & live, other=0)
        s = tl.where(step >= 0, slot, s)
    if FULL:
        return turned(tl.load(ptr + (s * K + dim), mask=live, eviction_policy=POLICY))
    return turned(tl.load(ptr + (s * K + dim), mask=live & (dim < K), other=0))


@triton.jit
def _load_block(
    start, last, live, places, K: tl.constexpr, FULL: tl.constexpr, POLICY: tl.constexpr
):
    """The block of keys and values that begins at a position, as words of two numbers."""
    key_ptr, value_ptr, s_K, dim_K, s_V, dim_V, path = places
    k = _load_lines(key_ptr, start + s_K, last, live, dim_K, path, K // 2, FULL, POLICY)
    return k, _load_lines(value_ptr, start + s_V, last, live, dim_V, path, K // 2, FULL, POLICY)


@triton.jit
def _halves(word, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """The lower or the higher number in each word."""
    half: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
    return (word >> SHIFT).to(half).to(dtype, bitcast=True)


@triton.jit
def _keys(word, dtype: tl.constexpr):
    """Keys as the kernel loads them, [L, N, K]."""
    x = tl.join(_halves(word, 0, dtype), _halves(word, dtype.primitive_bitwidth, dtype))
    return operand(x, WORDS=True)


@triton.jit
def _values(word, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """Even or odd dimensions of values as the kernel loads them, the left operand [L, K / 2, N]."""
    L: tl.constexpr = word.shape[2]
    N: tl.constexpr = 4 * word.shape[3]
    D: tl.constexpr = word.shape[4]
    v = tl.reshape(_halves(word, SHIFT, dtype), [4, 8, L, N // 8, 2, D, 4])
    return tl.reshape(tl.permute(v, (2, 5, 6, 1, 3, 0, 4)), [L, D * 32, N])


@triton.jit
def _attend(softmax, q_LQK, k, v, s_LN, position_R, scale, WINDOW: tl.constexpr):
    """One block of keys into the running softmax of each slab: nothing leaves its warp."""
    max_LR, sum_LR4, even_LDR, odd_LDR = softmax
    dtype: tl.constexpr = q_LQK.dtype
    L: tl.constexpr = max_LR.shape[0]
    R: tl.constexpr = max_LR.shape[1]
    N: tl.constexpr = s_LN.shape[1]
    k_LNK = _keys(k, dtype)
    scores = tl.dot(q_LQK, tl.permute(k_LNK, (0, 2, 1)), input_precision="ieee")
    if R < _ROWS:  # the instruction has 16 rows; those that are padding are zeros
        scores = tl.sum(tl.reshape(scores, [L, _ROWS // R, R, N]), axis=1)
    seen = s_LN[:, None, :] <= position_R[None, :, None]
    if WINDOW > 0:
        seen &= s_LN[:, None, :] > position_R[None, :, None] - WINDOW
    scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(max_LR, tl.max(scores, axis=2))
    shift = new_max * scale
    p = tl.exp2(tl.fma(scores, scale, -shift[:, :, None]))
    keep = tl.exp2((max_LR - new_max) * scale)  # exactly 1 if the maximum stays
    p_LNR = tl.permute(p.to(dtype), (0, 2, 1))
    even = _values(v, 0, dtype)
    odd = _values(v, dtype.primitive_bitwidth, dtype)
    even_LDR = tl.dot(even, p_LNR, even_LDR * keep[:, None, :], input_precision="ieee")
    odd_LDR = tl.dot(odd, p_LNR, odd_LDR * keep[:, None, :], input_precision="ieee")
    p = tl.reshape(p, [L, R, N // 8, 4, 2])
    sum_LR4 = tl.fma(sum_LR4, keep[:, :, None], tl.sum(tl.sum(p, axis=4), axis=2))
    return new_max, sum_LR4, even_LDR, odd_LDR


@triton.jit(
    do_not_specialize=["T", "S", "sequence_lines", "path_length", "scale", "splits", "doublings"]
)
def _decode_attention_kernel(
    out_ptr, q_ptr, key_ptr, value_ptr, position_ptr, T, S, sequence_lines, scale,
    splits, doublings, path_slots_ptr, path_start_ptr, path_length,
    acc_ptr, extremes_ptr, ticket_ptr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr,
    ABREAST: tl.constexpr, ALONE: tl.constexpr, ONCE: tl.constexpr, EAGER: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL and EAGER:
        gdc_launch_dependents()
    HEADS: tl.constexpr = H // G
    HEAD_TILES: tl.constexpr = (HEADS + R - 1) // R
    row_tiles = tl.cdiv(T, R // min(HEADS, R))
    b, tile = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles
    group = tl.program_id(1) // HEAD_TILES
    r = tl.arange(0, R)
    row, line_R, row_ok = _queries(r, tile, b, T, group, R, HEADS, HEAD_TILES, H)
    base = (b.to(tl.int64) * sequence_lines + group * S) * K
    key_ptr += base
    value_ptr += base

    # What kernels before the last one wrote may be read before the wait: the last one has waited
    # for them before it let this one start. So positions, and keys of earlier steps.
    position_R = tl.load(position_ptr + row, mask=row_ok, other=-1)
    begin = tl.load(position_ptr + b * T)  # from here on keys are the last kernel's
    if path_slots_ptr is not None:  # or a path's: rows of other branches may have written its nodes
        begin = tl.minimum(begin, tl.load(path_start_ptr + b))
    last_key = tl.max(position_R)
    last_split = _split_of(last_key)
    first_split = 0
    if WINDOW > 0:
        first_seen = tl.min(tl.where(row_ok, position_R, last_key)) - WINDOW + 1
        first_split = _split_of(tl.maximum(first_seen, 0))
    # This program walks over some splits, and its loads run ahead across their borders.
    first = tl.maximum(_share_begins(tl.program_id(2), doublings), first_split)
    last = tl.minimum(_share_begins(tl.program_id(2) + 1, doublings) - 1, last_split)
    first_key = _first_of(first)
    newest = tl.minimum(_first_of(last + 1) - 1, last_key)

    # A block is slabs of N neighbours, one slab a warp; of ABREAST splits, one block of each
    # is attended to at once, the second's _SPLIT keys further on. Operands are loaded where the
    # matrix instruction wants them, as in a projection: keys by `operand`; of the values a thread
    # takes 8 neighbouring dimensions of every key whose weight it will hold.
    L: tl.constexpr = _SLABS * ABREAST
    N: tl.constexpr = _BLOCK_S // _SLABS
    BLOCK_D: tl.constexpr = max(triton.next_power_of_2(K), 64)
    BUFFERS: tl.constexpr = 2 if K <= _MOST_K else 1  # blocks on their way, as registers allow
    C: tl.constexpr = BLOCK_D // 32
    D: tl.constexpr = BLOCK_D // 64
    slab_L = tl.arange(0, L) // _SLABS * _SPLIT + tl.arange(0, L) % _SLABS * N
    s_K = slab_L[None, :, None, None, None] + eights(N)
    dim_K = (tl.arange(0, C)[:, None] * 32 + tl.arange(0, 32)[None, :])[None, None, :, None, :]
    word_K = (tl.arange(0, C)[:, None] * 16 + tl.arange(0, 16)[None, :])[None, None, :, None, :]
    # [4, 8, L, N / 4, D, 4]: four threads take four pairs of keys, eight times four the dimensions.
    of_thread = tl.arange(0, N // 4)[None, :] // 2 * 8 + tl.arange(0, N // 4)[None, :] % 2
    of_thread += tl.arange(0, 4)[:, None] * 2
    s_V = of_thread[:, None, None, :, None, None]
    s_V += slab_L[None, None, :, None, None, None]
    dim_V = (tl.arange(0, D) * 32)[None, None, None, None, :, None]
    dim_V += (tl.arange(0, 8)[:, None] * 4 + tl.arange(0, 4)[None, :])[None, :, None, None, None, :]
    FULL: tl.constexpr = K == BLOCK_D
    POLICY: tl.constexpr = "evict_first" if ONCE else ""
    dtype: tl.constexpr = value_ptr.dtype.element_ty
    word: tl.constexpr = tl.int32 if dtype.primitive_bitwidth == 16 else tl.int64
    key_ptr = key_ptr.to(tl.pointer_type(word), bitcast=True)
    value_ptr = value_ptr.to(tl.pointer_type(word), bitcast=True)
    path = (path_slots_ptr, path_start_ptr, path_length, b)
    places = (key_ptr, value_ptr, s_K, word_K, s_V, dim_V, path)
    old = tl.minimum(newest, begin - 1)
    second = first_key + _BLOCK_S
    beside: tl.constexpr = (ABREAST - 1) * _SPLIT  # how far on a block's last keys are
    k0, v0 = _load_block(first_key, old, first_key <= old, places, K, FULL, POLICY)
    if BUFFERS == 2:
        k1, v1 = _load_block(second, old, second <= old, places, K, FULL, POLICY)
    wait_and_trigger(PDL)

    if first > last:
        return
    _, line_Q, ok_Q = _queries(eights(_ROWS), tile, b, T, group, R, HEADS, HEAD_TILES, H)
    place_Q = tl.broadcast_to(line_Q * K + dim_K, [8, L, C, _ROWS // 8, 32])
    q = turned(tl.load(q_ptr + turned(place_Q), mask=turned(ok_Q & (dim_K < K)), other=0.0))
    if (begin <= newest) & (begin < second + beside):  # some keys of the block are new
        k0, v0 = _load_block(first_key, newest, True, places, K, FULL, POLICY)
    if BUFFERS == 2:
        third = second + _BLOCK_S
        if (begin <= newest) & (begin < third + beside):
            k1, v1 = _load_block(second, newest, second <= newest, places, K, FULL, POLICY)

    q_LQK = operand(q, WORDS=True)
    s_LN = slab_L[:, None] + tl.arange(0, N)[None, :]
    dim = tl.arange(0, BLOCK_D // 4)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    out_ptr += line_R[:, None, None] * K + dim
    mask = row_ok[:, None, None] & (dim < K)
    line = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    groups = tl.cdiv(splits, _GROUP_SPLITS)
    acc_ptr += line.to(tl.int64) * (splits + groups) * R * K
    extremes_ptr += line.to(tl.int64) * (splits + groups) * 2 * R
    for split in range(first, last + 1, ABREAST):
        max_LR = tl.full([L, R], LOWEST, tl.float32)
        sum_LR4 = tl.zeros([L, R, 4], tl.float32)
        acc_LDR = tl.zeros([L, BLOCK_D // 2, R], tl.float32)
        softmax = (max_LR, sum_LR4, acc_LDR, acc_LDR)  # of even dimensions and of odd ones
        end = tl.minimum(_first_of(split + 1), newest + 1)
        for start in tl.range(_first_of(split), end, BUFFERS * _BLOCK_S, num_stages=1):
            softmax = _attend(softmax, q_LQK, k0, v0, start + s_LN, position_R, scale, WINDOW)
            ahead = start + BUFFERS * _BLOCK_S
            if ABREAST == 1:
                k0, v0 = _load_block(ahead, newest, ahead <= newest, places, K, FULL, POLICY)
            if BUFFERS == 2:
                if start + _BLOCK_S < end:
                    s = start + _BLOCK_S + s_LN
                    softmax = _attend(softmax, q_LQK, k1, v1, s, position_R, scale, WINDOW)
                if ABREAST == 1:
                    ahead += _BLOCK_S
                    k1, v1 = _load_block(ahead, newest, ahead <= newest, places, K, FULL, POLICY)
        if ABREAST == 2:
            acc_RDE, sum_R = join_pair(softmax, scale)
            store_out(out_ptr, acc_RDE, sum_R, mask)
        else:
            acc_RDE, max_R, sum_R = join_slabs(softmax, scale)
            if ALONE or first_split == last_split:
                store_out(out_ptr, acc_RDE, sum_R, mask)
            else:
                store_part(acc_ptr, extremes_ptr, split, acc_RDE, max_R, sum_R, mask, dim, K)
    if not ALONE and first_split < last_split:
        # Join the splits of a group, then the groups.
        ticket_ptr += line * (groups + 1)
        my_group = first // _GROUP_SPLITS
        begin_group = tl.maximum(first_split, my_group * _GROUP_SPLITS)
        end_group = tl.minimum(last_split, my_group * _GROUP_SPLITS + _GROUP_SPLITS - 1)
        mine = last - first + 1
        if arrive(ticket_ptr + my_group, mine) + mine == end_group - begin_group + 1:
            tl.store(ticket_ptr + my_group, 0)
            acc_RDE, max_R, sum_R = join_parts(
                acc_ptr, extremes_ptr, begin_group, end_group, mask, dim, K
            )
            begin_group, end_group = first_split // _GROUP_SPLITS, last_split // _GROUP_SPLITS
            if begin_group == end_group:
                store_out(out_ptr, acc_RDE, sum_R, mask)
            else:
                acc_ptr += splits * R * K
                extremes_ptr += splits * 2 * R
                store_part(acc_ptr, extremes_ptr, my_group, acc_RDE, max_R, sum_R, mask, dim, K)
                if arrive(ticket_ptr + groups, 1) == end_group - begin_group:
                    tl.store(ticket_ptr + groups, 0)
                    acc_RDE, max_R, sum_R = join_parts(
                        acc_ptr, extremes_ptr, begin_group, end_group, mask, dim, K
                    )
                    store_out(out_ptr, acc_RDE, sum_R, mask)


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
    groups = triton.cdiv(splits, GROUP_SPLITS)
    lines = {R: math.prod(_tiles(sequences, rows, H, G, R)) for R in (8, ROWS)}
    parts = max(R * count for R, count in lines.items()) * (splits + groups)
    return parts * K, parts * 2, max(lines.values()) * (groups + 1)


def _tiles(sequences: int, rows: int, H: int, G: int, R: int) -> tuple[int, int]:
    """Programs of one split: tiles of rows, tiles of heads."""
    heads = H // G
    return sequences * triton.cdiv(rows, R // min(heads, R)), G * triton.cdiv(heads, R)


def _shares(splits: int, walk: int) -> int:
    """Programs of one tile, as `_share_begins` deals out the splits."""
    begins = pairwise([*(count_splits(first) for first, _ in TIERS), splits])
    programs = 0
    for (_, keys), (begin, end) in zip(TIERS, begins, strict=True):
        each = min(max(walk * SPLIT // keys, 1), GROUP_SPLITS)
        programs += triton.cdiv(max(min(splits, end) - begin, 0), each)
    return programs


def decode_attention(
    out_MHK: Tensor, q_MHK: Tensor, keys: Tensor, values: Tensor, positions_M: Tensor, *, rows: int,
    splits: int, workspace: AttentionWorkspace, pdl: dict[str, bool], window: int | None = None,
    path_slots: Tensor | None = None, path_start: Tensor | None = None, eager: bool = False,
) -> None:  # fmt: skip
    """Attend from `rows` new tokens of each sequence to its cache [B, G, S, K], into `out_MHK`.

    `positions_M` int32: rows of one sequence are neighbours, in order of position. `splits` is the
    room of the grid, count_splits(largest position + 1) or more. With `path_slots` int32 [B, N]
    and `path_start` int32 [B], B paths share the cache of one sequence. `eager` starts the next
    kernel at once: before its wait that may touch nothing but weights. Nothing is allocated.
    """
    _, H, K = q_MHK.shape
    _, G, S, _ = keys.shape
    sequences = len(path_start) if path_start is not None else keys.shape[0]
    R, tiles = 8, _tiles(sequences, rows, H, G, 8)
    if rows * min(H // G, ROWS) > R and math.prod(tiles) * _shares(splits, 2) > PROGRAMS[R]:
        R, tiles = ROWS, _tiles(sequences, rows, H, G, ROWS)
    abreast = 2 if splits == 2 and R == 8 and K <= MOST_K else 1  # splits at once
    walk, most_walk = abreast, GROUP_SPLITS * TIERS[-1][1] // SPLIT
    while walk < most_walk and math.prod(tiles) * _shares(splits, walk) > PROGRAMS[R]:
        walk *= 2
    once = R == 8 and min(walk, splits) >= ONCE_WALK  # wider tiles have no register for that
    _decode_attention_kernel[(*tiles, _shares(splits, walk))](
        out_MHK, q_MHK, keys, values, positions_M, rows, S,
        0 if path_start is not None else G * S, K**-0.5 * math.log2(math.e),
        splits, walk.bit_length() - 1, path_slots, path_start,
        path_slots.shape[1] if path_slots is not None else 0,
        workspace.acc, workspace.extremes, workspace.tickets,
        H, G, K, R, window or 0, abreast, splits <= abreast, once, eager,
        num_warps=SLABS * abreast, **pdl,
    )  # fmt: skip


def decode_attention_reference(
    q_MHK: Tensor, keys: Tensor, values: Tensor, starts: list[int], *, rows: int,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """The definition, a sequence at a time; `rows` new tokens from position `starts[b]` on."""
    out = []
    for b, start in enumerate(starts):
        q_THK = q_MHK[b * rows : (b + 1) * rows]
        k_SGK, v_SGK = (x[b, :, : start + rows].transpose(0, 1) for x in (keys, values))
        out.append(attention_reference(q_THK, k_SGK, v_SGK, start=start, window=window))
    return torch.cat(out)

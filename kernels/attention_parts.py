"""Parts of attention on their way to one: slabs to a split, splits to a group, groups to a row.

Legend: kernels/decode_attention.py. A part is the sum of values [R, K], weighted by exp2 of scores
less the part's maximum, that maximum and the sum of weights. Order and rounding are the same
wherever parts are joined, in registers or by way of memory: where the compiler could fuse a product
into a sum or not, an explicit `fma` decides.
"""

import triton
import triton.language as tl

from draftnorm.kernels.operands import fold, sum_slabs, turned

LOWEST: tl.constexpr = tl.constexpr(-1e38)  # maximum of nothing: finite, so no difference is NaN


@triton.jit
def join_slabs(softmax, scale):
    """The slabs of a split as one part: acc [R, K / 4, 4], maximum and sum [R]."""
    max_LR, sum_LR4, even_LDR, odd_LDR = softmax
    L: tl.constexpr = max_LR.shape[0]
    R: tl.constexpr = max_LR.shape[1]
    BLOCK_D: tl.constexpr = 2 * even_LDR.shape[1]
    acc = tl.reshape(tl.join(even_LDR, odd_LDR), [L, BLOCK_D // 64, 4, 8, R, 2])
    acc_LRK = tl.reshape(tl.permute(acc, (0, 4, 1, 3, 2, 5)), [L, R, BLOCK_D])
    max_R = fold(tl.permute(max_LR, (1, 0)), LARGEST=True)
    # Explicit products: whether the compiler fuses them into the sums may differ from R to R.
    weight_LR = tl.exp2((max_LR - max_R[None, :]) * scale)
    sum_LR = tl.fma(tl.sum(sum_LR4, axis=2), weight_LR, 0.0)
    sum_R = tl.reshape(sum_slabs(sum_LR[:, :, None]), [R])
    acc_RK = sum_slabs(tl.fma(acc_LRK, weight_LR[:, :, None], 0.0))
    return tl.reshape(acc_RK, [R, BLOCK_D // 4, 4]), max_R * scale, sum_R


@triton.jit
def _no_part(R: tl.constexpr, D: tl.constexpr):
    """What parts are added to: maximum and sum [R, 1, 1], acc [R, D, 4]."""
    max_R = tl.full([R, 1, 1], LOWEST, tl.float32)
    return max_R, tl.zeros([R, 1, 1], tl.float32), tl.zeros([R, D, 4], tl.float32)


@triton.jit
def _add_part(max_R, sum_R, acc, part_max, part_sum, part_acc):
    """One more part of what is joined: maximum and sum [R, 1, 1], acc [R, D, E]."""
    new_max = tl.maximum(max_R, part_max)
    keep, weight = tl.exp2(max_R - new_max), tl.exp2(part_max - new_max)
    sum_R = tl.fma(part_sum, weight, sum_R * keep)
    return new_max, sum_R, tl.fma(part_acc, weight, acc * keep)


@triton.jit
def join_pair(softmax, scale):
    """Two splits, each half of the slabs, as one part: acc [R, K / 4, 4] and sum [R]."""
    max_LR, sum_LR4, even_LDR, odd_LDR = softmax
    L: tl.constexpr = max_LR.shape[0]
    R: tl.constexpr = max_LR.shape[1]
    D: tl.constexpr = even_LDR.shape[1] // 2
    max_R2 = fold(tl.permute(max_LR, (1, 0)), 2, LARGEST=True)
    of_slab = tl.broadcast_to(tl.permute(max_R2, (1, 0))[:, None, :], [2, L // 2, R])
    weight_LR = tl.exp2((max_LR - tl.reshape(of_slab, [L, R])) * scale)
    sum_LR = tl.fma(tl.sum(sum_LR4, axis=2), weight_LR, 0.0)
    sum_R2 = tl.reshape(sum_slabs(sum_LR[:, :, None], 2), [R, 2])
    # One after the other, as there is room for half of them beside the weight stream.
    even_RK2, odd_RK2 = _sum_half(even_LDR, weight_LR), _sum_half(odd_LDR, weight_LR)
    acc = tl.permute(tl.join(even_RK2, odd_RK2), (0, 1, 3, 2))
    acc_0, acc_1 = tl.split(tl.reshape(acc, [R, D, 4, 2]))
    max_0, max_1 = tl.split(tl.reshape(tl.fma(max_R2, scale, 0.0), [R, 1, 1, 2]))
    sum_0, sum_1 = tl.split(tl.reshape(sum_R2, [R, 1, 1, 2]))
    max_R, sum_R, acc_RDE = _no_part(R, D)
    max_R, sum_R, acc_RDE = _add_part(max_R, sum_R, acc_RDE, max_0, sum_0, acc_0)
    max_R, sum_R, acc_RDE = _add_part(max_R, sum_R, acc_RDE, max_1, sum_1, acc_1)
    return acc_RDE, tl.reshape(sum_R, [R])


@triton.jit
def _sum_half(acc_LDR, weight_LR):
    """Even or odd dimensions of two splits, as the matrix instruction left them, [R, D, 2]."""
    L: tl.constexpr = acc_LDR.shape[0]
    D: tl.constexpr = acc_LDR.shape[1]
    R: tl.constexpr = acc_LDR.shape[2]
    acc = tl.reshape(tl.fma(acc_LDR, weight_LR[:, None, :], 0.0), [L, D // 32, 4, 8, R])
    return sum_slabs(tl.reshape(tl.permute(acc, (0, 4, 1, 3, 2)), [L, R, D]), 2)


@triton.jit
def store_part(acc_ptr, extremes_ptr, part, acc_RDE, max_R, sum_R, mask, dim, K: tl.constexpr):
    """Leave one part of a tile for the program that joins: acc [R, K], maximum and sum [R, 2]."""
    R: tl.constexpr = max_R.shape[0]
    r = tl.arange(0, R)
    place = turned(acc_ptr + ((r + part * R)[:, None, None] * K + dim))
    tl.store(place, turned(acc_RDE), mask=turned(mask))
    tl.store(extremes_ptr + (r + part * R) * 2, max_R)
    tl.store(extremes_ptr + (r + part * R) * 2 + 1, sum_R)


@triton.jit
def join_parts(acc_ptr, extremes_ptr, first, last, mask, dim, K: tl.constexpr):
    """Join parts first … last in order, a few at a time, so that their loads overlap."""
    if last - first < 4:  # one trip either way, and shorter
        joined = _join_some(acc_ptr, extremes_ptr, first, last, mask, dim, K, 4)
    else:
        joined = _join_some(acc_ptr, extremes_ptr, first, last, mask, dim, K, 8)
    return joined


@triton.jit
def _join_some(
    acc_ptr, extremes_ptr, first, last, mask, dim, K: tl.constexpr, TOGETHER: tl.constexpr
):
    """The same, TOGETHER at a time."""
    R: tl.constexpr = mask.shape[0]
    r = tl.arange(0, R)[:, None, None]
    max_R, sum_R, acc_RDE = _no_part(R, mask.shape[1])
    for start in range(first, last + 1, TOGETHER):
        for i in tl.static_range(TOGETHER):
            # A part that is not there weighs exp2(lowest) = 0 and adds exact zeros.
            # .cg: other programs wrote these, so this one's L1 must not answer.
            part = start + i
            live = part <= last
            place = extremes_ptr + (r + part * R) * 2
            part_max = tl.load(place, mask=live, other=LOWEST, cache_modifier=".cg")
            part_sum = tl.load(place + 1, mask=live, other=0.0, cache_modifier=".cg")
            place = turned(acc_ptr + ((r + part * R) * K + dim))
            part_acc = tl.load(place, turned(mask & live), 0.0, cache_modifier=".cg")
            max_R, sum_R, acc_RDE = _add_part(
                max_R, sum_R, acc_RDE, part_max, part_sum, turned(part_acc)
            )
    return acc_RDE, tl.reshape(max_R, [R]), tl.reshape(sum_R, [R])


@triton.jit
def store_out(out_ptrs, acc_RDE, sum_R, mask):
    out = acc_RDE / tl.where(sum_R == 0.0, 1.0, sum_R)[:, None, None]
    tl.store(turned(out_ptrs), turned(out.to(out_ptrs.dtype.element_ty)), mask=turned(mask))

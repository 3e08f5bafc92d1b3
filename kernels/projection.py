"""Projections of a decode step: y = epilogue(norm(x) Wᵀ), a few rows against a large weight.

One kernel family, row-invariant: the bits of a row of y depend on that row of x alone. Legend:
M rows, K inputs, N outputs, F feed-forward width, H query heads, G key/value heads, S cache slots,
V vocabulary, U experts that the rows touch, R = 8 or 16 rows of a tile, L slabs of K, W weight rows
of a tile.

Absent rows of a tile are zeros, so decoding one token and verifying eight run the same code. A tile
of 16 is two of the 8-column instructions that a tile of 8 is one of: the same bits, and half the
work saved where it counts. The weight is the wide operand and is read once. K is summed in an order
made of N and K alone: within a slab (one a warp, so that short tiles keep every warp busy) block by
block from left to right, then slab by slab. The experts of a row are then summed in order of id, by
whichever program arrives last: its ticket is an integer atomic, arithmetic never is.

Prologue: RMSNorm, where registers hold all of K. A producer of x leaves the sums of squares of
aligned 16-column blocks, which are nodes of the summation tree of `rms_norm`; finishing the tree
gives that kernel's bits. In a pipelined loop that costs more than a short kernel, `normalize`.
Epilogues (sums are fp32 and are rounded once):
  plain     y = x Wᵀ + b
  residual  y = r + x Wᵀ + b, and its sums of squares for the next norm
  gated     y = silu(g) · u, g and u the first and second half of the outputs; times the routing
            weight in an expert
  rotary    heads of q, k and v: optional norm of q and k (Qwen3), rotation by position; q goes to
            y, k and v into the cache
  argmax    the best output of each tile of the vocabulary and its lowest id, at a temperature the
            best after noise (kernels/sample.py); optionally the logits

Programmatic dependent launch: a program may start while earlier kernels still run, and may touch
nothing but immutable weights, and the head how its rows draw, before its one `gdc_wait`. It uses
that time to fetch its weights: the first blocks into registers, where the matrix instruction wants
them, and the beginning of the rest into L2. Where registers hold all of K, nothing after the wait
goes through shared memory before the sums do.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear
from triton.language.extra.cuda import gdc_launch_dependents

from draftnorm.kernels.decode_norm import (
    SQUARES,
    Norm,
    load_squares,
    normed,
    square_sums,
)
from draftnorm.kernels.gated import gated_reference
from draftnorm.kernels.head import best_of
from draftnorm.kernels.operands import (
    arrive,
    eights,
    fetch,
    operand,
    prefetch_l2,
    sum_slabs,
    wait_and_trigger,
)
from draftnorm.kernels.rms_norm import finish_rstd, rms_norm_reference
from draftnorm.kernels.sample import Draw, gumbel, load_draw

_SQUARES: tl.constexpr = tl.constexpr(SQUARES)


@triton.jit
def _rotate_and_store(
    out_ptr, key_ptr, value_ptr, low_WR, high_WR, cos_WR, sin_WR, q_norm_ptr, k_norm_ptr, eps,
    head, pair, row_ok, rows, sequence, slot, S,
    H: tl.constexpr, G: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The rotary epilogue of one head: both halves of some of its pairs, by rows."""
    R: tl.constexpr = low_WR.shape[1]
    dtype = out_ptr.dtype.element_ty
    pair_ok = (pair < PAIRS)[:, None]
    # Nested: the first is known when compiling, the second is not.
    if q_norm_ptr is not None:  # noqa: SIM102
        if head < H + G:
            squares_WR = tl.fma(low_WR, low_WR, tl.fma(high_WR, high_WR, 0.0))
            square_sum_R = tl.reshape(sum_slabs(squares_WR[:, None, :]), [R])
            rstd_R = tl.rsqrt(square_sum_R / (2 * PAIRS) + eps)
            norm_ptr = k_norm_ptr
            if head < H:
                norm_ptr = q_norm_ptr
            low_W = tl.load(norm_ptr + pair, mask=pair < PAIRS, other=0.0).to(tl.float32)
            high_W = tl.load(norm_ptr + PAIRS + pair, mask=pair < PAIRS, other=0.0).to(tl.float32)
            low_WR = (low_WR * rstd_R[None, :]).to(dtype).to(tl.float32) * low_W[:, None]
            high_WR = (high_WR * rstd_R[None, :]).to(dtype).to(tl.float32) * high_W[:, None]
    if head < H + G:
        turned_WR = tl.fma(low_WR, cos_WR, -(high_WR * sin_WR))
        high_WR = tl.fma(high_WR, cos_WR, low_WR * sin_WR)
        low_WR = turned_WR
    if head < H:
        place = out_ptr + (rows * H + head)[None, :] * (2 * PAIRS) + pair[:, None]
    else:
        base_ptr = value_ptr
        if head < H + G:
            base_ptr = key_ptr
        line = (sequence * G + (head - H) % G) * S + slot
        place = base_ptr + line[None, :] * (2 * PAIRS) + pair[:, None]
    tl.store(place, low_WR.to(dtype), mask=pair_ok & row_ok[None, :])
    tl.store(place + PAIRS, high_WR.to(dtype), mask=pair_ok & row_ok[None, :])


@triton.jit
def _outputs(lane, tile, N: tl.constexpr, PAIRS: tl.constexpr, W: tl.constexpr):
    """Which outputs a tile's weight rows `lane` are, and whether there are such.

    Paired tiles hold two outputs that lie PAIRS apart (gate and up, the halves of a head) in their
    first and second half: of which group, and from which pair on, comes third and fourth.
    """
    group, first_pair = tile, 0
    if PAIRS == 0:
        n = tile * W + lane
        ok = n < N
    else:
        TILES_PER_GROUP: tl.constexpr = (PAIRS + W // 2 - 1) // (W // 2)
        group, first_pair = tile // TILES_PER_GROUP, tile % TILES_PER_GROUP * (W // 2)
        pair = first_pair + lane % (W // 2)
        n = group * (2 * PAIRS) + lane // (W // 2) * PAIRS + pair
        ok = pair < PAIRS
    return n, ok, group, first_pair


@triton.jit
def _columns(BLOCK: tl.constexpr, L: tl.constexpr):
    """Columns of a block of the loop: [1, BLOCK] or, a slab for each of L warps, [L, 1, …]."""
    if L == 1:
        k = tl.arange(0, BLOCK)[None, :]
    else:
        slab = tl.arange(0, L)[:, None] * (BLOCK // L) + tl.arange(0, BLOCK // L)[None, :]
        k = slab[:, None, :]
    return k


@triton.jit
def _lines(index, L: tl.constexpr):
    """A number for each line of a block of the loop: [lines, 1] or [1, lines, 1]."""
    return index[:, None] if L == 1 else index[None, :, None]


@triton.jit(do_not_specialize=["M", "T", "S", "capacity", "eps"])
def _projection_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, M,
    norm_weight_ptr, squares_ptr, eps,  # prologue
    residual_ptr, out_squares_ptr,
    q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, key_ptr, value_ptr, T, S,
    best_ptr, best_id_ptr, settings_ptr,
    expert_ptr, routing_ptr, capacity,
    partial_ptr, ticket_ptr,
    N: tl.constexpr, K: tl.constexpr, EPILOGUE: tl.constexpr,
    PAIRS: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    BLOCK_K: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    row_tiles = tl.cdiv(M, R)
    tile = tl.program_id(0) // row_tiles  # row tiles of one weight tile are neighbours: L2 serves
    first_row = tl.program_id(0) % row_tiles * R
    rows = first_row + tl.arange(0, R)
    row_ok = rows < M
    part = tl.program_id(1)  # place in the list of experts

    n_W, n_ok, group, first_pair = _outputs(tl.arange(0, W), tile, N, PAIRS, W)

    if expert_ptr is not None:
        wait_and_trigger(PDL)
        parts = tl.load(expert_ptr)
        if part >= parts:
            return
        expert = tl.load(expert_ptr + 1 + part)
        weight_ptr += expert.to(tl.int64) * N * K
        routing_R = tl.load(routing_ptr + expert * capacity + rows, mask=row_ok, other=0.0)
        x_ok = routing_R != 0.0
        if partial_ptr is not None:  # each expert has an input of its own
            x_ptr += part.to(tl.int64) * capacity * K
        else:
            out_ptr += part.to(tl.int64) * capacity * (N // 2)
    else:
        x_ok = row_ok

    # Before the wait: a step's first kernel says where rows stand, and its first rotary product
    # waits for that before it lets attention start, or anything behind it.
    if settings_ptr is not None:
        temperature, seed, position, stream, request = load_draw(
            position_ptr, settings_ptr, tl.where(row_ok, rows, 0)[None, :], T
        )
    EARLY: tl.constexpr = FIRST + SECOND
    if EARLY > 0:
        n_E, ok_E, _, _ = _outputs(eights(W), tile, N, PAIRS, W)
        line_E = n_E.to(tl.int64) * K
        w0, w1 = fetch(weight_ptr, line_E, ok_E, FIRST, SECOND, L, K, "evict_first")
        if norm_weight_ptr is not None:
            one = tl.zeros([1, 1, 1, 1, 1], tl.int64)
            scale0, scale1 = fetch(norm_weight_ptr, one, one == 0, FIRST, SECOND, L, K, "")
    if settings_ptr is not None:
        noise_WR = gumbel(n_W[:, None], seed, position, stream, request)
    if PDL and expert_ptr is None:
        if PREFETCH > 0:
            LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
            line = EARLY + tl.arange(0, PREFETCH) * LINE
            lines = weight_ptr + n_W.to(tl.int64)[:, None] * K + line[None, :]
            prefetch_l2(tl.where(n_ok[:, None] & (line < K)[None, :], lines, weight_ptr))
        # Programs that hold all of K are small: the next kernel's find room beside them, and fetch
        # their weights meanwhile. Not attention, which reads what this one must have waited for.
        if EARLY >= K and EPILOGUE != "rotary":
            gdc_launch_dependents()
        wait_and_trigger(PDL)

    if norm_weight_ptr is not None:
        squares = load_squares(squares_ptr, rows, row_ok, K)
    # What the epilogue reads is asked for here, so that it arrives during the product.
    y_ptrs = rows.to(tl.int64)[None, :] * N + n_W[:, None]
    y_mask = n_ok[:, None] & row_ok[None, :]
    if EPILOGUE == "residual":
        residual_WR = tl.load(residual_ptr + y_ptrs, mask=y_mask, other=0.0)
    if EPILOGUE == "rotary":
        pair = first_pair + tl.arange(0, W // 2)
        position_R = tl.load(position_ptr + rows, mask=row_ok, other=0)
        slot_R = tl.load(slot_ptr + rows, mask=row_ok, other=0)
        turn_ptrs = position_R[None, :] * PAIRS + pair[:, None]
        turn_mask = row_ok[None, :] & (pair < PAIRS)[:, None]
        cos_WR = tl.load(cos_ptr + turn_ptrs, mask=turn_mask, other=0.0)
        sin_WR = tl.load(sin_ptr + turn_ptrs, mask=turn_mask, other=0.0)
    if bias_ptr is not None:
        bias_W = tl.load(bias_ptr + n_W, mask=n_ok, other=0.0).to(tl.float32)

    acc = tl.zeros([W, R] if L == 1 else [L, W, R], tl.float32)
    if EARLY > 0:
        row_E = first_row + eights(R)
        line_E = row_E.to(tl.int64) * K
        ok_E = row_E < M
        if expert_ptr is not None:
            place = routing_ptr + expert * capacity + row_E
            ok_E = tl.load(place, mask=ok_E, other=0.0) != 0.0
        x0, x1 = fetch(x_ptr, line_E, ok_E, FIRST, SECOND, L, K, "")
        if norm_weight_ptr is not None:
            rstd_R = finish_rstd(squares, eps, K)
            rstd = tl.trans(tl.reshape(rstd_R, [R // 8, 8]))[:, None, None, :, None]
            x0, x1 = normed(x0, rstd, scale0), normed(x1, rstd, scale1)
        acc = tl.dot(operand(w0), tl.trans(operand(x0)), acc, input_precision="ieee")
        if SECOND > 0:
            acc = tl.dot(operand(w1), tl.trans(operand(x1)), acc, input_precision="ieee")
    if EARLY < K:
        k = _columns(BLOCK_K, L)
        line_W, ok_W = _lines(n_W, L).to(tl.int64) * K, _lines(n_ok, L)
        line_R, ok_R = _lines(rows, L).to(tl.int64) * K, _lines(x_ok, L)
        for k0 in tl.range(EARLY, K, BLOCK_K, num_stages=STAGES):
            w_ok, in_x = ok_W, ok_R
            if (K - EARLY) % BLOCK_K != 0:
                w_ok, in_x = ok_W & (k < K - k0), ok_R & (k < K - k0)
            w_ptrs, x_ptrs = weight_ptr + line_W + (k0 + k), x_ptr + line_R + (k0 + k)
            w = tl.load(w_ptrs, mask=w_ok, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptrs, mask=in_x, other=0.0)
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    if L > 1:
        acc = sum_slabs(acc)

    if partial_ptr is not None:
        partial_ptrs = partial_ptr + y_ptrs
        stride = row_tiles.to(tl.int64) * R * N
        tl.store(partial_ptrs + part * stride, acc, mask=y_mask)
        if arrive(ticket_ptr + tl.program_id(0)) != parts - 1:
            return
        tl.store(ticket_ptr + tl.program_id(0), 0)
        acc = tl.zeros([W, R], tl.float32)
        # .cg: other programs wrote these, so this one's L1 must not answer.
        for i in range(parts):
            acc += tl.load(partial_ptrs + i * stride, y_mask, 0.0, cache_modifier=".cg")
    if bias_ptr is not None:
        acc += bias_W[:, None]

    if EPILOGUE == "plain":
        tl.store(out_ptr + y_ptrs, acc.to(out_ptr.dtype.element_ty), mask=y_mask)
    elif EPILOGUE == "residual":
        y_WR = (acc + residual_WR.to(tl.float32)).to(dtype)
        tl.store(out_ptr + y_ptrs, y_WR, mask=y_mask)
        block = tile * (W // _SQUARES) + tl.arange(0, W // _SQUARES)
        place = out_squares_ptr + rows[None, :] * tl.cdiv(N, _SQUARES) + block[:, None]
        sums = square_sums(tl.where(y_mask, y_WR.to(tl.float32), 0.0))
        tl.store(place, sums, mask=(block * _SQUARES < N)[:, None] & row_ok[None, :])
    elif EPILOGUE == "argmax":
        if out_ptr is not None:
            tl.store(out_ptr + y_ptrs, acc, mask=y_mask)
        if settings_ptr is not None:
            # Absent rows are zeros, of which a quotient takes the slow path.
            acc = tl.div_rn(tl.where(row_ok[None, :], acc, 1.0), temperature) + noise_WR
        best_R, id_R = best_of(tl.where(n_ok[:, None], acc, float("-inf")), n_W[:, None])
        place = rows * tl.cdiv(N, W) + tile
        tl.store(best_ptr + place, best_R, mask=row_ok)
        tl.store(best_id_ptr + place, id_R, mask=row_ok)
    else:
        halves = tl.permute(tl.reshape(acc, [2, W // 2, R]), (1, 2, 0))
        low_WR, high_WR = tl.split(halves)
        if EPILOGUE == "gated":
            y_WR = low_WR / (1.0 + tl.exp(-low_WR)) * high_WR
            if routing_ptr is not None:
                y_WR *= routing_R[None, :]
            f = first_pair + tl.arange(0, W // 2)
            place = out_ptr + rows.to(tl.int64)[None, :] * PAIRS + f[:, None]
            tl.store(place, y_WR.to(dtype), mask=(f < PAIRS)[:, None] & row_ok[None, :])
        else:
            _rotate_and_store(
                out_ptr, key_ptr, value_ptr, low_WR, high_WR, cos_WR, sin_WR,
                q_norm_ptr, k_norm_ptr, eps, group, pair, row_ok,
                rows.to(tl.int64), (rows // T).to(tl.int64), slot_R, S, H, G, PAIRS,
            )  # fmt: skip


def projection_reference(
    x_MK: Tensor,
    weight_NK: Tensor,
    epilogue: str,
    *,
    bias_N: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual_MN: Tensor | None = None,
) -> Tensor:
    """The definition; argmax gives the logits, rotary turns heads of the plain product."""
    if norm is not None:
        x_MK = rms_norm_reference(x_MK, *norm)
    y_MN = linear(x_MK, weight_NK, bias_N)
    if epilogue == "gated":
        return gated_reference(y_MN)
    return y_MN if residual_MN is None else residual_MN + y_MN


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How one projection is cut. A function of its shape alone, as bits follow from it."""

    rows: int  # weight rows of a tile, W
    slabs: int  # a slab of K a warp, or 1: the warps share the weight rows
    early: tuple[int, int] = (0, 0)  # columns of two blocks that registers hold before the wait
    block_k: int = 16  # columns of a block of the loop over the rest of K
    warps: int = 4
    stages: int = 4
    prefetch: int = 0  # 128-byte lines of each weight row asked for before the wait, beyond `early`

    @classmethod
    def whole(cls, K: int, *, rows: int, slabs: int, warps: int | None = None) -> "Tiling":
        """All of K in two blocks at most, so that little of them is padding: 576 = 512 + 64."""
        first = 1 << (max(K, 32 * slabs).bit_length() - 1)
        second = max(triton.next_power_of_2(K - first), 32 * slabs) if first < K else 0
        if second >= first:
            first, second = 2 * first, 0
        return cls(rows=rows, slabs=slabs, early=(first, second), warps=warps or slabs)

    def holds_norm(self, K: int) -> bool:
        """Whether a program has a whole row of the input at once, as the norm's prologue needs."""
        return sum(self.early) >= K


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotary:
    """Where heads of q, k and v turn and go: tables fp32 [positions, K/2], int32 [M] places."""

    cos: Tensor
    sin: Tensor
    positions_M: Tensor
    slots_M: Tensor
    rows_per_sequence: int
    keys: Tensor  # [B, G, S, K]
    values: Tensor
    eps: float = 0.0
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """Which experts run for whom: int32 [1 + E] (their number, then ids), fp32 weights [E, M]."""

    chosen: Tensor
    routing_EM: Tensor
    most: int  # no more than so many are chosen
    own_input: bool  # x is [U, M, K], an input an expert, whose products are summed


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """Products of experts, fp32 [U · M rounded up to 16 · N] or more, and tickets, int32 zeros."""

    partials: Tensor
    tickets: Tensor


def choose_tiling(
    N: int, K: int, epilogue: str, *, expert: bool = False, head_norm: bool = False
) -> Tiling:
    """The measured rule (NOTES.md): all of K at once where it fits, else blocks in a pipeline."""
    if head_norm:  # a tile is a whole head, too much for a block of all of K
        return Tiling(rows=64, slabs=1, block_k=128)
    if N < 64 and not expert and K <= 4096:
        return Tiling.whole(K, rows=16, slabs=16 if K > 1024 else 4)
    if (K <= 2048 and N * K <= 1 << 23) or (K <= 1024 and not expert):
        if N < 3072:  # few programs, so that four warps may hold eight slabs: shorter sums
            slabs = 8 if K > 512 else 4
            return Tiling.whole(K, rows=32 if K > 2 * N else 16, slabs=slabs, warps=4)
        return Tiling.whole(K, rows=32, slabs=4 if K <= 1024 else 8)
    if epilogue == "argmax":
        return Tiling(rows=64, slabs=1, block_k=128, stages=5)
    if N >= 8192:
        return Tiling(rows=64, slabs=1, block_k=128, prefetch=2)
    if expert:
        return Tiling(rows=32, slabs=8, block_k=512, warps=8, stages=3)
    if N >= 4096 and epilogue == "residual":
        return Tiling(rows=32, slabs=8, early=(512, 0), block_k=512, warps=8)
    if N >= 4096:
        return Tiling(rows=64, slabs=1, block_k=128, stages=8)
    return Tiling(rows=16, slabs=8, early=(512, 0), block_k=512, warps=4, stages=6, prefetch=16)


def project(
    out: Tensor | None,
    x_MK: Tensor,
    weight_NK: Tensor,
    *,
    rows: int,
    epilogue: str,
    workspace: Workspace,
    tiling: Tiling,
    pdl: dict[str, bool],
    bias_N: Tensor | None = None,
    norm: Norm | None = None,
    residual_MN: Tensor | None = None,
    squares_out: Tensor | None = None,
    rotary: Rotary | None = None,
    best: tuple[Tensor, Tensor] | None = None,
    draw: Draw | None = None,
    experts: Experts | None = None,
) -> None:
    """Launch one projection of the first `rows` rows of x into `out` (see the module's docstring).

    x [M, K] and weight [N, K] are contiguous ([E, N, K] with experts). `out` is [M, N] for plain
    and residual (which may overwrite `residual_MN`), [M, N / 2] for gated ([U, M, N / 2] with
    experts), q [M, H, K] for rotary, logits or None for argmax, whose `best` are value and id,
    [M, ceil(N / tile rows)], with noise where rows `draw`, which is read before the wait. Nothing
    is allocated. Raises ValueError if the tiling cannot `norm`.
    """
    N, K = weight_NK.shape[-2:]
    if norm is not None and not tiling.holds_norm(K):
        raise ValueError(f"{tiling} has no room for the norm of {K=}: launch normalize before it")
    tile, pairs, groups, heads, kv_heads = tiling.rows, 0, 1, 0, 0
    if epilogue == "gated":
        pairs = N // 2
    elif epilogue == "rotary":
        pairs, kv_heads = rotary.keys.shape[3] // 2, rotary.keys.shape[1]
        groups = N // (2 * pairs)
        heads = groups - 2 * kv_heads
        if rotary.q_norm is not None or tile > 2 * pairs:
            tile = max(triton.next_power_of_2(2 * pairs), 16)
    tiles = groups * triton.cdiv(pairs, tile // 2) if pairs else triton.cdiv(N, tile)
    summed = workspace if experts and experts.own_input else None  # over a row's experts
    R = 8 if rows <= 8 and tiling.slabs > 1 else 16
    grid = (tiles * triton.cdiv(rows, R), experts.most if experts else 1)
    places = rotary or draw
    eps = norm.eps if norm else rotary.eps if rotary else 0.0
    _projection_kernel[grid](
        out, x_MK, weight_NK, bias_N, rows,
        norm and norm.weight, norm and norm.squares, eps,
        residual_MN, squares_out,
        rotary and rotary.q_norm, rotary and rotary.k_norm, rotary and rotary.cos,
        rotary and rotary.sin, places and places.positions_M, rotary and rotary.slots_M,
        rotary and rotary.keys, rotary and rotary.values,
        places.rows_per_sequence if places else 1, rotary.keys.shape[2] if rotary else 1,
        *(best or (None, None)), draw and draw.settings_BW,
        experts and experts.chosen, experts and experts.routing_EM,
        experts.routing_EM.shape[1] if experts else 1,
        summed and summed.partials, summed and summed.tickets,
        N, K, epilogue, pairs, heads, kv_heads,
        R, tile, *tiling.early, tiling.block_k, tiling.slabs, tiling.stages, tiling.prefetch,
        num_warps=tiling.warps, **pdl,
    )  # fmt: skip

"""Projections of a decode step: y = epilogue(norm(x) Wᵀ), a few rows against a large weight.

One kernel family, row-invariant: the bits of a row of y depend on that row of x alone. Legend:
M rows, K inputs, N outputs, F feed-forward width, H query heads, G key/value heads, S cache slots,
V vocabulary, U experts that the rows touch, R = 8 or 16 rows of a tile, L slabs of K, W weight rows
of a tile.

Absent rows of a tile are zeros, so decoding one token and verifying eight run the same code. A tile
of 16 is two of the 8-column instructions that a tile of 8 is one of: the same bits, and half the
work saved where it counts. The weight is the wide operand and is read once. K is summed in an order
made of N and K alone: within a block of K, slab by slab (one slab a warp, so that short tiles
keep every warp busy), blocks from left to right, then slabs, then splits of K (or experts) in
order, by whichever program arrives last: its ticket is an integer atomic, arithmetic never is.

Prologue: RMSNorm, where one block covers K. A producer of x leaves the sums of squares of aligned
16-column blocks, which are nodes of the summation tree of `rms_norm`; finishing the tree gives that
kernel's bits. In a pipelined loop that arithmetic costs more than a short kernel, `normalize`.
Epilogues (sums are fp32 and are rounded once):
  plain     y = x Wᵀ + b
  residual  y = r + x Wᵀ + b, and its sums of squares for the next norm
  gated     y = silu(g) · u, g and u the first and second half of the outputs; times the routing
            weight in an expert
  rotary    heads of q, k and v: optional norm of q and k (Qwen3), rotation by position; q goes to
            y, k and v into the cache
  argmax    the best output of each tile of the vocabulary and its lowest id; optionally the logits

Programmatic dependent launch: a program may start while earlier kernels still run, and may touch
nothing but immutable weights before its one `gdc_wait`. It uses that time to fetch its weights:
into registers where one block covers K, else into L2.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear, silu
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from draftnorm.kernels.decode_norm import (
    SQUARES,
    Norm,
    finish_rstd,
    load_squares,
    norm_levels,
    square_sums,
)
from draftnorm.kernels.rms_norm import rms_norm_reference

_SQUARES: tl.constexpr = tl.constexpr(SQUARES)


@triton.jit
def prefetch_l2(addresses):
    """Ask for the cache lines at these addresses, without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [addresses.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def sum_slabs(acc_LWR, L: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """Sum [L, W, R] over L, neighbours first. Returns [W, R].

    `split` wants both operands in one thread: one exchange between the warps that own the slabs.
    """
    acc = tl.permute(acc_LWR, (1, 2, 0))
    for level in tl.static_range(L.bit_length() - 1):
        left, right = tl.split(tl.reshape(acc, [W, R, L >> (level + 1), 2]))
        acc = left + right
    return tl.reshape(acc, [W, R])


@triton.jit
def _rotate_and_store(
    out_ptr, key_ptr, value_ptr, low_WR, high_WR, cos_WR, sin_WR, q_norm_ptr, k_norm_ptr, eps,
    head, pair, row_ok, rows, sequence, slot, S,
    H: tl.constexpr, G: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The rotary epilogue of one head: both halves of its pairs, W / 2 pairs by 16 rows."""
    dtype = out_ptr.dtype.element_ty
    pair_ok = (pair < PAIRS)[:, None]
    # Nested: the first is known when compiling, the second is not.
    if q_norm_ptr is not None:  # noqa: SIM102
        if head < H + G:
            square_sum_R = tl.sum(low_WR * low_WR + high_WR * high_WR, axis=0)
            rstd_R = tl.rsqrt(square_sum_R / (2 * PAIRS) + eps)
            norm_ptr = k_norm_ptr
            if head < H:
                norm_ptr = q_norm_ptr
            low_W = tl.load(norm_ptr + pair, mask=pair < PAIRS, other=0.0).to(tl.float32)
            high_W = tl.load(norm_ptr + PAIRS + pair, mask=pair < PAIRS, other=0.0).to(tl.float32)
            low_WR = (low_WR * rstd_R[None, :]).to(dtype).to(tl.float32) * low_W[:, None]
            high_WR = (high_WR * rstd_R[None, :]).to(dtype).to(tl.float32) * high_W[:, None]
    if head < H + G:
        turned_WR = low_WR * cos_WR - high_WR * sin_WR
        high_WR = high_WR * cos_WR + low_WR * sin_WR
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


@triton.jit(do_not_specialize=["M", "T", "S", "capacity", "eps"])
def _projection_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, M,
    norm_weight_ptr, squares_ptr, eps,  # prologue
    residual_ptr, out_squares_ptr,
    q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, key_ptr, value_ptr, T, S,
    best_ptr, best_id_ptr,
    expert_ptr, routing_ptr, capacity,
    partial_ptr, ticket_ptr,
    N: tl.constexpr, K: tl.constexpr, EPILOGUE: tl.constexpr,
    PAIRS: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, BLOCK_K: tl.constexpr, L: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr, PREFETCH: tl.constexpr, NORM_LEVELS: tl.constexpr,
    EXPERT_INPUT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    row_tiles = tl.cdiv(M, R)
    tile = tl.program_id(0) // row_tiles  # row tiles of one weight tile are neighbours: L2 serves
    rows = (tl.program_id(0) % row_tiles) * R + tl.arange(0, R)
    row_ok = rows < M
    part = tl.program_id(1)  # a split of K, or a place in the list of experts

    # Which outputs the W weight rows of this tile are. Paired tiles hold two outputs that lie
    # PAIRS apart (gate and up, the halves of a head) in their first and second half.
    SPAN: tl.constexpr = K // SPLITS
    lane = tl.arange(0, W)
    if PAIRS == 0:
        n_W = tile * W + lane
        n_ok = n_W < N
    else:
        TILES_PER_GROUP: tl.constexpr = (PAIRS + W // 2 - 1) // (W // 2)
        group = tile // TILES_PER_GROUP
        first_pair = tile % TILES_PER_GROUP * (W // 2)
        pair_W = first_pair + lane % (W // 2)
        n_W = group * (2 * PAIRS) + lane // (W // 2) * PAIRS + pair_W
        n_ok = pair_W < PAIRS

    if expert_ptr is not None:
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        parts = tl.load(expert_ptr)
        if part >= parts:
            return
        expert = tl.load(expert_ptr + 1 + part)
        weight_ptr += expert.to(tl.int64) * N * K
        routing_R = tl.load(routing_ptr + expert * capacity + rows, mask=row_ok, other=0.0)
        x_ok = routing_R != 0.0
        first_k = 0
        if EXPERT_INPUT:
            x_ptr += part.to(tl.int64) * capacity * K
        else:
            out_ptr += part.to(tl.int64) * capacity * (N // 2)
    else:
        parts = SPLITS
        x_ok = row_ok
        first_k = part * SPAN

    # Slab l of a block holds its columns l·BLOCK_K/L …: one slab a warp.
    SLAB: tl.constexpr = BLOCK_K // L
    if L == 1:
        k = tl.arange(0, BLOCK_K)[None, :]
        w_ptrs = weight_ptr + first_k + n_W.to(tl.int64)[:, None] * K + k
        x_ptrs = x_ptr + first_k + rows.to(tl.int64)[:, None] * K + k
        w_mask, x_mask = n_ok[:, None], x_ok[:, None]
        acc = tl.zeros([W, R], tl.float32)
    else:
        k = (tl.arange(0, L)[:, None] * SLAB + tl.arange(0, SLAB)[None, :])[:, None, :]
        w_ptrs = weight_ptr + first_k + n_W.to(tl.int64)[None, :, None] * K + k
        x_ptrs = x_ptr + first_k + rows.to(tl.int64)[None, :, None] * K + k
        w_mask, x_mask = n_ok[None, :, None], x_ok[None, :, None]
        acc = tl.zeros([L, W, R], tl.float32)

    ONE_BLOCK: tl.constexpr = SPAN <= BLOCK_K
    if ONE_BLOCK:
        w = tl.load(w_ptrs, mask=w_mask & (k < SPAN), other=0.0, eviction_policy="evict_first")
        if norm_weight_ptr is not None:
            scale = tl.load(norm_weight_ptr + first_k + k, mask=k < SPAN, other=0.0).to(tl.float32)
    if PDL and expert_ptr is None:
        if PREFETCH > 0:
            LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
            line = tl.arange(0, PREFETCH) * LINE
            lines = weight_ptr + first_k + n_W.to(tl.int64)[:, None] * K + line[None, :]
            prefetch_l2(tl.where(n_ok[:, None] & (line < SPAN)[None, :], lines, weight_ptr))
        gdc_wait()
        gdc_launch_dependents()

    if norm_weight_ptr is not None:
        squares = load_squares(squares_ptr, rows, row_ok, K, NORM_LEVELS)
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

    if ONE_BLOCK:
        x = tl.load(x_ptrs, mask=x_mask & (k < SPAN), other=0.0)
        if norm_weight_ptr is not None:
            rstd_R = finish_rstd(squares, eps, K, R, NORM_LEVELS)
            rstd = rstd_R[:, None] if L == 1 else rstd_R[None, :, None]
            x = ((x.to(tl.float32) * rstd).to(dtype).to(tl.float32) * scale).to(dtype)
        if L == 1:
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        else:
            acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc, input_precision="ieee")
    else:
        for k0 in tl.range(0, SPAN, BLOCK_K, num_stages=STAGES):
            if SPAN % BLOCK_K == 0:
                w = tl.load(w_ptrs + k0, mask=w_mask, other=0.0, eviction_policy="evict_first")
                x = tl.load(x_ptrs + k0, mask=x_mask, other=0.0)
            else:
                w_ok, x_ok = w_mask & (k < SPAN - k0), x_mask & (k < SPAN - k0)
                w = tl.load(w_ptrs + k0, mask=w_ok, other=0.0, eviction_policy="evict_first")
                x = tl.load(x_ptrs + k0, mask=x_ok, other=0.0)
            if L == 1:
                acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
            else:
                acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc, input_precision="ieee")
    if L > 1:
        acc = sum_slabs(acc, L, W, R)

    if partial_ptr is not None:
        partial_ptrs = partial_ptr + y_ptrs
        stride = row_tiles.to(tl.int64) * R * N
        tl.store(partial_ptrs + part * stride, acc, mask=y_mask)
        tl.debug_barrier()  # every thread's share is written before the ticket says so
        ticket = tl.atomic_add(ticket_ptr + tl.program_id(0), 1, sem="acq_rel")
        if ticket != parts - 1:
            return
        tl.store(ticket_ptr + tl.program_id(0), 0)
        acc = tl.zeros([W, R], tl.float32)
        # .cg: other programs wrote these, so this one's L1 must not answer.
        if expert_ptr is None:
            for i in tl.static_range(SPLITS):
                acc += tl.load(partial_ptrs + i * stride, y_mask, 0.0, cache_modifier=".cg")
        else:
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
        place = out_squares_ptr + rows[:, None] * tl.cdiv(N, _SQUARES) + block[None, :]
        sums = square_sums(tl.trans(tl.where(y_mask, y_WR.to(tl.float32), 0.0)), R, W)
        tl.store(place, sums, mask=row_ok[:, None] & (block * _SQUARES < N)[None, :])
    elif EPILOGUE == "argmax":
        if out_ptr is not None:
            tl.store(out_ptr + y_ptrs, acc, mask=y_mask)
        acc = tl.where(n_ok[:, None], acc, float("-inf"))
        best_R = tl.max(acc, axis=0)
        # Ties go to the lowest id.
        id_R = tl.min(tl.where(acc == best_R[None, :], n_W[:, None], N - 1), axis=0)
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
        gate_MF, up_MF = y_MN.chunk(2, dim=-1)
        return silu(gate_MF) * up_MF
    return y_MN if residual_MN is None else residual_MN + y_MN


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How one projection is cut. A function of its shape alone, as bits follow from it."""

    rows: int  # weight rows of a tile, W
    block_k: int
    slabs: int  # a slab of K a warp, or 1: the warps share the weight rows
    splits: int = 1
    warps: int = 4
    stages: int = 4
    prefetch: int = 0  # 128-byte lines of each weight row asked for before the wait

    def holds_norm(self, K: int) -> bool:
        """Whether a program has a whole row of the input at once, as the norm's prologue needs."""
        return self.splits == 1 and self.block_k >= K


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
    """Partial sums, fp32 [parts · M rounded up to 16 · N] or more, and tickets, int32 zeros."""

    partials: Tensor
    tickets: Tensor


def choose_tiling(N: int, K: int, epilogue: str, *, expert: bool = False) -> Tiling:
    """The measured rule (NOTES.md): one block of K where it fits, else blocks in a pipeline."""
    block_k = triton.next_power_of_2(max(K, 32))
    slabs = min(block_k // 16, 4 if block_k <= 1024 else 8)
    if block_k <= 2048 and N * K <= 1 << 23:
        wide = N > 2048 or (epilogue == "residual" and block_k <= 1024)
        return Tiling(rows=32 if wide else 16, block_k=block_k, slabs=slabs, warps=slabs)
    if block_k <= 1024 and not expert:
        return Tiling(rows=64, block_k=block_k, slabs=min(block_k // 16, 8), warps=8)
    if N < 64 and not expert:
        return Tiling(rows=16, block_k=512, slabs=8, warps=8, splits=8 if K % 8 == 0 else 1)
    if N >= 8192 or expert:
        return Tiling(rows=64, block_k=128, slabs=1)
    return Tiling(rows=16, block_k=512, slabs=8, warps=8, stages=6, prefetch=16)


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
    experts: Experts | None = None,
) -> None:
    """Launch one projection of the first `rows` rows of x into `out` (see the module's docstring).

    x [M, K] and weight [N, K] are contiguous ([E, N, K] with experts). `out` is [M, N] for plain
    and residual (which may overwrite `residual_MN`), [M, N / 2] for gated ([U, M, N / 2] with
    experts), q [M, H, K] for rotary, logits or None for argmax, whose `best` are value and id,
    [M, ceil(N / tile rows)]. Nothing is allocated. Raises ValueError if the tiling cannot `norm`.
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
    parts = experts.most if experts else tiling.splits
    combine = tiling.splits > 1 or (experts is not None and experts.own_input)
    R = 8 if rows <= 8 and tiling.slabs > 1 else 16
    grid = (tiles * triton.cdiv(rows, R), parts)
    best_value, best_id = best or (None, None)
    eps = norm.eps if norm else rotary.eps if rotary else 0.0
    _projection_kernel[grid](
        out, x_MK, weight_NK, bias_N, rows,
        norm and norm.weight, norm and norm.squares, eps,
        residual_MN, squares_out,
        rotary and rotary.q_norm, rotary and rotary.k_norm, rotary and rotary.cos,
        rotary and rotary.sin, rotary and rotary.positions_M, rotary and rotary.slots_M,
        rotary and rotary.keys, rotary and rotary.values,
        rotary.rows_per_sequence if rotary else 1, rotary.keys.shape[2] if rotary else 1,
        best_value, best_id,
        experts and experts.chosen, experts and experts.routing_EM,
        experts.routing_EM.shape[1] if experts else 1,
        workspace.partials if combine else None, workspace.tickets if combine else None,
        N, K, epilogue, pairs, heads, kv_heads,
        R, tile, tiling.block_k, tiling.slabs, tiling.splits, tiling.stages, tiling.prefetch,
        norm_levels(K), experts is not None and experts.own_input,
        num_warps=tiling.warps, **pdl,
    )  # fmt: skip

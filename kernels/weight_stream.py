"""Everything between one attention and the next in a single kernel whose weights never pause.

Its phases: o product + residual; norm + gate/up + SiLU · u; down product + residual; norm + qkv +
rotary of the next layer. Legend: M rows, R rows of a tile (absent ones are zeros), T rows of a
sequence, K inputs, N outputs, F feed-forward width, D hidden size, H query heads, G key/value heads
of 2 · HALF, S cache slots, L = 8 slabs of K, one a warp.

As kernels of their own, each of these products waits at its start for rows that the one before it
has just written, and meanwhile no weight is on its way: 2 to 2.5 µs a border. Here one program a
multiprocessor stays for all of them, and three parts of it work beside each other:

  weights   one warp has the weights of all phases copied into a ring in shared memory, in the order
            of their use and as fast as slots become free. It waits for no other program.
  inputs    two warps wait until all programs have finished a phase, and copy the rows that the next
            one reads into a ring of their own.
  products  eight warps multiply what has arrived, and write.

So at a border weights go on arriving until the ring is full, which takes longer than the border.

A slot of the weights is 16 rows by 512 columns, a slab of 64 for each warp; the rows are eight
neighbours and eight that lie PAIRS further on, so that gate meets up, and one half of a head the
other, in one thread. K is summed slab by slab, the even slots and the odd ones apart, then over the
slabs, neighbours first: an order made of K alone. Rows of x are columns of the instruction, so no
row knows of another, and which program makes which outputs is nothing to them. Slots are taken two
at a time, as all threads of the products meet before each wait and arrival.

Programs wait for each other, so all must be resident: there are as many as multiprocessors, each
takes nearly all the shared memory of one, the kernel before lets this one start only when all of
its own programs run, and no two of these kernels may come from different streams, or from processes
under MPS, at once (StreamedLayers.replay sees to the streams of a process). In Gluon, as Triton's
own pipelines end at such a border; for Hopper, and measured on an H200 alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, mma_v2
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from draftnorm.kernels.gated import gated_reference
from draftnorm.kernels.projection import Rotary
from draftnorm.kernels.rms_norm import rms_norm_reference
from draftnorm.kernels.stream_copies import (
    COLUMNS,
    DOWN,
    FINISHED,
    GATE_UP,
    O_PROJ,
    QKV,
    SLAB,
    L,
    full_pair,
    inputs_part,
    let_go,
    load_scales,
    of_pair,
    thread_barrier,
    weights_part,
)
from draftnorm.kernels.stream_layouts import (
    INPUT_WARPS,
    columns_layout,
    count_nodes,
    half_layout,
    nodes_layout,
    rows_layout,
    slabs_layout,
    sum_neighbours,
    tile_layout,
)

ROWS = 16  # the most rows of a kernel
WIDTH = 2 * COLUMNS.value  # D, F and H · K are multiples of it
COUNTERS = 4  # int64: tickets, and for each phase but the first the programs that came to it
SHARED_MEMORY = 232448  # bytes of one program on Hopper
REGISTERS = 80  # a thread, so that a program of attention fits beside
_MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [8, 1, 1], [1, 16, 8]))
_A = gl.constexpr(gl.DotOperandLayout(0, _MMA.value, 2))
_B = gl.constexpr(gl.DotOperandLayout(1, _MMA.value, 2))
WEIGHTS = gl.NVMMASharedLayout(128, 16, rank=4)
_WEIGHTS = gl.constexpr(WEIGHTS)
_INPUTS = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=3))
_COPY_REGISTERS = gl.constexpr(48)


@gluon.jit
def _rstd(squares_ptr, M, eps, D: gl.constexpr, R: gl.constexpr):
    """What `finish_rstd` computes, fp32 [R], from the same sums in the same order."""
    NODES: gl.constexpr = count_nodes(D)
    layout: gl.constexpr = nodes_layout(R, NODES)
    row = gl.arange(0, R, gl.SliceLayout(1, layout))[:, None]
    node = gl.arange(0, NODES, gl.SliceLayout(0, layout))[None, :]
    mask = (row < M) & (node < D // 16)
    # .cg: other programs wrote these, so this one's L1 must not answer.
    x = gl.load(squares_ptr + row * (D // 16) + node, mask=mask, other=0.0, cache_modifier=".cg")
    x = sum_neighbours(gl.reshape(x, [R, 32, NODES // 32]), NODES.bit_length() - 6)
    x = gl.convert_layout(x, rows_layout(R))
    x = gl.reshape(sum_neighbours(gl.reshape(x, [1, R, 32]), 5), [R])
    rstd = gl.rsqrt(gl.fma(x, 1.0 / D, gl.to_tensor(eps)))
    return gl.convert_layout(rstd, gl.SliceLayout(0, gl.SliceLayout(1, _B)))


@gluon.jit
def _weights(ring, count):
    """A slot of weights, as the instruction wants them."""
    return ring[0].index(count % ring[3]).reshape([L, 16, SLAB]).load(_A)


@gluon.jit
def _rows(ring, count, step, rstd, scales):
    """512 columns of x, as the instruction wants them, normalised if there are `scales`."""
    slots, _, _, SLOTS = ring
    x = slots.index((count + step) % SLOTS).permute([0, 2, 1]).load(_B)
    if scales is not None:
        scale = scales.index(step).load(gl.SliceLayout(2, _B))[:, :, None].to(gl.float32)
        x = (x.to(gl.float32) * rstd[None, None, :]).to(slots.dtype).to(gl.float32)
        x = (x * scale).to(slots.dtype)
    return x


@gluon.jit
def _product(w, x, counts, rstd, scales, K: gl.constexpr, R: gl.constexpr, HELD: gl.constexpr):
    """One tile of outputs, fp32 [16, R], from the rings w and x.

    Two slots a turn: Triton has all threads meet before each wait and arrival.
    """
    count, x_count = counts
    even = gl.zeros([L, 16, R], gl.float32, _MMA)
    odd = gl.zeros([L, 16, R], gl.float32, _MMA)
    for step in range(0, K // COLUMNS, 2):
        full_pair(x, x_count + step)
        x0 = _rows(x, x_count, step, rstd, scales)
        x1 = _rows(x, x_count, step + 1, rstd, scales)
        full_pair(w, count)
        w0 = _weights(w, count)
        w1 = _weights(w, count + 1)
        # Both slots are in registers before a copy may write there again: a barrier of warps waits
        # for no load that is under way.
        fence_async_shared()
        let_go(w, count)
        if not HELD:
            let_go(x, x_count + step)
        even = mma_v2(w0, x0, even)
        odd = mma_v2(w1, x1, odd)
        count += 2
    acc = even + odd
    if not HELD:
        x_count += K // COLUMNS
    acc = gl.permute(gl.convert_layout(acc, slabs_layout(R)), (1, 2, 0))
    return gl.convert_layout(sum_neighbours(acc, 3), tile_layout(R)), (count, x_count)


@gluon.jit
def _let_rows_go(x, counts, K: gl.constexpr):
    """Held rows are needed no more, nor by a program that had no tile for them: but they came."""
    count, x_count = counts
    for step in range(0, K // COLUMNS, 2):
        full_pair(x, x_count + step)
        let_go(x, x_count + step)
    return count, x_count + K // COLUMNS


@gluon.jit
def _finish_phase(opened, PHASE: gl.constexpr, LAST: gl.constexpr):
    """Tell the inputs' part, which tells all programs, that this one's outputs are there."""
    if PHASE < LAST:
        thread_barrier()  # every thread's share is written before anybody hears of it
        mbarrier.arrive(opened.index(FINISHED), count=1)


@gluon.jit
def _residual_phase(
    x_ptr, squares_ptr, M, w, x, counts, opened,
    D: gl.constexpr, K: gl.constexpr, R: gl.constexpr, PHASE: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """x += y Wᵀ, and the sums of squares of each 16 columns of x for the next norm."""
    HELD: gl.constexpr = x[3] >= K // COLUMNS
    layout: gl.constexpr = tile_layout(R)
    row = gl.arange(0, R, gl.SliceLayout(0, layout))[None, :]
    lane = gl.arange(0, 16, gl.SliceLayout(1, layout))[:, None]
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    mbarrier.wait(opened.index(PHASE), 0)
    for tile in range(gl.program_id(0), D // 16, gl.num_programs(0)):
        place = x_ptr + row * D + (tile * 16 + lane)
        # .cg: another program may have written it, so this one's L1 must not answer.
        residual = gl.load(place, mask=row < M, other=0.0, cache_modifier=".cg")
        acc, counts = _product(w, x, counts, 0, None, K, R, HELD)
        y = (acc + residual.to(gl.float32)).to(dtype)
        gl.store(place, y, mask=row < M)
        y = gl.convert_layout(y, columns_layout(R)).to(gl.float32)
        squares = gl.permute(gl.fma(y, y, gl.zeros_like(y)), (1, 0))
        squares = gl.reshape(sum_neighbours(gl.reshape(squares, [1, R, 16]), 4), [R])
        node_row = gl.arange(0, R, squares.type.layout)
        gl.store(squares_ptr + node_row * (D // 16) + tile, squares, mask=node_row < M)
    _finish_phase(opened, PHASE, LAST)
    if HELD:
        counts = _let_rows_go(x, counts, K)
    return counts


@gluon.jit
def _halves(y, R: gl.constexpr):
    """The first and the second eight outputs of a tile, each [8, R]."""
    low, high = gl.split(gl.permute(gl.reshape(y, [2, 8, R]), (1, 2, 0)))
    layout: gl.constexpr = half_layout(R)
    return gl.convert_layout(low, layout), gl.convert_layout(high, layout)


@gluon.jit
def _next_tile(w, tiles, counts):
    """Which tile the next pair of slots begins."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    full_pair(w, counts[0])
    return gl.max(of_pair(tiles, counts[0], w[3]).load(one), axis=0)


@gluon.jit
def _open_phase(
    opened, norm_ptr, squares_ptr, M, eps, scales,
    D: gl.constexpr, R: gl.constexpr, NORM: gl.constexpr, PHASE: gl.constexpr,
):  # fmt: skip
    """Wait until a phase begins; its rows' rstd, and their norm's weight in `scales`."""
    rstd = 0
    if NORM:
        load_scales(norm_ptr, scales, D)
    mbarrier.wait(opened.index(PHASE), 0)
    if NORM:
        rstd = _rstd(squares_ptr, M, eps, D, R)
    return rstd


@gluon.jit
def _gated_phase(
    out_ptr, norm_ptr, squares_ptr, M, eps, w, x, counts, scales, tiles, opened,
    D: gl.constexpr, F: gl.constexpr, R: gl.constexpr, NORM: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """out = silu(g) · u."""
    layout: gl.constexpr = half_layout(R)
    row = gl.arange(0, R, gl.SliceLayout(0, layout))[None, :]
    lane = gl.arange(0, 8, gl.SliceLayout(1, layout))[:, None]
    rstd = _open_phase(opened, norm_ptr, squares_ptr, M, eps, scales, D, R, NORM, GATE_UP)
    tile = _next_tile(w, tiles, counts)
    while tile < F // 8:
        acc, counts = _product(w, x, counts, rstd, scales if NORM else None, D, R, True)
        gate, up = _halves(acc, R)
        y = gate / (1.0 + gl.exp(-gate)) * up
        gl.store(out_ptr + row * F + tile * 8 + lane, y.to(out_ptr.dtype.element_ty), mask=row < M)
        tile = _next_tile(w, tiles, counts)
    let_go(w, counts[0])
    counts = (counts[0] + 2, counts[1])
    _finish_phase(opened, GATE_UP, LAST)
    return _let_rows_go(x, counts, D)


@gluon.jit
def _rotary_phase(
    q_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr,
    M, first_row, T, S, norm_ptr, squares_ptr, eps, w, x, counts,
    scales, opened,
    D: gl.constexpr, H: gl.constexpr, G: gl.constexpr, HALF: gl.constexpr,
    R: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    """Heads of q, k and v, q and k turned by position; k and v into the cache."""
    layout: gl.constexpr = half_layout(R)
    row_R = gl.arange(0, R, gl.SliceLayout(0, layout))
    row = row_R[None, :]
    lane = gl.arange(0, 8, gl.SliceLayout(1, layout))[:, None]
    rstd = _open_phase(opened, norm_ptr, squares_ptr, M, eps, scales, D, R, NORM, QKV)
    position = gl.load(position_ptr + row_R, mask=row_R < M, other=0)[None, :]
    slot = gl.load(slot_ptr + row_R, mask=row_R < M, other=0)[None, :]
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    for tile in range(gl.program_id(0), (H + 2 * G) * HALF // 8, gl.num_programs(0)):
        head = tile // (HALF // 8)
        pair = tile % (HALF // 8) * 8 + lane
        turn = position * HALF + pair
        cos = gl.load(cos_ptr + turn, mask=row < M, other=0.0)
        sin = gl.load(sin_ptr + turn, mask=row < M, other=0.0)
        acc, counts = _product(w, x, counts, rstd, scales if NORM else None, D, R, True)
        low, high = _halves(acc, R)
        if head < H + G:
            turned = gl.fma(low, cos, -(high * sin))
            high = gl.fma(high, cos, low * sin)
            low = turned
        if head < H:
            place = q_ptr + (row * H + head).to(gl.int64) * (2 * HALF) + pair
        else:
            base_ptr = value_ptr
            if head < H + G:
                base_ptr = key_ptr
            line = (((first_row + row) // T) * G + (head - H) % G).to(gl.int64) * S + slot
            place = base_ptr + line * (2 * HALF) + pair
        gl.store(place, low.to(dtype), mask=row < M)
        gl.store(place + HALF, high.to(dtype), mask=row < M)
    _let_rows_go(x, counts, D)


@gluon.jit
def _products_part(
    x_ptr, gated_ptr, squares_ptr, norm_ptr, next_norm_ptr,
    q_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr,
    M, first_row, T, S, eps, next_eps, w, x, scales, tiles, opened,
    D: gl.constexpr, F: gl.constexpr, H: gl.constexpr, G: gl.constexpr, HALF: gl.constexpr,
    R: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    gdc_wait()
    counts = (0, 0)
    if FIRST <= O_PROJ and LAST >= O_PROJ:
        counts = _residual_phase(
            x_ptr, squares_ptr, M, w, x, counts, opened, D, 2 * H * HALF, R, O_PROJ, LAST
        )
    if FIRST <= GATE_UP and LAST >= GATE_UP:
        counts = _gated_phase(
            gated_ptr, norm_ptr, squares_ptr, M, eps, w, x, counts, scales, tiles, opened,
            D, F, R, NORM, LAST,
        )  # fmt: skip
    if FIRST <= DOWN and LAST >= DOWN:
        counts = _residual_phase(x_ptr, squares_ptr, M, w, x, counts, opened, D, F, R, DOWN, LAST)
    if LAST >= QKV:
        _rotary_phase(
            q_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, M, first_row, T, S,
            next_norm_ptr, squares_ptr, next_eps, w, x, counts, scales, opened,
            D, H, G, HALF, R, NORM,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "first_row", "T", "S", "eps", "next_eps"])
def _weight_stream_kernel(
    o, gate_up, down, qkv, attended_ptr, x_ptr, gated_ptr, normed_ptr,
    squares_ptr, norm_ptr, next_norm_ptr, counter_ptr,
    q_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr,
    M, first_row, T, S, eps, next_eps,
    D: gl.constexpr, F: gl.constexpr, H: gl.constexpr, G: gl.constexpr, HALF: gl.constexpr,
    R: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, SLOTS: gl.constexpr,
    X_SLOTS: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    ring = gl.allocate_shared_memory(dtype, [SLOTS, L, 2, 8, SLAB], _WEIGHTS)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    tiles = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], barrier)
    x_ring = gl.allocate_shared_memory(dtype, [X_SLOTS, L, R, SLAB], _INPUTS)
    x_full = gl.allocate_shared_memory(gl.int64, [X_SLOTS, 1], barrier)
    x_empty = gl.allocate_shared_memory(gl.int64, [X_SLOTS, 1], barrier)
    opened = gl.allocate_shared_memory(gl.int64, [FINISHED + 1, 1], barrier)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    scales = gl.allocate_shared_memory(dtype, [D // COLUMNS, L, SLAB], plain)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(X_SLOTS):
        mbarrier.init(x_full.index(i), count=2 * 32 * INPUT_WARPS)
        mbarrier.init(x_empty.index(i), count=1)
    for i in gl.static_range(FINISHED + 1):
        mbarrier.init(opened.index(i), count=1)
    # With a norm the inputs are what the products wrote; else another kernel has normalised them.
    in_ptr = x_ptr if NORM else normed_ptr
    gl.warp_specialize(
        [
            (
                _products_part,
                (
                    x_ptr, gated_ptr, squares_ptr, norm_ptr, next_norm_ptr,
                    q_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr,
                    M, first_row, T, S, eps, next_eps,
                    (ring, full, empty, SLOTS), (x_ring, x_full, x_empty, X_SLOTS), scales,
                    tiles, opened, D, F, H, G, HALF, R, FIRST, LAST, NORM,
                ),
            ),
            (
                inputs_part,
                (
                    attended_ptr, in_ptr, gated_ptr, counter_ptr, M,
                    (x_ring, x_full, x_empty, X_SLOTS), opened, D, F, H, G, HALF, R, FIRST, LAST,
                ),
            ),
            (
                weights_part,
                (
                    o, gate_up, down, qkv, (ring, full, empty, SLOTS), tiles, counter_ptr, opened,
                    D, F, H, G, HALF, FIRST, LAST,
                ),
            ),
        ],
        [INPUT_WARPS, 1],
        [_COPY_REGISTERS, _COPY_REGISTERS],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamBuffers:
    """What a step works on, M rows each: none is another's, each contiguous and aligned."""

    x: Tensor  # the residual stream [M, D]
    squares: Tensor  # sums of squares of aligned 16 columns of it, fp32 [M, D / 16]
    normed: Tensor  # [M, D], read in place of x if another kernel has normalised it
    gated: Tensor  # [M, F]
    attended: Tensor  # [M, H · K]
    q: Tensor  # [M, H, K]
    counters: Tensor  # int64 [COUNTERS], zero at first: all launches of one stream share them


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamWeights:
    """Weights of a launch, those that its phases use: `norm` of gate/up's input, [N, K] each."""

    o: Tensor | None = None
    norm: tuple[Tensor, float] | None = None  # weight [D] and eps
    gate_up: Tensor | None = None
    down: Tensor | None = None
    next_norm: tuple[Tensor, float] | None = None  # of the next layer's qkv
    qkv: Tensor | None = None

    def products(self) -> list[Tensor]:
        """Those that are multiplied with, in the order of their use."""
        return [w for w in (self.o, self.gate_up, self.down, self.qkv) if w is not None]


def ring_slots(D: int, rows: int) -> tuple[int, int]:
    """Slots of weights and of rows, the latter enough for all D columns of `rows` of them."""
    R = 8 if rows <= 8 else ROWS
    inputs = max(64 // R, D // COLUMNS.value)
    room = SHARED_MEMORY - inputs * COLUMNS.value * R * 2 - 2 * D - 512 * R - 1536
    return room // (COLUMNS.value * 32), inputs


def stream_layer(
    weights: StreamWeights,
    buffers: StreamBuffers,
    *,
    rows: int,
    rotary: Rotary,
    fused: bool,
    pdl: dict[str, bool],
) -> None:
    """Launch the phases whose weights are there, for each 16 of `rows` rows.

    o and down add to `buffers.x`; q of the next layer goes to `buffers.q`, its keys and values
    where `rotary` says. `fused` normalises the inputs of gate/up and qkv; else `buffers.normed` has
    them already, so no launch may need both. Nothing is allocated.
    """
    x = buffers.x
    D, F, (_, H, K) = x.shape[1], buffers.gated.shape[1], buffers.q.shape
    _, G, S, _ = rotary.keys.shape
    phases = {
        O_PROJ.value: (weights.o, 8),
        GATE_UP.value: (weights.gate_up, F),
        DOWN.value: (weights.down, 8),
        QKV.value: (weights.qkv, K // 2),
    }
    used = [phase for phase, (weight, _) in phases.items() if weight is not None]
    assert used == list(range(used[0], used[-1] + 1)), "phases of a launch are neighbours"
    assert fused or weights.gate_up is None or weights.qkv is None
    tiles = [_tiles_of(*phases[min(max(phase, used[0]), used[-1])]) for phase in phases]
    norm, eps = weights.norm or (x, 0.0)
    next_norm, next_eps = weights.next_norm or (x, 0.0)
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    for first in range(0, rows, ROWS):
        M = min(ROWS, rows - first)
        R = 8 if M <= 8 else ROWS
        of_rows = (buffers.attended, x, buffers.gated, buffers.normed, buffers.squares)
        _weight_stream_kernel[(programs,)](
            *tiles, *(buffer[first:] for buffer in of_rows), norm, next_norm, buffers.counters,
            buffers.q[first:], rotary.keys, rotary.values, rotary.cos, rotary.sin,
            rotary.positions_M[first:], rotary.slots_M[first:],
            M, first, rotary.rows_per_sequence, S, eps, next_eps,
            D, F, H, G, K // 2, R, used[0], used[-1], *ring_slots(D, M), fused,
            num_warps=8, maxnreg=REGISTERS, launch_pdl=pdl.get("launch_pdl", False),
        )  # fmt: skip


def _tiles_of(weight_NK: Tensor, pairs: int) -> TensorDescriptor:
    """[K / 64, 2, rows, 64]: slabs of eight rows and of the eight that lie `pairs` further on."""
    N, K = weight_NK.shape
    shape, strides = [K // 64, 2, N - pairs, 64], [64, pairs * K, K, 1]
    return TensorDescriptor(weight_NK, shape, strides, [8, 2, 8, 64], WEIGHTS)


def stream_layer_reference(
    x_MD: Tensor, attended_MN: Tensor, weights: StreamWeights
) -> tuple[Tensor, Tensor]:
    """The definition, all phases: the residual stream after the layer, and the next one's qkv."""
    x_MD = x_MD + linear(attended_MN, weights.o)
    gate_up_M2F = linear(rms_norm_reference(x_MD, *weights.norm), weights.gate_up)
    x_MD = x_MD + linear(gated_reference(gate_up_M2F), weights.down)
    return x_MD, linear(rms_norm_reference(x_MD, *weights.next_norm), weights.qkv)

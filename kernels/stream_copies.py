"""What brings weights and rows into the shared memory of kernels/weight_stream.py.

Legend there. A ring is a tuple: slots, which are used in turns, barriers in shared memory, and
SLOTS, how many there are of each. `count` numbers uses of the slots. A product takes two at a time,
so pairs of uses have barriers: `full`, which the copies of both complete, and `empty`, on which
their reader arrives. Those go round by themselves, as a pair may lie across the end of an odd
number of slots: pair p has the barriers p % SLOTS, and waits for their round p // SLOTS.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from draftnorm.kernels.stream_layouts import inputs_layout

L = gl.constexpr(8)
SLAB = gl.constexpr(64)
COLUMNS = gl.constexpr(8 * 64)
EARLY = gl.constexpr(9)  # pairs that begin in so many slots of a phase come one at a time
O_PROJ, GATE_UP, DOWN, QKV = (gl.constexpr(phase) for phase in range(4))
TICKETS = gl.constexpr(0)  # the first counter; then, for each phase but the first, who may begin it
FINISHED = gl.constexpr(4)  # the barrier behind those that open phases
# One name until Triton 3.6, another one since.
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def of_pair(these, count, SLOTS: gl.constexpr):
    """That one of SLOTS barriers, or numbers, which the pair of use `count` has."""
    return these.index(count // 2 % SLOTS)


@gluon.jit
def _wait_for_pair(barriers, count, SLOTS: gl.constexpr):
    mbarrier.wait(of_pair(barriers, count, SLOTS), count // 2 // SLOTS & 1)


@gluon.jit
def empty_slot(ring, count):
    """Where the copy of a use goes, once the pair that had the slot before has let it go."""
    _, _, empty, SLOTS = ring
    if count >= SLOTS:
        _wait_for_pair(empty, count - SLOTS, SLOTS)
    return count % SLOTS


@gluon.jit
def full_pair(ring, count):
    """Wait until the copies of the pair that use `count` belongs to are there."""
    _, full, _, SLOTS = ring
    _wait_for_pair(full, count, SLOTS)


@gluon.jit
def let_go(ring, count):
    """The slots of this use's pair may be filled anew."""
    _, _, empty, SLOTS = ring
    mbarrier.arrive(of_pair(empty, count, SLOTS), count=1)


@gluon.jit
def _stream_tile(weight, ring, count, begin, tile, PAIRS: gl.constexpr, K: gl.constexpr):
    """Copies of one tile, left to right, of a phase that began with use `begin` of the ring.

    Two pairs at most are under way: more would only queue, and others behind them. Of the first
    ones of a phase it is one, as they come while attention runs or programs agree on the phase
    before, whose small reads are what all wait for.
    """
    slots, full, _, SLOTS = ring
    line = tile // (PAIRS // 8) * (2 * PAIRS) + tile % (PAIRS // 8) * 8
    for step in range(0, K // COLUMNS, 2):
        first = empty_slot(ring, count)
        landed = count - 4
        if count - begin < EARLY:
            landed = count - 2
        if landed >= 0:
            full_pair(ring, landed)
        barrier = of_pair(full, count, SLOTS)
        mbarrier.expect(barrier, 2 * weight.block_type.nbytes)
        place = [step * L, 0, line, 0]
        tma.async_copy_global_to_shared(weight, place, barrier, slots.index(first))
        second = empty_slot(ring, count + 1)
        place = [step * L + L, 0, line, 0]
        tma.async_copy_global_to_shared(weight, place, barrier, slots.index(second))
        count += 2
    return count


@gluon.jit
def _stream_tickets(
    weight, ring, tiles, counter_ptr, opened, count,
    TILES: gl.constexpr, PAIRS: gl.constexpr, K: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """A phase of many tiles: multiprocessors are not equally fast, so each takes what it can.

    Every program draws until a ticket is one too many, so a launch draws `draws` of them, and the
    counter need never be set back.
    """
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    programs = gl.num_programs(0)
    dealt = gl.maximum(TILES // programs - 2, 1) * programs  # of the rest, tickets are drawn
    draws = TILES - dealt + programs
    begin, tile = count, gl.program_id(0)
    while tile < TILES:
        next_tile = tile + programs
        if next_tile >= dealt:
            mbarrier.wait(opened.index(FIRST), 0)  # the kernel before this one draws no more
            ticket = gl.atomic_add(counter_ptr + TICKETS, 1, sem="relaxed") % draws
            next_tile = dealt + ticket.to(gl.int32)
        empty_slot(ring, count)
        of_pair(tiles, count, ring[3]).store(gl.full([1], tile, gl.int32, one))
        thread_barrier()  # all lanes have stored it, and one of them arrives
        count = _stream_tile(weight, ring, count, begin, tile, PAIRS, K)
        tile = next_tile
    empty_slot(ring, count)
    of_pair(tiles, count, ring[3]).store(gl.full([1], TILES, gl.int32, one))
    thread_barrier()
    mbarrier.arrive(of_pair(ring[1], count, ring[3]), count=1)
    return count + 2


@gluon.jit
def _stream_weights(weight, ring, count, TILES: gl.constexpr, PAIRS: gl.constexpr, K: gl.constexpr):
    """A phase of few tiles, dealt out in turns."""
    begin = count
    for tile in range(gl.program_id(0), TILES, gl.num_programs(0)):
        count = _stream_tile(weight, ring, count, begin, tile, PAIRS, K)
    return count


@gluon.jit
def weights_part(
    o, gate_up, down, qkv, ring, tiles, counter_ptr, opened,
    D: gl.constexpr, F: gl.constexpr, H: gl.constexpr, G: gl.constexpr, HALF: gl.constexpr,
    FIRST: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """One warp: the weights of all phases, in the order of their use."""
    n = 0
    if FIRST <= O_PROJ and LAST >= O_PROJ:
        n = _stream_weights(o, ring, n, D // 16, 8, 2 * H * HALF)
    if FIRST <= GATE_UP and LAST >= GATE_UP:
        n = _stream_tickets(gate_up, ring, tiles, counter_ptr, opened, n, F // 8, F, D, FIRST)
    if FIRST <= DOWN and LAST >= DOWN:
        n = _stream_weights(down, ring, n, D // 16, 8, F)
    if LAST >= QKV:
        _stream_weights(qkv, ring, n, (H + 2 * G) * HALF // 8, HALF, D)


@gluon.jit
def _arrivals(counter_ptr):
    """A counter, and with it all that those who arrived had written; read by each thread alone.

    A load: atomic reads of all programs would queue before the arrivals they wait for.
    """
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.u64 $0, [$1];", "=l,l", [counter_ptr.to(gl.int64)],
        dtype=gl.int64, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _change_phase(counter_ptr, opened, PHASE: gl.constexpr, FIRST: gl.constexpr):
    """Arrive at a phase once this program has finished the one before, and wait for all others.

    Counters only grow, by the number of programs a launch. The first phase is open already. This
    part arrives, not the products': the one atomic of a program then also says what to wait for.
    """
    if PHASE > FIRST:
        mbarrier.wait(opened.index(FINISHED), PHASE - FIRST + 1 & 1)
        programs = gl.num_programs(0)
        now = gl.atomic_add(counter_ptr + PHASE, 1, sem="acq_rel")
        target = (now // programs + 1) * programs
        while _arrivals(counter_ptr + PHASE) < target:
            pass
        mbarrier.arrive(opened.index(PHASE), count=1)


@gluon.jit
def _fetch_inputs(x_ptr, M, ring, count, TILES: gl.constexpr, K: gl.constexpr, R: gl.constexpr):
    """Rows of x: once if the ring holds them, else for each tile."""
    slots, full, _, _ = ring
    SLOTS: gl.constexpr = ring[3]
    layout: gl.constexpr = inputs_layout(R)
    slab = gl.arange(0, L, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    row = gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    column = gl.arange(0, SLAB, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    pointers = x_ptr + row * K + (slab * SLAB + column)
    mask = (row < M) & (slab >= 0) & (column >= 0)
    turns = 1
    if K // COLUMNS > SLOTS:
        turns = gl.cdiv(TILES - gl.program_id(0), gl.num_programs(0))
    for _ in range(turns):
        for step in range(0, K // COLUMNS, 2):
            first = empty_slot(ring, count)  # and the next slot, as this ring's number is even
            for i in gl.static_range(2):
                async_copy.async_copy_global_to_shared(
                    slots.index(first + i), pointers + (step + i) * COLUMNS, mask=mask
                )
                async_copy.mbarrier_arrive(of_pair(full, count, SLOTS), increment_count=False)
            count += 2
    return count


@gluon.jit
def inputs_part(
    attended_ptr, x_ptr, gated_ptr, counter_ptr, M, ring, opened,
    D: gl.constexpr, F: gl.constexpr, H: gl.constexpr, G: gl.constexpr, HALF: gl.constexpr,
    R: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """Two warps: open each phase to this program, and bring the rows it reads."""
    gdc_wait()
    gdc_launch_dependents()  # not before: attention, which is next, reads what this waited for
    mbarrier.arrive(opened.index(FIRST), count=1)
    n = 0
    if FIRST <= O_PROJ and LAST >= O_PROJ:
        n = _fetch_inputs(attended_ptr, M, ring, n, D // 16, 2 * H * HALF, R)
    if FIRST <= GATE_UP and LAST >= GATE_UP:
        _change_phase(counter_ptr, opened, GATE_UP, FIRST)
        n = _fetch_inputs(x_ptr, M, ring, n, F // 8, D, R)
    if FIRST <= DOWN and LAST >= DOWN:
        _change_phase(counter_ptr, opened, DOWN, FIRST)
        n = _fetch_inputs(gated_ptr, M, ring, n, D // 16, F, R)
    if LAST >= QKV:
        _change_phase(counter_ptr, opened, QKV, FIRST)
        _fetch_inputs(x_ptr, M, ring, n, (H + 2 * G) * HALF // 8, D, R)


@gluon.jit
def load_scales(norm_ptr, scales, D: gl.constexpr):
    """A norm's weight into shared memory, [D / 512, L, 64]: every tile needs it."""
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [8, 1], [1, 0])
    slab = gl.arange(0, L, gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, SLAB, gl.SliceLayout(0, layout))[None, :]
    for step in range(D // COLUMNS):
        scales.index(step).store(gl.load(norm_ptr + step * COLUMNS + slab * SLAB + column))

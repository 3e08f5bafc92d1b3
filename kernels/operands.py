"""What the kernels of a step share: operands loaded where the matrix instruction wants them, sums
in a fixed order.

Legend: L slabs of a sum, one a warp; C = columns / 32 L.

What a program does between its wait and its result decides the time of a small kernel, and a trip
through shared memory is two barriers. The instruction, m16n8k16, wants 2 columns of each of 4
groups of 8 from a thread, while a thread loads best 8 neighbouring ones. Which columns those are is
nothing to a sum, if both operands agree. So the columns of each 32 change names: thread t of four
loads columns 8t … 8t + 7 of a line, and no value ever leaves its thread.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Of axes whose neighbours are apart in memory, Triton's default layout hands the first to the lanes
# of a warp first; the last, from 3.7 on. The kernels are written for the former.
_LAST_AXIS_FIRST: tl.constexpr = tl.constexpr(
    tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
)


@triton.jit
def turned(x):
    """x with the axes before the last in the order that a load or store wants: its own inverse."""
    if _LAST_AXIS_FIRST:
        if len(x.shape) == 3:
            x = tl.permute(x, (1, 0, 2))
        elif len(x.shape) == 5:
            x = tl.permute(x, (3, 2, 1, 0, 4))
        else:
            x = tl.permute(x, (4, 3, 2, 1, 0, 5))
    return x


@triton.jit
def wait_and_trigger(PDL: tl.constexpr):
    """Wait for the kernels before this one, then let the next one's programs start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.constexpr_function
def log2(n):
    """The logarithm of a power of two."""
    return n.bit_length() - 1


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
def eights(W: tl.constexpr):
    """Lines 0 … W - 1 as [8, 1, 1, W / 8, 1], the shape of `fetch`."""
    return (tl.arange(0, 8)[:, None] + 8 * tl.arange(0, W // 8)[None, :])[:, None, None, :, None]


@triton.jit
def fetch(
    ptr, line, ok, FIRST: tl.constexpr, SECOND: tl.constexpr, L: tl.constexpr, K: tl.constexpr,
    POLICY: tl.constexpr,
):  # fmt: skip
    """The FIRST columns of lines of K and the SECOND ones behind them; if 0, the former twice."""
    first = _fetch(ptr, line, ok, 0, FIRST, L, K, POLICY)
    second = first
    if SECOND > 0:
        second = _fetch(ptr, line, ok, FIRST, SECOND, L, K, POLICY)
    return first, second


@triton.jit
def _fetch(
    ptr, line, ok, START: tl.constexpr, BLOCK: tl.constexpr, L: tl.constexpr, K: tl.constexpr,
    POLICY: tl.constexpr,
):  # fmt: skip
    """BLOCK columns from START on as [8, L, BLOCK / 32 L, lines / 8, 32].

    In Triton's default layout for this shape, `turned`, four threads take 32 columns of a line,
    eight lines are the other dimension of a warp, and slabs alternate between the warps.
    """
    C: tl.constexpr = BLOCK // (32 * L)
    k = (tl.arange(0, L)[:, None] + L * tl.arange(0, C)[None, :])[None, :, :, None, None] * 32
    k += START + tl.arange(0, 32)[None, None, None, None, :]
    if START + BLOCK > K:
        ok &= k < K
    return turned(tl.load(turned(ptr + line + k), turned(ok), 0.0, eviction_policy=POLICY))


@triton.jit
def operand(x, WORDS: tl.constexpr = False):
    """What `fetch` brought as [L, lines, 32 C], its columns permuted within each 32.

    The permutation is another one where WORDS, pairs of columns, were loaded: [8, L, C, …, 16, 2].
    """
    x = tl.reshape(x, *x.shape[:4], 4, 2, 2, 2)
    if WORDS:
        x = tl.permute(x, (1, 3, 0, 2, 6, 4, 5, 7))
    else:
        x = tl.permute(x, (1, 3, 0, 2, 5, 6, 4, 7))
    return tl.reshape(x, [x.shape[0], x.shape[1] * 8, x.shape[3] * 32])


@triton.jit
def fold(x, PARTS: tl.constexpr = 1, LARGEST: tl.constexpr = False):
    """The sum or the largest over the last axis, neighbours first; of PARTS > 1 of it, of each.

    `split` wants both operands in one thread: one exchange between the warps that own the slabs.
    """
    for _ in tl.static_range(log2(x.shape[-1] // PARTS)):
        left, right = tl.split(tl.reshape(x, *x.shape[:-1], x.shape[-1] // 2, 2))
        x = tl.maximum(left, right) if LARGEST else left + right
    return x if PARTS > 1 else tl.reshape(x, x.shape[:-1])


@triton.jit
def sum_slabs(acc_LWR, PARTS: tl.constexpr = 1):
    """Sum [L, W, R] over slabs: [W, R], or of PARTS > 1 of them [W, R, PARTS]."""
    return fold(tl.permute(acc_LWR, (1, 2, 0)), PARTS)


@triton.jit
def arrive(ticket_ptr, parts=1):
    """How many parts of a sum were left before this program's: the last one joins them."""
    tl.debug_barrier()  # every thread's share is written before the ticket says so
    return tl.atomic_add(ticket_ptr, parts, sem="acq_rel")

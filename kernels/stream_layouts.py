"""Which thread holds what in kernels/weight_stream.py: linear layouts, given by their bases.

A basis says where in a tensor one bit of a register's, lane's or warp's number leads. Legend: R
rows of x in a tile, 8 or 16; [L, …] a slab of K for each of 8 warps.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

INPUT_WARPS = gl.constexpr(2)


@gluon.constexpr_function
def _bits(first, end, rank, axis):
    """Bases along an axis: first, 2 · first, … below end."""
    bases = []
    while first < end:
        bases.append([first if i == axis else 0 for i in range(rank)])
        first *= 2
    return bases


@gluon.constexpr_function
def _layout(registers, lanes, warps, shape, num_warps=8):
    """A linear layout; lanes and warps without a base of their own hold copies."""
    log_warps = num_warps.bit_length() - 1
    zero = [[0] * len(shape)]
    lanes, spare = lanes[:5], lanes[5:]
    warps = spare + warps
    warps, spare = warps[:log_warps], warps[log_warps:]
    return gl.DistributedLinearLayout(
        registers + spare, lanes + zero * (5 - len(lanes)),
        warps + zero * (log_warps - len(warps)), [], shape,
    )  # fmt: skip


@gluon.constexpr_function
def slabs_layout(R):
    """[L, 16, R]: all slabs and both halves of a pair in one thread."""
    registers = [*_bits(1, 8, 3, 0), [0, 8, 0]]
    return _layout(registers, _bits(1, 8, 3, 1) + _bits(1, R, 3, 2), [], [8, 16, R])


@gluon.constexpr_function
def tile_layout(R):
    """[16, R], as `slabs_layout` leaves it."""
    return _layout([[8, 0]], _bits(1, 8, 2, 0) + _bits(1, R, 2, 1), [], [16, R])


@gluon.constexpr_function
def half_layout(R):
    """[8, R], a half of `tile_layout`."""
    return _layout([], _bits(1, 8, 2, 0) + _bits(1, R, 2, 1), [], [8, R])


@gluon.constexpr_function
def columns_layout(R):
    """[16, R]: the outputs of a row in one thread."""
    return _layout(_bits(1, 16, 2, 0), _bits(1, R, 2, 1), [], [16, R])


@gluon.constexpr_function
def inputs_layout(R):
    """[L, R, 64]: 16 bytes a thread, four rows a warp's copy."""
    columns, rows = _bits(1, 64, 3, 2), _bits(1, R, 3, 1)
    rest = rows[2:] + _bits(1, 8, 3, 0)
    return _layout(columns[:3] + rest[1:], columns[3:] + rows[:2], rest[:1], [8, R, 64], 2)


@gluon.constexpr_function
def count_nodes(D):
    """Sums of squares of 16 columns of a row, padded: at least one a lane."""
    return max(triton.next_power_of_2(D // 16), 32)


@gluon.constexpr_function
def nodes_layout(R, NODES):
    """[R, NODES]: neighbouring nodes in a thread, a row a warp."""
    nodes = _bits(1, NODES, 2, 1)
    return _layout(nodes[:-5], nodes[-5:], _bits(1, R, 2, 0), [R, NODES])


@gluon.constexpr_function
def rows_layout(R):
    """[R, 32]: a row a thread."""
    return _layout(_bits(1, 32, 2, 1), _bits(1, R, 2, 0), [], [R, 32])


@gluon.jit
def sum_neighbours(x, LEVELS: gl.constexpr):
    """Sum the last axis of [A, B, 2^LEVELS], which one thread holds, neighbours first: [A, B]."""
    for _ in gl.static_range(LEVELS):
        left, right = gl.split(gl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
        x = left + right
    return gl.reshape(x, [x.shape[0], x.shape[1]])

"""The two ends of a decode step: tokens to rows, and the best output of a row to a token.

Legend: B sequences, T new tokens of each, M = B·T rows, D hidden, V vocabulary, C tiles of V.

`embed` looks tokens up, leaves the sums of squares that the first norm starts from and says where
each row stands: position and cache slot, from device-side lengths. `choose` finishes the argmax
that the head's projection began tile by tile; ties go to the lowest id. In a plain greedy step it
also moves on by itself: the token becomes the next input, the length grows, and the token is
written to a ring in pinned host memory, which the host reads late, without a synchronisation. A row
with a NaN or an infinity among its logits, or with nothing but -inf, has no best token, and gets
NO_TOKEN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from draftnorm.kernels.decode_norm import SQUARES, square_sums

NO_TOKEN = -2  # -1 marks a place of the ring that was not written yet
_SQUARES: tl.constexpr = tl.constexpr(SQUARES)
_NO_TOKEN: tl.constexpr = tl.constexpr(NO_TOKEN)


@triton.jit(do_not_specialize=["T"])
def _embed_kernel(
    x_ptr, squares_ptr, position_ptr, slot_ptr, token_ptr, length_ptr, table_ptr, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ptr + row).to(tl.int64)
    position = tl.load(length_ptr + row // T) + row % T
    tl.store(position_ptr + row, position.to(tl.int32))
    tl.store(slot_ptr + row, position.to(tl.int32))
    column = tl.arange(0, BLOCK_D)
    x_D = tl.load(table_ptr + token * D + column, mask=column < D, other=0.0)
    tl.store(x_ptr + row * D + column, x_D, mask=column < D)
    sums = square_sums(tl.reshape(x_D.to(tl.float32), [BLOCK_D, 1]), BLOCK_D, 1)
    BLOCKS: tl.constexpr = (D + _SQUARES - 1) // _SQUARES
    block = tl.arange(0, BLOCK_D // _SQUARES)
    place = squares_ptr + row * BLOCKS + block
    tl.store(place, tl.reshape(sums, [BLOCK_D // _SQUARES]), mask=block < BLOCKS)


@triton.jit
def best_of(scores, token):
    """The largest along axis 0 and its lowest id; a NaN, which must not hide, counts as inf."""
    scores = tl.where(scores != scores, float("inf"), scores)
    best = tl.max(scores, axis=0)
    return best, tl.min(tl.where(scores == best, token, 0x7FFFFFFF), axis=0)


@triton.jit
def best_token(best_ptr, best_id_ptr, row, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The lowest id among the best tiles of a row, or NO_TOKEN."""
    tile = tl.arange(0, BLOCK_C)
    best_C = tl.load(best_ptr + row * C + tile, mask=tile < C, other=float("-inf"))
    id_C = tl.load(best_id_ptr + row * C + tile, mask=tile < C)
    best, token = best_of(best_C, id_C)
    return tl.where((best > float("-inf")) & (best < float("inf")), token, _NO_TOKEN)


@triton.jit
def emit(
    token, row, chosen_ptr, token_ptr, length_ptr, ring_ptr, T,
    RING: tl.constexpr, ADVANCE: tl.constexpr,
):  # fmt: skip
    """Write a row's token; after a sequence's last row, move the sequence on."""
    tl.store(chosen_ptr + row, token)
    if ADVANCE:  # noqa: SIM102 - the first is known when compiling, the second is not
        if row % T == T - 1:
            b = row // T
            length = tl.load(length_ptr + b) + T
            tl.store(length_ptr + b, length)
            tl.store(token_ptr + b, tl.maximum(token, 0))  # a step in flight reads some embedding
            tl.store(ring_ptr + b * RING + length % RING, token)


@triton.jit(do_not_specialize=["T"])
def _choose_kernel(
    chosen_ptr, best_ptr, best_id_ptr, token_ptr, length_ptr, ring_ptr, T,
    C: tl.constexpr, BLOCK_C: tl.constexpr, RING: tl.constexpr, ADVANCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    token = best_token(best_ptr, best_id_ptr, row, C, BLOCK_C)
    emit(token, row, chosen_ptr, token_ptr, length_ptr, ring_ptr, T, RING, ADVANCE)


def embed(
    x_MD: Tensor,
    squares: Tensor,
    positions_M: Tensor,
    slots_M: Tensor,
    tokens_M: Tensor,
    lengths_B: Tensor,
    table_VD: Tensor,
    *,
    rows: int,
    rows_per_sequence: int,
    pdl: dict[str, bool],
) -> None:
    """Launch: x = table[tokens], square sums fp32 [M, ceil(D / 16)], positions and slots int32.

    Row m belongs to sequence b = m // rows_per_sequence, at lengths_B[b] + m % rows_per_sequence.
    """
    D = table_VD.shape[1]
    block_d = max(triton.next_power_of_2(D), SQUARES)
    _embed_kernel[(rows,)](
        x_MD, squares, positions_M, slots_M, tokens_M, lengths_B, table_VD, rows_per_sequence,
        D, block_d, **pdl,
    )  # fmt: skip


def choose(
    chosen_M: Tensor,
    best: tuple[Tensor, Tensor],
    *,
    rows: int,
    vocabulary: int,
    tile_rows: int,
    pdl: dict[str, bool],
    rows_per_sequence: int = 1,
    advance: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Launch: the best token of each row from the best of each tile, int32 [M].

    `advance` = (tokens_M, lengths_B, ring [B, slots]) makes it the end of a greedy step: what
    follows a sequence's last row becomes its next token, one of tokens_M[:B].
    """
    C = triton.cdiv(vocabulary, tile_rows)
    tokens_M, lengths_B, ring = advance or (None, None, None)
    _choose_kernel[(rows,)](
        chosen_M, *best, tokens_M, lengths_B, ring, rows_per_sequence,
        C, triton.next_power_of_2(C), 0 if ring is None else ring.shape[1], advance is not None,
        **pdl,
    )  # fmt: skip


def choose_reference(logits_MV: Tensor) -> Tensor:
    """The lowest id among a row's largest logits."""
    is_best_MV = logits_MV == logits_MV.amax(dim=-1, keepdim=True)
    return torch.argmax(is_best_MV.to(torch.int32), dim=-1)

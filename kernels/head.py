"""The two ends of a decode step: tokens to rows, and the best output of a row to a token.

Legend: B sequences, T new tokens of each, M = B·T rows, D hidden, V vocabulary, C tiles of V.

`embed` looks tokens up, leaves the sums of squares that the first norm starts from and says where
each row stands: position and cache slot, from device-side lengths. `choose` finishes the argmax
that the head's projection began tile by tile, and the step (kernels/cycle.py); ties go to the
lowest id. A row with a NaN or an infinity among its logits, or with nothing but -inf, has no best
token, and gets NO_TOKEN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftnorm.kernels.cycle import Text, ending, finish, note_time
from draftnorm.kernels.decode_norm import SQUARES, square_sums
from draftnorm.kernels.operands import wait_and_trigger

NO_TOKEN = -2  # neither of the marks of kernels/cycle.py
_SQUARES: tl.constexpr = tl.constexpr(SQUARES)
_NO_TOKEN: tl.constexpr = tl.constexpr(NO_TOKEN)


@triton.jit(do_not_specialize=["T", "V"])
def _embed_kernel(
    x_ptr, squares_ptr, position_ptr, slot_ptr, token_ptr, length_ptr, stamp_ptr, table_ptr, T, V,
    D: tl.constexpr, TEXT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_and_trigger(PDL)
    row = tl.program_id(0).to(tl.int64)
    if stamp_ptr is not None:  # noqa: SIM102 - the first is known when compiling
        if row == 0:
            note_time(stamp_ptr)
    position = tl.load(length_ptr + row // T) + row % T
    token = tl.load(token_ptr + (position if TEXT else row)).to(tl.int64)
    token = tl.minimum(token, V - 1)  # a padded target may say what a draft cannot read
    tl.store(position_ptr + row, position.to(tl.int32))
    tl.store(slot_ptr + row, position.to(tl.int32))
    BLOCK_D: tl.constexpr = max(triton.next_power_of_2(D), _SQUARES)
    column = tl.arange(0, BLOCK_D)
    x_D = tl.load(table_ptr + token * D + column, mask=column < D, other=0.0)
    tl.store(x_ptr + row * D + column, x_D, mask=column < D)
    sums = square_sums(tl.reshape(x_D.to(tl.float32), [BLOCK_D, 1]))
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
def best_token(best_ptr, best_id_ptr, row, C: tl.constexpr):
    """The lowest id among the best tiles of a row, or NO_TOKEN."""
    tile = tl.arange(0, triton.next_power_of_2(C))
    best_C = tl.load(best_ptr + row * C + tile, mask=tile < C, other=float("-inf"))
    id_C = tl.load(best_id_ptr + row * C + tile, mask=tile < C)
    best, token = best_of(best_C, id_C)
    return tl.where((best > float("-inf")) & (best < float("inf")), token, _NO_TOKEN)


@triton.jit
def _choose_kernel(
    chosen_ptr, best_ptr, best_id_ptr, text_ptr, state_ptr, blocks_ptr, experts_ptr,
    C: tl.constexpr, END: tl.constexpr, LAYERS: tl.constexpr, EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_and_trigger(PDL)
    row = tl.program_id(0)
    token = best_token(best_ptr, best_id_ptr, row, C)
    finish(
        token, row, chosen_ptr, text_ptr, state_ptr, blocks_ptr, experts_ptr,
        END, LAYERS, EXPERTS,
    )  # fmt: skip


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
    by_position: bool = False,
    stamp: Tensor | None = None,
) -> None:
    """Launch: x = table[tokens], square sums fp32 [M, ceil(D / 16)], positions and slots int32.

    Row m belongs to sequence b = m // rows_per_sequence, at lengths_B[b] + m % rows_per_sequence.
    Its token is the m-th of tokens_M, or `by_position` the one at its position. `stamp` takes the
    time.
    """
    V, D = table_VD.shape
    _embed_kernel[(rows,)](
        x_MD, squares, positions_M, slots_M, tokens_M, lengths_B, stamp, table_VD,
        rows_per_sequence, V, D, by_position, **pdl,
    )  # fmt: skip


def choose(
    chosen_M: Tensor,
    best: tuple[Tensor, Tensor],
    *,
    rows: int,
    pdl: dict[str, bool],
    text: Text | None = None,
    end: str = "asked",
    experts: Tensor | None = None,
) -> None:
    """Launch: the best token of each row, int32 [M], from value and id of each tile, [M, C].

    With a text it is the end of a step: one of ENDINGS, a cycle with the `experts` it touched.
    """
    tensors, constants = ending(text, end, experts)
    _choose_kernel[(rows,)](chosen_M, *best, *tensors, best[0].shape[1], *constants, **pdl)


def choose_reference(logits_MV: Tensor) -> Tensor:
    """The lowest id among a row's largest logits."""
    is_best_MV = logits_MV == logits_MV.amax(dim=-1, keepdim=True)
    return torch.argmax(is_best_MV.to(torch.int32), dim=-1)

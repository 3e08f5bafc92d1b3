"""Cycles of draft and verify that a GPU works off by itself: the text, how a step ends, n-grams.

Legend: n committed tokens, T rows of a step, N drafts. A drafter's guesses are its drafts.

The text lies on the device: token i in place i, drafts in the places behind the n committed ones.
A step of a run finds its tokens there by their positions, so nobody has to tell it any, and its
ending says what follows:

    asked   nothing: the host told the tokens and reads the choices
    feed    the drafter has read T tokens more, up to the last two, which its first step takes
    draft   what follows the last row is the next draft
    cycle   the target's choices meet the drafts: those that agree and one choice more are
            committed (`verify_exact` of decoding/verification.py), lengths are set back, and the
            block is written to pinned host memory, which the host reads late and without a
            synchronisation

`look_up` is a drafter by itself, prompt look-up as in `NgramDrafter` of decoding/drafters.py, which
is its definition.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from draftnorm.kernels.operands import arrive, wait_and_trigger
from draftnorm.kernels.rms_norm import INTERPRETED

ENDINGS = ("asked", "feed", "draft", "cycle")
MOST = 16  # rows of a verify
SLOTS, LINE = 8, 32  # blocks in the host's memory, more than can be under way; words of one
OPEN, NONE = -1, -3  # a word that was not written yet, and one behind the end of a block
DRAFTS, TOUCHED, TIMES = MOST, MOST + 1, MOST + 2  # words of a block behind its tokens: drafts that
# there were, experts that the layers' rows touched together, ns of STAMPS
# Words of the state: lengths of the target's cache and of the drafter's, aligned like any buffer;
# drafts that there are, cycles so far, rows that have ended, when each of STAMPS began.
LENGTH, DRAFT_LENGTH, FOUND, CYCLE, TICKET, BEGAN = 0, 4, 8, 9, 10, 11
STAMPS = ("feed", "draft", "cycle")  # the last feed, all steps that draft, the verify
_MOST, _SLOTS, _LINE, _NONE = (tl.constexpr(x) for x in (MOST, SLOTS, LINE, NONE))
_DRAFTS, _TOUCHED, _TIMES, _BEGAN = (tl.constexpr(x) for x in (DRAFTS, TOUCHED, TIMES, BEGAN))
_LENGTH, _DRAFT_LENGTH, _FOUND = (tl.constexpr(x) for x in (LENGTH, DRAFT_LENGTH, FOUND))
_CYCLE, _TICKET = (tl.constexpr(x) for x in (CYCLE, TICKET))
_TIMED: tl.constexpr = tl.constexpr(not INTERPRETED)  # which has no clock


@dataclass(frozen=True, slots=True)
class Text:
    """The sequence on the device, shared by target and drafter. All int32."""

    tokens: Tensor  # by position
    state: Tensor
    blocks: Tensor  # [SLOTS, LINE], pinned

    @classmethod
    def allocate(cls, capacity: int, device: torch.device) -> "Text":
        """For sequences of up to `capacity` tokens."""
        return cls(
            tokens=torch.zeros(capacity + 2 * MOST, dtype=torch.int32, device=device),
            state=torch.zeros(BEGAN + len(STAMPS), dtype=torch.int32, device=device),
            blocks=torch.full(
                (SLOTS, LINE), OPEN, dtype=torch.int32, pin_memory=device.type == "cuda"
            ),
        )

    def length(self, end: str) -> Tensor:
        """Where a step with this ending finds how many tokens are in its cache."""
        word = LENGTH if end == "cycle" else DRAFT_LENGTH
        return self.state[word : word + 1]

    def stamp(self, end: str, rows: int) -> Tensor | None:
        """Where a step notes when it began, unless it drafts behind another that does."""
        if end not in STAMPS or (end == "draft" and rows == 1) or INTERPRETED:
            return None
        word = BEGAN + STAMPS.index(end)
        return self.state[word : word + 1]


@triton.jit
def note_time(ptr):
    """The device's clock, its last 32 bits, in ns."""
    tl.store(ptr, globaltimer().to(tl.int32))


@triton.jit
def _accept(
    token, row, chosen_ptr, text_ptr, state_ptr, blocks_ptr, experts_ptr, T,
    LAYERS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """All rows have chosen, the last one this token: commit, set lengths back, publish."""
    word = tl.arange(0, _LINE)
    n = tl.load(state_ptr + _LENGTH) + 1
    # .cg: other programs chose, so this one's L1 must not answer.
    other = (word < T) & (word != row)
    choice = tl.load(chosen_ptr + word, mask=other, other=_NONE, cache_modifier=".cg")
    choice = tl.where(word == row, token, choice)
    draft = tl.load(text_ptr + n + word, mask=word < T - 1, other=_NONE)
    drafts = tl.minimum(tl.load(state_ptr + _FOUND), T - 1)
    read = tl.load(state_ptr + _DRAFT_LENGTH)
    cycle = tl.load(state_ptr + _CYCLE)
    accepted = tl.min(tl.where((word < drafts) & (draft == choice), _LINE, word), axis=0)
    line = tl.where(word <= accepted, choice, _NONE)
    line = tl.where(word == _DRAFTS, drafts, line)
    touched = 0
    for layer in tl.static_range(LAYERS):
        touched += tl.load(experts_ptr + layer * EXPERTS)
    line = tl.where(word == _TOUCHED, touched, line)
    if _TIMED:
        began = globaltimer().to(tl.int32)
        for i in tl.static_range(2, -1, -1):
            ended, began = began, tl.load(state_ptr + _BEGAN + i)
            line = tl.where(word == _TIMES + i, tl.maximum(ended - began, 0), line)
    tl.debug_barrier()  # every thread has read what is now written
    tl.store(text_ptr + n + word, tl.maximum(choice, 0), mask=word <= accepted)
    tl.store(state_ptr + _LENGTH, n + accepted)
    tl.store(state_ptr + _DRAFT_LENGTH, tl.minimum(read, n + accepted - 1))
    tl.store(state_ptr + _CYCLE, cycle + 1)
    tl.store(state_ptr + _TICKET, 0)
    tl.store(blocks_ptr + cycle % _SLOTS * _LINE + word, line)


@triton.jit
def finish(
    token, row, chosen_ptr, text_ptr, state_ptr, blocks_ptr, experts_ptr,
    END: tl.constexpr, LAYERS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write a row's token, a program's; once all rows have theirs, end the step."""
    T = tl.num_programs(0)
    tl.store(chosen_ptr + row, token)
    if END == "cycle":
        before = T - 1
        if T > 1:
            before = arrive(state_ptr + _TICKET)
        if before == T - 1:
            _accept(
                token, row, chosen_ptr, text_ptr, state_ptr, blocks_ptr, experts_ptr, T,
                LAYERS, EXPERTS,
            )  # fmt: skip
    elif END != "asked":  # noqa: SIM102 - the first is known when compiling, the second is not
        if row == T - 1:  # each thread for itself: no barrier, as who stores has loaded
            read = tl.load(state_ptr + _DRAFT_LENGTH) + T
            if END == "feed":
                read = tl.maximum(tl.minimum(read, tl.load(state_ptr + _LENGTH) - 1), 0)
            else:
                tl.store(text_ptr + read, tl.maximum(token, 0))  # the next step reads some row
            tl.store(state_ptr + _DRAFT_LENGTH, read)


def ending(text: Text | None, end: str, experts: Tensor | None) -> tuple[tuple, tuple]:
    """What a kernel that ends a step takes: tensors and constants.

    `experts` int32 [layers, …] says first how many a layer's rows touch.
    """
    if text is None or end == "asked":
        return (None,) * 4, ("asked", 0, 0)
    layers, words = (0, 0) if experts is None or end != "cycle" else experts.shape
    return (text.tokens, text.state, text.blocks, experts), (end, layers, words)


@triton.jit(do_not_specialize=["N"])
def _look_up_kernel(
    text_ptr, state_ptr, N, SHORTEST: tl.constexpr, LONGEST: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_and_trigger(PDL)
    if _TIMED:
        note_time(state_ptr + _BEGAN + 1)
    n = tl.load(state_ptr + _LENGTH) + 1
    best = tl.zeros([BLOCK], tl.int64)
    for start in range(0, n, BLOCK):
        # How far back from place e − 1 the text is as it is at its end; the longest, then the last.
        e = start + tl.arange(0, BLOCK)
        same, length = e < n, tl.zeros([BLOCK], tl.int64)
        for i in tl.static_range(1, LONGEST + 1):
            here = tl.load(text_ptr + e - i, mask=same & (e >= i), other=_NONE)
            same &= here == tl.load(text_ptr + tl.maximum(n - i, 0))
            length += same.to(tl.int64)
        best = tl.maximum(best, tl.where(length >= SHORTEST, (length << 32) + e, 0))
    source = (tl.max(best, axis=0) & 0xFFFFFFFF).to(tl.int32)
    i = tl.arange(0, _MOST)
    found = source > 0
    # Copying may run into its own output, as in LZ77: a loop in the text goes on.
    draft = tl.load(text_ptr + source + i % (n - source), mask=found)
    tl.store(text_ptr + n + i, draft, mask=found & (i < N))
    tl.store(state_ptr + _FOUND, tl.where(found, N, 0))


def look_up(text: Text, *, drafts: int, lengths: range, pdl: dict[str, bool]) -> None:
    """Launch: what followed the last time the text ended as it ends now, up to `drafts` tokens.

    The longest known suffix counts, its length one of `lengths`.
    """
    _look_up_kernel[(1,)](
        text.tokens, text.state, drafts, lengths[0], lengths[-1], 4096, num_warps=8, **pdl,
    )  # fmt: skip

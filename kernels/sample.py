"""Sampling on the device: argmax of logits / temperature + Gumbel noise over the tokens kept.

Legend: B sequences, M rows, V vocabulary, C tiles of V, W words of settings, G tiles of a block.

The noise is Philox4x32-10 (Salmon et al. 2011): key = seed, counter = (position at which the token
will stand, token id, stream, request id), u = ((bits >> 9) + 0.5) · 2⁻²³, noise = −log(−log u). So
the argmax draws from softmax(logits / temperature), and a draw depends on where it is made, not on
who makes it. Ties go to the lowest id.

At pure temperature the head's product adds the noise in its epilogue (kernels/projection.py), and
what follows is `head.choose`. With top-k, top-p or min-p logits are stored. `_race_kernel` scores
them in tiles, many programs a row, and `_decide_kernel`, one program a row, takes the winner,
without a sort:

- top-k: the k-th largest of the tiles' maxima bounds the k-th largest score from below. In the
  tiles that reach it, only k but for ties, the threshold is found by quartering the bits of a
  float. Ties with the k-th stay. With k > C every tile is searched, which is slow.
- top-p and min-p keep a head of the order (score, then lower id). A token is in it if the mass
  ahead is less than top-p of the whole, and if its weight is at least min-p of the largest. If the
  winner is not in it, nothing behind is: the winner among those ahead is next. One pass over the
  tiles that reach the first winner weighs and elects at once; 1 + log(1 / mass of the head) passes
  are expected at most. The whole is the sum of what tiles weigh, or with top-k of what it keeps.

Every sum has an order made of the row's own values, so a token does not depend on the other rows.
Settings are read from the device: new ones of the same kind need no other kernel or graph.
"""

import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftnorm.kernels.cycle import Text, ending, finish
from draftnorm.kernels.head import NO_TOKEN, best_of, best_token
from draftnorm.kernels.operands import wait_and_trigger

WARPS, GROUP = 16, 32  # warps of _decide_kernel, tiles of a block of its passes
TILE = 128  # tokens of a tile
WORDS = 7  # temperature, top-p, min-p (bits of fp64), top-k, seed, stream, request id
_WORDS: tl.constexpr = tl.constexpr(WORDS)
_INF: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def load_fraction(word_ptr):
    return tl.load(word_ptr).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def load_draw(position_ptr, settings_ptr, rows, T):
    """Of rows, in their shape: temperature, seed, position of the next token, stream, request."""
    setting = settings_ptr + rows // T * _WORDS
    stream, request = tl.load(setting + 5).to(tl.uint32), tl.load(setting + 6).to(tl.uint32)
    position = tl.load(position_ptr + rows) + 1
    return load_fraction(setting), tl.load(setting + 4), position, stream, request


@triton.jit
def noise_bits(token, seed, position, stream, request):
    """The first output word of Philox, uint32 of the arguments' common shape."""
    return tl.philox(seed, position, token, stream, request)[0]


@triton.jit
def gumbel(token, seed, position, stream, request):
    """Noise, fp32 of the arguments' common shape."""
    bits = noise_bits(token, seed, position, stream, request)
    # Exact: 23 bits and a half. tl.log is accurate near 1, where the winners' u lie.
    u = ((bits >> 9).to(tl.float32) + 0.5) * (2.0**-23)
    return -tl.log(-tl.log(u))


@triton.jit(do_not_specialize=["T"])
def _race_kernel(
    best_ptr, best_id_ptr, scores_ptr, noisy_ptr, largest_ptr, mass_ptr,
    logits_ptr, position_ptr, settings_ptr, T,
    V: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_and_trigger(PDL)
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = tile * TILE + tl.arange(0, TILE)
    place = row * V + token
    logits = tl.load(logits_ptr + place, mask=token < V, other=-_INF)
    temperature, seed, position, stream, request = load_draw(position_ptr, settings_ptr, row, T)
    scores = tl.div_rn(logits, temperature)
    noisy = scores + gumbel(token, seed, position, stream, request)
    tl.store(scores_ptr + place, scores, mask=token < V)
    tl.store(noisy_ptr + place, noisy, mask=token < V)
    best, winner = best_of(noisy, token)
    slot = row * tl.cdiv(V, TILE) + tile
    tl.store(best_ptr + slot, best)
    tl.store(best_id_ptr + slot, winner)
    largest = tl.max(scores, axis=0)
    tl.store(largest_ptr + slot, largest)
    weights = tl.where(scores > -_INF, tl.exp(scores - largest), 0.0)
    tl.store(mass_ptr + slot, tl.sum(weights, axis=0))


@triton.jit
def _flip(bits):
    """Bits of a float to an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(x):
    return _flip(x.to(tl.int32, bitcast=True))


@triton.jit
def _float(key):
    return _flip(key).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    return (low & high) + ((low ^ high) >> 1)  # (low + high) / 2 without overflow


@triton.jit
def _quarters(low, high):
    half = _middle(low, high)
    return _middle(low, half), half, _middle(half, high)


@triton.jit
def _reach(scores, low, high):
    """Which of three thresholds between the keys scores reach; sums of it are three counts."""
    first, second, third = _quarters(low, high)
    two = (scores >= _float(first)).to(tl.int64) + ((scores >= _float(second)).to(tl.int64) << 21)
    return two + ((scores >= _float(third)).to(tl.int64) << 42)


@triton.jit
def _narrow(low, high, reached, counts, k):
    """The quarter in which fewer than k begin to reach, and how many reach its beginning."""
    first, second, third = _quarters(low, high)
    one, two, three = counts & 0x1FFFFF, (counts >> 21) & 0x1FFFFF, counts >> 42
    reached = tl.where(three >= k, three, tl.where(two >= k, two, tl.where(one >= k, one, reached)))
    above = tl.where(three >= k, high, tl.where(two >= k, third, tl.where(one >= k, second, first)))
    low = tl.where(three >= k, third, tl.where(two >= k, second, tl.where(one >= k, first, low)))
    return low, above, reached


@triton.jit
def _load_scores(
    scores_ptr, live_ptr, first, count, V: tl.constexpr, TILE: tl.constexpr, G: tl.constexpr
):
    """Ids [G, TILE] of live tiles from the first-th on, which of them are none, and their scores:
    NaN, which passes no test, for those."""
    place = first + tl.arange(0, G)
    tile = tl.load(live_ptr + place, mask=place < count, other=0)
    token = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    ok = (place < count)[:, None] & (token < V)
    return token, ok, tl.load(scores_ptr + token, mask=ok, other=float("nan"))


@triton.jit
def _ahead(
    scores_ptr, noisy_ptr, live_ptr, count, largest, least, score, token,
    V: tl.constexpr, TILE: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Of live scores from `least` on: the mass of all, the mass ahead of (score, token), and the
    winner of the race among the latter, or V if there are none."""
    mass = tl.zeros([G, TILE], tl.float32)
    before = tl.zeros([G, TILE], tl.float32)
    best = tl.full([G, TILE], -_INF, tl.float32)
    winner = tl.full([G, TILE], V, tl.int32)
    for first in range(0, count, G):
        other, ok, scores = _load_scores(scores_ptr, live_ptr, first, count, V, TILE, G)
        noise = tl.load(noisy_ptr + other, mask=ok, other=-_INF)
        ahead = (scores > score) | ((scores == score) & (other < token))
        ahead &= scores >= least
        weight = tl.exp(scores - largest)
        mass += tl.where(scores >= least, weight, 0.0)
        before += tl.where(ahead, weight, 0.0)
        noise = tl.where(ahead, noise, -_INF)
        winner = tl.where(noise > best, other, winner)
        best = tl.maximum(noise, best)
    winner = tl.where(best == tl.max(best), winner, V)
    return tl.sum(mass), tl.sum(before), tl.min(winner)


@triton.jit(do_not_specialize=["T"])
def _decide_kernel(
    chosen_ptr, text_ptr, state_ptr, blocks_ptr, experts_ptr,
    best_ptr, best_id_ptr, scores_ptr, noisy_ptr, largest_ptr, mass_ptr, live_ptr, settings_ptr, T,
    V: tl.constexpr, TILE: tl.constexpr, G: tl.constexpr, END: tl.constexpr,
    LAYERS: tl.constexpr, EXPERTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_and_trigger(PDL)
    row = tl.program_id(0).to(tl.int64)
    C: tl.constexpr = (V + TILE - 1) // TILE
    token = best_token(best_ptr, best_id_ptr, row, C)
    settings_ptr += row // T * _WORDS
    top_p, min_p = load_fraction(settings_ptr + 1), load_fraction(settings_ptr + 2)
    top_k = tl.minimum(tl.load(settings_ptr + 3), V).to(tl.int32)
    if (token >= 0) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)):
        scores_ptr += row * V
        noisy_ptr += row * V
        live_ptr += row * C
        tile = tl.arange(0, triton.next_power_of_2(C))
        largest_C = tl.load(largest_ptr + row * C + tile, mask=tile < C, other=-_INF)
        largest = tl.max(largest_C, axis=0)
        mass_C = tl.load(mass_ptr + row * C + tile, mask=tile < C, other=0.0)
        whole = tl.sum(tl.where(mass_C > 0.0, mass_C * tl.exp(largest_C - largest), 0.0), axis=0)
        score = tl.load(scores_ptr + token)
        # At least top_k scores reach _float(low), fewer reach _float(high).
        low = _key(score)
        high = _key(largest) + 1
        if top_k > 0:
            low = _key(tl.cast(-_INF, tl.float32))
            if top_k <= C:
                least = tl.min(tl.where(tile < C, largest_C, _INF), axis=0)
                low, above = _key(least), high
                reached = tl.cast(C, tl.int64)
                while (low + 1 < above) & (reached != top_k):
                    counts = tl.sum(_reach(largest_C, low, above), axis=0)
                    low, above, reached = _narrow(low, above, reached, counts, top_k)
        live_C = (tile < C) & (largest_C >= _float(low))
        index_C = tl.cumsum(live_C.to(tl.int32), axis=0)
        count = tl.max(index_C, axis=0)
        tl.store(live_ptr + index_C - 1, tile, mask=live_C)
        tl.debug_barrier()  # every thread's tiles are in the list before any thread reads it
        if top_k > 0:
            reached = tl.cast(V, tl.int64)
            while (low + 1 < high) & (reached != top_k):
                counts_GT = tl.zeros([G, TILE], tl.int64)
                for first in range(0, count, G):
                    _, _, scores = _load_scores(scores_ptr, live_ptr, first, count, V, TILE, G)
                    counts_GT += _reach(scores, low, high)
                low, high, reached = _narrow(low, high, reached, tl.sum(counts_GT), top_k)
        least = tl.where(top_k > 0, _float(low), -_INF)
        kept = top_k < 0  # not yet
        while not kept:
            score = tl.load(scores_ptr + token)
            mass, before, leader = _ahead(
                scores_ptr, noisy_ptr, live_ptr, count, largest, least, score, token, V, TILE, G
            )  # fmt: skip
            kept = (score >= least) & (tl.exp(score - largest) >= min_p)
            kept &= (top_p >= 1.0) | (before < top_p * tl.where(top_k > 0, mass, whole))
            kept |= leader == V  # the first is always kept, also where infinities make NaN
            token = tl.where(kept, token, leader)
    finish(
        token, row, chosen_ptr, text_ptr, state_ptr, blocks_ptr, experts_ptr,
        END, LAYERS, EXPERTS,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How rows draw. Row m stands at positions_M[m] (int32) and its token at the next one; it
    belongs to sequence m // rows_per_sequence, whose settings (int64 [B, 7], `pack_settings`) hold.
    """

    positions_M: Tensor
    settings_BW: Tensor
    rows_per_sequence: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleWorkspace:
    """What the two kernels hand over. C tiles of V; allocated once, for the most rows of a step."""

    best: tuple[Tensor, Tensor]  # of each tile with noise, fp32 and int32 [M, C]
    scores_MV: Tensor  # logits / temperature, fp32
    noisy_MV: Tensor  # and with noise
    largest_MC: Tensor  # score of each tile, fp32
    mass_MC: Tensor  # sum of exp(score − largest) of each tile, fp32
    live_MC: Tensor  # the tiles of a row to search, int32
    tile: int

    @classmethod
    def allocate(
        cls, rows: int, vocabulary: int, device: torch.device, *, tile: int = TILE
    ) -> "SampleWorkspace":
        """Raises ValueError for a vocabulary of which three counts do not share 64 bits."""
        if vocabulary >= 1 << 21:
            raise ValueError(
                "top-k, top-p and min-p on a GPU count to 2,097,151, this vocabulary has "
                f"{vocabulary:,}"
            )
        C = triton.cdiv(vocabulary, tile)

        def buffer(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(rows, width, dtype=dtype, device=device)

        return cls(
            best=(buffer(C), buffer(C, torch.int32)),
            scores_MV=buffer(vocabulary), noisy_MV=buffer(vocabulary),
            largest_MC=buffer(C), mass_MC=buffer(C), live_MC=buffer(C, torch.int32), tile=tile,
        )  # fmt: skip


def pack_settings(
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stream: int = 0,
    request_id: int = 0,
) -> Tensor:
    """A request's settings as the kernels read them, int64 [7] on the host; temperature > 0."""
    words = struct.pack(
        "3d4Q", temperature, top_p, min_p, min(top_k, 2**31 - 1), seed, stream, request_id
    )
    return torch.frombuffer(bytearray(words), dtype=torch.int64)


def is_filtered(settings_BW: Tensor) -> bool:
    """Whether top-k, top-p or min-p may exclude a token of any sequence."""
    fractions_BW = settings_BW[:, :3].cpu().view(torch.float64)
    exclude_B = (fractions_BW[:, 1] < 1) | (fractions_BW[:, 2] > 0) | (settings_BW[:, 3].cpu() > 0)
    return bool(exclude_B.any())


def sample(
    chosen_M: Tensor,
    logits_MV: Tensor,
    draw: Draw,
    *,
    workspace: SampleWorkspace,
    rows: int,
    pdl: dict[str, bool],
    text: Text | None = None,
    end: str = "asked",
    experts: Tensor | None = None,
) -> None:
    """Launch: fp32 logits [M, V] -> the token after each row, int32 [M], or NO_TOKEN where they
    hold NaN, infinity or nothing finite. Nothing is allocated; V alone decides what is compiled.

    `text`, `end` and `experts` are those of `head.choose`.
    """
    V, tile = logits_MV.shape[1], workspace.tile
    scored = (
        *workspace.best, workspace.scores_MV, workspace.noisy_MV, workspace.largest_MC,
        workspace.mass_MC,
    )  # fmt: skip
    _race_kernel[(triton.cdiv(V, tile), rows)](
        *scored, logits_MV, draw.positions_M, draw.settings_BW, draw.rows_per_sequence, V, tile,
        num_warps=1, **pdl,
    )  # fmt: skip
    tensors, constants = ending(text, end, experts)
    _decide_kernel[(rows,)](
        chosen_M, *tensors, *scored, workspace.live_MC, draw.settings_BW, draw.rows_per_sequence,
        V, tile, GROUP, *constants, num_warps=WARPS, **pdl,
    )  # fmt: skip


def sample_reference(logits_V: Tensor, noise_V: Tensor, settings_W: Tensor) -> int:
    """The definition for one row, given its Gumbel noise; weights in fp64."""
    temperature, top_p, min_p = settings_W[:3].view(torch.float64).tolist()
    top_k = int(settings_W[3])
    if not logits_V.max().isfinite():  # of NaN and more, max is NaN
        return NO_TOKEN
    scores_V, ids_V = (logits_V / temperature).sort(descending=True, stable=True)
    weights_V = (scores_V - scores_V[0]).double().exp()
    if top_k:
        weights_V[scores_V < scores_V[min(top_k, len(scores_V)) - 1]] = 0
    kept_V = (weights_V > 0) & (weights_V >= min_p)
    if top_p < 1:
        kept_V &= weights_V.cumsum(0) - weights_V < top_p * weights_V.sum()
    noisy_V = torch.where(kept_V, scores_V + noise_V[ids_V], -torch.inf)
    return int(ids_V[noisy_V == noisy_V.max()].min())

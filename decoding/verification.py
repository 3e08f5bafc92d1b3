"""Verification: which drafts the target keeps, and the one token of its own that follows them.

Shapes: T = N + 1 rows, N drafts, V vocabulary. Row i holds the target's logits for the i-th token
after the committed ones, computed in one pass over [last committed token, draft 1, … draft N].
Both rules return a block: the accepted drafts, then one token of the target's, so that a block of
n tokens accepted n − 1 drafts and a cycle always makes progress.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from draftnorm.decoding.noise import ACCEPT, RESIDUAL
from draftnorm.decoding.sampling import Sampler, warp
from draftnorm.model.transformer import Transformer

ACCEPTANCE = ("exact", "rejection")


def verify_exact(choices_T: Iterable[int], drafts: Sequence[int]) -> list[int]:
    """Emit the target's own choices, and go on for as long as a draft foresaw them.

    What comes out is what plain decoding would have chosen, token for token: drafts decide how many
    come at once, never which. Greedy is the special case without noise. No choice is taken from
    `choices_T`, one a row, that is not emitted.
    """
    block = []
    for draft, token in zip([*drafts, None], choices_T, strict=False):
        block.append(token)
        if token != draft:
            break
    return block


def verify_rejection(
    logits_TV: Tensor, drafts: Sequence[int], q_NV: Tensor | None, sampler: Sampler, position: int
) -> list[int]:
    """Keep the target's distribution, not its noise: speculative sampling.

    Draft d is accepted with probability min(1, p(d)/q(d)); the first rejection is replaced by a
    draw from (p − q)₊; a block without one ends in a bonus token from p (Leviathan et al. 2023,
    algorithm 1; Chen et al. 2023). `q_NV` are the distributions that the drafts were drawn from,
    None for a deterministic drafter, whose q is one-hot.
    """
    block = []
    for row, draft in enumerate(drafts):
        p_V = warp(logits_TV[row], sampler.sampling).softmax(-1)
        q_V = torch.zeros_like(p_V)
        if q_NV is None:
            q_V[draft] = 1
        else:  # a draft model may have fewer padding entries than the target
            q_V[: q_NV.shape[1]] = q_NV[row]
        u = float(sampler.noise.uniform(position + row, np.array([draft]), ACCEPT)[0])
        if not accepts(u, float(p_V[draft]), float(q_V[draft])):
            weights_V = residual(p_V, q_V)
            return [*block, sampler.race(weights_V.log(), position + row, RESIDUAL)]
        block.append(draft)
    bonus_V = warp(logits_TV[len(drafts)], sampler.sampling)
    return [*block, sampler.race(bonus_V, position + len(drafts), RESIDUAL)]


def accepts(u: float, p: float, q: float) -> bool:
    """True with probability min(1, p/q). Half-open: p = 0 is never accepted, even by u = 0."""
    return u * q < p


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """(p − q)₊, unnormalised. Where p = q nothing is left, and rounding alone led here: then p."""
    left_V = (p_V - q_V).clamp_min(0)
    return left_V if left_V.any() else p_V


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two outputs part, and how close the call was there.

    `index` counts output tokens from 0. A token is None where that output had ended.
    `top_two_gap` is the distance between the target's two largest logits at that place: near zero
    it was a tie that rounding decided, otherwise something is wrong.
    """

    index: int
    tokens: tuple[int | None, int | None]
    top_two_gap: float


@torch.inference_mode()
def first_difference(
    model: Transformer, prompt_ids: Sequence[int], a: Sequence[int], b: Sequence[int]
) -> Difference | None:
    """Compare two outputs of one prompt; None if they are equal."""
    for index, tokens in enumerate(zip_longest(a, b)):
        if tokens[0] != tokens[1]:
            context = [*prompt_ids, *a[:index]]
            logits_V = model.prefill(context, model.new_cache(len(context)))
            first, second = torch.topk(logits_V, 2).values.tolist()
            return Difference(index, tokens, first - second)
    return None

"""Sampling: temperature, top-k, top-p and min-p, then the argmax of log-probability plus noise.

Shapes: V vocabulary. Everything is done on one row at a time, by the same calls whether the row
came from plain decoding or from a verify of sixteen: the bits of a choice then depend on its row
alone. Ties go to the lowest id, everywhere.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral

import torch
from torch import Tensor

from draftnorm.decoding.noise import EXACT, GUMBEL_RANGE, Noise
from draftnorm.kernels.sample import pack_settings


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How the next token is chosen. temperature 0 is greedy and leaves the rest unused.

    top_k 0, top_p 1 and min_p 0 mean off. The same seed gives the same tokens, whatever drafter
    or draft length is used (with `acceptance="exact"`). Invalid values are ValueErrors.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Written as "not inside" so that NaN, which fails every comparison, is refused too.
        if not (self.temperature == 0 or 1e-5 <= self.temperature < math.inf):
            raise ValueError(
                f"temperature must be 0 (greedy) or a finite number from 1e-5, "
                f"not {self.temperature}"
            )
        if not isinstance(self.top_k, Integral) or self.top_k < 0:
            raise ValueError(f"top_k must be a whole number from 0 (off), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], not {self.min_p}")
        if not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be a whole number in 0 … 2⁶⁴ − 1, not {self.seed}")


class Sampler:
    """A SamplingConfig with the noise of one request."""

    def __init__(self, sampling: SamplingConfig, request_id: int = 0) -> None:
        self.sampling = sampling
        self.noise = Noise(sampling.seed, request_id)

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    def settings(self) -> Tensor | None:
        """What a DecodeStep needs to choose as `sample` does, int64 [1, 7]; None if greedy."""
        if self.greedy:
            return None
        request_id = self.noise.request_id
        return pack_settings(**asdict(self.sampling), stream=EXACT, request_id=request_id)[None]

    def choose(
        self, logits_TV: Tensor, position: int, chosen_T: Sequence[int] | None = None
    ) -> Iterator[int]:
        """The token after each row, the first one for `position`, as far as they are asked for.

        `chosen_T` are the tokens after every row if a DecodeStep with our settings chose them.
        """
        if chosen_T is not None:
            for row, token in enumerate(chosen_T):
                yield checked(token, position + row)
        else:
            for row, logits_V in enumerate(logits_TV):
                yield self.sample(logits_V, position + row)

    def sample(self, logits_V: Tensor, position: int, stream: int = EXACT) -> int:
        """The token for `position` under this row of logits."""
        if self.greedy:
            return _argmax(logits_V, position)
        return self.race(warp(logits_V, self.sampling), position, stream)

    def race(self, log_weights_V: Tensor, position: int, stream: int) -> int:
        """Draw from weights given as logarithms, −inf for zero, up to a common constant.

        The Gumbel-max form of the exponential race argmax(w / e): no sum, no cumulative
        distribution, and a token of weight zero cannot win. Nor can one that lies further behind
        the favourite than noise can differ: drawing none for those halves the time.
        """
        favourite = log_weights_V[_argmax(log_weights_V, position)]
        live = torch.nonzero(log_weights_V >= favourite - GUMBEL_RANGE).squeeze(1)
        noise = torch.from_numpy(self.noise.gumbel(position, live.cpu().numpy(), stream))
        winner = _argmax(log_weights_V[live] + noise.to(log_weights_V.device), position)
        return int(live[winner])


def warp(logits_V: Tensor, sampling: SamplingConfig) -> Tensor:
    """Logits over temperature, −inf where top-k, top-p or min-p exclude a token.

    fp32, and in the order of transformers' warpers, each seeing what the one before it left. As
    there, tokens that tie with the k-th are kept, and at least one token always is. Where top-p
    cuts through a tie, which transformers leaves to chance, the lowest ids stay.
    """
    scores_V = logits_V.float() / sampling.temperature
    if sampling.top_k:
        kth = torch.topk(scores_V, min(sampling.top_k, len(scores_V))).values[-1]
        scores_V = scores_V.masked_fill(scores_V < kth, -math.inf)
    if sampling.top_p < 1:
        # Ascending, the higher id first among equals, so that the lower one is excluded later.
        order_V = torch.sort(scores_V, descending=True, stable=True).indices.flip(0)
        excluded_V = scores_V[order_V].softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        excluded_V[-1] = False
        scores_V = scores_V.masked_fill(
            torch.empty_like(excluded_V).scatter_(0, order_V, excluded_V), -math.inf
        )
    if sampling.min_p:
        probabilities_V = scores_V.softmax(-1)
        least = sampling.min_p * probabilities_V.amax()
        scores_V = scores_V.masked_fill(probabilities_V < least, -math.inf)
    return scores_V


def checked(token: int, position: int) -> int:
    """A token that was chosen; ValueError if none was, as the best logit is no finite number."""
    if token < 0:
        raise ValueError(
            f"the model's logits at position {position} hold NaN or infinity: broken weights?"
        )
    return token


def _argmax(scores_V: Tensor, position: int) -> int:
    """The lowest id of the largest score. argmax takes NaN for the largest: one look finds any."""
    winner = int(scores_V.argmax())
    return checked(winner if math.isfinite(scores_V[winner]) else -1, position)

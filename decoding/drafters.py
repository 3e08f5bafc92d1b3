"""Drafters: anything that guesses the next few tokens cheaply.

Shapes: N draft tokens, V vocabulary. `Drafter` is the whole protocol; `NgramDrafter` looks the
continuation up in the text so far, `ModelDrafter` asks a smaller model. A drafter can be wrong or
silent without harm: it decides how fast tokens come, never which.
"""

from collections.abc import Sequence
from itertools import takewhile, zip_longest
from typing import Protocol

import torch
from torch import Tensor

from draftnorm.decoding.noise import DRAFT, EXACT
from draftnorm.decoding.sampling import Sampler, warp
from draftnorm.kernels.compilation import Progress
from draftnorm.kernels.cycle import Text
from draftnorm.model.config import ModelConfig
from draftnorm.model.decode_run import DRAFT_STEPS
from draftnorm.model.decode_step import ROWS, DecodeStep
from draftnorm.model.open_step import open_step
from draftnorm.model.tokenizer import Tokenizer
from draftnorm.model.transformer import Transformer


class Drafter(Protocol):
    """What the speculative loop calls, in this order: prefill once, then (catch_up, propose)*.

    Committed tokens reach a drafter exactly once, first the prompt and then in order; a drafter is
    not called in cycles that do not draft, so `catch_up` may bring one token or many.
    """

    needs_features: bool  # whether prefill and catch_up want the target's hidden states

    def prefill(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """Begin a sequence with this prompt."""

    def catch_up(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """Take the tokens that were committed since the last call."""

    def propose(self, length: int) -> tuple[list[int], Tensor | None]:
        """Up to `length` tokens to follow the committed ones; none is a valid answer.

        The second value is q [N, V], the distributions that they were drawn from, or None if they
        were not drawn: then q is one-hot. Only `acceptance="rejection"` reads it.
        """


class NgramDrafter:
    """Proposes what followed the last time the text ended as it ends now (prompt lookup).

    The longest known suffix of up to `longest` tokens counts, its latest occurrence wins. A
    committed token adds one dictionary entry a length: a cycle takes microseconds at any context.
    """

    needs_features = False

    def __init__(self, *, longest: int = 8, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"an n-gram drafter needs 1 <= shortest <= longest: {shortest=} {longest=}"
            )
        self.lengths = range(shortest, longest + 1)
        self._tokens: list[int] = []
        self._follower: dict[tuple[int, ...], int] = {}  # n-gram -> index of what followed it

    def prefill(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        self._tokens, self._follower = [], {}
        self.catch_up(tokens)

    def catch_up(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        for token in tokens:
            # An n-gram is filed when its follower arrives: the suffix never finds itself.
            for suffix in self._suffixes():
                self._follower[suffix] = len(self._tokens)
            self._tokens.append(token)

    def propose(self, length: int) -> tuple[list[int], Tensor | None]:
        for suffix in self._suffixes():
            source = self._follower.get(suffix)
            if source is not None:
                # Copying may run into its own output, as in LZ77: a loop in the text goes on.
                text = self._tokens[source:]
                for i in range(length - len(text)):
                    text.append(text[i])
                return text[:length], None
        return [], None

    def _suffixes(self) -> list[tuple[int, ...]]:
        """The n-grams that end the text, longest first."""
        tail = tuple(self._tokens[-self.lengths[-1] :])
        return [tail[-n:] for n in reversed(self.lengths) if n <= len(tail)]


class ModelDrafter:
    """A smaller model with the target's vocabulary and a cache, hence lengths, of its own.

    Its first step takes the last two committed tokens: after a full accept the last draft was never
    fed, so two are missing, and otherwise rewriting one position changes nothing. The shape is thus
    always the same. Past the model's context it proposes nothing. On a GPU `engine` can take the
    target's `text` and draft by itself (model/decode_run.py).

    `stream` is the noise it samples with: EXACT shares the target's, so that the same token tends
    to win both races; DRAFT is independent of it, as the rejection rule requires. Ids from
    `vocabulary` on are padding and never proposed.
    """

    needs_features = False

    def __init__(
        self,
        model: Transformer,
        sampler: Sampler,
        *,
        stream: int = EXACT,
        vocabulary: int,
        capacity: int,
        prompt_length: int = 1,
        text: Text | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._sampler, self._stream = model, sampler, stream
        if text is not None and text.tokens.device != model.device:
            text = None  # the host then carries tokens from one device to the other
        self._context = min(model.config.context, capacity)
        self._cache = model.new_cache(self._context)
        self.engine = open_step(
            model,
            self._cache,
            # To catch up, the first step, every other.
            DRAFT_STEPS if text else [(rows, "asked") for rows in (ROWS, 2, 1)],
            text=text,
            settings=sampler.settings() if text else None,
            lengths=range(min(prompt_length, self._context), self._context + 1),
            vocabulary=vocabulary,
            progress=progress,
        )
        self._tokens: list[int] = []  # committed
        self._drafts: list[int] = []  # proposed after them, all but the last one in the cache
        self.lost = False  # the text has outgrown the context, or has an id that is not ours

    def prefill(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        self._tokens, self.lost = [], False
        self._cache.rollback(0)
        self.extend(tokens)
        self._feed(self._tokens)

    def catch_up(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        # Drafts that were accepted are cached at the right place already.
        pairs = zip(self._drafts, tokens, strict=False)
        accepted = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        kept = min(self._cache.lengths[0], len(self._tokens) + accepted)
        self._cache.rollback(kept)
        self.extend(tokens)
        # Something is missing only if cycles went by without drafting. Full blocks, of which the
        # last writes some tokens again: a prompt's pass costs a GPU as much as many of them.
        end = len(self._tokens) - 2
        if not isinstance(self.engine, DecodeStep) or end < ROWS:
            self._feed(self._tokens[kept:end])
        elif not self.lost:
            for i in range(kept, end, ROWS):
                start = min(i, end - ROWS)
                self._cache.rollback(start)
                self.engine.forward([self._tokens[start : start + ROWS]])

    def propose(self, length: int) -> tuple[list[int], Tensor | None]:
        # The last draft is not fed, so the positions needed end one before it.
        length = min(length, self._context - len(self._tokens) + 1)
        rows, q_NV = self._tokens[-2:], []
        if length < 1 or self.lost:
            return [], None
        self._cache.rollback(len(self._tokens) - 2)
        for position in range(len(self._tokens), len(self._tokens) + length):
            logits_V = self.engine.forward([rows])[0, -1]
            if self._stream == DRAFT:
                warped_V = warp(logits_V, self._sampler.sampling)
                q_NV.append(warped_V.softmax(-1))
                token = self._sampler.race(warped_V, position, DRAFT)
            else:
                token = self._sampler.sample(logits_V, position, self._stream)
            self._drafts.append(token)
            rows = [token]
        return list(self._drafts), torch.stack(q_NV) if q_NV else None

    def extend(self, tokens: Sequence[int]) -> None:
        """Take committed tokens that the cache has already, or that `engine` will find."""
        self._tokens += tokens
        self._drafts = []
        known = self._model.config.vocab_size  # a padded target may say what a draft cannot read
        self.lost |= len(self._tokens) > self._context or max(tokens) >= known

    def _feed(self, tokens: Sequence[int]) -> None:
        if tokens and not self.lost:
            self._model.prefill(tokens, self._cache)


def check_vocabularies(
    target_tokenizer: Tokenizer | None,
    draft_tokenizer: Tokenizer | None,
    target_config: ModelConfig,
    draft_config: ModelConfig,
) -> int:
    """The number of ids that target and draft share; a ValueError if they mean different tokens.

    Embeddings may be padded to different sizes: ids past the tokenizers' are never proposed. With
    no tokenizer at all padding cannot be told from tokens, and the sizes must be equal.
    """
    if target_tokenizer is not None and draft_tokenizer is not None:
        pieces = zip_longest(target_tokenizer.tokens, draft_tokenizer.tokens)
        for token_id, (target, draft) in enumerate(pieces):
            if target != draft:
                raise ValueError(
                    f"the draft has another vocabulary: token {token_id} is {target!r} in the "
                    f"target's tokenizer and {draft!r} in the draft's"
                )
    target_size, draft_size = target_config.vocab_size, draft_config.vocab_size
    real = target_size if target_tokenizer is None else target_tokenizer.vocab_size
    if draft_size < real or (target_tokenizer is None and draft_size != target_size):
        raise ValueError(
            f"the draft has another vocabulary: {draft_size} ids, of which the target has {real}"
        )
    return min(real, target_size)

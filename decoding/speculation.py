"""Speculative generation: a drafter guesses, the target checks all guesses in one pass.

One cycle, with N = 3 drafts of which a = 2 are accepted (n committed tokens, the last one is `z`):

                    position    …  n−1    n   n+1  n+2
    before          cached      … │                        n − 1 tokens; z is not among them
    propose                         z │  d1   d2   d3      the drafter's guesses
    verify          fed         …   z    d1   d2   d3      N + 1 rows, written to the cache
                    chooses         t1   t2   t3   t4      row i chooses the token at n + i
    accept          t1 = d1, t2 = d2, t3 ≠ d3: the block is t1 t2 t3, two drafts and one own
    after           cached      …   z    d1   d2 │         rolled back to n + a, t3 is the new z

The target's row costs nearly nothing extra: decoding is bound by reading weights, once a pass.
Rollback sets a length, and what lies past it is overwritten. With acceptance "exact" each t is what
plain decoding would choose there, so the output is plain decoding's whatever the drafter says.

Shapes: T = N + 1 rows, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from draftnorm.decoding.draft_length import MAX_DRAFT_LENGTH, AutoDraftLength, FixedDraftLength
from draftnorm.decoding.drafters import Drafter, ModelDrafter, NgramDrafter, check_vocabularies
from draftnorm.decoding.generation import Generation, PlainDecoder
from draftnorm.decoding.noise import DRAFT, EXACT
from draftnorm.decoding.request import Request
from draftnorm.decoding.sampling import checked
from draftnorm.decoding.statistics import Cycle, SpeculationStatistics
from draftnorm.decoding.verification import ACCEPTANCE, verify_exact, verify_rejection
from draftnorm.model.decode_run import CycleResult
from draftnorm.model.tokenizer import Tokenizer
from draftnorm.model.transformer import Transformer

logger = logging.getLogger("draftnorm")

_WARN_AFTER, _WARN_BELOW = 64, 0.2  # cycles that drafted; share of them whose first draft held


def speculate(
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompt: str | Sequence[int],
    *,
    draft: str | Transformer | Drafter = "ngram",
    draft_length: int | str = "auto",
    acceptance: str = "exact",
    draft_tokenizer: Tokenizer | None = None,
    **options: Any,
) -> Generation:
    """Decode with draft and verify: an iterator of Chunks with a `.result()`, as `generate`.

    `draft` is "ngram" (look-up in the text so far), a model with the target's vocabulary, or any
    object with the Drafter protocol. `draft_length` is 1 … 15 or "auto", which measures what pays.
    `acceptance` "exact" gives the tokens of `generate`, bit for bit where the target's rows do not
    depend on their number; "rejection" gives its distribution, with more drafts accepted at high
    temperature. A model's vocabulary is compared by its tokenizer if that is given. Prompt and
    options are those of `Request.of`, ValueErrors included.
    """
    if acceptance not in ACCEPTANCE:
        raise ValueError(f"acceptance must be one of {', '.join(ACCEPTANCE)}, not {acceptance!r}")
    length = AutoDraftLength() if draft_length == "auto" else FixedDraftLength(draft_length)
    request = Request.of(model.config, tokenizer, prompt, **options)
    if request.sampler.greedy:
        acceptance = "exact"  # at temperature 0 both rules are the same
    drafter = NgramDrafter() if draft == "ngram" else draft
    if hasattr(draft, "decode"):
        drafter = partial(
            ModelDrafter,
            draft,
            request.sampler,
            stream=EXACT if acceptance == "exact" else DRAFT,
            vocabulary=check_vocabularies(tokenizer, draft_tokenizer, model.config, draft.config),
            capacity=request.longest + MAX_DRAFT_LENGTH,
            prompt_length=len(request.prompt_ids),
            progress=request.progress,
        )
    elif not hasattr(drafter, "propose"):
        raise ValueError(f"draft must be 'ngram', a model or a drafter, not {draft!r}")
    elif drafter.needs_features:
        raise ValueError("this drafter needs the target's hidden states, which are not provided")
    return Generation(request, SpeculativeDecoder(model, request, drafter, length, acceptance))


class SpeculativeDecoder(PlainDecoder):
    """A decoder whose step is one speculative cycle.

    A GPU works cycles off by itself (model/decode_run.py) if their drafts come of n-grams or a
    model and acceptance is exact. All others the host drives, one call after the other, as it does
    on a CPU: `_drive` is the cycle to read.
    """

    def __init__(
        self,
        model: Transformer,
        request: Request,
        drafter: Drafter | Callable[..., ModelDrafter],
        length: FixedDraftLength | AutoDraftLength,
        acceptance: str,
    ) -> None:
        rows = range(1, length.most + 2)  # the last committed token and up to so many drafts
        asked, cycles = ([(T, end) for T in rows] for end in ("asked", "cycle"))
        self._exact = acceptance == "exact"
        self._looks_up = type(drafter) is NgramDrafter  # whatever else another may do
        joins = self._exact and (self._looks_up or not hasattr(drafter, "propose"))
        alone = cycles[:1] if self._exact else []
        super().__init__(
            model,
            request,
            steps=cycles if joins else asked + alone,
            ngrams=drafter.lengths if self._looks_up else None,
            slack=MAX_DRAFT_LENGTH,
        )
        self._by_device = joins and self._run is not None
        if not hasattr(drafter, "propose"):
            drafter = drafter(text=self.engine.text if self._by_device else None)
            engines = self.engine, drafter.engine
            if self._by_device and getattr(drafter.engine, "text", None) is self.engine.text:
                self._run.drafter = drafter.engine
            elif self._by_device:  # another device, or no kernels for it
                self._by_device = False
                self.engine.prepare(asked, self._lengths, request.progress)
            if any(engine.compile_seconds is not None for engine in engines):
                self.compile_seconds = sum(engine.compile_seconds or 0 for engine in engines)
                self.capture_seconds = sum(engine.capture_seconds or 0 for engine in engines)
        self._drafter, self._length = drafter, length
        self._told = 0  # committed tokens that the drafter knows of
        self._cycles: list[Cycle] = []
        self._results: Iterator[CycleResult] | None = None  # of the device's cycles
        self._tried = self._held = 0  # cycles that drafted, and whose first draft was accepted

    def prefill(self, tokens: Sequence[int]) -> list[int]:
        block = super().prefill(tokens)
        start = self.clock()
        if not (self._by_device and self._looks_up):
            self._drafter.prefill(tokens)
        self._told = len(tokens)
        self.prefill_seconds["draft"] = self.clock() - start
        return block

    def step(self, tokens: list[int], room: int) -> list[int]:
        """One cycle."""
        cycle, block, waited = (self._await if self._by_device else self._drive)(tokens, room)
        self._length.observe(cycle, hurried=not waited)
        self._record(cycle)
        return block

    def _drive(self, tokens: list[int], room: int) -> tuple[Cycle, list[int], bool]:
        """Propose, verify, accept, roll back."""
        start = caught_up = self.clock()
        drafts, q_NV = [], None
        length = min(self._length.next(), room - 1)  # the block ends in a token of the target's own
        if length > 0:
            self._drafter.catch_up(tokens[self._told :])
            self._told = len(tokens)
            caught_up = self.clock()
            drafts, q_NV = self._propose(length)
        drafted, verify_seconds = self.clock(), None
        if self._run and length < 1:
            result = self.run_ahead(tokens, min(1 + self._length.idle, room))
            block, verify_seconds = result.tokens, result.verify_seconds
        else:
            logits_TV = self.engine.forward([[tokens[-1], *drafts]])[0]
            if self._exact:
                choices = self.sampler.choose(logits_TV, len(tokens), self.engine.chosen)
                block = verify_exact(choices, drafts)
            else:
                block = verify_rejection(logits_TV, drafts, q_NV, self.sampler, len(tokens))
        self.cache.rollback(len(tokens) + len(block) - 1)
        return (
            Cycle(
                drafted=len(drafts),
                accepted=len(block) - 1,
                catch_up_seconds=caught_up - start,
                draft_seconds=drafted - caught_up,
                verify_seconds=verify_seconds or self.clock() - drafted,
            ),
            block,
            True,
        )

    def _await(self, tokens: list[int], room: int) -> tuple[Cycle, list[int], bool]:
        """What came of the cycle that the device has worked on since the last one."""
        if self._results is None:
            # Through `self` a run would keep its own decoder alive.
            plan, drafter = self._length, self._drafter

            def drafts() -> int:
                length = plan.next()
                return 0 if getattr(drafter, "lost", False) else length

            self._results = self._run.cycles(tokens, room, drafts)
        result = next(self._results)
        block = [checked(token, len(tokens) + i) for i, token in enumerate(result.tokens)]
        if not self._looks_up:
            self._drafter.extend(block)
        return (
            Cycle(
                drafted=result.drafted,
                accepted=len(block) - 1,
                absent=result.asked - result.drafted,
                catch_up_seconds=result.feed_seconds,
                draft_seconds=result.draft_seconds,
                verify_seconds=result.verify_seconds,
            ),
            block,
            result.waited,
        )

    def statistics(self, committed: int) -> SpeculationStatistics:
        touched, passes = self.engine.expert_counts()
        return SpeculationStatistics.of(
            self._cycles, committed, experts_per_layer=touched / passes if passes else None
        )

    def _propose(self, length: int) -> tuple[list[int], Tensor | None]:
        """The drafter's guesses, which need not be ours and are therefore checked."""
        drafts, q_NV = self._drafter.propose(length)
        size = self.model.config.vocab_size
        if len(drafts) > length or not all(0 <= draft < size for draft in drafts):
            raise ValueError(f"asked for {length} tokens of {size}, the drafter proposed {drafts}")
        return drafts, q_NV

    def _record(self, cycle: Cycle) -> None:
        self._cycles.append(cycle)
        self._tried += cycle.drafted > 0
        self._held += cycle.accepted > 0
        # For n-grams on prose this is normal; a model that is mostly wrong is the wrong model.
        misplaced = self._held < _WARN_BELOW * self._tried and not self._looks_up
        if self._tried == _WARN_AFTER and cycle.drafted and misplaced:
            logger.warning(
                "the target accepted a draft in only %d of %d cycles: is this the right drafter?",
                self._held,
                self._tried,
            )

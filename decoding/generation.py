"""Plain generation, and what every kind of generation shares: requests, endings, text, results.

    Request      the caller's arguments, checked
    decoder      produces blocks of tokens: PlainDecoder here, SpeculativeDecoder in speculation.py
    Transcript   takes blocks, turns them into text, decides where the output ends (transcript.py)
    Generation   drives the one with the other; the iterator that callers hold

A block is what one step commits: any number of accepted drafts, then one token of the target's own.
Between steps the last committed token is not in the cache: the step that asks for its successor
writes it.
"""

import operator
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from draftnorm.decoding.sampling import Sampler, SamplingConfig
from draftnorm.decoding.statistics import Chunk, Result, SpeculationStatistics
from draftnorm.decoding.transcript import Transcript
from draftnorm.model.cache import KVCache
from draftnorm.model.tokenizer import Tokenizer
from draftnorm.model.transformer import Transformer


def generate(
    model: Transformer, tokenizer: Tokenizer | None, prompt: str | Sequence[int], **options: Any
) -> "Generation":
    """Decode plainly, one token a step: an iterator of Chunks with a `.result()`.

    Prompt and options are those of `Request.of`, ValueErrors included.
    """
    request = Request.of(model, tokenizer, prompt, **options)
    return Generation(request, PlainDecoder(model, request))


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to decode and when to end, checked."""

    prompt_ids: tuple[int, ...]
    tokenizer: Tokenizer | None  # None if only ids are wanted
    sampler: Sampler
    max_new_tokens: int
    stop_ids: frozenset[int]
    stop: tuple[str, ...]
    context: int
    clock: Callable[[], float]

    @classmethod
    def of(
        cls,
        model: Transformer,
        tokenizer: Tokenizer | None,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 256,
        sampling: SamplingConfig | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        context: int | None = None,
        request_id: int = 0,
        chat: bool = True,
        system: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> "Request":
        """Check the arguments of `generate` and `speculate`; ValueError, in one line, if they fail.

        `prompt` is text, put through the checkpoint's chat template if it has one and `chat` is
        true (with `system` before it), or token ids, with which `tokenizer` may be None. Output
        ends after `max_new_tokens`, at a stop id of the checkpoint unless `ignore_eos`, before a
        string of `stop`, or where prompt and output fill `context` (the model's own by default).
        Sampling is greedy by default; `request_id` gives requests with one seed different noise.
        """
        if isinstance(prompt, str):
            prompt = _encode(tokenizer, prompt, chat, system)
        prompt_ids = tuple(map(operator.index, prompt))
        most, size = model.config.context, model.config.vocab_size
        limit = most if context is None else context
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not prompt_ids:
            raise ValueError("the prompt is empty, and the tokenizer adds no token to begin with")
        if not all(0 <= token < size for token in prompt_ids):
            wrong = next(token for token in prompt_ids if not 0 <= token < size)
            raise ValueError(f"token id {wrong} is outside the vocabulary of {size} ids")
        if not 1 <= limit <= most:
            raise ValueError(
                f"context must be 1 … {most}, what the model was made for, not {limit}"
            )
        if len(prompt_ids) > limit:
            raise ValueError(f"the prompt has {len(prompt_ids)} tokens, the context only {limit}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
        if stop and (tokenizer is None or not all(stop)):
            raise ValueError("stop strings must not be empty, and need a tokenizer")
        eos = (model.config if tokenizer is None else tokenizer).eos_token_ids
        return cls(
            prompt_ids=prompt_ids,
            tokenizer=tokenizer,
            sampler=Sampler(sampling or SamplingConfig(), request_id),
            max_new_tokens=max_new_tokens,
            stop_ids=frozenset() if ignore_eos else frozenset(eos),
            stop=stop,
            context=limit,
            clock=clock,
        )

    @property
    def longest(self) -> int:
        """Prompt and output together can have this many tokens."""
        return min(self.context, len(self.prompt_ids) + self.max_new_tokens)


def _encode(tokenizer: Tokenizer | None, prompt: str, chat: bool, system: str | None) -> list[int]:
    if tokenizer is None:
        raise ValueError("a prompt given as text needs a tokenizer")
    if chat and tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return tokenizer.encode_chat(messages)
    if system is not None:
        raise ValueError("a system prompt needs a chat template, which is missing or turned off")
    return tokenizer.encode(prompt)


class PlainDecoder:
    """Plain decoding: a block is one token. Speculation overrides `step`."""

    def __init__(self, model: Transformer, request: Request, *, slack: int = 0) -> None:
        """`slack` is cache beyond the user's limit, for drafts that will not all be kept."""
        self.model, self.sampler, self.clock = model, request.sampler, request.clock
        self.cache = KVCache(
            model.config,
            capacity=request.longest + slack,
            device=model.device,
            dtype=model.dtype,
        )
        self.prefill_seconds: dict[str, float | None] = {"target": None, "draft": None}

    def prefill(self, tokens: Sequence[int]) -> list[int]:
        """Read the prompt; the first block is the token that follows it."""
        start = self.clock()
        logits_V = self.model.prefill(tokens, self.cache)
        block = [self.sampler.sample(logits_V, position=len(tokens))]
        self.prefill_seconds["target"] = self.clock() - start
        return block

    def step(self, tokens: list[int], room: int) -> list[int]:
        """The next block after the committed tokens, `room` tokens at most."""
        logits_V = self.model.decode([tokens[-1:]], self.cache)[0, -1]
        return [self.sampler.sample(logits_V, position=len(tokens))]

    def statistics(self, committed: int) -> SpeculationStatistics | None:
        return None


class Generation(Iterator[Chunk]):
    """Yields chunks as they are committed. Ends by itself or, interrupted, by `close`.

    An exception out of a step, KeyboardInterrupt included, closes the generation before it
    propagates; `result` then returns what had come until there.
    """

    def __init__(self, request: Request, decoder: PlainDecoder) -> None:
        self.decoder = decoder
        self._request, self._transcript = request, Transcript(request)
        self._ready: deque[Chunk] = deque()
        self._time_to_first_token: float | None = None
        self._seconds = 0.0

    def __next__(self) -> Chunk:
        while not self._ready and self._transcript.stop_reason is None:
            try:
                self._advance()
            except BaseException:
                self.close()
                raise
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()

    @torch.inference_mode()
    def _advance(self) -> None:
        start, transcript = self._request.clock(), self._transcript
        first = self._time_to_first_token is None
        if first:
            block = self.decoder.prefill(transcript.tokens)
            self._time_to_first_token = self._request.clock() - start
        else:
            block = self.decoder.step(transcript.tokens, transcript.room)
            self._seconds += self._request.clock() - start
        self._ready.extend(transcript.commit(block))
        # A stop may have cut tokens: then the cache forgets them too.
        cache = self.decoder.cache
        cache.rollback(min(cache.lengths[0], len(transcript.tokens) - 1))

    def close(self) -> None:
        """End the output here; held-back text still comes."""
        self._transcript.finish("interrupted")
        self._ready.extend(self._transcript.chunks())

    def result(self) -> Result:
        """Decode to the end, unless closed, and sum up."""
        for _ in self:
            pass
        transcript, output = self._transcript, self._transcript.output
        timed = len(output) - 1
        return Result(
            text=transcript.text,
            token_ids=output,
            prompt_tokens=len(self._request.prompt_ids),
            stop_reason=transcript.stop_reason,
            prefill_seconds=dict(self.decoder.prefill_seconds),
            time_to_first_token=self._time_to_first_token,
            seconds=self._seconds,
            tokens_per_second=timed / self._seconds if timed > 0 and self._seconds else None,
            speculation=self.decoder.statistics(max(timed, 0)),
        )

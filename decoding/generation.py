"""Plain generation, and what every kind of generation shares: decoders, text, results.

    Request      the caller's arguments, checked (request.py)
    decoder      produces blocks of tokens: PlainDecoder here, SpeculativeDecoder in speculation.py
    Transcript   takes blocks, turns them into text, decides where the output ends (transcript.py)
    Generation   drives the one with the other; the iterator that callers hold

A block is what one step commits: any number of accepted drafts, then one token of the target's own.
Between steps the last committed token is not in the cache: the step that asks for its successor
writes it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from draftnorm.decoding.request import Request
from draftnorm.decoding.sampling import checked
from draftnorm.decoding.statistics import Chunk, Result, SpeculationStatistics
from draftnorm.decoding.transcript import Transcript
from draftnorm.model.decode_run import CycleResult, DecodeRun
from draftnorm.model.decode_step import DecodeStep
from draftnorm.model.open_step import open_step
from draftnorm.model.tokenizer import Tokenizer
from draftnorm.model.transformer import Transformer


def generate(
    model: Transformer, tokenizer: Tokenizer | None, prompt: str | Sequence[int], **options: Any
) -> "Generation":
    """Decode plainly, one token a step: an iterator of Chunks with a `.result()`.

    Prompt and options are those of `Request.of`, ValueErrors included.
    """
    request = Request.of(model.config, tokenizer, prompt, **options)
    return Generation(request, PlainDecoder(model, request))


class PlainDecoder:
    """Plain decoding: a block is one token. Speculation overrides `step`."""

    def __init__(
        self,
        model: Transformer,
        request: Request,
        *,
        steps: Sequence[tuple[int, str]] = ((1, "cycle"),),
        ngrams: range | None = None,
        slack: int = 0,
    ) -> None:
        """Speculation names the `steps` and `ngrams` of its own (`open_step`); `slack` is cache
        beyond the user's limit, for drafts that will not all be kept. Without cycles among the
        steps tokens come of logits alone, whatever the device would choose.
        """
        self.model, self.sampler, self.clock = model, request.sampler, request.clock
        self._progress = request.progress
        self._lengths = range(len(request.prompt_ids), request.longest + slack + 1)
        self.cache = model.new_cache(self._lengths[-1])
        cycles = any(end == "cycle" for _, end in steps)
        self.engine = open_step(
            model,
            self.cache,
            steps,
            settings=self.sampler.settings() if cycles else None,
            lengths=self._lengths,
            ngrams=ngrams,
            progress=request.progress,
        )
        runs = cycles and isinstance(self.engine, DecodeStep)
        self._run = DecodeRun(self.engine) if runs else None
        self.compile_seconds = self.engine.compile_seconds
        self.capture_seconds = self.engine.capture_seconds
        self._ahead: Iterator[CycleResult] = iter(())  # what the device does meanwhile
        self.prefill_seconds: dict[str, float | None] = {"target": None, "draft": None}

    def prefill(self, tokens: Sequence[int]) -> list[int]:
        """Read the prompt; the first block is the token that follows it."""
        start = self.clock()
        logits_V = self.model.prefill(tokens, self.cache, progress=self._progress)
        block = [self.sampler.sample(logits_V, position=len(tokens))]
        self.prefill_seconds["target"] = self.clock() - start
        return block

    def step(self, tokens: list[int], room: int) -> list[int]:
        """The next block after the committed tokens, `room` tokens at most."""
        if self._run:
            return self.run_ahead(tokens, room).tokens
        logits_V = self.engine.forward([tokens[-1:]])[0, -1]
        return [self.sampler.sample(logits_V, position=len(tokens))]

    def run_ahead(self, tokens: list[int], count: int) -> CycleResult:
        """The next token. The device does not wait for the calls after it, `count` with this."""
        result = next(self._ahead, None)
        if result is None:
            self._ahead = self._run.cycles(tokens[-1:], count)
            result = next(self._ahead)
        checked(result.tokens[0], position=len(tokens))
        return result

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
        self._ready.extend(transcript.commit(block))
        self._forget()
        if not first:  # the handing over, too: a GPU may work on meanwhile
            self._seconds += self._request.clock() - start

    def close(self) -> None:
        """End the output here; held-back text still comes."""
        self._transcript.finish("interrupted")
        self._ready.extend(self._transcript.chunks())
        self._forget()

    def _forget(self) -> None:
        """The cache forgets what a stop has cut, or a step had written when it was interrupted."""
        cache = self.decoder.cache
        cache.rollback(min(cache.lengths[0], len(self._transcript.tokens) - 1))

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
            compile_seconds=self.decoder.compile_seconds,
            capture_seconds=self.decoder.capture_seconds,
        )

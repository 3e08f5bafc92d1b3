"""Transcript: what of the committed tokens is output, as tokens and as text, and why it ended.

Everything that ends a generation is decided here, for plain and speculative decoding alike: stop
ids anywhere in a block, stop strings across token borders, the budget, the context.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from draftnorm.decoding.statistics import Chunk
from draftnorm.model.tokenizer import IncrementalDecoder

if TYPE_CHECKING:
    from draftnorm.decoding.request import Request


class Transcript:
    """Prompt and output as tokens and text, and the reason why the output ended.

    Text is settled once it can no longer be the beginning of a stop string; until then it and the
    tokens that begin in it are held back. A match cuts text and tokens where it begins: the tokens
    kept are those that begin before it. Tokens are taken one by one, so that nothing depends on how
    they were grouped in blocks.
    """

    def __init__(self, request: "Request") -> None:
        self.tokens = list(request.prompt_ids)
        self.text = ""
        self.stop_reason: str | None = None
        self._request, self._longest = request, request.longest
        self._decoder = request.tokenizer and IncrementalDecoder(request.tokenizer)
        self._starts: list[int] = []  # of each output token: where in the text it begins
        self._drafted: list[bool] = []
        self._settled = 0  # characters
        self._shown = self._shown_text = 0  # tokens and characters that chunks have carried
        self._end_if_full()

    @property
    def output(self) -> tuple[int, ...]:
        return tuple(self.tokens[len(self._request.prompt_ids) :])

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return self._longest - len(self.tokens)

    def commit(self, block: Sequence[int]) -> list[Chunk]:
        """Take a block up to where the output ends; the chunks that this settles."""
        stop_ids, decoder, last = self._request.stop_ids, self._decoder, len(block) - 1
        for i, token in enumerate(block):
            self._starts.append(len(self.text))
            self._drafted.append(i < last)
            self.tokens.append(token)
            if token in stop_ids:
                self.finish("stop_token")
            elif decoder:
                self._read(decoder.push(token))
            self._end_if_full()
            if self.stop_reason:
                break
        return self.chunks()

    def finish(self, reason: str) -> None:
        """End the output here, unless it has ended."""
        if self.stop_reason is None and self._decoder:
            self._read(self._decoder.flush())
        self.stop_reason = self.stop_reason or reason

    def _end_if_full(self) -> None:
        if len(self.tokens) == self._longest:
            budget_spent = len(self._starts) == self._request.max_new_tokens
            self.finish("length" if budget_spent else "context")

    def _read(self, piece: str) -> None:
        self.text += piece
        if not self._request.stop:
            self._settled = len(self.text)
            return
        found = (self.text.find(stop, self._settled) for stop in self._request.stop)
        cut = min((at for at in found if at >= 0), default=None)
        if cut is None:
            self._settled = len(self.text) - self._forming()
            return
        kept = bisect_left(self._starts, cut)
        del self.tokens[len(self.tokens) - len(self._starts) + kept :]
        del self._starts[kept:], self._drafted[kept:]
        self.text, self._settled, self.stop_reason = self.text[:cut], cut, "stop_string"

    def _forming(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        return max(
            (n for s in self._request.stop for n in range(1, len(s)) if self.text.endswith(s[:n])),
            default=0,
        )

    def chunks(self) -> list[Chunk]:
        """What has settled since the last call, split where drafts and own tokens alternate."""
        end, tokens_end = self._settled, len(self._starts)
        if self.stop_reason is not None:
            end = len(self.text)
        elif self._request.stop:
            tokens_end = bisect_left(self._starts, end)
        chunks, prompt = [], len(self._request.prompt_ids)
        for drafted, group in groupby(range(self._shown, tokens_end), self._drafted.__getitem__):
            last = list(group)[-1] + 1
            text_end = self._starts[last] if last < tokens_end else end
            text = self.text[self._shown_text : text_end]
            tokens = self.tokens[prompt + self._shown : prompt + last]
            chunks.append(Chunk(text, tuple(tokens), drafted))
            self._shown, self._shown_text = last, text_end
        if self._shown_text < end:  # the rest of a token that was shown in part
            chunks.append(
                Chunk(self.text[self._shown_text : end], (), self._drafted[self._shown - 1])
            )
            self._shown_text = end
        return chunks

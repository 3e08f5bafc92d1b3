"""Request: what to decode and when to end, checked before anything is decoded."""

import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

from draftnorm.decoding.sampling import Sampler, SamplingConfig
from draftnorm.kernels.compilation import Progress
from draftnorm.model.config import ModelConfig
from draftnorm.model.tokenizer import Tokenizer


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
    progress: Progress | None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
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
        progress: Progress | None = None,
    ) -> "Request":
        """Check the arguments of `generate` and `speculate`; ValueError, in one line, if they fail.

        `prompt` is text, put through the checkpoint's chat template if it has one and `chat` is
        true (with `system` before it), or token ids, with which `tokenizer` may be None. Output
        ends after `max_new_tokens`, at a stop id of the checkpoint unless `ignore_eos`, before a
        string of `stop`, or where prompt and output fill `context` (the model's own by default).
        Sampling is greedy by default; `request_id` gives requests with one seed different noise.
        `progress` hears what is done before the first token, how far it is and how far it goes.
        """
        if isinstance(prompt, str):
            prompt = _encode(tokenizer, prompt, chat, system)
        prompt_ids = tuple(map(operator.index, prompt))
        most, size = config.context, config.vocab_size
        limit = most if context is None else context
        stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if not prompt_ids:
            raise ValueError("the prompt is empty, and the tokenizer adds no token to begin with")
        if wrong := [token for token in prompt_ids if not 0 <= token < size]:
            raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {size} ids")
        if not isinstance(limit, Integral) or not 1 <= limit <= most:
            raise ValueError(
                f"context must be 1 … {most}, what the model was made for, not {limit}"
            )
        if len(prompt_ids) > limit:
            raise ValueError(f"the prompt has {len(prompt_ids)} tokens, the context only {limit}")
        if not isinstance(max_new_tokens, Integral) or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be 0, 1, 2, …, not {max_new_tokens}")
        if stop and (tokenizer is None or not all(stop)):
            raise ValueError("stop strings must not be empty, and need a tokenizer")
        eos = (config if tokenizer is None else tokenizer).eos_token_ids
        return cls(
            prompt_ids=prompt_ids,
            tokenizer=tokenizer,
            sampler=Sampler(sampling or SamplingConfig(), request_id),
            max_new_tokens=max_new_tokens,
            stop_ids=frozenset() if ignore_eos else frozenset(eos),
            stop=stop,
            context=limit,
            clock=clock,
            progress=progress,
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

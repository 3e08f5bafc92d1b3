"""A language model small enough to know exactly, with the interface of Transformer.

Its logits at a position are a function of the last `order` cached tokens and of the position, read
back from a real KVCache, where it writes each token and its position as key and value. A cache that
was rolled back wrongly, fed twice or written at a wrong position therefore changes its output or
trips an assertion. `on_pass(rows)` is called for every decode, so that tests can move a clock.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.tokenizer import Tokenizer


def config_of(vocab_size: int, context: int = 512, **fields) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        context=context,
        hidden_size=2,
        intermediate_size=2,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_size=2,  # the least; only the first component is used
        windows=(None,),
        **fields,
    )


class FakeModel:
    """`logits_of(tokens, position) -> [V]` sees the last tokens, oldest first."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(
        self,
        vocab_size: int,
        logits_of: Callable[[tuple[int, ...], int], Tensor] | None = None,
        *,
        seed: int = 0,
        order: int = 2,
        sharpness: float = 3.0,
        on_pass: Callable[[int], None] = lambda rows: None,
        **fields,
    ) -> None:
        self.config = config_of(vocab_size, **fields)
        self.seed, self.order, self.sharpness = seed, order, sharpness
        self.logits_of = logits_of or self.random_logits
        self.on_pass = on_pass
        self._known: dict[tuple[int, ...], Tensor] = {}

    def random_logits(self, tokens: tuple[int, ...], position: int) -> Tensor:
        """Fixed random logits for every context; the same on every machine."""
        if tokens not in self._known:
            digest = hashlib.blake2b(repr((self.seed, tokens)).encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            logits_V = torch.randn(self.config.vocab_size, generator=generator)
            self._known[tokens] = self.sharpness * logits_V
        return self._known[tokens]

    def new_cache(self, capacity: int) -> KVCache:
        return KVCache(self.config, capacity=capacity)

    def prefill(
        self, tokens: Sequence[int], cache: KVCache, *, sequence: int = 0, progress: object = None
    ) -> Tensor:
        assert len(tokens) > 0 and sequence == 0
        return self._append([int(t) for t in tokens], cache)[-1]

    def decode(self, tokens_BT: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        self.on_pass(len(tokens_BT[0]))
        return self._append([int(t) for t in tokens_BT[0]], cache)[None]

    def _append(self, tokens: list[int], cache: KVCache) -> Tensor:
        assert all(0 <= token < self.config.vocab_size for token in tokens)
        keys, values = cache.keys[0][0, 0, :, 0], cache.values[0][0, 0, :, 0]
        rows = []
        for token, position in zip(tokens, cache.extend(len(tokens)), strict=True):
            keys[position], values[position] = token, position
            seen = range(max(0, position + 1 - self.order), position + 1)
            assert [int(v) for v in values[seen.start : seen.stop]] == list(seen)
            context = tuple(int(k) for k in keys[seen.start : seen.stop])
            rows.append(self.logits_of(context, position + 1).float())
        return torch.stack(rows)


def fake_tokenizer(pieces: Sequence[str | bytes], **fields) -> Tokenizer:
    """A tokenizer whose ids stand for these pieces; it encodes by longest match."""
    known = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]

    def encode(text: str, add_special: bool) -> list[int]:
        data, ids = text.encode(), []
        while data:
            best = max((p for p in known if p and data.startswith(p)), key=len)
            ids.append(known.index(best))
            data = data[len(best) :]
        return ids

    return Tokenizer(
        encoder=encode,
        tokens=[piece.decode(errors="backslashreplace") for piece in known],
        token_bytes=known,
        special=frozenset(),
        drops_space=False,
        roles={},
        **fields,
    )


class ScriptedDrafter:
    """Proposes what a function of the committed tokens says; asserts the protocol on the way."""

    needs_features = False

    def __init__(self, guess: Callable[[list[int], int], list[int]]) -> None:
        self.guess = guess
        self.tokens: list[int] = []

    def prefill(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        self.tokens = list(tokens)

    def catch_up(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        assert tokens, "every cycle commits something"
        self.tokens += tokens

    def propose(self, length: int) -> tuple[list[int], Tensor | None]:
        return self.guess(self.tokens, length), None

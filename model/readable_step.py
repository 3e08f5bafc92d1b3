"""ReadableStep: the forward of DecodeStep by `Transformer.decode`, for a CPU and other devices."""

from collections.abc import Sequence

from torch import Tensor

from draftnorm.model.cache import KVCache
from draftnorm.model.transformer import Transformer


class ReadableStep:
    """`Transformer.decode` bound to a cache, with what DecodeStep's users look at."""

    chosen = compile_seconds = capture_seconds = None

    def __init__(self, model: Transformer, cache: KVCache, vocabulary: int | None) -> None:
        self.model, self.cache, self.vocabulary = model, cache, vocabulary
        self._touched = self._passes = 0

    def expert_counts(self) -> tuple[int, int]:
        """Experts touched by the steps so far, and the layers that touched them (once a tile)."""
        return self._touched, self._passes

    def forward(self, tokens_BT: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Append T tokens to every sequence of the cache; logits after each, fp32 [B, T, V]."""
        model = self.model  # which others decode with, too: a draft that is the target itself
        touched, passes = model.experts_touched, model.expert_layer_passes
        logits_BTV = model.decode(tokens_BT, self.cache)[:, :, : self.vocabulary]
        self._touched += model.experts_touched - touched
        self._passes += model.expert_layer_passes - passes
        return logits_BTV

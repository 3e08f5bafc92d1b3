"""Who decodes, asks here: a DecodeStep where its kernels run, else the same by library calls."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from draftnorm.kernels.compilation import OutOfResources, Progress
from draftnorm.kernels.cycle import Text
from draftnorm.model.cache import KVCache
from draftnorm.model.decode_step import ROWS, DecodeStep
from draftnorm.model.transformer import Transformer

logger = logging.getLogger("draftnorm")

DTYPES = (torch.bfloat16, torch.float16)


class ReadableStep:
    """`Transformer.decode` bound to a cache, with what DecodeStep's users look at."""

    chosen = compile_seconds = capture_seconds = None

    def __init__(self, model: Transformer, cache: KVCache, vocabulary: int | None) -> None:
        self.model, self.cache, self.vocabulary = model, cache, vocabulary

    def expert_counts(self) -> tuple[int, int]:
        """Experts touched by the steps so far, and the layers that touched them (once a tile)."""
        return self.cache.experts_touched, self.cache.expert_layer_passes

    def forward(self, tokens_BT: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Append T tokens to every sequence of the cache; logits after each, fp32 [B, T, V]."""
        return self.model.decode(tokens_BT, self.cache)[:, :, : self.vocabulary]


def open_step(
    model: Transformer,
    cache: KVCache,
    steps: Sequence[tuple[int, str]],
    *,
    lengths: range,
    settings: Tensor | None = None,
    vocabulary: int | None = None,
    text: Text | None = None,
    ngrams: range | None = None,
    progress: Progress | None = None,
) -> DecodeStep | ReadableStep:
    """The way to decode with this empty cache: DecodeStep on a GPU that can run it.

    `steps` are the tokens of a sequence and the ending, "asked" for `forward`, of all that will be
    run, at cache `lengths`: what that needs is compiled and captured here. With `settings` (int64
    [B, 7], see `pack_settings`) a DecodeStep samples instead of taking the argmax. Ids from
    `vocabulary` on do not exist. `text` and `ngrams` are those of DecodeStep. Which way it is
    follows from the device and the dtype alone, and a GPU that cannot run the kernels is named in a
    warning.
    """
    device, dtype = model.device, model.dtype
    if device.type != "cuda":
        return ReadableStep(model, cache, vocabulary)
    if torch.cuda.get_device_capability(device) < (8, 0):
        reason = "the kernels need compute capability 8.0"
    elif dtype not in DTYPES:
        reason = f"the kernels take bfloat16 and float16, not {dtype}"
    else:
        rows = max(ROWS, *(T for T, _ in steps))
        own = dict(vocabulary=vocabulary, settings=settings, text=text, ngrams=ngrams)
        step = DecodeStep(model, cache, rows=rows, **own)
        try:
            step.prepare(steps, lengths, progress)
            return step
        except OutOfResources as error:  # less shared memory than a tiling was made for
            reason = str(error)
    logger.warning(
        "decoding on %s with library calls, slower: %s", torch.cuda.get_device_name(device), reason
    )
    return ReadableStep(model, cache, vocabulary)

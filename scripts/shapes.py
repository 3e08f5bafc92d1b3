"""Real models' shapes with random weights: what benchmarks of a step take as --shape."""

from typing import Any

import torch
from torch import Tensor

from draftnorm.kernels.rms_norm import INTERPRETED
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.transformer import Transformer
from draftnorm.scripts.benchmark_report import progress
from draftnorm.scripts.checkpoints import EMBEDDED_FOLDER

_LLAMA = dict(num_kv_heads=8, vocab_size=128256, num_heads=32, context=131072)
_LARGE = dict(hidden_size=4096, intermediate_size=14336, num_layers=32, head_size=128)
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
        num_kv_heads=3, head_size=64, tie_embeddings=True, context=8192,
    ),
    "llama-3.2-1b": _LLAMA | dict(
        hidden_size=2048, intermediate_size=8192, num_layers=16, head_size=64, tie_embeddings=True
    ),
    "llama-3.1-8b": _LLAMA | _LARGE,
    "mixtral-8x7b": _LLAMA | _LARGE | dict(
        architecture="mixtral", vocab_size=32000, num_experts=8, experts_per_token=2,
        expert_size=14336, context=32768,
    ),
}  # fmt: skip
# "target" is the embedded target, whose config.json says the rest.
NAMES = (*SHAPES, "target")


def random_model(shape: str, dtype: torch.dtype | None = None) -> Transformer:
    """A model of this shape on the GPU, with weights that keep its rows of size one.

    bf16 by default. Raises ValueError, in one line, without a GPU.
    """
    cuda = torch.cuda.is_available()
    if not (cuda or INTERPRETED):
        raise ValueError(f"--shape {shape} times GPU kernels and needs a CUDA device: found none")
    dtype = dtype or (torch.bfloat16 if cuda else torch.float32)  # the interpreter has no bf16
    if shape == "target":
        config = ModelConfig.from_directory(EMBEDDED_FOLDER / shape)
    else:
        config = ModelConfig(**SHAPES[shape])
    progress(f"{shape}: {config.parameters * dtype.itemsize / 1e9:.2f} GB of weights")
    model = Transformer(config, device="cuda" if cuda else "cpu", dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    return model


def scattered_tokens(model: Transformer, count: int) -> Tensor:
    """Different ids, none beside the next: 7919 is a prime that no vocabulary divides."""
    return torch.arange(count, device=model.device) * 7919 % model.config.vocab_size


def first_token(model: Transformer, cache: KVCache, length: int) -> int:
    """Read a prompt of `length` into the empty cache; the best token after it."""
    cache.rollback(0)
    prompt = torch.arange(length, device=model.device) % model.config.vocab_size
    return int(model.prefill(prompt, cache).argmax())

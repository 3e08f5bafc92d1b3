"""Real models' shapes, without their weights: what benchmarks of a step take as --shape."""

from typing import Any

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

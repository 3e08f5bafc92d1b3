"""The kernels of a prefill chunk in Triton's interpreter, against float64 and in a whole prompt."""

import pytest
import torch

from draftnorm.kernels.gated import gated_forward, gated_reference
from draftnorm.kernels.rotary import (
    inverse_frequencies,
    rotary_table,
    rotate_heads,
    rotate_into_cache_forward,
)
from draftnorm.model import transformer
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.transformer import Transformer


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def unit(dtype: torch.dtype) -> float:
    """Relative error of a rounding. The interpreter truncates to bf16, which doubles it there."""
    return torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("F", [1, 50, 1030])
def test_gate_matches_float64(F: int, dtype: torch.dtype) -> None:
    both = 4 * random(3, 2 * F, dtype=dtype)
    # Beside the last rounding: 2 ulp of exp and of the division, a sum and a product, in fp32.
    bound = dict(rtol=unit(dtype) + 8 * 2**-24, atol=torch.finfo(dtype).tiny)
    torch.testing.assert_close(
        gated_forward(both).double(), gated_reference(both.double()), **bound
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(1, 1, 2), (6, 2, 6), (9, 3, 64), (30, 2, 8)])
def test_rotation_into_the_cache_matches_float64(heads, dtype: torch.dtype) -> None:
    H, G, K = heads
    qkv = random(5, H + 2 * G, K, dtype=dtype)
    table = rotary_table(torch.arange(7, 12), inverse_frequencies(K, 1e4))
    expected = rotate_heads(qkv.double(), tuple(x.double() for x in table), G)
    cache = tuple(torch.full((2, G, 64, K), torch.nan, dtype=dtype) for _ in "kv")
    q = rotate_into_cache_forward(qkv, table, cache, 1, 7)
    stored = [x[1, :, 7:12].transpose(0, 1) for x in cache]
    # Two products and their sum in fp32, of numbers up to 5; one rounding to the dtype.
    for actual, wanted in zip((q, *stored), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=unit(dtype), atol=3 * 5 * 2**-24)
    assert sum(int(x.isnan().sum()) for x in cache) == 2 * G * K * (2 * 64 - 5)  # no other place


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_prompt_through_the_kernels_is_the_readable_one(qk_norm: bool, monkeypatch) -> None:
    config = ModelConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
        num_kv_heads=2, head_size=8, initializer_range=0.4, qk_norm=qk_norm,
        architecture="qwen3" if qk_norm else "llama",
    )  # fmt: skip
    model = Transformer(config).init_weights(seed=1)
    monkeypatch.setattr(transformer, "PREFILL_CHUNK", 8)
    tokens, found = torch.arange(21) * 5 % 32, []
    for kernels in (False, True):
        if kernels:
            monkeypatch.setattr(transformer, "gated", gated_forward)
            monkeypatch.setattr(transformer, "rotate_into_cache", rotate_into_cache_forward)
        cache = KVCache(config, batch=2, capacity=64)
        for part in (tokens[:13], tokens[13:]):
            logits = model.prefill(part, cache, sequence=1)
        found.append([logits, *(x[1, :, :21] for x in (*cache.keys, *cache.values))])
    # fp32 through two layers; all are of size 1 to 10.
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

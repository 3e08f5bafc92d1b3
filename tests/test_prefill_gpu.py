"""Prompts on CUDA: chunks after the first, bounded memory, no host wait. Run with `-m gpu`."""

import pytest
import torch

from draftnorm.kernels.attention import block_attention
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.memory import WORK
from draftnorm.model.transformer import Transformer

pytestmark = pytest.mark.gpu
CONFIG = dict(
    vocab_size=1000, hidden_size=512, intermediate_size=1024, num_layers=2, num_heads=8,
    num_kv_heads=2, head_size=64, context=32768,
)  # fmt: skip
MODELS = {
    "dense": CONFIG,
    "moe": CONFIG | dict(
        architecture="mixtral", num_experts=8, experts_per_token=2, expert_size=512
    ),
}  # fmt: skip


@pytest.mark.parametrize("T,S", [(1, 700), (512, 1024), (188, 2236)])
@pytest.mark.parametrize("heads", [(8, 2, 64), (32, 8, 128), (4, 4, 80)])
def test_the_last_rows_see_what_they_saw_among_all_rows(T: int, S: int, heads) -> None:
    H, G, K = heads
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, S, n, K, generator=generator, device="cuda", dtype=torch.bfloat16)
        for n in (H, G, G)
    )
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    everything = block_attention(q.double(), keys.double(), values.double())
    last = block_attention(q[:, S - T :], keys, values)
    # bf16 probabilities and sums of values of size 1: 2⁻⁸ each, and the result's rounding.
    torch.testing.assert_close(last.double(), everything[:, S - T :], rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_in_chunks_is_the_forward_pass(name: str) -> None:
    model = Transformer(ModelConfig(**MODELS[name]), device="cuda", dtype=torch.bfloat16)
    model.init_weights(seed=1)
    tokens = torch.randint(0, 1000, (1300,), generator=torch.Generator().manual_seed(2)).cuda()
    cache = KVCache(model.config, capacity=1300, device="cuda", dtype=model.dtype)
    logits = model.prefill(tokens, cache)
    again = KVCache(model.config, capacity=4000, device="cuda", dtype=model.dtype)
    assert torch.equal(model.prefill(tokens, again), logits)  # whatever the capacity
    with torch.no_grad():
        expected = model.float()(tokens[None])[0, -1]
    # Some twenty roundings to bf16, 2⁻⁹ each, in either direction; another expert at a near-tie.
    bound = 0.02 if name == "dense" else 0.1
    assert (logits - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_never_waits_for_the_device_and_its_memory_is_bounded(name: str) -> None:
    model = Transformer(ModelConfig(**MODELS[name]), device="cuda", dtype=torch.bfloat16)
    model.init_weights(seed=1)
    tokens = torch.zeros(16384, dtype=torch.long, device="cuda")
    cache = KVCache(model.config, capacity=16384, device="cuda", dtype=model.dtype)
    model.prefill(tokens[:600], cache)  # compiles, allocates what libraries keep
    cache.rollback(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.prefill(tokens, cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < WORK

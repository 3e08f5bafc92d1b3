"""Prompts on CUDA: their kernels, what bits hang on, bounded memory, no host wait. Run `-m gpu`."""

import pytest
import torch

from draftnorm.kernels.attention import block_attention
from draftnorm.kernels.gated import gated, gated_reference
from draftnorm.kernels.rotary import (
    inverse_frequencies,
    rotary_table,
    rotate_heads,
    rotate_into_cache,
)
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.memory import WORK
from draftnorm.model.transformer import PREFILL_CHUNK, Transformer

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


@pytest.mark.parametrize("T,S", [(1, 700), (512, 1024), (188, 2236), (300, 300)])
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
    with torch.inference_mode():
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


@pytest.mark.parametrize("name", [*MODELS, "qk_norm"])
def test_a_prompts_bits_hang_on_the_prompt_alone(name: str) -> None:
    """Not on capacity, batch or slot, nor on being cut in parts at borders of chunks."""
    fields = MODELS.get(name, CONFIG | dict(architecture="qwen3", qk_norm=True, head_size=80))
    model = Transformer(ModelConfig(**fields), device="cuda", dtype=torch.bfloat16)
    model.init_weights(seed=1)
    for count in (1, 17, 2 * PREFILL_CHUNK + 129):
        tokens = torch.randint(0, 1000, (count,), generator=torch.Generator().manual_seed(count))
        borders, found = range(PREFILL_CHUNK, count, PREFILL_CHUNK), []
        ways = ((1, count, 0, ()), (3, 5000, 2, ()), (2, 2999, 1, borders))
        for batch, capacity, slot, cuts in ways:
            cache = KVCache(
                model.config, batch=batch, capacity=capacity, device="cuda", dtype=model.dtype
            )
            for part in tokens.cuda().tensor_split(list(cuts)):
                logits = model.prefill(part, cache, sequence=slot)
            found.append([logits, *(x[slot, :, :count] for x in (*cache.keys, *cache.values))])
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(8, 2, 64), (32, 8, 128), (9, 3, 80), (6, 2, 6)])
def test_rotation_into_the_cache_is_the_definition(heads: tuple[int, int, int], dtype) -> None:
    H, G, K = heads
    generator = torch.Generator(device="cuda").manual_seed(0)
    qkv = torch.randn(300, H + 2 * G, K, generator=generator, device="cuda").to(dtype)
    table = rotary_table(torch.arange(77, 377).cuda(), inverse_frequencies(K, 1e4).cuda())
    expected = rotate_heads(qkv.double(), tuple(x.double() for x in table), G)
    cache = tuple(torch.full((2, G, 448, K), torch.nan, device="cuda", dtype=dtype) for _ in "kv")
    q = rotate_into_cache(qkv, table, cache, 1, 77)
    # Two products and their sum in fp32, of numbers up to 5; one rounding to the dtype.
    bound = dict(rtol=torch.finfo(dtype).eps / 2, atol=3 * 5 * 2**-24)
    stored = (x[1, :, 77:377].transpose(0, 1) for x in cache)
    for actual, wanted in zip((q, *stored), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, **bound)
    assert sum(int(x.isnan().sum()) for x in cache) == 2 * G * K * (2 * 448 - 300)  # as they were


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("F", [1, 208, 1536, 14336])
def test_the_gate_is_the_definition_and_records_for_training(F: int, dtype) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    both = (4 * torch.randn(65, 2 * F, generator=generator, device="cuda")).to(dtype)
    # exp and the division: 2 ulp of fp32 each, at most four roundings beside; one to the dtype.
    # exp(g) is 2 to the g · log2 e, whose two roundings are worth 2 |g| half-ulps of the result.
    half_ulps = 8 + 2 * float(both.abs().max())
    bound = dict(rtol=torch.finfo(dtype).eps / 2 + half_ulps * 2**-24, atol=torch.finfo(dtype).tiny)
    y = gated(both)
    torch.testing.assert_close(y.double(), gated_reference(both.double()), **bound)
    assert torch.equal(gated(both[1:]), y[1:])  # not aligned to 16 bytes if F is 1
    assert gated(both.requires_grad_()).grad_fn is not None


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

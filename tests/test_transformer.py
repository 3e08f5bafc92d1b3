"""The model's three ways of being called agree; decode rows have the same bits in any company."""

import pytest
import torch
from families import BASE, FAMILIES

from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.transformer import PREFILL_CHUNK, Transformer


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Transformer:
    return Transformer(ModelConfig(**BASE | FAMILIES[request.param])).init_weights(seed=3)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # fp32 through two layers; logits are of size 1 to 10.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_prefill_and_decode_match_the_forward_pass(model: Transformer) -> None:
    sequence = tokens(40)
    expected = model(sequence[None])[0].detach()
    cache = KVCache(model.config, capacity=40)
    close(model.prefill(sequence[:11], cache), expected[10])
    for t in range(11, 40):
        close(model.decode(sequence[None, t : t + 1], cache)[0, 0], expected[t])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 8, 13, 16])
def test_a_row_has_the_same_bits_in_any_company(
    model: Transformer, rows: int, dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    sequence, start = tokens(60), 5
    cache = KVCache(model.config, capacity=60, dtype=dtype)
    model.prefill(sequence[:start], cache)
    alone = torch.cat([model.decode(sequence[None, t : t + 1], cache)[0] for t in range(start, 60)])
    keys = [layer[:, :, :60].clone() for layer in cache.keys]
    cache.rollback(start)
    for t in range(start, 60, rows):
        together = model.decode(sequence[None, t : t + rows], cache)[0]
        assert torch.equal(together, alone[t - start : t - start + rows])
    assert all(map(torch.equal, (layer[:, :, :60] for layer in cache.keys), keys))


def test_sequences_do_not_touch_each_other(model: Transformer) -> None:
    prompts = [tokens(n, seed=n) for n in (3, 12, 7)]
    together = KVCache(model.config, batch=3, capacity=30)
    for b, prompt in enumerate(prompts):
        model.prefill(prompt, together, sequence=b)
    for T in (1, 3, 2):
        new = torch.stack([tokens(T, seed=50 + b + T) for b in range(3)])
        logits = model.decode(new, together)
        for b, prompt in enumerate(prompts):
            alone = KVCache(model.config, capacity=30)
            model.prefill(prompt, alone)
            for earlier in (1, 3, 2)[: (1, 3, 2).index(T)]:
                model.decode(tokens(earlier, seed=50 + b + earlier)[None], alone)
            assert torch.equal(model.decode(new[b : b + 1], alone)[0], logits[b])


@pytest.mark.parametrize("kept", range(5))
def test_rollback_around_each_border_of_a_sliding_window(kept: int) -> None:
    """Verify five rows, keep `kept` of them, go on: same bits as never having seen the others."""
    window = 7
    config = ModelConfig(**BASE | dict(architecture="mistral", windows=(window, window)))
    model = Transformer(config).init_weights(seed=4)
    sequence = tokens(40, seed=9)
    for start in range(1, 2 * window + 3):
        cache, plain = (KVCache(config, capacity=40) for _ in range(2))
        for c in (cache, plain):
            model.prefill(sequence[:start], c)
        rejected = tokens(5, seed=start)
        rejected[:kept] = sequence[start : start + kept]
        model.decode(rejected[None], cache)
        cache.rollback(start + kept)
        if kept:
            model.decode(sequence[None, start : start + kept], plain)
        rest = sequence[None, start + kept : start + kept + 3]
        assert torch.equal(model.decode(rest, cache), model.decode(rest, plain))


def test_prefill_in_parts_equals_prefill_at_once_at_chunk_borders() -> None:
    config = ModelConfig(**BASE | dict(windows=(None, 300)))
    model = Transformer(config).init_weights(seed=5)
    prompt = tokens(PREFILL_CHUNK + 90)
    whole, parts = (KVCache(config, capacity=len(prompt)) for _ in range(2))
    expected = model.prefill(prompt, whole)
    model.prefill(prompt[:PREFILL_CHUNK], parts)
    assert torch.equal(model.prefill(prompt[PREFILL_CHUNK:], parts), expected)
    close(expected, model(prompt[None])[0, -1].detach())


def test_gradients_reach_every_parameter(model: Transformer) -> None:
    logits: list[torch.Tensor] = []
    model(tokens(40).view(2, 20), router_logits=logits).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    sparse = sum(map(model.config.is_sparse, range(model.config.num_layers)))
    assert [tuple(x.shape) for x in logits] == [(40, model.config.num_experts)] * sparse


def test_parameter_count_and_experts_touched(model: Transformer) -> None:
    assert model.config.parameters == sum(p.numel() for p in model.parameters())
    cache = KVCache(model.config, capacity=8)
    model.prefill(tokens(3), cache)
    model.decode(tokens(1)[None], cache)
    sparse = sum(map(model.config.is_sparse, range(model.config.num_layers)))
    assert cache.experts_touched == sparse * model.config.experts_per_token
    assert cache.expert_layer_passes == sparse


def test_empty_prompt_and_full_cache_are_clear_errors(model: Transformer) -> None:
    cache = KVCache(model.config, capacity=4)
    with pytest.raises(ValueError, match="empty prompt"):
        model.prefill([], cache)
    with pytest.raises(ValueError, match="do not fit"):
        model.prefill([1, 2, 3, 4, 5], cache)
    with pytest.raises(ValueError, match="the cache has 1 sequences"):
        model.decode([[1], [2]], cache)
    cache = KVCache(model.config, batch=2, capacity=4)
    model.prefill([1], cache, sequence=0)
    model.prefill([1, 2, 3], cache, sequence=1)
    with pytest.raises(ValueError, match="do not fit"):
        model.decode([[1, 2], [3, 4]], cache)
    assert cache.lengths == [1, 3]


def test_every_call_stays_on_the_models_device() -> None:
    """On the meta device any tensor that was left on the CPU is an error, without a GPU to try on.

    Dense models only: which experts a tile reads is known on the host.
    """
    variants = (FAMILIES[name] for name in ("llama", "mistral", "qwen3"))
    for config in (ModelConfig(**BASE | variant) for variant in variants):
        model = Transformer(config, device="meta", dtype=torch.bfloat16)
        ones = torch.ones(2, 9, dtype=torch.long, device="meta")
        cache = KVCache(config, capacity=20, device=model.device, dtype=model.dtype)
        prefilled = model.prefill([1, 2, 3], cache), model.prefill(torch.tensor([4, 5]), cache)
        decoded, whole = model.decode([[6, 7, 8]], cache), model(ones)
        assert {x.device.type for x in (*prefilled, decoded, whole)} == {"meta"}
        assert decoded.shape == (1, 3, 97) and whole.shape == (2, 9, 97)

"""Logits against transformers, on random tiny checkpoints of every family and option, in fp32.

Each case is a model that transformers makes and writes: we load it and must give its logits, then
write it, and transformers must load ours. The cached path (prefill, decode, rollback) must give
transformers' logits of the whole sequence, position by position.

Tolerance: fp32 implementations that sum in different orders differ by a few 2^-24 an operation.
Over 3 layers and sums of at most 64 terms this was 2e-6 of the largest logit at most, while a real
difference (a window one too wide, another norm of the router's weights) was never below 0.1.
"""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from draftnorm import load_model, save_model
from draftnorm.model.cache import KVCache

TOLERANCE = 2e-5
LENGTH = 24  # tokens; more than four windows of 5

BASE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20)
WINDOW = dict(use_sliding_window=True, sliding_window=5)
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
CASES = {
    "llama-mha": ("Llama", dict(num_key_value_heads=4)),
    "llama-gqa": ("Llama", {}),
    "llama-mqa": ("Llama", dict(num_key_value_heads=1)),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama-biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-head-size": ("Llama", dict(head_dim=16)),
    "llama-theta": ("Llama", dict(rope_parameters=dict(rope_type="default", rope_theta=300.0))),
    "llama-linear": (
        "Llama",
        dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4)),
    ),
    "llama-llama3": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama-dynamic": (
        "Llama",
        dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
    ),
    "mistral-full": ("Mistral", dict(sliding_window=None)),
    "mistral-window": ("Mistral", dict(sliding_window=5, head_dim=16)),
    "mixtral": ("Mixtral", dict(num_local_experts=4, sliding_window=None)),
    "mixtral-window": (
        "Mixtral",
        dict(num_local_experts=5, num_experts_per_tok=3, sliding_window=5),
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", dict(**WINDOW, max_window_layers=1, tie_word_embeddings=True)),
    "qwen2-layer-types": ("Qwen2", dict(**WINDOW, layer_types=ALTERNATING)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3-biases": ("Qwen3", dict(head_dim=8, attention_bias=True)),
    "qwen3-window": ("Qwen3", dict(**WINDOW, head_dim=8, max_window_layers=2)),
    "qwen3-moe-normalized": ("Qwen3Moe", dict(**EXPERTS, norm_topk_prob=True, head_dim=16)),
    "qwen3-moe-raw": ("Qwen3Moe", dict(**EXPERTS, norm_topk_prob=False)),
    "qwen3-moe-window": ("Qwen3Moe", dict(**EXPERTS, **WINDOW)),
    "qwen3-moe-mlp-only": ("Qwen3Moe", dict(**EXPERTS, mlp_only_layers=[1])),
    "qwen3-moe-step": ("Qwen3Moe", dict(**EXPERTS, decoder_sparse_step=2)),
}
SPARSE = [name for name in CASES if name.startswith(("mixtral", "qwen3-moe"))]
WINDOWED = [name for name in CASES if "window" in name or "layer-types" in name]


@pytest.fixture(scope="module")
def reference():
    """name -> (transformers model with random weights everywhere, tokens_BT, logits_BTV)."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(len(name))
            family, options = CASES[name]
            config = getattr(transformers, f"{family}Config")(**BASE | options)
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for key, weight in model.named_parameters():
                    # Biases start at 0 and norms at 1, which would hide that they are lost.
                    weight.normal_(1.0 if "norm" in key else 0.0, 0.25)
            tokens_BT = torch.randint(0, BASE["vocab_size"], (2, LENGTH))
            made[name] = model, tokens_BT, logits(model, tokens_BT)
        return made[name]

    return make


@torch.no_grad()
def logits(model, tokens_BT):
    output = model(tokens_BT)
    return getattr(output, "logits", output)


def assert_close(actual, expected):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE, f"relative error {error:.2e}"


def spell_as_transformers_4(directory):
    """Rewrite a config.json of transformers 5 as version 4 wrote it."""
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    # "type" is the key of the first rope_scaling entries; llama3 came with "rope_type".
    key = "rope_type" if kind == "llama3" else "type"
    fields["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    fields["torch_dtype"] = fields.pop("dtype")
    if fields["model_type"] == "qwen3_moe":  # version 5's attribute for what version 4 stored
        fields["num_experts"] = fields.pop("num_local_experts", fields.get("num_experts"))
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_and_back(name, reference, tmp_path):
    theirs, tokens_BT, expected_BTV = reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", device="cpu")
    assert ours.config.parameters == sum(weight.numel() for weight in theirs.parameters())
    assert_close(logits(ours, tokens_BT), expected_BTV)

    save_model(ours, tmp_path / "ours")
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    assert again.dtype == torch.float32
    assert torch.equal(logits(again, tokens_BT), expected_BTV)  # the same weights, the same code


@pytest.mark.parametrize("name", CASES)
def test_config_spelled_as_transformers_4(name, reference, tmp_path):
    theirs, tokens_BT, expected_BTV = reference(name)
    theirs.save_pretrained(tmp_path)
    spell_as_transformers_4(tmp_path)
    assert_close(logits(load_model(tmp_path, device="cpu"), tokens_BT), expected_BTV)


@pytest.mark.parametrize("name", SPARSE)
def test_packed_experts(name, reference, tmp_path):
    theirs, tokens_BT, expected_BTV = reference(name)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    assert_close(logits(load_model(tmp_path, device="cpu"), tokens_BT), expected_BTV)


@pytest.mark.parametrize("name", ["llama-biases", "mixtral", "qwen3-moe-mlp-only"])
def test_shards(name, reference, tmp_path):
    theirs, tokens_BT, expected_BTV = reference(name)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = load_model(tmp_path / "theirs", device="cpu")
    assert_close(logits(ours, tokens_BT), expected_BTV)

    save_model(ours, tmp_path / "ours", max_shard_size="20KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again, tokens_BT), expected_BTV)


@pytest.mark.parametrize("name", CASES)
def test_cached_path_equals_no_cache(name, reference, tmp_path):
    """Prefill, then decode blocks of 1, 3, 1, 5 … rows: each row against the whole forward's."""
    theirs, tokens_BT, expected_BTV = reference(name)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, device="cpu")
    cache = KVCache(ours.config, batch=2, capacity=LENGTH + 5, device="cpu", dtype=torch.float32)
    prompts = (4, 9)  # two sequences, each with its own length
    with torch.no_grad():
        for b, length in enumerate(prompts):
            logits_V = ours.prefill(tokens_BT[b, :length], cache, sequence=b)
            assert_close(logits_V, expected_BTV[b, length - 1])
        for rows in (1, 3, 1, 5, 2):
            block_BT = torch.stack(
                [tokens_BT[b, n : n + rows] for b, n in enumerate(cache.lengths)]
            )
            starts = list(cache.lengths)
            logits_BTV = ours.decode(block_BT, cache)
            for b, start in enumerate(starts):
                assert cache.lengths[b] == start + rows
                assert_close(logits_BTV[b], expected_BTV[b, start : start + rows])


@pytest.mark.parametrize("name", ["llama-gqa", *WINDOWED])
def test_prefill_over_chunk_borders(name, reference, tmp_path, monkeypatch):
    """Chunks of 8 stand for those of 512: prompts that end before, on and after their borders."""
    monkeypatch.setattr("draftnorm.model.transformer.PREFILL_CHUNK", 8)
    theirs, tokens_BT, expected_BTV = reference(name)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, device="cpu")
    cache = KVCache(ours.config, capacity=LENGTH, device="cpu", dtype=torch.float32)
    for length in (7, 8, 9, 17, LENGTH):
        cache.rollback(0)
        logits_V = ours.prefill(tokens_BT[0, :length], cache)
        assert_close(logits_V, expected_BTV[0, length - 1])
    cache.rollback(3)  # a second prompt part starts inside a chunk and inside a window
    assert_close(ours.prefill(tokens_BT[0, 3:21], cache), expected_BTV[0, 20])


@pytest.mark.parametrize("name", WINDOWED)
def test_rollback_around_each_window_border(name, reference, tmp_path):
    """At every length through three windows: drafts that are all rejected, then some accepted."""
    theirs, tokens_BT, expected_BTV = reference(name)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, device="cpu")
    tokens_T, expected_TV = tokens_BT[0], expected_BTV[0]
    wrong_BT = (tokens_T[None, :6] + 1) % BASE["vocab_size"]
    cache = KVCache(ours.config, capacity=LENGTH + 6, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        ours.prefill(tokens_T[:1], cache)
        for length in range(1, 17):
            ours.decode(wrong_BT, cache)
            cache.rollback(length)  # nothing accepted
            for accepted in (0, 1, 5, 6):  # of six drafts; then one more cycle from there
                drafts_BT = tokens_T[None, length : length + 6].clone()
                drafts_BT[:, accepted:] = wrong_BT[:, accepted:]
                logits_BTV = ours.decode(drafts_BT, cache)
                good = slice(length, length + accepted)
                if accepted:
                    assert_close(logits_BTV[0, :accepted], expected_TV[good])
                cache.rollback(good.stop)
                next_BTV = ours.decode(tokens_T[None, good.stop : good.stop + 1], cache)
                assert_close(next_BTV[0, 0], expected_TV[good.stop])
                cache.rollback(length)
            ours.decode(tokens_T[None, length : length + 1], cache)

"""config.json, both spellings: read, round-tripped, or refused by name in one line."""

import json
from pathlib import Path

import pytest

from draftnorm.model.config import ARCHITECTURES, ConfigError, ModelConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 1e5,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "eos_token_id": [2, 3],
}

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(**changes: object) -> ModelConfig:
    return ModelConfig.from_dict({**LLAMA, **changes})


def family(name: str, **changes: object) -> dict:
    return {**LLAMA, "model_type": name, "architectures": [ARCHITECTURES[name]], **changes}


def test_llama() -> None:
    config = read()
    assert (config.head_size, config.num_kv_heads, config.context) == (8, 2, 512)
    assert config.rope.theta == 1e5
    assert config.eos_token_ids == (2, 3)
    assert config.windows == (None, None)
    assert not (config.qkv_bias or config.output_bias or config.mlp_bias or config.qk_norm)


def test_both_spellings_of_rope_agree() -> None:
    old = read(rope_scaling={"type": "linear", "factor": 2.0})
    new = dict(LLAMA, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5})
    del new["rope_theta"]
    assert ModelConfig.from_dict(new) == old
    assert old.rope.kind == "linear" and old.rope.factor == 2.0


def test_options_of_the_families() -> None:
    def of(name: str, **changes: object) -> ModelConfig:
        return ModelConfig.from_dict(family(name, **changes))

    assert of("qwen2").qkv_bias and not of("qwen2").output_bias
    assert of("qwen3").head_size == 128 and of("qwen3").qk_norm
    assert of("mistral", sliding_window=16).windows == (16, 16)
    assert of("qwen2", sliding_window=16).windows == (None, None)  # use_sliding_window is off
    windows = of("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=1).windows
    assert windows == (None, 16)
    kinds = ["sliding_attention", "full_attention"]
    config = of("qwen3", sliding_window=16, use_sliding_window=True, layer_types=kinds)
    assert config.windows == (16, None)
    mixtral = of("mixtral", num_local_experts=4)
    assert (mixtral.num_experts, mixtral.experts_per_token, mixtral.expert_size) == (4, 2, 96)
    sparse = of("qwen3_moe", num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2)
    assert [sparse.is_sparse(i) for i in range(2)] == [False, True]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip(name: str) -> None:
    extra = {"sliding_window": 16} if name in ("mistral", "mixtral") else {}
    if name.startswith("qwen"):
        extra = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    if name == "qwen3_moe":
        extra |= {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
    scaling = LLAMA3 | {"original_max_position_embeddings": 128}
    config = ModelConfig.from_dict(family(name, rope_scaling=scaling, **extra))
    assert ModelConfig.from_dict(config.to_dict()) == config


MISTAKES = {
    "another architecture": (dict(model_type="gpt2"), "gpt2"),
    "not a causal LM": (dict(architectures=["LlamaForSequenceClassification"]), "causal"),
    "unknown activation": (dict(hidden_act="gelu"), "gelu"),
    "unknown field": (dict(logit_softcap=30.0), "logit_softcap"),
    "quantised": (dict(quantization_config={"bits": 4}), "quantis"),
    "negative size": (dict(hidden_size=-64), "hidden_size"),
    "size of another type": (dict(vocab_size="100"), "vocab_size"),
    "layers without end": (dict(num_hidden_layers=10**15), "num_hidden_layers"),
    "boolean size": (dict(num_hidden_layers=True), "num_hidden_layers"),
    "NaN": (dict(rms_norm_eps=float("nan")), "norm_eps"),
    "infinite theta": (dict(rope_theta=float("inf")), "theta"),
    "heads that do not divide": (dict(num_key_value_heads=3), "KV heads"),
    "odd head": (dict(head_dim=7), "odd"),
    "unknown rope": (dict(rope_scaling={"type": "yarn", "factor": 2.0}), "yarn"),
    "unknown rope option": (
        dict(rope_scaling={"type": "linear", "factor": 2.0, "mscale": 1.5}),
        "mscale",
    ),
    "rope without its factor": (dict(rope_scaling={"type": "linear"}), "factor"),
    "rope that is no object": (dict(rope_scaling="linear"), "rope_scaling"),
    "partial rotary": (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "llama with a window": (dict(sliding_window=16), "sliding_window"),
    "bad stop id": (dict(eos_token_id="two"), "token ids"),
    "low above high": (
        dict(rope_scaling=dict(LLAMA3, low_freq_factor=8.0)),
        "low_freq_factor < high_freq_factor",
    ),
    "infinite factor": (
        dict(rope_scaling=dict(LLAMA3, high_freq_factor=float("inf"))),
        "high_freq_factor must be a positive finite number",
    ),
    "partial rotary in rope": (
        dict(rope_scaling=dict(LLAMA3, partial_rotary_factor=0.5)),
        "partial_rotary_factor",
    ),
    "more experts a token than experts": (
        family("mixtral", num_local_experts=2, num_experts_per_tok=3),
        "3 experts a token but only 2",
    ),
    "no experts": (family("mixtral", num_local_experts=0), "num_local_experts"),
    "bias of another family": (family("mistral", attention_bias=True), "for mistral"),
    "dense layers that are no list": (family("qwen3_moe", mlp_only_layers=1), "mlp_only_layers"),
    "windows from a fraction": (
        family("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0.5),
        "max_window_layers",
    ),
    "kinds of other layers": (family("qwen3", layer_types=["full_attention"]), "each of the 2"),
    "unknown kind of layer": (family("qwen3", layer_types=["full_attention", "ssm"]), "'ssm'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_refused_by_name_in_one_line(mistake: str) -> None:
    changes, named = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=named) as error:
        read(**changes)
    assert "\n" not in str(error.value)


def test_unknown_fields_whose_value_means_off_are_accepted() -> None:
    assert read(logit_softcap=None, some_scaling=0, other=False) == read()


def test_missing_field_is_named() -> None:
    fields = {k: v for k, v in LLAMA.items() if k != "hidden_size"}
    with pytest.raises(ConfigError, match="hidden_size is missing"):
        ModelConfig.from_dict(fields)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        ModelConfig.from_directory(tmp_path)
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="not a directory"):
        ModelConfig.from_directory(file)
    for content in (b"{", b"[1]", b"\xff\xfe", b"[" * 100_000):
        file.write_bytes(content)
        with pytest.raises(ConfigError) as error:
            ModelConfig.from_directory(tmp_path)
        assert "\n" not in str(error.value)
    file.write_text(json.dumps(LLAMA))
    assert ModelConfig.from_directory(tmp_path) == read()

"""Checkpoints written from a list of Hugging Face's names by hand, not by our own writer."""

import json

import pytest
import torch
from safetensors.torch import save_file

from draftnorm import load_model
from draftnorm.model.checkpoint import CheckpointError

D, F, H, G, K, V, E = 16, 24, 4, 2, 6, 40, 3
LLAMA = dict(
    model_type="llama",
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=2,
    num_attention_heads=H,
    num_key_value_heads=G,
    head_dim=K,
)
BIASED = LLAMA | dict(attention_bias=True, mlp_bias=True)
TIED = LLAMA | dict(tie_word_embeddings=True)
MIXTRAL = LLAMA | dict(model_type="mixtral", num_local_experts=E, num_experts_per_tok=2)
QWEN = LLAMA | dict(
    model_type="qwen3_moe",
    num_experts=E,
    num_experts_per_tok=2,
    moe_intermediate_size=F,
    mlp_only_layers=[1],
)


def hub_tensors(fields, *, packed=False, dtype=torch.float32):
    """Random tensors under the names of the Hub for this config (packed: transformers 5's)."""
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not fields.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (V, D)
    for i in range(fields["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (D,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (D,)
        for name, rows in (("q", H * K), ("k", G * K), ("v", G * K)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, D)
            if fields.get("attention_bias"):
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (D, H * K)
        if fields.get("attention_bias"):
            shapes[f"{layer}.self_attn.o_proj.bias"] = (D,)
        if fields["model_type"] == "qwen3_moe":
            shapes[f"{layer}.self_attn.q_norm.weight"] = (K,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (K,)
        if fields["model_type"] == "llama" or i in fields.get("mlp_only_layers", ()):
            for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
                shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
                if fields.get("mlp_bias"):
                    shapes[f"{layer}.mlp.{name}_proj.bias"] = shape[:1]
            continue
        if packed:
            shapes[f"{layer}.mlp.gate.weight"] = (E, D)
            shapes[f"{layer}.mlp.experts.gate_up_proj"] = (E, 2 * F, D)
            shapes[f"{layer}.mlp.experts.down_proj"] = (E, D, F)
            continue
        mixtral = fields["model_type"] == "mixtral"
        block = f"{layer}.{'block_sparse_moe' if mixtral else 'mlp'}"
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        shapes[f"{block}.gate.weight"] = (E, D)
        for e in range(E):
            shapes[f"{block}.experts.{e}.{gate}.weight"] = (F, D)
            shapes[f"{block}.experts.{e}.{up}.weight"] = (F, D)
            shapes[f"{block}.experts.{e}.{down}.weight"] = (D, F)
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def write(directory, fields, tensors, shards=1):
    """A checkpoint directory; with several shards an index names them."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, directory / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    write_index(directory, weight_map)
    return directory


def write_index(directory, weight_map):
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)


def load(directory):
    return load_model(directory, device="cpu")


def refused(directory):
    """The message of the error with which a checkpoint is refused: always one line."""
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 1500 and message.isprintable()
    return message

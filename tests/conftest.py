"""What several test files share: tiny random checkpoints, made afresh, with real file formats."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


def write_tokenizer(directory: Path, *, padding: int = 0) -> int:
    """A byte-level BPE tokenizer.json with a stop token, <end>; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        piece: i for i, piece in enumerate([*alphabet, *(f"<pad{i}>" for i in range(padding))])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return tokenizer.get_vocab_size()


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """make_checkpoint(name, seed=0, **config) writes a tiny Llama in Hugging Face's layout."""

    def make(name: str = "tiny", *, seed: int = 0, padding: int = 0, **overrides: object) -> Path:
        from draftnorm import ModelConfig, save_model
        from draftnorm.model.transformer import Transformer

        directory = tmp_path / name
        directory.mkdir()
        vocab_size = write_tokenizer(directory, padding=padding)
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "bos_token_id": None,
            "eos_token_id": vocab_size - 1,
            "initializer_range": 0.2,  # large enough that logits depend on the tokens
        }
        model = Transformer(ModelConfig.from_dict(config | overrides)).init_weights(seed)
        save_model(model, directory)
        return directory

    return make

"""GGUF import: a file written as llama.cpp writes it comes back as the model that it came from."""

import io
import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers

from draftnorm.model.config import ConfigError
from draftnorm.model.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="pip install 'draftnorm[fetch]'")
from test_tokenizer import mistral_model  # noqa: E402

from draftnorm.model.gguf_import import GGUFError, GGUFFile, import_gguf  # noqa: E402

F32, Q8_0, Q4_1 = (gguf.GGMLQuantizationType[name] for name in ("F32", "Q8_0", "Q4_1"))
TO_GGUF = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp", "mlp.experts.down_proj":
    "ffn_down_exps",
}  # fmt: skip
CORPUS = ["the cat sat on the mat", "def f(x):\n\treturn x + 1", "naïve café, 2024", "日本語 text"]
TEXTS = [*CORPUS, "", " a  b   ", "don't STOP 12345", "a\x04b 🙂\r\n\n\t", "<s> x</s>", "ﬁ e\u0301"]


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own formula (convert_hf_to_gguf.py, LlamaModel.permute)."""
    half = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return half.swapaxes(1, 2).reshape(rows.shape)


def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator(CORPUS * 9, trainer)
    model = json.loads(library.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(m) for m in model["merges"]]


def write_gguf(path: Path, tensors=None, *, tokenizer=None, kinds=None, **fields) -> Path:
    """A GGUF file of a tiny one-layer Llama; `fields` (with _ for .) override its metadata."""
    tokens, merges = byte_level_vocabulary()
    tokenizer = tokenizer or {
        "model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": merges,
        "token_type": [3, 3] + [1] * (len(tokens) - 2), "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    size = len(tokenizer["tokens"])
    if tensors is None:
        rng = np.random.default_rng(0)
        shapes = {"token_embd": (size, 32), "output_norm": (32,), "blk.0.attn_norm": (32,)}
        shapes |= {f"blk.0.attn_{x}": (32, 32) for x in ("q", "k", "v", "output")}
        shapes |= {"blk.0.ffn_norm": (32,), "blk.0.ffn_gate": (32, 32), "blk.0.ffn_up": (32, 32)}
        shapes |= {"blk.0.ffn_down": (32, 32)}
        tensors = {f"{k}.weight": rng.normal(size=s) for k, s in shapes.items()}
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    metadata = {
        "llama.context_length": 64, "llama.embedding_length": 32, "llama.block_count": 1,
        "llama.feed_forward_length": 32, "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    for key, value in (metadata | fields).items():
        if value is None:
            continue
        kind = gguf.GGUFValueType.get_type(value)
        if kind == gguf.GGUFValueType.INT32:
            kind = gguf.GGUFValueType.UINT32 if value >= 0 else kind
        writer.add_key_value(key, value, kind)
    for name, values in tensors.items():
        kind = (kinds or {}).get(name, F32)
        data = np.ascontiguousarray(values, np.float32)
        writer.add_tensor(name, gguf.quantize(data, kind) if kind != F32 else data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Weights and configuration, against transformers

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
VARIANTS = {
    "grouped heads, tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "explicit head size": dict(head_dim=32, num_key_value_heads=1),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "llama 3.1": dict(rope_scaling={**LLAMA3_ROPE, "rope_theta": 5e5}, rope_theta=5e5, head_dim=64),
    "linear rope": dict(rope_scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2),
}


def to_gguf(model, path: Path) -> Path:
    """What llama.cpp's converter makes of a transformers model."""
    config, tensors = model.config, {}
    for name, value in model.state_dict().items():
        stem, leaf = (
            name.rsplit(".", 1) if name.endswith((".weight", ".bias")) else (name, "weight")
        )
        prefix, values = "", value.float().numpy()
        if stem.startswith("model.layers."):
            layer, stem = stem.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{layer}."
        if stem == "mlp.experts.gate_up_proj":
            gate, up = np.split(values, 2, axis=1)
            tensors |= {f"{prefix}ffn_gate_exps.weight": gate, f"{prefix}ffn_up_exps.weight": up}
            continue
        for role, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            values = permuted(values, heads) if stem == f"self_attn.{role}_proj" else values
        if not (stem == "lm_head" and config.tie_word_embeddings):
            tensors[f"{prefix}{TO_GGUF[stem]}.{leaf}"] = values
    rope = config.rope_parameters
    fields = {
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.attention.key_length": getattr(config, "head_dim", None),
        "llama.rope.freq_base": rope["rope_theta"],
        "llama.expert_count": getattr(config, "num_local_experts", None),
        "llama.expert_used_count": getattr(config, "num_experts_per_tok", None),
    }
    if rope["rope_type"] == "linear":
        fields |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, 64, 2) / 64)
        tensors["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq).numpy()
    return write_gguf(path, tensors, **fields)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_model_that_was_converted(variant, tmp_path):
    transformers = pytest.importorskip("transformers")
    family = "Mixtral" if variant == "mixtral" else "Llama"
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(byte_level_vocabulary()[0]), hidden_size=64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        initializer_range=0.2, **VARIANTS[variant],
    )  # fmt: skip
    original = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    path = to_gguf(original, tmp_path / "model.gguf")
    import_gguf(path, tmp_path / "out", dtype=torch.float32)
    imported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(config.vocab_size, (1, 50))
    with torch.no_grad():
        expected, actual = original(tokens).logits, imported(tokens).logits
    # Same weights, same code. Only llama 3.1's frequencies went through a division in float32.
    tolerance = 1e-4 if variant == "llama 3.1" else 0
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantised_values_and_the_stored_type(dtype, tmp_path):
    from safetensors.torch import load_file

    names = {"blk.0.ffn_up.weight": Q4_1, "blk.0.attn_v.weight": Q8_0}
    path, seen = write_gguf(tmp_path / "model.gguf", kinds=names), []
    import_gguf(path, tmp_path / "out", dtype=dtype, progress=lambda *n: seen.append(n))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, target in (("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj")):
        tensor = reader[f"blk.0.{name}.weight"]
        expected = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).to(dtype)
        assert torch.equal(stored[f"model.layers.0.{target}.weight"], expected)
    assert all(tensor.dtype == dtype for tensor in stored.values())
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in stored.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"]


# Tokenizers


def reference_pre_tokenizer(pre: str):
    """As the models' own tokenizer.json files have it."""
    word = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    if pre == "gpt-2":
        return level
    digits = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
    pattern = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{word}|{digits}|{rest}"
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_ids(pre, tmp_path):
    tokens, merges = byte_level_vocabulary()
    tokens.append("Ġxyzzy")  # no merges lead there: only ignore_merges (Llama 3) finds it
    fields = {
        "model": "gpt2", "pre": pre, "tokens": [*tokens, "<add>"], "merges": merges,
        "token_type": [3, 3] + [1] * (len(tokens) - 2) + [4], "bos_token_id": 0,
        "eos_token_id": 1, "eot_token_id": 5,
    }  # fmt: skip
    template = {"tokenizer.chat_template": "{{ messages }}", "general.license": "mit"}
    path = write_gguf(tmp_path / "model.gguf", tokenizer=fields, **template)
    import_gguf(path, tmp_path / "out")
    ours = load_tokenizer(tmp_path / "out")
    reference = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(merge.split(" ")) for merge in merges],
            ignore_merges=pre == "llama-bpe",
        )
    )
    reference.pre_tokenizer, reference.decoder = reference_pre_tokenizer(pre), decoders.ByteLevel()
    if pre == "qwen2":
        reference.normalizer = normalizers.NFC()
    reference.add_special_tokens(["<s>", "</s>"])
    reference.add_tokens([AddedToken("<add>", normalized=False)])
    for text in [*TEXTS, "x<add>y xyzzy"]:
        ids = reference.encode(text).ids
        assert ours.encode(text, add_special=False) == ids
        assert ours.encode(text) == ([0, *ids] if pre == "llama-bpe" else ids)
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False)
    assert ours.chat_template == "{{ messages }}"
    assert (ours.bos_token_id, ours.eos_token_ids) == (0, (1, 5))
    assert "mit" in (tmp_path / "out" / "LICENSE").read_text()


@pytest.mark.parametrize("kind", ["prefix", "no prefix", "mistral"])
def test_sentencepiece_ids(kind, tmp_path):
    if kind == "mistral":  # real, and its runs of spaces all have the same score
        model = mistral_model()
    else:
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 9), model_writer=out, model_type="bpe", vocab_size=340,
            byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            add_dummy_prefix=kind == "prefix", character_coverage=0.98,
        )  # fmt: skip
        model = out.getvalue()
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = range(reference.vocab_size())
    kinds = [
        2 if reference.is_unknown(i) else 3 if reference.is_control(i) else 6
        if reference.is_byte(i) else 1 for i in size
    ]  # fmt: skip
    fields = {
        "model": "llama", "tokens": [reference.id_to_piece(i) for i in size], "token_type": kinds,
        "scores": [float(reference.get_score(i)) for i in size], "bos_token_id": 1,
        "eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": kind != "no prefix",
    }  # fmt: skip
    import_gguf(write_gguf(tmp_path / "model.gguf", tokenizer=fields), tmp_path / "out")
    ours = load_tokenizer(tmp_path / "out")
    code = Path(__file__).read_text(encoding="utf-8").replace("<s>", "").replace("</s>", "")
    for text in {code, " " * 19 + "x", *TEXTS} - {"<s> x</s>"}:
        ids = reference.encode(text)
        assert ours.encode(text) == [1, *ids]  # BOS is SentencePiece models' default
        assert ours.decode(ids) == reference.decode(ids)
    assert 1 in ours.encode("<s> x</s>", add_special=False)


# What is refused

HEADER = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
KEY = struct.pack("<Q", 1) + b"k"
HUGE = 2**62


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGU",
        b"PK\x03\x04" + bytes(60),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE),
        HEADER + struct.pack("<Q", HUGE),
        HEADER + KEY + struct.pack("<IQ", 8, HUGE),
        HEADER + KEY + struct.pack("<IIQ", 9, 0, HUGE),
        HEADER + KEY + struct.pack("<IIQ", 9, 8, HUGE),
        HEADER + KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9999,
        HEADER + KEY + struct.pack("<I", 77),
        HEADER + KEY + struct.pack("<IQ", 8, 2) + b"\xff\xfe",
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<IQIQ", 1, HUGE, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<IQIQ", 1, 8, 0, HUGE),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<IQIQ", 1, 8, 999, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<IQIQ", 1, 7, 8, 0),
    ],
)
def test_hostile_headers_are_one_line(content, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(GGUFError, match=r"bad\.gguf") as caught:
        GGUFFile(tmp_path / "bad.gguf")
    assert "\n" not in str(caught.value)


def test_no_file_and_a_directory(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(GGUFError, match="no whole GGUF file"):
            GGUFFile(path)


def test_damaged_files_never_fail_otherwise(tmp_path):
    """Cut anywhere it is an error; with bytes changed it is one, or a conversion."""
    whole = write_gguf(tmp_path / "model.gguf").read_bytes()
    rng, bad = random.Random(0), tmp_path / "bad.gguf"
    for size in [rng.randrange(len(whole)) for _ in range(60)]:
        bad.write_bytes(whole[:size])
        with pytest.raises(GGUFError):
            GGUFFile(bad)
    header = len(whole) - sum(t.n_bytes for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 3])):
            damaged[rng.randrange(header)] = rng.randrange(256)
        bad.write_bytes(damaged)
        try:
            import_gguf(bad, tmp_path / "out")
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"architecture": "gemma"}, "architecture 'gemma'; only 'llama'"),
        ({"split.count": 2}, "split GGUF"),
        ({"llama.attention.sliding_window": 9}, "sliding_window is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is not the head size 16"),
        ({"llama.attention.value_length": 8}, "value_length is not the head size"),
        ({"llama.context_length": None}, "context_length is None, not int"),
        ({"llama.attention.head_count": 0}, "num_attention_heads"),
        ({"llama.attention.head_count": [2, 2]}, "num_attention_heads"),
        ({"llama.block_count": -1}, "num_hidden_layers"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken'; known are gpt-2"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is None"),
        ({"tokenizer.ggml.model": "bert"}, "'bert' is neither"),
        ({"tokenizer.ggml.merges": ["x y"]}, "no tokenizer can be built"),
        ({"tokenizer.ggml.bos_token_id": 99999}, "bos_token_id 99999 is not in the vocabulary"),
        ({"tokenizer.ggml.eot_token_id": "x"}, "eot_token_id x is not"),
        ({"tokenizer.ggml.token_type": [1]}, "lacks their types"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(fields, reason, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", **fields)
    with pytest.raises((GGUFError, ConfigError), match=reason) as caught:
        import_gguf(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("blk.0.attn_sinks.weight", np.ones(8), "attn_sinks.weight is not part of"),
        ("blk.0.attn_q.weight", np.ones((33, 32)), "has not 2 heads"),
        ("rope_freqs.weight", np.full(8, 3.0), "is not Llama 3.1's scaling"),
        ("output_norm.weight", np.full(32, np.nan), "not finite"),
    ],
)
def test_odd_tensors_are_refused_by_name(name, values, reason, tmp_path):
    write_gguf(tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors} | {name: values}
    path = write_gguf(tmp_path / "odd.gguf", tensors)
    with pytest.raises(GGUFError, match=reason):
        import_gguf(path, tmp_path / "out")


def test_missing_tensors_and_integers_are_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "none.gguf", {})
    with pytest.raises(GGUFError, match=r"tensor blk\.0\.attn_q\.weight is missing"):
        import_gguf(path, tmp_path / "out")
    whole = write_gguf(tmp_path / "model.gguf").read_bytes()
    name = b"output_norm.weight"
    kind = whole.index(name) + len(name) + struct.calcsize("<IQ")  # after the rank and 32 values
    integers = gguf.GGMLQuantizationType.I32.to_bytes(4, "little")
    (tmp_path / "int.gguf").write_bytes(whole[:kind] + integers + whole[kind + 4 :])
    with pytest.raises(GGUFError, match=r"output_norm\.weight: type I32 is not supported"):
        import_gguf(tmp_path / "int.gguf", tmp_path / "out")

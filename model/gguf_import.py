"""GGUF to a Hugging Face directory: dequantise, undo llama.cpp's q/k order, rebuild the tokenizer.

Reads any one-file GGUF of architecture `llama` (Llama, SmolLM, Mistral, Mixtral) whose tensor types
the `gguf` package (extra `fetch`) dequantises. One tensor at a time is in memory. Weights become
bfloat16 unless told otherwise: half the size of the float32 that dequantisation gives, what a GPU
decodes in, and with a rounding of 2⁻⁹ finer than the quantisation that went before.

Format: the GGUF specification, versions 2 and 3. Shapes: rows of q and k are heads × head size.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from draftnorm.kernels.rotary import inverse_frequencies
from draftnorm.model.checkpoint import SINGLE
from draftnorm.model.config import ModelConfig, RopeConfig

_SCALARS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}  # struct's letters
_U32, _STRING, _ARRAY, _U64 = 4, 8, 9, 10
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_FIELDS = {
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok",
    "rope.freq_base": "rope_theta",
}  # fmt: skip
_CHECKED = {"vocab_size", "attention.value_length", "rope.dimension_count"}
_CHECKED |= {"rope.scaling.type", "rope.scaling.factor"}
_TENSORS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "ffn_gate_inp": "block_sparse_moe.gate",
}  # fmt: skip
_EXPERTS = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}
# How text is cut before byte-level BPE, by tokenizer.ggml.pre; None is GPT-2's own pattern.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _WORDS % "{1,3}"
_CUTS = {"gpt-2": None, "smollm": None, "qwen2": _WORDS % ""}
_CUTS |= {"llama-bpe": _LLAMA3, "llama-v3": _LLAMA3, "llama3": _LLAMA3}

Tensors = Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]  # name, shape, read


class GGUFError(ValueError):
    """A GGUF file that cannot be read or represented; the message is one line."""


class GGUFFile:
    """A mapped GGUF file: `metadata`, and `tensors` as name -> (shape, type, raw bytes)."""

    def __init__(self, path: str | Path) -> None:
        """Raises GGUFError unless all that the header promises is there."""
        self.path, self._at = Path(path), 0
        try:
            self._data = np.memmap(self.path, np.uint8, "r")
            self._parse()
        except KeyError as error:
            raise GGUFError(f"{path} has a value of unknown type {error}") from None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise GGUFError(f"{path} is no whole GGUF file: {error}") from None

    def _parse(self) -> None:
        if self._take(4).tobytes() != b"GGUF" or self._value(_U32) not in (2, 3):
            raise ValueError("it does not begin with the mark of version 2 or 3")
        num_tensors, num_fields = self._value(_U64), self._value(_U64)
        # Every round consumes bytes or fails: a hostile count ends with the file.
        self.metadata = {
            self._value(_STRING): self._value(self._value(_U32)) for _ in range(num_fields)
        }
        infos = []
        for _ in range(num_tensors):
            name, rank = self._value(_STRING), self._value(_U32)
            dims = [self._value(_U64) for _ in range(rank)]
            infos.append((name, dims, self._value(_U32), self._value(_U64)))
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment if alignment else self._at
        self.tensors = {}
        for name, dims, type_id, offset in infos:
            kind = gguf.GGMLQuantizationType(type_id)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if not dims or dims[0] % block:
                raise ValueError(f"tensor {name} of type {kind.name} has shape {dims}")
            shape = tuple(reversed(dims))  # GGUF names the fastest dimension first
            row_bytes = dims[0] // block * block_bytes
            self._at = start + offset
            data = self._take(math.prod(shape[:-1]) * row_bytes)
            self.tensors[name] = shape, kind, data.reshape(*shape[:-1], row_bytes)

    def _take(self, count: int) -> np.ndarray:
        if count > len(self._data) - self._at:
            raise ValueError(f"it ends before the {count} bytes at {self._at}")
        self._at += count
        return self._data[self._at - count : self._at]

    def _value(self, code: int) -> Any:
        if code == _STRING:
            return self._take(self._value(_U64)).tobytes().decode()
        if code == _ARRAY:
            code, count = self._value(_U32), self._value(_U64)
            if code in (_STRING, _ARRAY):
                return [self._value(code) for _ in range(count)]
            dtype = np.dtype("<" + _SCALARS[code])
            return self._take(count * dtype.itemsize).view(dtype).tolist()
        layout = struct.Struct("<" + _SCALARS[code])
        return layout.unpack(self._take(layout.size))[0]

    def need(self, key: str, kind: type) -> Any:
        """Metadata that must be there and of this type."""
        if not isinstance(value := self.metadata.get(key), kind):
            raise GGUFError(f"{self.path}: {key} is {str(value)[:40]}, not {kind.__name__}")
        return value

    def token_id(self, role: str) -> int | None:
        """The id that the metadata give to "bos", "eos", "unknown" and so on."""
        index = self.metadata.get(f"tokenizer.ggml.{role}_token_id")
        known = range(len(self.need("tokenizer.ggml.tokens", list)))
        if index is not None and (not isinstance(index, int) or index not in known):
            raise GGUFError(f"{self.path}: {role}_token_id {index} is not in the vocabulary")
        return index

    def dequantize(self, name: str, expert: int | None = None) -> np.ndarray:
        """A tensor, or one expert of a stack of them, in float32."""
        shape, kind, data = self.tensors[name]
        if expert is not None:
            shape, data = shape[1:], data[expert]
        try:
            return gguf.dequantize(data, kind).reshape(shape)
        except NotImplementedError:
            raise GGUFError(f"{self.path}: {name}: type {kind.name} is not supported") from None


def import_gguf(
    path: str | Path,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Convert a llama-architecture GGUF file into a checkpoint directory.

    `progress(done, total)` counts bytes written. Raises GGUFError or ConfigError, of one line, and
    then leaves `directory` half written: give a temporary one and rename it.
    """
    source, directory = GGUFFile(path), Path(directory)
    config = _config(source)
    try:
        tokenizer, tokenizer_config = _tokenizer(source)
    except GGUFError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise GGUFError(f"{path}: no tokenizer can be built: {error}") from None
    ends = {source.token_id(end) for end in ("eos", "eot", "eom")}
    contents = {
        "config.json": config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")},
        "generation_config.json": {"eos_token_id": sorted(ends - {None})},
        "tokenizer_config.json": tokenizer_config,
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
    tokenizer.save(str(directory / "tokenizer.json"))
    if licence := source.metadata.get("general.license"):
        (directory / "LICENSE").write_text(f"{source.path.name} names its licence: {licence}\n")
    _write_safetensors(directory / SINGLE, _tensors(source, config), dtype, progress)


def _config(source: GGUFFile) -> ModelConfig:
    if (architecture := source.need("general.architecture", str)) != "llama":
        raise GGUFError(f"{source.path}: architecture {architecture!r}; only 'llama' is imported")
    if source.metadata.get("split.count", 1) != 1:
        raise GGUFError(f"{source.path} is one part of a split GGUF; merge the parts first")
    found = {k.removeprefix("llama."): v for k, v in source.metadata.items() if k[:6] == "llama."}
    if unknown := found.keys() - _FIELDS.keys() - _CHECKED:
        raise GGUFError(f"{source.path}: llama.{min(unknown)} is not supported")
    if (scaling := found.get("rope.scaling.type", "none")) not in ("none", "linear"):
        raise GGUFError(f"{source.path}: rope scaling {scaling!r} is not supported")
    if missing := {"token_embd.weight", "blk.0.attn_q.weight"} - source.tensors.keys():
        raise GGUFError(f"{source.path}: tensor {min(missing)} is missing")
    source.need("llama.context_length", int)
    epsilon = source.need("llama.attention.layer_norm_rms_epsilon", float)
    fields = {_FIELDS[key]: value for key, value in found.items() if key in _FIELDS and value}
    fields |= {
        "model_type": "mixtral" if "num_local_experts" in fields else "llama",
        "vocab_size": source.tensors["token_embd.weight"][0][0],
        "rms_norm_eps": float(str(np.float32(epsilon))),  # 1e-05, not 9.999999747378752e-06
        "rope_theta": fields.get("rope_theta", 10_000.0),
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "attention_bias": "blk.0.attn_q.bias" in source.tensors,
        "bos_token_id": source.token_id("bos"),
        "eos_token_id": source.token_id("eos"),
    }
    if fields["model_type"] == "llama":
        fields["mlp_bias"] = "blk.0.ffn_up.bias" in source.tensors
    if scaling == "linear":
        fields["rope_scaling"] = {"type": scaling, "factor": found.get("rope.scaling.factor")}
    config = ModelConfig.from_dict(fields)
    for key in ("attention.value_length", "rope.dimension_count"):
        if found.get(key, config.head_size) != config.head_size:
            raise GGUFError(f"{source.path}: llama.{key} is not the head size {config.head_size}")
    if "rope_freqs.weight" in source.tensors:
        config = replace(config, rope=_llama3_rope(source, config))
    return config


def _llama3_rope(source: GGUFFile, config: ModelConfig) -> RopeConfig:
    """Llama 3.1's scaling, which GGUF stores as a divisor of each frequency. Of its four numbers
    only `factor` differs between models: take it from there, and check that it explains them all.
    """
    divisors = torch.tensor(source.dequantize("rope_freqs.weight"))
    rope = replace(config.rope, kind="llama3", factor=float(divisors.max()))
    stretched = inverse_frequencies(config.head_size, **asdict(rope))
    expected = inverse_frequencies(config.head_size, rope.theta) / stretched
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise GGUFError(f"{source.path}: rope_freqs.weight is not Llama 3.1's scaling")
    return rope


def _tensors(source: GGUFFile, config: ModelConfig) -> Tensors:
    """The tensors under their Hugging Face names, in the file's order."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    for name, (shape, _, _) in source.tensors.items():
        stem, _, leaf = name.rpartition(".")
        prefix = ""
        if stem.startswith("blk.") and stem.count(".") == 2:
            _, layer, stem = stem.split(".")
            prefix = f"model.layers.{layer}."
        if stem in _EXPERTS and leaf == "weight":
            for e in range(shape[0]):
                target = f"{prefix}block_sparse_moe.experts.{e}.{_EXPERTS[stem]}.weight"
                yield target, shape[1:], lambda name=name, e=e: source.dequantize(name, e)
        elif stem in _TENSORS and leaf in ("weight", "bias"):
            num = heads.get(stem)
            if num and shape[0] % (2 * num):
                raise GGUFError(f"{source.path}: {name} of shape {shape} has not {num} heads")
            target = f"{prefix}{_TENSORS[stem]}.{leaf}"
            yield target, shape, lambda name=name, num=num: _halves(source.dequantize(name), num)
        elif name != "rope_freqs.weight":  # which went into the configuration
            raise GGUFError(f"{source.path}: tensor {name} is not part of a Llama model")


def _halves(rows: np.ndarray, heads: int | None) -> np.ndarray:
    """Undo llama.cpp's order of q and k rows: it keeps the two of a rotary pair adjacent, Hugging
    Face half a head apart. Forgetting this makes the text worse but no garbage.
    """
    if heads is None:
        return rows
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _write_safetensors(
    path: Path, tensors: Tensors, dtype: torch.dtype, progress: Callable[[int, int], None]
) -> None:
    """Write the format by hand, as safetensors' own function wants all tensors at once."""
    code = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    readers, end = [], 0
    for name, shape, read in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
        readers.append((name, read))
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, read in readers:
            values = torch.tensor(read()).to(dtype)
            if not values.isfinite().all():
                raise GGUFError(f"{name} has values that are not finite in {dtype}")
            values.view(torch.uint8).numpy().tofile(file)
            progress(file.tell() - len(encoded) - 8, end)


def _tokenizer(source: GGUFFile) -> tuple[Tokenizer, dict[str, Any]]:
    """tokenizer.json, and the content of tokenizer_config.json."""
    get = source.metadata.get
    tokens = source.need("tokenizer.ggml.tokens", list)
    ids = {token: index for index, token in enumerate(tokens)}
    kinds = get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(ids) != len(tokens) or len(kinds) != len(tokens):
        raise GGUFError(f"{source.path}: the vocabulary repeats a token or lacks their types")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (index := source.token_id(key)) is not None:
            config[f"{role}_token"] = tokens[index]
    model = source.need("tokenizer.ggml.model", str)
    if model not in ("gpt2", "llama"):
        raise GGUFError(f"{source.path}: tokenizer {model!r} is neither 'gpt2' nor 'llama'")
    build = _byte_level if model == "gpt2" else _sentencepiece
    tokenizer = build(source, ids, config.get("unk_token"))
    added = [(t, k) for t, k in zip(tokens, kinds, strict=True) if k in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=kind == _CONTROL) for token, kind in added]
    )
    default = model == "llama" or _CUTS[get("tokenizer.ggml.pre")] == _LLAMA3
    if get("tokenizer.ggml.add_bos_token", default) and "bos_token" in config:
        bos = config["bos_token"]
        tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, ids[bos])])
    if template := get("tokenizer.chat_template"):
        config["chat_template"] = template
    return tokenizer, config | {"clean_up_tokenization_spaces": False}


def _byte_level(source: GGUFFile, ids: dict[str, int], unknown: str | None) -> Tokenizer:
    """Byte-level BPE as in GPT-2, Llama 3, Qwen2 and SmolLM; it knows every byte, or drops it."""
    if (pre := source.need("tokenizer.ggml.pre", str)) not in _CUTS:
        raise GGUFError(f"{source.path}: pre-tokenizer {pre!r}; known are {', '.join(_CUTS)}")
    merges = [tuple(merge.split(" ")) for merge in source.need("tokenizer.ggml.merges", list)]
    tokenizer = Tokenizer(BPE(ids, merges, ignore_merges=_CUTS[pre] == _LLAMA3))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=_CUTS[pre] is None)]
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif _CUTS[pre]:
        steps.insert(0, pre_tokenizers.Split(Regex(_CUTS[pre]), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(source: GGUFFile, ids: dict[str, int], unknown: str | None) -> Tokenizer:
    """SentencePiece BPE (Llama 1 and 2, Mistral): its merges follow from the tokens' scores."""
    scores = source.need("tokenizer.ggml.scores", list)
    # Of equal scores (Mistral's runs of spaces) the longest left part goes first.
    merges = [
        (-scores[index], -cut, -len(token), ids[token[:cut]], token, cut)
        for token, index in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    pairs = [(token[:cut], token[cut:]) for *_, token, cut in sorted(merges)]
    tokenizer = Tokenizer(BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if source.metadata.get("tokenizer.ggml.add_space_prefix", True):
        prefixed = [normalizers.Prepend("▁"), tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence(prefixed)
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer

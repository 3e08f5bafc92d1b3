"""ModelConfig: what a Hugging Face config.json says of a Llama-family model, checked.

Families differ by these fields only; there is one Transformer. Every key of a config.json is
either read here, on an explicit list of harmless ones, or refused by name, so that a checkpoint
which needs something we do not compute is never run as if it did not. Both spellings in circulation
are read: transformers 4 (rope_theta, rope_scaling) and transformers 5 (rope_parameters).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# Keys that say nothing about what an inference forward pass computes.
_HARMLESS = frozenset(
    "_name_or_path architectures attention_dropout attn_implementation bos_token_id "
    "cache_implementation chunk_size_feed_forward dtype eos_token_id hidden_dropout id2label "
    "initializer_range is_llama_config label2id max_window_layers model_type num_labels "
    "output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp "
    "problem_type return_dict router_aux_loss_coef router_jitter_noise tokenizer_class torch_dtype "
    "transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache".split()
)
_MOST_LAYERS = 10_000  # a hostile file must not make us build lists without end
_ROPE_KINDS = ("default", "linear", "llama3", "dynamic")


class ConfigError(ValueError):
    """A config.json that this package cannot run, with the reason in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary embedding: its base, and how frequencies are stretched (RoFormer; Llama 3.1)."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of a model. Sizes are counts; `windows[i]` is layer i's attention window or None.

    `eos_token_ids` are config.json's; a tokenizer adds those of generation_config.json.
    """

    architecture: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    context: int = 2048
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    normalize_router: bool = True
    dense_layers: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        _known_family(self.architecture)
        sizes = "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads"
        for name in [*sizes.split(), "head_size", "context"]:
            _positive_int(name, getattr(self, name))
        for name in ("norm_eps", "initializer_range"):
            _positive_float(name, getattr(self, name))
        _positive_float("rope theta", self.rope.theta)
        _positive_float("rope factor", self.rope.factor)
        if self.rope.kind == "llama3":
            _positive_float("rope low_freq_factor", self.rope.low_freq_factor)
            _positive_float("rope high_freq_factor", self.rope.high_freq_factor)
            if self.rope.low_freq_factor >= self.rope.high_freq_factor:
                raise ConfigError("rope llama3 needs low_freq_factor < high_freq_factor")
            _positive_int("rope original_max_position_embeddings", self.rope.original_context)
        if self.head_size % 2:
            raise ConfigError(f"head size {self.head_size} is odd; rotary embedding needs pairs")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads do not divide among {self.num_kv_heads} KV heads"
            )
        if len(self.windows) != self.num_layers:
            raise ConfigError(f"{len(self.windows)} windows given for {self.num_layers} layers")
        for window in self.windows:
            if window is not None:
                _positive_int("sliding_window", window)
        if self.num_experts:
            for name in ("num_experts", "experts_per_token", "expert_size"):
                _positive_int(name, getattr(self, name))
            if self.experts_per_token > self.num_experts:
                raise ConfigError(
                    f"{self.experts_per_token} experts a token but only {self.num_experts} experts"
                )

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer's feed-forward is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def parameters(self) -> int:
        """Number of parameters, embeddings included (a tied head counts once)."""
        D, K = self.hidden_size, self.head_size
        qkv_rows = (self.num_heads + 2 * self.num_kv_heads) * K
        attention = qkv_rows * D + D * self.num_heads * K
        attention += qkv_rows * self.qkv_bias + D * self.output_bias + 2 * K * self.qk_norm
        dense = 3 * D * self.intermediate_size
        dense += (2 * self.intermediate_size + D) * self.mlp_bias
        sparse = self.num_experts * (D + 3 * D * self.expert_size)
        layers = sum(
            attention + 2 * D + (sparse if self.is_sparse(i) else dense)
            for i in range(self.num_layers)
        )
        return layers + D + self.vocab_size * D * (1 if self.tie_embeddings else 2)

    @classmethod
    def from_directory(cls, path: str | Path) -> "ModelConfig":
        """Read `path`/config.json. Raises ConfigError, in one line, for anything we cannot run."""
        file = Path(path) / "config.json"
        if not Path(path).is_dir():
            raise ConfigError(f"{path} is not a directory with a checkpoint in it")
        if not file.is_file():
            raise ConfigError(f"{path} has no config.json")
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{file} cannot be read as JSON: {error}") from None
        try:
            return cls.from_dict(fields)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    @classmethod
    def from_dict(cls, fields: dict) -> "ModelConfig":
        """Translate the content of a config.json (either spelling). Raises ConfigError."""
        if not isinstance(fields, dict):
            raise ConfigError("the top level is not a JSON object")
        reader = _Reader(fields)
        family = _known_family(reader.take("model_type", None))
        classes = reader.take("architectures", None) or [ARCHITECTURES[family]]
        if not isinstance(classes, list) or ARCHITECTURES[family] not in classes:
            raise ConfigError(f"architecture {classes} is not supported; expected a causal LM")
        if reader.take("quantization_config", None):
            raise ConfigError("quantised checkpoints are not supported (quantization_config)")
        if reader.take("hidden_act", "silu") not in ("silu", "swish"):
            raise ConfigError(f"activation {fields['hidden_act']!r} is not supported; only silu is")

        heads = reader.take("num_attention_heads")
        hidden = reader.take("hidden_size")
        layers = _positive_int("num_hidden_layers", reader.take("num_hidden_layers"))
        if layers > _MOST_LAYERS:
            raise ConfigError(f"num_hidden_layers = {layers} is not believable")
        _positive_int("num_attention_heads", heads)
        _positive_int("hidden_size", hidden)
        default_head = 128 if family == "qwen3" else hidden // heads  # as transformers' classes do
        attention_bias = reader.flag("attention_bias")
        if attention_bias and family not in ("llama", "qwen3", "qwen3_moe"):
            raise ConfigError(f"attention_bias is not supported for {family}")
        context = reader.take("max_position_embeddings", 2048)
        config = dict(
            architecture=family,
            vocab_size=reader.take("vocab_size"),
            hidden_size=hidden,
            intermediate_size=reader.take("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=reader.given("num_key_value_heads", default=heads),
            head_size=reader.given("head_dim", default=default_head),
            norm_eps=reader.take("rms_norm_eps", 1e-6),
            tie_embeddings=reader.flag("tie_word_embeddings"),
            context=context,
            rope=_read_rope(reader, family, context),
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias,
            mlp_bias=reader.flag("mlp_bias") if family == "llama" else False,
            qk_norm=family in ("qwen3", "qwen3_moe"),
            windows=_read_windows(reader, family, layers),
            bos_token_id=reader.take("bos_token_id", None),
            eos_token_ids=token_ids(reader.take("eos_token_id", None)),
            initializer_range=reader.given("initializer_range", default=0.02),
        )
        if family == "mixtral":
            experts = reader.given("num_local_experts", "num_experts", default=8)
            config |= dict(
                num_experts=_positive_int("num_local_experts", experts),
                experts_per_token=reader.take("num_experts_per_tok", 2),
                expert_size=config["intermediate_size"],
            )
        elif family == "qwen3_moe":
            experts = reader.given("num_experts", "num_local_experts", default=128)
            step = _positive_int("decoder_sparse_step", reader.take("decoder_sparse_step", 1))
            dense = reader.take("mlp_only_layers", None) or []
            if not isinstance(dense, list):
                raise ConfigError(f"mlp_only_layers must be a list of layers, not {dense!r}")
            config |= dict(
                num_experts=_positive_int("num_experts", experts),
                experts_per_token=reader.take("num_experts_per_tok", 8),
                expert_size=reader.take("moe_intermediate_size", 768),
                normalize_router=reader.flag("norm_topk_prob"),
                dense_layers=tuple(i for i in range(layers) if i in dense or (i + 1) % step),
            )
        reader.refuse_the_rest()
        return cls(**config)

    def to_dict(self) -> dict:
        """The config.json of this model, in the spelling that transformers 4 and 5 both read."""
        family, rope = self.architecture, self.rope
        fields = {
            "architectures": [ARCHITECTURES[family]],
            "model_type": family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.context,
            "rope_theta": rope.theta,
            "rope_scaling": None,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": _one_or_list(self.eos_token_ids),
        }
        if rope.kind != "default":
            fields["rope_scaling"] = {"rope_type": rope.kind, "factor": rope.factor}
        if rope.kind == "llama3":
            fields["rope_scaling"] |= {
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_context,
            }
        window = next((w for w in self.windows if w is not None), None)
        if family in ("mistral", "mixtral"):
            fields["sliding_window"] = window
        elif family != "llama":
            fields |= {"use_sliding_window": window is not None, "sliding_window": window}
            if family != "qwen3_moe":
                kinds = ("full_attention", "sliding_attention")
                fields["layer_types"] = [kinds[w is not None] for w in self.windows]
        if family in ("llama", "qwen3", "qwen3_moe"):
            fields["attention_bias"] = self.qkv_bias
        if family == "llama":
            fields["mlp_bias"] = self.mlp_bias
        if family == "mixtral":
            fields["num_local_experts"] = self.num_experts
        if family == "qwen3_moe":
            fields |= {
                "num_experts": self.num_experts,
                "moe_intermediate_size": self.expert_size,
                "norm_topk_prob": self.normalize_router,
                "decoder_sparse_step": 1,
                "mlp_only_layers": list(self.dense_layers),
            }
        if self.num_experts:
            fields["num_experts_per_tok"] = self.experts_per_token
        return fields


class _Reader:
    """Takes keys out of a config and, at the end, refuses by name any that nobody took."""

    def __init__(self, fields: dict) -> None:
        self.fields, self.taken = fields, set(_HARMLESS)

    def take(self, name: str, *default: object) -> object:
        self.taken.add(name)
        if name in self.fields:
            return self.fields[name]
        if not default:
            raise ConfigError(f"{name} is missing")
        return default[0]

    def given(self, *names: str, default: object) -> object:
        """The first of these spellings that is there and not null."""
        values = [self.take(name, None) for name in names]
        return next((value for value in values if value is not None), default)

    def flag(self, name: str) -> bool:
        value = self.take(name, False)
        if value not in (True, False, None):
            raise ConfigError(f"{name} must be true or false, not {value!r}")
        return bool(value)

    def refuse_the_rest(self) -> None:
        for name, value in self.fields.items():
            if name not in self.taken and value not in (None, False, 0, "", [], {}):
                raise ConfigError(f"field {name!r} = {value!r} is not supported")


def _read_rope(reader: _Reader, family: str, context: int) -> RopeConfig:
    old = reader.take("rope_scaling", None)
    scaling = reader.take("rope_parameters", None) or old or {}
    if not isinstance(scaling, dict):
        raise ConfigError(f"rope_scaling is not an object: {scaling!r}")
    rope = _Reader(scaling)
    default_theta = 1e6 if family == "mixtral" else 1e4  # as transformers' classes do
    theta = reader.take("rope_theta", default_theta)
    kind = rope.given("rope_type", "type", default="default")
    options = {"theta": rope.given("rope_theta", default=theta), "kind": kind}
    if kind not in _ROPE_KINDS:
        raise ConfigError(f"rope type {kind!r} is not supported, only {_ROPE_KINDS}")
    for fields in (reader, rope):
        if fields.take("partial_rotary_factor", 1.0) not in (1, None):
            raise ConfigError("partial_rotary_factor is not supported unless it is 1.0")
    if kind == "llama3":
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            options[name] = rope.take(name)
        options["original_context"] = rope.take("original_max_position_embeddings", context)
    elif kind in ("linear", "dynamic"):
        # Within max_position_embeddings, which is our context, "dynamic" leaves frequencies alone.
        options["factor"] = rope.take("factor")
        rope.take("original_max_position_embeddings", None)
    rope.refuse_the_rest()
    return RopeConfig(**options)


def _read_windows(reader: _Reader, family: str, layers: int) -> tuple[int | None, ...]:
    window = reader.take("sliding_window", None)
    kinds = reader.take("layer_types", None)
    if family == "llama" and window is not None:
        raise ConfigError(f"field 'sliding_window' = {window!r} is not supported for llama")
    first = 0  # the first layer with a window
    if family.startswith("qwen"):
        if not reader.flag("use_sliding_window"):
            window = None
        if family != "qwen3_moe":
            first = reader.take("max_window_layers", 28)
    if kinds is None:
        if window is not None and (not isinstance(first, int) or isinstance(first, bool)):
            raise ConfigError(f"max_window_layers must be an integer, not {first!r}")
        return tuple(window if window is not None and i >= first else None for i in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(f"layer_types does not name the kind of each of the {layers} layers")
    if unknown := set(map(str, kinds)) - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"layer type {min(unknown)!r} is not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def token_ids(value: object) -> tuple[int, ...]:
    """An `eos_token_id` entry, null, one id or a list of ids, as a tuple. Raises ConfigError."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"token ids must be non-negative integers, not {value!r}")
    return ids


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)


def _known_family(name: object) -> str:
    if not isinstance(name, str) or name not in ARCHITECTURES:
        families = ", ".join(ARCHITECTURES)
        raise ConfigError(f"model_type {name!r} is not supported; supported are {families}")
    return name


def _positive_int(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{name} must be a positive integer, not {value!r}")
    return value


def _positive_float(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} must be a positive finite number, not {value!r}")

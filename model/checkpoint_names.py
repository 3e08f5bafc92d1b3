"""Names in Hugging Face checkpoints, and the part of our parameters that each of them fills.

One literal table serves both directions. Our parameters keep Hugging Face's names except where
several stored tensors are fused, row upon row, into one product: q, k, v; gate, up; the experts.
Loading takes whichever spelling a checkpoint uses, saving takes the first one.

Legend: D hidden, F expert/FFN width, H query heads, G key/value heads, K head size, E experts.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from draftnorm.model.config import ModelConfig

# Our name inside a layer -> its spellings. A spelling lists the stored tensors from the top row
# down; one with {e} lists those of expert e alone. Names that are not here are stored as they are.
_Spellings = Mapping[str, tuple[tuple[str, ...], ...]]
_FUSED: _Spellings = {
    "self_attn.qkv_proj.weight": (
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    "self_attn.qkv_proj.bias": (
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    ),
    "mlp.gate_up_proj.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"),),
    "mlp.gate_up_proj.bias": (("mlp.gate_proj.bias", "mlp.up_proj.bias"),),
    "mlp.experts.gate_up_proj": (
        ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
        ("mlp.experts.gate_up_proj",),  # transformers 5, packed: [E, 2F, D]
    ),
    "mlp.experts.down_proj": (
        ("mlp.experts.{e}.down_proj.weight",),
        ("mlp.experts.down_proj",),  # [E, D, F]
    ),
}
_MIXTRAL: _Spellings = {
    "mlp.gate.weight": (("block_sparse_moe.gate.weight",), ("mlp.gate.weight",)),
    "mlp.experts.gate_up_proj": (
        ("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight"),
        ("mlp.experts.gate_up_proj",),
    ),
    "mlp.experts.down_proj": (
        ("block_sparse_moe.experts.{e}.w2.weight",),
        ("mlp.experts.down_proj",),
    ),
}
# Tables that older writers stored although every reader computes them.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One stored tensor: `shape[0]` rows of a parameter (of one expert of it), from `start` on."""

    parameter: str
    expert: int | None
    start: int
    shape: tuple[int, ...]

    def of(self, parameter: Tensor) -> Tensor:
        """The view of our parameter that the stored tensor fills; contiguous."""
        rows = parameter if self.expert is None else parameter[self.expert]
        return rows[self.start : self.start + self.shape[0]]


def stored_pieces(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], stored: Collection[str] = ()
) -> dict[str, Piece]:
    """Stored name -> Piece, for every tensor that a checkpoint of this model must hold.

    `shapes` are the shapes of our parameters by name. Of several spellings of one parameter it is
    the one with most names in `stored`, the first if none is there. The pieces of a parameter tile
    it: every element belongs to exactly one.
    """
    table = _FUSED | _MIXTRAL if config.architecture == "mixtral" else _FUSED
    pieces: dict[str, Piece] = {}
    for parameter, shape in shapes.items():
        prefix, inside = re.fullmatch(r"(model\.layers\.\d+\.|)(.*)", parameter).groups()
        spellings = [
            dict(_tile(config, parameter, tuple(shape), prefix, names))
            for names in table.get(inside, ((inside,),))
        ]
        chosen = max(spellings, key=lambda spelling: sum(name in stored for name in spelling))
        assert sum(math.prod(piece.shape) for piece in chosen.values()) == math.prod(shape)
        pieces |= chosen
    return pieces


def is_harmless(name: str, config: ModelConfig) -> bool:
    """Whether a stored tensor that no parameter needs may be there all the same."""
    tied_head = config.tie_embeddings and name == "lm_head.weight"
    return tied_head or _HARMLESS.fullmatch(name) is not None


def _tile(
    config: ModelConfig, parameter: str, shape: tuple[int, ...], prefix: str, names: tuple[str, ...]
) -> Iterator[tuple[str, Piece]]:
    """The pieces of one parameter in one spelling, from the top row down."""
    per_expert = "{e}" in names[0]
    rows, *rest = shape[1:] if per_expert else shape
    if len(names) == 3:
        key_rows = config.num_kv_heads * config.head_size
        heights = (config.num_heads * config.head_size, key_rows, key_rows)
    else:
        heights = (rows // len(names),) * len(names)
    for expert in range(shape[0]) if per_expert else (None,):
        start = 0
        for name, height in zip(names, heights, strict=True):
            yield (
                prefix + name.format(e=expert),
                Piece(parameter=parameter, expert=expert, start=start, shape=(height, *rest)),
            )
            start += height

"""Checkpoints in Hugging Face's layout: config.json and safetensors, in one file or in shards.

Loading first reads headers alone and holds every name, shape and dtype against the model. Only when
all of them fit are parameters allocated, uninitialised, and filled tensor by tensor from the mapped
files. So a wrong, cut-off or hostile checkpoint is one CheckpointError before anything large is
allocated, and host memory beyond the model itself stays within one tensor. Nothing is unpickled.
"""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from draftnorm.model.cache import free_bytes
from draftnorm.model.checkpoint_names import Piece, is_harmless, stored_pieces
from draftnorm.model.config import ModelConfig
from draftnorm.model.transformer import Transformer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OURS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?")
_LARGEST_INDEX = 100_000_000  # bytes; safetensors holds its own headers to as much
_FLOATS = ("F64", "F32", "F16", "BF16")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written, with the reason in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """What a header says of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@torch.no_grad()
def load_model(
    path: str | Path, *, device: str | torch.device = "auto", dtype: torch.dtype | None = None
) -> Transformer:
    """The model of a checkpoint directory, in eval mode.

    `device="auto"` is CUDA where there is one; `dtype=None` is bfloat16 on CUDA, float32 elsewhere.
    Stored floats of any width are cast. Raises CheckpointError or ConfigError, both ValueErrors of
    one line, if the directory does not hold exactly the weights that its config.json describes.
    """
    directory = Path(path)
    config = ModelConfig.from_directory(directory)
    device, dtype = resolve_placement(device, dtype)

    stored = _read_headers(directory)
    elements = sum(math.prod(tensor.shape) for tensor in stored.values())
    if 2 * elements < config.parameters:
        # Not a matter of single tensors, and listing what a huge config.json misses may never end.
        raise CheckpointError(
            f"{directory}: config.json describes {config.parameters:,} parameters, the files hold "
            f"only {elements:,}"
        )
    shapes = {n: p.shape for n, p in Transformer(config, device="meta").named_parameters()}
    pieces = stored_pieces(config, shapes, stored)
    _check_fit(directory, config, pieces, stored)

    model = _allocate(config, device, dtype)
    parameters = dict(model.named_parameters())
    for file in dict.fromkeys(tensor.file for tensor in stored.values()):
        with _reading(file) as shard:
            for name in sorted(shard.keys()):
                if piece := pieces.get(name):
                    piece.of(parameters[piece.parameter]).copy_(shard.get_tensor(name))
    if "lm_head.weight" in stored and config.tie_embeddings:
        _check_tie(stored["lm_head.weight"], parameters["model.embed_tokens.weight"])
    return model.eval()


@torch.no_grad()
def save_model(model: Transformer, path: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Write config.json and safetensors that transformers 4 and 5 and `load_model` read.

    `max_shard_size` is a number of bytes or a text such as "500MB" (decimal units); a single larger
    tensor gets a shard of its own. Weights already in the directory are replaced, other files stay.
    At most one shard is copied to host memory at a time. Raises CheckpointError.
    """
    directory, limit = Path(path), _parse_size(max_shard_size)
    parameters = dict(model.named_parameters())
    pieces = stored_pieces(model.config, {name: p.shape for name, p in parameters.items()})
    sizes = {name: math.prod(p.shape) * model.dtype.itemsize for name, p in pieces.items()}
    shards = _split(sizes, limit)
    fields = model.config.to_dict() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    weight_map: dict[str, str] = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as scratch:
            _write_json(Path(scratch, "config.json"), fields)
            for number, names in enumerate(shards, 1):
                sharded = f"model-{number:05}-of-{len(shards):05}.safetensors"
                file = sharded if len(shards) > 1 else SINGLE
                views = {n: pieces[n].of(parameters[pieces[n].parameter]).cpu() for n in names}
                save_file(views, Path(scratch, file), metadata={"format": "pt"})
                shutil.copymode(Path(scratch, "config.json"), Path(scratch, file))  # not its 0600
                weight_map |= dict.fromkeys(names, file)
            if len(shards) > 1:
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
                _write_json(Path(scratch, INDEX), index)
            _swap_in(Path(scratch), directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {directory}: {_line(error)}") from None


def resolve_placement(
    device: str | torch.device, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Where a model goes: "auto" is CUDA where there is one, None bf16 there and fp32 on a CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise CheckpointError(f"device {device!r}: {_line(error)}") from None
    if device.type not in ("cpu", "cuda"):
        raise CheckpointError(f"device {str(device)!r} is not supported, only cpu and cuda are")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"device {str(device)!r}: this machine or this torch has no CUDA")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CheckpointError(f"{dtype=} is not a floating-point torch.dtype")
    return device, dtype


def _read_headers(directory: Path) -> dict[str, _Stored]:
    """Every tensor of the checkpoint by name, from the files' headers."""
    stored: dict[str, _Stored] = {}
    index = _read_index(directory)
    for file in index or [SINGLE]:
        if not (directory / file).is_file():
            pickled = any(directory.glob("pytorch_model*.bin"))
            hint = "; pytorch_model.bin is pickled and never read, convert it" if pickled else ""
            raise CheckpointError(f"{directory}: {file} is missing{hint}")
        with _reading(directory / file) as shard:
            for name in sorted(shard.keys()):
                if index and name not in index[file]:
                    raise CheckpointError(
                        f"{directory / file}: {_quote(name)} is not where the index puts it"
                    )
                view = shard.get_slice(name)
                stored[name] = _Stored(
                    file=directory / file, dtype=view.get_dtype(), shape=tuple(view.get_shape())
                )
    return stored


def _read_index(directory: Path) -> dict[str, set[str]]:
    """File name -> names of its tensors, by the index; empty if there is no index."""
    path = directory / INDEX
    if not path.exists():
        return {}
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_INDEX:
            raise ValueError(f"not a file of at most {_LARGEST_INDEX:,} bytes")
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names_of: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            names_of.setdefault(file, set()).add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not an index of safetensors: {_line(error)}") from None
    home = Path(os.path.realpath(directory))
    # The Hub's cache fills snapshots/<revision> with links into the blobs beside snapshots.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    for file in names_of:
        plain = isinstance(file, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", file)
        target = Path(os.path.realpath(directory / file)) if plain else Path("/")
        if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
            raise CheckpointError(f"{path}: entry {_quote(file)} leaves the directory")
    return names_of


@contextmanager
def _reading(file: Path) -> Iterator[safe_open]:
    """The opened safetensors file; whatever makes it unreadable becomes a CheckpointError."""
    try:
        # safe_open itself holds the header's length and every offset against the file's size.
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cut off or not safetensors: {_line(error)}") from None


def _check_fit(
    directory: Path, config: ModelConfig, pieces: dict[str, Piece], stored: dict[str, _Stored]
) -> None:
    """Raise one CheckpointError for all tensors that are missing, left over or of another kind."""
    both = [name for name in pieces if name in stored]
    problems = {
        "missing": [name for name in pieces if name not in stored],
        "unexpected": [n for n in stored if n not in pieces and not is_harmless(n, config)],
        "of the wrong shape": [
            f"{name} {list(stored[name].shape)} instead of {list(pieces[name].shape)}"
            for name in both
            if stored[name].shape != pieces[name].shape
        ],
        "not of a floating-point type (quantised weights are not supported)": [
            f"{name} {stored[name].dtype}" for name in both if stored[name].dtype not in _FLOATS
        ],
    }
    found = [
        f"{len(names):,} {what}: {', '.join(map(_quote, names[:3]))}{', …' * (len(names) > 3)}"
        for what, names in problems.items()
        if names
    ]
    if found:
        raise CheckpointError(f"{directory}: tensors do not fit config.json; {'; '.join(found)}")


def _check_tie(head: _Stored, embedding_VD: Tensor) -> None:
    """A stored head that differs from the embedding it is tied to would change every logit."""
    with _reading(head.file) as shard:
        head_VD = shard.get_tensor("lm_head.weight")
        if not torch.equal(head_VD.to(embedding_VD), embedding_VD):
            raise CheckpointError(
                f"{head.file}: lm_head.weight differs from the embedding although config.json ties "
                "them; set tie_word_embeddings to false"
            )


def _allocate(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A model with uninitialised parameters, if they fit the free memory."""
    needed, free = config.parameters * dtype.itemsize, free_bytes(device)
    message = f"out of memory: the weights need {needed:,} bytes on {device}, {free:,} are free"
    if needed > free:
        raise CheckpointError(message)
    try:
        return Transformer(config, device=device, dtype=dtype)
    except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, RuntimeError itself on the CPU
        raise CheckpointError(f"{message} ({_line(error)})") from None


def _split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in shards of at most `limit` bytes, in order; a larger tensor is alone in its shard."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _swap_in(scratch: Path, directory: Path) -> None:
    """Replace the weights of `directory` by the complete new ones.

    Old files go first and the entry point comes last: interrupted anywhere, this leaves a directory
    that does not load, never old and new shards under one index.
    """
    for old in directory.iterdir():
        if _OURS.fullmatch(old.name):
            old.unlink()
    for new in sorted(scratch.iterdir()):  # in ASCII "model." comes after "model-" and "config"
        os.replace(new, directory / new.name)


def _parse_size(max_shard_size: int | str) -> int:
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    parts = re.fullmatch(r"(\d+) *([KMG]B|)", str(max_shard_size).upper())
    if parts is None or int(parts[1]) == 0:
        raise ValueError(f"{max_shard_size=} is neither a positive number nor a text like '5GB'")
    return int(parts[1]) * units[parts[2]]


def _write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _quote(name: object) -> str:
    """A name out of a file, made safe to print: no control characters, no endless text."""
    return ascii(name)[1:-1][:120]


def _line(error: Exception) -> str:
    return _quote(str(error) or type(error).__name__)

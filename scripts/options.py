"""Arguments that subcommands share, and what they resolve to: checkpoints, prompts, sampling."""

import argparse
import importlib.util
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Modules that import torch are imported where they are used: --help and usage errors stay fast.

if TYPE_CHECKING:
    import torch

    from draftnorm.decoding.sampling import SamplingConfig
    from draftnorm.model.tokenizer import Tokenizer
    from draftnorm.scripts.report import Loaded

FETCHABLE = ("smollm2-135m",)
EMBEDDED = ("target", "draft")
# The folder of the embedded pair, in a checkout and in an installed wheel alike.
EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "model" / "embedded"
# Where a fetched checkpoint is looked for by its name, relative to the working directory.
FETCHED_FOLDER = Path("checkpoints")

# Code to edit: the answer repeats its input, which is where an n-gram drafter shines.
DEMO_PROMPT = """\
Rewrite this Python class with the name `Queue` instead of `Stack`. Change nothing else.

```python
class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if len(self.items) == 0:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def peek(self):
        if len(self.items) == 0:
            raise IndexError("peek at an empty stack")
        return self.items[-1]

    def size(self):
        return len(self.items)
```"""


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that `generate` and `speculate` share."""
    model = parser.add_argument_group("model")
    model.add_argument("--target", metavar="PATH|NAME|HUB_ID", help="default: the embedded target")
    add_device_arguments(model)
    model.add_argument(
        "--context", type=positive_int, metavar="N", help="positions to keep room for"
    )
    model.add_argument("--list", action="store_true", help="name what is built in, and exit")

    prompt = parser.add_argument_group("prompt")
    source = prompt.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT|-", help="the prompt, or - for standard input")
    source.add_argument(
        "--prompt-file", type=Path, metavar="F", help="a file that holds the prompt"
    )
    prompt.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    prompt.add_argument("--raw", action="store_true", help="do not apply the chat template")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=count, default=256, metavar="N")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 is off")
    sampling.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 is off")
    sampling.add_argument(
        "--seed", type=count, metavar="S", help="drawn and printed if the temperature is above 0"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="do not end at a stop token")
    sampling.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; repeatable",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document and nothing else"
    )


def add_device_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda", "auto"], default="auto")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto"
    )


def add_benchmark_arguments(
    parser: argparse.ArgumentParser, *, repeats: int | None = None, plot: bool = False
) -> None:
    """How often a benchmark measures, by default `repeats` times, and how it prints the result."""
    if repeats is not None:
        parser.add_argument(
            "-r", dest="repeats", type=positive_int, default=repeats, metavar="R", help="repeats"
        )
    parser.add_argument("-o", dest="output", choices=["md", "csv", "json"], default="md")
    if plot:
        parser.add_argument(
            "--plot", type=plot_file, metavar="F.png", help="draw it (needs matplotlib)"
        )


def plot_file(text: str) -> Path:
    """A file to draw to. ImportError without matplotlib, before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'draftnorm[plot]'")
    return Path(text)


def count(text: str) -> int:
    """An argument of 0, 1, 2, …"""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def positive_int(text: str) -> int:
    """An argument of 1, 2, 3, …"""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def draft_length(text: str) -> int | str:
    """An argument of `auto` or 1 … 15."""
    if text == "auto":
        return text
    if not text.isdecimal() or not 1 <= int(text) <= 15:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor 1 … 15")
    return int(text)


def several(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argument such as 1,8,64 whose every word is an argument of its own."""

    def words(text: str) -> list[Any]:
        return [one(word) for word in text.split(",") if word]

    return words


positive_ints = several(positive_int)
draft_lengths = several(draft_length)


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt as text, from wherever the arguments say; the built-in one by default."""
    if args.system is not None and args.raw:
        raise ValueError("--system is a message of the chat template, which --raw turns off")
    try:
        if args.prompt_file is not None:
            prompt = args.prompt_file.read_text(encoding="utf-8")
        elif args.prompt == "-":
            prompt = sys.stdin.read()
        else:
            prompt = built_in_prompt(args.target) if args.prompt is None else args.prompt
    except UnicodeDecodeError as error:
        source = args.prompt_file or "standard input"
        raise ValueError(f"the prompt in {source} is not UTF-8 text: {error.reason}") from None
    if not prompt:
        raise ValueError("the prompt is empty")
    return prompt


def built_in_prompt(target: str | None) -> str:
    """A function head to complete for the embedded target, an instruction for any other."""
    if target in (None, "target"):
        return (EMBEDDED_FOLDER / "target" / "prompt.txt").read_text(encoding="utf-8")
    return DEMO_PROMPT


def sampling_config(args: argparse.Namespace) -> "SamplingConfig":
    """The sampling settings; a seed is drawn where one matters and none was given."""
    from draftnorm.decoding.sampling import SamplingConfig

    seed = args.seed
    if seed is None:
        seed = secrets.randbelow(2**32) if args.temperature > 0 else 0
    return SamplingConfig(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=seed,
    )


def resolve_checkpoint(name: str) -> Path:
    """The directory that a path, a built-in name or a Hub id stands for.

    Raises ValueError, in one line that says what to run, if it is not on this machine.
    """
    if name in EMBEDDED:
        return EMBEDDED_FOLDER / name
    if Path(name).exists():
        if not Path(name).is_dir():
            raise ValueError(f"{name} is a file; a checkpoint is a directory with config.json")
        return Path(name)
    if name in FETCHABLE:
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
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(hub_id, "config.json")
    except HFValidationError:
        config = None
    if not isinstance(config, str):
        raise ValueError(
            f"{hub_id} is neither a directory nor in the Hub cache: run `draftnorm fetch {hub_id}` "
            f"({_hub_size(hub_id)})"
        )
    return Path(config).parent


def _hub_size(hub_id: str) -> str:
    """How much a fetch would bring, if the Hub can be asked."""
    from draftnorm.model import hub

    try:
        return f"{sum(hub.plan_hub(hub_id, None).sizes.values()) / 1e9:.2f} GB"
    except ValueError:
        return "size unknown: the Hub does not answer for it"


def torch_dtype(name: str) -> "torch.dtype | None":
    """The dtype of that name; None, the device's default, for `auto`."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def load(name: str, args: argparse.Namespace, tokenizer: "Tokenizer | None" = None) -> "Loaded":
    """Read the checkpoint that `name` stands for, with its tokenizer, and time it."""
    path = resolve_checkpoint(name)
    from draftnorm.model.checkpoint import load_model
    from draftnorm.model.tokenizer import load_tokenizer
    from draftnorm.scripts.report import Loaded

    started = time.perf_counter()
    model = load_model(path, device=args.device, dtype=torch_dtype(args.dtype))
    return Loaded(
        name=name,
        path=path,
        model=model,
        tokenizer=tokenizer or load_tokenizer(path),
        seconds=time.perf_counter() - started,
    )

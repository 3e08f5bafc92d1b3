"""Arguments that subcommands share. Nothing here needs torch: --help and usage errors are fast."""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an argument of `least` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {least}, {least + 1}, …")
        return int(text)

    return parse


def draft_length(text: str) -> int | str:
    """An argument of `auto` or 1 … 15."""
    if text == "auto":
        return text
    if not text.isdecimal() or not 1 <= int(text) <= 15:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor 1 … 15")
    return int(text)


def several(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of an argument such as 1,8,64 whose every word is an argument of its own."""

    def parse(text: str) -> list[Any]:
        words = [one(word) for word in text.split(",") if word]
        if not words:
            raise argparse.ArgumentTypeError(f"{text!r} is an empty list")
        return words

    return parse


count, positive_int = whole_number(0), whole_number(1)
positive_ints, draft_lengths = several(positive_int), several(draft_length)

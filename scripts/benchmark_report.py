"""What benchmarks share: the head of their documents, how these are printed, and progress."""

import argparse
import csv
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from draftnorm.scripts.report import describe_environment, dump
from draftnorm.scripts.terminal import number


def describe(schema: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What every benchmark's document begins with."""
    return {"schema": schema, **describe_environment(device), "command": args.command_line}


def show(
    document: dict[str, Any],
    args: argparse.Namespace,
    markdown: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """Print a benchmark's document as -o says (csv: its results alone); draw it as --plot says."""
    if args.output == "md":
        print(f"{headline(document)}\n\n{markdown(document)}")
    else:
        print({"csv": comma_separated, "json": dump}[args.output](document))
    if draw and args.plot:
        draw(document, args.plot)


def headline(document: dict[str, Any]) -> str:
    """Hardware and versions, on one line."""
    hardware = document["hardware"]
    parts = [hardware["name"]]
    if hardware.get("device") == "cpu":
        parts.append(f"{hardware['threads']} threads")
    for name in ("draftnorm", "torch", "triton", "transformers", "liger-kernel"):
        if document.get(name):
            parts.append(f"{name} {document[name]}")
    return " · ".join([*parts, document["date"][:10]])


def table(head: str, rows: Iterable[str]) -> str:
    """A markdown table, of lines that are given as "cell | cell | cell"."""
    rule = " | ".join(["---"] * (1 + head.count("|")))
    return "\n".join(f"| {line} |" for line in (head, rule, *rows))


def rates(row: dict[str, Any]) -> str:
    """Two cells of a table: tokens a second, and their `spread`."""
    median, *ends = (number(row[k], ",.1f") for k in ("tokens_per_second", "slowest", "fastest"))
    return f"{median} | {' – '.join(ends)}"


def comma_separated(document: dict[str, Any]) -> str:
    """The document's results, rows of equal keys, as CSV under a comment line."""
    out, rows = io.StringIO(), document["results"]
    out.write(f"# {headline(document)}\n")
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def spread(rates: Sequence[float]) -> dict[str, float | None]:
    """Tokens a second over the repeats; None if a run has no tokens after its first."""
    return {
        "tokens_per_second": statistics.median(rates) if rates else None,
        "slowest": min(rates, default=None),
        "fastest": max(rates, default=None),
    }


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

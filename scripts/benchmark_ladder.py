"""The norm's ladder in a whole decode step: `draftnorm benchmark ladder`.

    draftnorm benchmark ladder --shape smollm2-135m,llama-3.2-1b

From rung to rung one thing changes: RMSNorm as a kernel that stores rstd, as one that does not, in
the products around it; then dependent launch. Random weights of a real shape, one sequence, greedy.
*step* is a replayed graph behind a prompt of -p tokens, *tokens/s* plain decoding of -n more by the
host's clock. All rungs must leave equal bits: the logits of a step are compared with the first's.
"""

if __name__ == "__main__":  # run as a file, also uninstalled: the command, from the checkout's root
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from draftnorm.scripts.main import main

    sys.exit(main(["benchmark", "ladder", *sys.argv[1:]]))

import argparse
import statistics
import time
from typing import Any

from draftnorm.scripts import options
from draftnorm.scripts.shapes import NAMES

SCHEMA = "draftnorm/benchmark-ladder/2"
RUNGS = {
    "norm stores rstd": dict(norm="train", pdl=False),
    "norm without rstd": dict(norm="inference", pdl=False),
    "norm in the products": dict(norm="fused", pdl=False),
    "and dependent launch": dict(norm="fused", pdl=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=_names, default=["smollm2-135m"], metavar="S,S",
                        help=f"of: {', '.join(NAMES)}")  # fmt: skip
    parser.add_argument("-p", dest="prompt_tokens", type=options.positive_int, default=64)
    parser.add_argument("-n", dest="new_tokens", type=options.positive_int, default=256)
    parser.add_argument("-r", dest="repeats", type=options.positive_int, default=5, metavar="R")
    parser.add_argument("-o", dest="output", choices=["md", "csv", "json"], default="md")


def run(args: argparse.Namespace) -> int:
    """Measure every rung of every shape, and print a table or one document."""
    from draftnorm.scripts import report
    from draftnorm.scripts.benchmark_shape import random_model

    results = []
    for shape in args.shape:
        model = random_model(shape)
        device, dtype = model.device, model.dtype
        results += [{"shape": shape} | row for row in climb(model, args)]
        del model  # before the next one
    document = {
        "schema": SCHEMA,
        **report.describe_environment(device),
        "command": args.command_line,
        "dtype": str(dtype).removeprefix("torch."),
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "results": results,
    }
    report.print_benchmark(document, args.output, markdown)
    return 0


def climb(model: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a rung."""
    import torch

    from draftnorm.model.cache import KVCache
    from draftnorm.model.decode_step import DecodeStep
    from draftnorm.scripts.step_times import progress, step_seconds

    room = args.prompt_tokens + args.new_tokens
    cache = KVCache(model.config, capacity=room, device=model.device, dtype=model.dtype)
    prompt = torch.arange(args.prompt_tokens, device=model.device) % model.config.vocab_size
    model.prefill(prompt, cache)
    rows, logits = [], None
    for name, settings in RUNGS.items():
        step = DecodeStep(model, cache, **settings)

        def greedy(step: DecodeStep = step) -> float:
            cache.lengths[0] = args.prompt_tokens
            start = time.perf_counter()
            for _ in step.stream([1], args.new_tokens):
                pass
            return args.new_tokens / (time.perf_counter() - start)

        greedy()  # compiles and captures
        rates = sorted(greedy() for _ in range(args.repeats))
        cache.lengths[0] = args.prompt_tokens
        found = step.forward(torch.ones(1, 1, dtype=torch.long, device=model.device)).clone()
        logits = found if logits is None else logits
        rows.append(
            {
                "rung": name,
                "step_seconds": step_seconds(step, 1, args.repeats),
                "tokens_per_second": statistics.median(rates),
                "slowest": rates[0],
                "fastest": rates[-1],
                "equal_bits": torch.equal(found, logits),
            }
        )
        progress(f"{name}: {1e6 * rows[-1]['step_seconds']:,.1f} µs a step")
    return rows


def markdown(document: dict[str, Any]) -> str:
    """A table that can be pasted."""
    from draftnorm.scripts.report import number, table

    rows, before = [], None
    for row in document["results"]:
        above = before if before and before["shape"] == row["shape"] else None
        saved = above and 1e6 * (above["step_seconds"] - row["step_seconds"])
        rows.append(
            [
                row["shape"],
                row["rung"],
                f"{1e6 * row['step_seconds']:.1f}",
                number(saved, ".1f"),
                f"{row['tokens_per_second']:,.1f}",
                f"{row['slowest']:,.1f} – {row['fastest']:,.1f}",
                "equal" if row["equal_bits"] else "OTHER",
            ]
        )
        before = row
    head = ["shape", "rung", "step, µs", "saved, µs", "tokens/s", "spread", "bits"]
    return "\n".join(
        [
            f"{document['dtype']}, {document['prompt_tokens']} + {document['new_tokens']} tokens, "
            f"median of {document['repeats']}.",
            "",
            *table(head, rows),
        ]
    )


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}, not one of {', '.join(NAMES)}")
    return names

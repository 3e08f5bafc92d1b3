"""The norm's ladder in a whole decode step: `draftnorm benchmark ladder`.

    draftnorm benchmark ladder --shape smollm2-135m,llama-3.2-1b

From rung to rung one thing changes: RMSNorm as a kernel that stores rstd, as one that does not, in
the products around it; then dependent launch. Random weights of a real shape, one sequence, greedy.
*step* is a replayed graph behind a prompt of -p tokens, *tokens/s* plain decoding of -n more by the
host's clock. All rungs must leave equal bits: the logits of a step are compared with the first's.
"""

if __name__ == "__main__":
    from as_file import run_as_file

    run_as_file("benchmark", "ladder")

import argparse
from typing import Any

import torch

from draftnorm.model.decode_step import DecodeStep
from draftnorm.model.transformer import Transformer
from draftnorm.scripts import benchmark_report, options
from draftnorm.scripts.benchmark_report import number, progress, rates, spread, table
from draftnorm.scripts.checkpoints import dtype_name
from draftnorm.scripts.shapes import NAMES, first_token, random_model
from draftnorm.scripts.step_times import step_seconds, stream_rate

SCHEMA = "draftnorm/benchmark-ladder/2"
RUNGS = {
    "norm stores rstd": dict(norm="train", pdl=False),
    "norm without rstd": dict(norm="inference", pdl=False),
    "norm in the products": dict(norm="fused", pdl=False),
    "and dependent launch": dict(norm="fused", pdl=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shapes, known = options.several(shape), f"of: {', '.join(NAMES)}"
    parser.add_argument("--shape", type=shapes, default="smollm2-135m", metavar="S,S", help=known)
    parser.add_argument("-p", dest="prompt_tokens", type=options.positive_int, default=64)
    parser.add_argument("-n", dest="new_tokens", type=options.positive_int, default=256)
    options.add_benchmark_arguments(parser, repeats=5)


def shape(text: str) -> str:
    if text not in NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(NAMES)}")
    return text


def run(args: argparse.Namespace) -> int:
    """Measure every rung of every shape, and print a table or one document."""
    results = []
    for name in args.shape:
        model = random_model(name)
        device, dtype = model.device, model.dtype
        results += [{"shape": name} | row for row in climb(model, args)]
        del model  # before the next one
    document = {
        **benchmark_report.describe(SCHEMA, args, device),
        "dtype": dtype_name(dtype),
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "results": results,
    }
    benchmark_report.show(document, args, markdown)
    return 0


def climb(model: Transformer, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a rung."""
    cache = model.new_cache(args.prompt_tokens + args.new_tokens)
    token = first_token(model, cache, args.prompt_tokens)
    rows, logits = [], None
    for name, settings in RUNGS.items():
        step = DecodeStep(model, cache, **settings)
        rates = []
        for _ in range(1 + args.repeats):
            cache.lengths[0] = args.prompt_tokens
            rates.append(stream_rate(step, token, args.new_tokens))
        cache.lengths[0] = args.prompt_tokens
        found = step.forward(torch.tensor([[token]], device=model.device)).clone()
        logits = found if logits is None else logits
        rows.append(
            {
                "rung": name,
                "step_seconds": step_seconds(step, 1, args.repeats),
                **spread(rates[1:]),  # the first one compiles and captures
                "equal_bits": torch.equal(found, logits),
            }
        )
        progress(f"{name}: {1e6 * rows[-1]['step_seconds']:,.1f} µs a step")
    return rows


def markdown(document: dict[str, Any]) -> str:
    """A table that can be pasted."""
    rows, before = [], None
    for row in document["results"]:
        above = before if before and before["shape"] == row["shape"] else None
        saved = above and 1e6 * (above["step_seconds"] - row["step_seconds"])
        rows.append(
            f"{row['shape']} | {row['rung']} | {1e6 * row['step_seconds']:.1f} | "
            f"{number(saved, '.1f')} | {rates(row)} | "
            f"{'equal' if row['equal_bits'] else 'OTHER'}"
        )
        before = row
    head = "shape | rung | step, µs | saved, µs | tokens/s | spread | bits"
    title = (
        f"{document['dtype']}, {document['prompt_tokens']} + {document['new_tokens']} tokens, "
        f"median of {document['repeats']}."
    )
    return f"{title}\n\n{table(head, rows)}"

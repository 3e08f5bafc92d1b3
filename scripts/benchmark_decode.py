"""Tokens per second, plain and with n-grams, beside transformers: `draftnorm benchmark decode`.

    draftnorm benchmark decode --target DIR -p 64,512 -n 64,256 -o json --plot speed.png
    draftnorm benchmark decode --shape llama-3.2-1b --context 64,1000,32768

With --shape: random weights of that shape on a GPU, step by step and kernel by kernel, as
benchmark_shape.py says. Else whole engines decode with a checkpoint, on any device; `draftnorm
benchmark speculate` is that with drafters and draft lengths of your choice.

All engines run greedily in one process on the same threads, take turns in each repeat after an
untimed run, and are timed by the same clock: the arrival of committed tokens.

*first token* is the time from the call to the first tokens; *tokens/s* counts what comes after them
(so it leaves out prefill), median and spread over the repeats. Stop tokens are ignored: all decode
as much. Without -p the prompt is the built-in one, code to edit; -p cuts or repeats it, which
suits plain decoding: a repeated prompt flatters an n-gram drafter. transformers runs greedily and
with prompt lookup.
"""

if __name__ == "__main__":
    from as_file import run_as_file

    run_as_file("benchmark", "decode")

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from draftnorm.decoding.generation import generate
from draftnorm.decoding.speculation import speculate
from draftnorm.decoding.statistics import SpeculationStatistics
from draftnorm.model.tokenizer import load_tokenizer
from draftnorm.scripts import benchmark_report, benchmark_shape, checkpoints, options, report
from draftnorm.scripts.benchmark_report import number, rates, spread, table
from draftnorm.scripts.checkpoints import Loaded
from draftnorm.scripts.shapes import NAMES

SCHEMA = "draftnorm/benchmark-engines/3"
LOOKUP_TOKENS = 10  # what transformers' documentation uses for prompt lookup
# An engine decodes `new_tokens` after a prompt, hands over tokens as it commits them and returns
# what is known of its drafts.
Emit = Callable[[Sequence[int]], None]
Engine = Callable[[list[int], int, Emit], SpeculationStatistics | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One run: seconds to the first tokens, rate of the others (None if there are none)."""

    first_token_seconds: float
    tokens_per_second: float | None
    token_ids: tuple[int, ...]
    speculation: SpeculationStatistics | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    shape = parser.add_argument_group("with --shape, on a GPU")
    shape.add_argument("--shape", choices=NAMES, help="random weights of this shape; no checkpoint")
    shape.add_argument(
        "--rows", type=options.positive_ints, default=[1, 5], metavar="M,M", help="rows of a step"
    )
    shape.add_argument(
        "--context",
        type=options.positive_ints,
        default=[64, 1000, 32768],
        metavar="S,S",
        help="tokens in the cache before the steps that are timed",
    )
    shape.add_argument(
        "--cold", action="store_true", help="compile every kernel anew, into an empty Triton cache"
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """What `decode` and `speculate` share."""
    parser.add_argument("--target", metavar="PATH|NAME|HUB_ID", help="default: the embedded target")
    parser.add_argument(
        "-p", dest="prompt_tokens", type=options.positive_ints, metavar="P,P", help="prompt tokens"
    )
    parser.add_argument(
        "-n", dest="new_tokens", type=options.positive_ints, metavar="N,N", help="new tokens"
    )
    options.add_benchmark_arguments(parser, repeats=3, plot=True)
    parser.add_argument("--no-peers", action="store_true", help="leave transformers out")
    options.add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure every prompt length × new tokens × engine, and print tables or one document."""
    if args.shape is None:
        return run_engines(args, drafts=["ngram"], lengths=["auto"])
    if args.target or args.device == "cpu":
        raise ValueError("--shape takes no --target, and runs on a GPU alone")
    benchmark_report.show(benchmark_shape.measure(args), args, benchmark_shape.markdown, draw)
    return 0


def run_engines(args: argparse.Namespace, *, drafts: list[str], lengths: list[int | str]) -> int:
    """Compare plain decoding, speculation with each of `drafts`, and transformers."""
    name = args.target or "target"
    path = checkpoints.resolve(name)
    target = checkpoints.load(name, args, load_tokenizer(path))
    stored_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    prompts = [benchmark_prompt(target, length) for length in args.prompt_tokens or [None]]
    counts = args.new_tokens or [128]
    longest, context = max(map(len, prompts)) + max(counts), target.model.config.context
    if longest > context:  # where ours would end and others go on
        raise ValueError(f"-p and -n make {longest} tokens, the context is {context}")
    engines = our_engines(target, args, drafts, lengths)
    if not args.no_peers:
        engines |= transformers_engines(target)
    rows = []
    for prompt, new_tokens in itertools.product(prompts, counts):
        rows += compare_engines(engines, prompt, new_tokens, args.repeats)
    document = {
        **benchmark_report.describe(SCHEMA, args, target.model.device),
        "transformers": None if args.no_peers else report.package_version("transformers"),
        "target": checkpoints.describe(target),
        "load": {
            "seconds": target.seconds,
            "bytes": stored_bytes,
            "bytes_per_second": stored_bytes / target.seconds,
        },
        "repeats": args.repeats,
        "results": rows,
    }
    benchmark_report.show(document, args, markdown, draw)
    return 0


def benchmark_prompt(target: Loaded, prompt_tokens: int | None) -> list[int]:
    """The built-in prompt as a chat, or its text cut or repeated to `prompt_tokens`."""
    prompt = checkpoints.built_in_prompt(target.name)
    if prompt_tokens is None and target.tokenizer.chat_template is not None:
        return target.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    text = target.tokenizer.encode(prompt)
    return list(itertools.islice(itertools.cycle(text), prompt_tokens or len(text)))


def our_engines(
    target: Loaded, args: argparse.Namespace, drafts: list[str], lengths: list[int | str]
) -> dict[str, Engine]:
    """Plain decoding, and speculation for each drafter and draft length."""

    def engine(decode: Callable[..., Any], **settings: Any) -> Engine:
        settings |= {"ignore_eos": True}

        def run_once(prompt: list[int], new_tokens: int, emit: Emit) -> Any:
            generation = decode(target.model, None, prompt, max_new_tokens=new_tokens, **settings)
            for chunk in generation:
                emit(chunk.token_ids)
            return generation.result().speculation

        return run_once

    engines = {"draftnorm plain": engine(generate)}
    for name in drafts:
        draft = name if name == "ngram" else checkpoints.load(name, args).model
        for length in lengths:
            label = f"draftnorm {Path(name).name}, length {length}"
            engines[label] = engine(speculate, draft=draft, draft_length=length)
    return engines


def transformers_engines(target: Loaded) -> dict[str, Engine]:
    """Greedy decoding and prompt lookup in transformers; nothing, with a note, without it."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.generation.streamers import BaseStreamer
        from transformers.utils import logging
    except ImportError:
        print("transformers is not installed: measuring draftnorm alone", file=sys.stderr)
        return {}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(target.path, dtype=target.model.dtype)
    model = model.to(target.model.device).eval()

    class Stream(BaseStreamer):
        def __init__(self, emit: Emit) -> None:
            self.emit, self.prompt_passed = emit, False

        def put(self, value: torch.Tensor) -> None:
            if self.prompt_passed:
                self.emit(value.flatten().tolist())
            self.prompt_passed = True

        def end(self) -> None:
            pass

    def engine(**settings: Any) -> Engine:
        def decode(prompt: list[int], new_tokens: int, emit: Emit) -> None:
            prompt_BT = torch.tensor([prompt], device=target.model.device)
            model.generate(
                prompt_BT,
                attention_mask=torch.ones_like(prompt_BT),
                do_sample=False,
                max_new_tokens=new_tokens,
                eos_token_id=None,
                streamer=Stream(emit),
                **settings,
            )

        return decode

    return {
        "transformers greedy": engine(),
        "transformers prompt lookup": engine(prompt_lookup_num_tokens=LOOKUP_TOKENS),
    }


def compare_engines(
    engines: dict[str, Engine], prompt: list[int], new_tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """One row an engine. Repeats go round all engines, so that a slow minute hits them alike."""
    for engine in engines.values():
        measure(engine, prompt, min(new_tokens, 8))
    timings: dict[str, list[Timing]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            timings[name].append(measure(engine, prompt, new_tokens))
    speeds = {
        name: spread([run.tokens_per_second for run in runs if run.tokens_per_second])
        for name, runs in timings.items()
    }
    medians = {name: speed["tokens_per_second"] for name, speed in speeds.items()}
    expected = timings["draftnorm plain"][0].token_ids
    plain, peer = medians["draftnorm plain"], medians.get("transformers greedy")
    rows = []
    for name, runs in timings.items():
        drafts = runs[-1].speculation
        rows.append(
            {
                "prompt_tokens": len(prompt),
                "new_tokens": new_tokens,
                "engine": name,
                **speeds[name],
                "first_token_seconds": statistics.median(run.first_token_seconds for run in runs),
                "same_tokens_as_plain": all(run.token_ids == expected for run in runs),
                "tokens_per_cycle": drafts and drafts.tokens_per_cycle,
                "acceptance_rate": drafts and drafts.acceptance_rate,
                "times_plain": report.ratio(medians[name], plain),
                "times_transformers": report.ratio(medians[name], peer),
            }
        )
    return rows


def measure(engine: Engine, prompt: list[int], new_tokens: int) -> Timing:
    """Time one run by the arrival of its tokens."""
    arrivals: list[tuple[float, Sequence[int]]] = []
    started = time.perf_counter()
    speculation = engine(
        prompt, new_tokens, lambda ids: arrivals.append((time.perf_counter(), ids))
    )
    tokens = tuple(itertools.chain.from_iterable(ids for _, ids in arrivals))
    first, last = arrivals[0][0], arrivals[-1][0]
    later = len(tokens) - len(arrivals[0][1])
    return Timing(
        first_token_seconds=first - started,
        tokens_per_second=later / (last - first) if later else None,
        token_ids=tokens,
        speculation=speculation,
    )


def markdown(document: dict[str, Any]) -> str:
    """A table that can be pasted."""
    target, load = document["target"], document["load"]
    head = (
        "prompt | new | engine | tokens/s | spread | first token | × plain | × transformers | "
        "tokens a cycle | accepted | tokens as plain"
    )
    ratios = ("times_plain", "times_transformers", "tokens_per_cycle", "acceptance_rate")
    rows = [
        f"{row['prompt_tokens']} | {row['new_tokens']} | {row['engine']} | {rates(row)} | "
        f"{row['first_token_seconds']:.3f} s | "
        f"{' | '.join(number(row[key], '.2f') for key in ratios)} | "
        f"{'yes' if row['same_tokens_as_plain'] else 'no'}"
        for row in document["results"]
    ]
    title = (
        f"{target['name']}, {target['parameters'] / 1e6:,.1f} M parameters, {target['dtype']}: "
        f"{load['bytes'] / 1e6:,.0f} MB loaded in {load['seconds']:.2f} s "
        f"({load['bytes_per_second'] / 1e9:.2f} GB/s). Greedy, median of {document['repeats']}."
    )
    return f"{title}\n\n{table(head, rows)}"


def draw(document: dict[str, Any], file: Path) -> None:
    """One bar a result, with its spread."""
    from matplotlib.figure import Figure

    rows = [row for row in document["results"] if row["tokens_per_second"]]
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        [f"{row['engine']} ({row['prompt_tokens']} + {row['new_tokens']})" for row in rows],
        [row["tokens_per_second"] for row in rows],
        xerr=[
            [row["tokens_per_second"] - row["slowest"] for row in rows],
            [row["fastest"] - row["tokens_per_second"] for row in rows],
        ],
    )
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s after the first")
    axes.set_title(benchmark_report.headline(document), fontsize="small")
    figure.savefig(file, dpi=150)

"""`draftnorm benchmark decode --shape`: a real shape on a GPU, and where each microsecond goes.

Random weights, one sequence, greedy, bf16. *tokens/s* is plain decoding after the first token, by
the host's clock. *First token* is the prefill and the choice after it. The *limit* is the time that
the weights a step reads take at the read bandwidth measured in this run; a *kernel's* limit counts
its weights, or keys and values, alone. A *step* is a replayed graph; beside the time of M rows, all
different tokens, stand the experts they touch and the bytes that means; kernels are timed as chains
of their kind, as step_times.py says, so that they sum to more than a step.

transformers has a static cache and torch.compile ("reduce-overhead", whole graph), and a bare loop
around them: no generate(), no synchronisation before the end.

The JSON document: what was run and where; the rates measured in this run; `results`, a row for each
engine and length; `prefill`; `steps`, a row for each context and M; `kernels`, a row for each
context and kind, with seconds and bytes of all its calls in a step of one row; `notes`, what was
not measured and why. Seconds and bytes throughout; shares are of 1.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from draftnorm.model.cache import free_bytes
from draftnorm.model.decode_step import DecodeStep
from draftnorm.model.transformer import Transformer
from draftnorm.scripts import benchmark_report, checkpoints, report, timing
from draftnorm.scripts.benchmark_report import number, progress, rates, spread, table
from draftnorm.scripts.shapes import first_token, random_model
from draftnorm.scripts.step_times import bytes_of_a_step, measure_steps, stream_rate

SCHEMA = "draftnorm/benchmark-decode-shape/1"
LONG_PROMPT = 2048  # whose prefill is measured beside the prompts asked for


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape; the document that `benchmark decode` prints."""
    with contextlib.ExitStack() as stack:
        if args.cold:  # read by Triton whenever it compiles
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder))
        return _measure(args)


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    model = random_model(args.shape, checkpoints.dtype_of(args))
    config, device, dtype = model.config, model.device, model.dtype
    bandwidth, flops = timing.read_bandwidth(device), timing.product_rate(device)
    progress(f"{bandwidth / 1e12:.2f} TB/s read, {flops / 1e12:.0f} TFLOP/s in products")
    limit = bandwidth / bytes_of_a_step(model)
    lengths = args.prompt_tokens or [64]
    sizes = list(itertools.product(lengths, args.new_tokens or [256]))
    rows, notes, first_start = [], [], None

    def keep(prompt: int, new_tokens: int, row: dict[str, Any]) -> None:
        rate, size = row["tokens_per_second"], {"prompt_tokens": prompt, "new_tokens": new_tokens}
        rows.append(size | row | {"limit_share": rate / limit})
        progress(f"{row['engine']}, {prompt} + {new_tokens}: {rate:,.1f} tokens/s")

    for size in sizes:
        row, start = decode(model, *size, args.repeats)
        first_start = first_start or start
        keep(*size, row)
    document = {
        **benchmark_report.describe(SCHEMA, args, device),
        "transformers": None if args.no_peers else report.package_version("transformers"),
        "shape": args.shape,
        "parameters": config.parameters,
        "dtype": checkpoints.dtype_name(dtype),
        "repeats": args.repeats,
        "read_bytes_per_second": bandwidth,
        "product_flops_per_second": flops,
        "step_bytes": bytes_of_a_step(model),
        "limit_tokens_per_second": limit,
        "triton_cache": "empty" if args.cold else "as found",
        **first_start,
        "prefill": [
            prefill(model, length, flops, args.repeats)
            for length in sorted({*lengths, LONG_PROMPT})
        ],
        **measure_steps(model, args.context, args.rows, bandwidth, args.repeats),
    }
    if not args.no_peers:
        for size in sizes:
            try:
                keep(*size, decode_transformers(model, *size, args.repeats))
            except Exception as error:  # ours is measured; a peer's failure is a finding
                notes.append(f"transformers was not measured: {' '.join(str(error).split())[:300]}")
                progress(notes[-1])
                break
    return document | {"results": rows, "notes": notes}


def prefill_flops(model: Transformer, T: int) -> int:
    """Operations of a prompt's products and causal attention; the head sees the last token only."""
    config = model.config
    head = config.vocab_size * config.hidden_size
    parameters = bytes_of_a_step(model) // model.dtype.itemsize - head
    attention = config.num_layers * 2 * config.num_heads * config.head_size * T * T
    return 2 * T * parameters + 2 * head + attention


def prefill(model: Transformer, length: int, flops: float, repeats: int) -> dict[str, Any]:
    """Seconds of a prompt of `length`, and its share of the rate of products."""
    cache = model.new_cache(length)
    memory = _ExtraMemory()
    read_prompt = partial(first_token, model, cache, length)
    seconds = statistics.median(timing.wall_seconds(read_prompt, repeats))
    progress(f"prefill of {length}: {length / seconds:,.0f} tokens/s")
    return {
        "prompt_tokens": length,
        "seconds": seconds,
        "tokens_per_second": length / seconds,
        "product_share": prefill_flops(model, length) / seconds / flops,
        "extra_memory_bytes": memory.peak(),
    }


def decode(
    model: Transformer, prompt_tokens: int, new_tokens: int, repeats: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plain decoding: a row of results, and what the first step of a session takes."""
    cache = model.new_cache(prompt_tokens + new_tokens)
    memory = _ExtraMemory()

    def start_session() -> tuple[DecodeStep, float]:
        cache.rollback(0)
        start = time.perf_counter()
        step = DecodeStep(model, cache)
        step.prepare([(1, "cycle")], range(prompt_tokens, prompt_tokens + new_tokens + 1))
        timing.synchronize()
        return step, time.perf_counter() - start

    step, first_seconds = start_session()
    start = {"compile_seconds": step.compile_seconds, "capture_seconds": step.capture_seconds}
    del step  # before its buffers are counted twice
    step, start["next_session_seconds"] = start_session()  # finds its kernels in this process

    read_prompt = partial(first_token, model, cache, prompt_tokens)
    row = time_engine(
        "draftnorm", read_prompt, lambda: stream_rate(step, read_prompt(), new_tokens), repeats
    )
    start["extra_memory_bytes"] = memory.peak()
    return row | {"warm_up_seconds": first_seconds}, start


def decode_transformers(
    ours: Transformer, prompt_tokens: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """The same shape in transformers, compiled on a GPU; ValueError if it does not fit."""
    from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

    config, device = ours.config, ours.device
    needed = config.parameters * ours.dtype.itemsize
    if needed * 1.05 > (free := free_bytes(device)):
        raise ValueError(f"{needed:,} bytes of weights do not fit beside ours, {free:,} are free")
    start = time.perf_counter()
    with device:
        peer = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config.to_dict()), dtype=ours.dtype
        ).eval()
    progress("transformers: compiling")
    cache = StaticCache(config=peer.config, max_cache_len=prompt_tokens + new_tokens)

    def advance(tokens_BT: Tensor) -> Tensor:
        logits = peer(tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    cuda = device.type == "cuda"
    step = torch.compile(advance, mode="reduce-overhead", fullgraph=True) if cuda else advance
    prompt = torch.arange(prompt_tokens, device=device)[None] % config.vocab_size

    @torch.no_grad()
    def read_prompt() -> Tensor:
        cache.reset()
        return advance(prompt)

    @torch.no_grad()
    def greedy() -> float:
        token = read_prompt()
        timing.synchronize()
        start = time.perf_counter()
        for _ in range(new_tokens):
            torch.compiler.cudagraph_mark_step_begin()
            token = step(token).clone()  # the graph's own output is overwritten by the next step
        timing.synchronize()
        return new_tokens / (time.perf_counter() - start)

    greedy()
    warm_up_seconds = time.perf_counter() - start
    row = time_engine("transformers, static cache, compiled", read_prompt, greedy, repeats)
    return row | {"warm_up_seconds": warm_up_seconds}


def time_engine(
    name: str, read_prompt: Callable[[], Any], greedy: Callable[[], float], repeats: int
) -> dict[str, Any]:
    """The row of an engine that reads its prompt, or decodes too and says how fast it decoded."""
    greedy()
    rates = [greedy() for _ in range(repeats)]
    first = timing.wall_seconds(read_prompt, repeats)
    return {"engine": name, **spread(rates), "first_token_seconds": statistics.median(first)}


class _ExtraMemory:
    """Peak of the device memory allocated from here on, beyond what is allocated already."""

    def __init__(self) -> None:
        self.before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        if self.before:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() - self.before if self.before else None


def markdown(document: dict[str, Any]) -> str:
    """Tables that can be pasted."""
    limit = document["limit_tokens_per_second"]
    engines = table(
        "prompt | new | engine | tokens/s | spread | of the limit | first token | warm-up",
        (
            f"{row['prompt_tokens']} | {row['new_tokens']} | {row['engine']} | {rates(row)} | "
            f"{row['limit_share']:.1%} | {1e3 * row['first_token_seconds']:.1f} ms | "
            f"{row['warm_up_seconds']:.1f} s"
            for row in document["results"]
        ),
    )
    prefills = table(
        "prefill | ms | tokens/s | of the products' rate | MB beyond weights and cache",
        (
            f"{row['prompt_tokens']:,} | {1e3 * row['seconds']:.2f} | "
            f"{row['tokens_per_second']:,.0f} | {row['product_share']:.1%} | "
            f"{_megabytes(row['extra_memory_bytes'])}"
            for row in document["prefill"]
        ),
    )
    steps = table(
        "context | rows | step, µs | × one row | experts a layer | × bytes of one row",
        (
            f"{row['context']:,} | {row['rows']} | {1e6 * row['seconds']:.1f} | "
            f"{row['times_one_row']:.3f} | {number(row['experts_touched'], '.2f')} | "
            f"{row['times_bytes']:.3f}"
            for row in document["steps"]
        ),
    )
    contexts = dict.fromkeys(row["context"] for row in document["kernels"])
    return "\n\n".join(
        [
            f"{document['shape']}, {document['parameters'] / 1e6:,.1f} M parameters, "
            f"{document['dtype']}. A step reads {document['step_bytes'] / 1e6:,.1f} MB: at most "
            f"{limit:,.0f} tokens/s at {document['read_bytes_per_second'] / 1e12:.2f} TB/s. "
            f"Compiling took {document['compile_seconds']:.1f} s (Triton cache "
            f"{document['triton_cache']}), capturing {document['capture_seconds']:.1f} s, the next "
            f"session {document['next_session_seconds']:.1f} s in all; memory beyond weights and "
            f"cache: {_megabytes(document['extra_memory_bytes'])} MB.",
            engines,
            *document["notes"],
            f"Products reach {document['product_flops_per_second'] / 1e12:.0f} TFLOP/s.",
            prefills,
            steps,
            *(_kernel_table(document, context) for context in contexts),
        ]
    )


def _kernel_table(document: dict[str, Any], context: int) -> str:
    """Each kind of kernel at that context, and all of them beside the step."""
    rows = [row for row in document["kernels"] if row["context"] == context]
    step = next(row["seconds"] for row in document["steps"] if row["context"] == context)
    cells = []
    for row in rows:
        calls, seconds, limit = row["calls"], row["seconds"], row["limit_seconds"]
        cells.append(
            f"{row['kind']} | {calls} | {1e6 * seconds / calls:.2f} | "
            f"{row['bytes'] / calls / 1e6:.2f} | {number(limit and 1e6 * limit / calls, '.2f')} | "
            f"{number(limit and seconds and limit / seconds, '.0%')} | {1e6 * seconds:.1f} | "
            f"{row['share']:.1%}"
        )
    limit = sum(row["limit_seconds"] or 0.0 for row in rows)
    total = sum(row["seconds"] for row in rows)
    for name, seconds in (("all, one after another", total), ("the step, overlapped", step)):
        cells.append(
            f"{name} |  |  |  | {1e6 * limit:.1f} a step | {limit / seconds:.0%} | "
            f"{1e6 * seconds:.1f} | {seconds / step:.1%}"
        )
    head = f"kernels at {context:,} | calls | µs a call | MB a call | limit, µs | of bandwidth"
    return table(f"{head} | µs a step | of a step", cells)


def _megabytes(size: int | None) -> str:
    return number(size and size / 1e6, ",.0f")

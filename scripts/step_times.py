"""Times of a decode step: of a few rows, and of each kind of kernel in it.

Kernels are timed as chains: a graph of all launches of one kind in a step, in order, behind a read
that empties the L2, less the read alone. So they sum to more than a step: in it each launch hides
behind the kernel before it.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from draftnorm.model import decode_step, streamed_layers
from draftnorm.model.decode_run import DecodeRun
from draftnorm.model.decode_step import DecodeStep
from draftnorm.model.transformer import Transformer
from draftnorm.scripts import timing
from draftnorm.scripts.benchmark_report import progress
from draftnorm.scripts.shapes import scattered_tokens

# What a step launches its kernels with, and where.
LAUNCHERS = {
    decode_step: ("embed", "normalize", "project", "decode_attention", "route_rows", "choose"),
    streamed_layers: ("stream_layer",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One kernel of a step, and the bytes of weights or of keys and values that it must read.

    `out` is its result, rows first, or None.
    """

    kind: str
    bytes: int
    out: Tensor | None
    call: Callable[[], None]


def bytes_of_a_step(model: Transformer, experts: float | None = None) -> int:
    """Weights that a step reads: all but the embedding's other rows and experts not touched.

    `experts` are touched in each layer; by default what one row touches.
    """
    config = model.config
    parameters = config.parameters
    if not config.tie_embeddings:
        parameters -= config.vocab_size * config.hidden_size
    sparse = sum(map(config.is_sparse, range(config.num_layers)))
    idle = config.num_experts - (config.experts_per_token if experts is None else experts)
    parameters -= round(sparse * idle * 3 * config.expert_size * config.hidden_size)
    return parameters * model.dtype.itemsize


def measure_steps(
    model: Transformer, contexts: list[int], rows: list[int], bandwidth: float, repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Times of a step of M rows and of its kernels, at every context."""
    rows = sorted({1, *rows})
    cache = model.new_cache(max(contexts) + max(rows))
    step = DecodeStep(model, cache, rows=max(rows))
    step.prepare([(M, "asked") for M in rows], range(contexts[0], contexts[0] + 1))
    for layer in cache.keys + cache.values:
        layer.normal_()
    steps, kernels = [], []
    for context in contexts:
        one = None
        for M in rows:
            cache.lengths[0] = context
            step.forward(scattered_tokens(model, M)[None])  # which take different experts
            experts = experts_touched(step, M)
            row = {
                "context": context,
                "rows": M,
                "seconds": step_seconds(step, M, repeats),
                "experts_touched": experts,
                "bytes": bytes_of_a_step(model, experts),
            }
            one = one or row
            row["times_one_row"] = row["seconds"] / one["seconds"]
            row["times_bytes"] = row["bytes"] / one["bytes"]
            steps.append(row)
            progress(f"step of {M} at {context}: {1e6 * row['seconds']:,.1f} µs")
        cache.lengths[0] = context
        step.forward(torch.ones(1, 1, dtype=torch.long, device=model.device))
        for row in kernel_rows(step, bandwidth, repeats):
            kernels.append({"context": context} | row | {"share": row["seconds"] / one["seconds"]})
            progress(f"  {row['kind']} × {row['calls']}: {1e6 * row['seconds']:,.1f} µs")
    return {"steps": steps, "kernels": kernels}


def stream_rate(step: DecodeStep, token: int, new_tokens: int) -> float:
    """Tokens a second of decoding plainly behind `token`, by the host's clock."""
    timing.synchronize()
    start = time.perf_counter()
    for _ in DecodeRun(step).cycles([token], new_tokens):
        pass
    return new_tokens / (time.perf_counter() - start)


def step_seconds(step: DecodeStep, rows: int, repeats: int) -> float:
    """Median time of a replay in a row of 20, where the last `forward` stood."""
    length, count = step.cache.lengths[0], 20 if step.x.is_cuda else 1

    def replays() -> None:
        for _ in range(count):
            step.run(rows, length, "asked")

    return statistics.median(timing.wall_seconds(replays, repeats)) / count


def experts_touched(step: DecodeStep, rows: int) -> float | None:
    """Experts that the rows of the last `forward` touch, in the mean over sparse layers."""
    touched = []

    def count(launch: Launch) -> None:
        launch.call()
        if launch.kind == "route_rows":
            touched.append(launch.out[0].item())

    observe_step(step, rows, count)
    return statistics.mean(touched) if touched else None


def kernel_rows(step: DecodeStep, bandwidth: float, repeats: int) -> Iterator[dict[str, Any]]:
    """For each kind of kernel in the last `forward` of one row: calls, seconds, bytes of all."""
    device, cuda = step.x.device, step.x.is_cuda
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if cuda else 0
    # A model that the L2 holds is read from there in every step, so then it stays.
    flushed = 4 * l2 if bytes_of_a_step(step.model) > l2 else 2**16
    data = torch.zeros(max(flushed // 4, 8192), dtype=torch.int32, device=device)
    read = partial(timing.read, data, data.new_empty(data.numel() // 8192))
    empty = _chain_seconds([read], repeats)
    launches: list[Launch] = []
    observe_step(step, 1, launches.append)
    for kind in dict.fromkeys(launch.kind for launch in launches):
        chain = [launch for launch in launches if launch.kind == kind]
        seconds = _chain_seconds([read, *(launch.call for launch in chain)], repeats)
        read_bytes = sum(launch.bytes for launch in chain)
        yield {
            "kind": kind,
            "calls": len(chain),
            "seconds": max(seconds - empty, 0.0),
            "bytes": read_bytes,
            "limit_seconds": read_bytes / bandwidth if read_bytes else None,
        }


@torch.inference_mode()
def observe_step(step: DecodeStep, rows: int, observe: Callable[[Launch], None]) -> None:
    """Walk through the last `forward`'s step again; `observe` gets each kernel, and may launch it.

    A step that is not a plain one changes nothing that a second run would not change alike.
    """
    length = step.cache.lengths[0]
    names = {
        parameter.data_ptr(): name.removesuffix(".weight").split(".", 3)[-1]
        for name, parameter in step.model.named_parameters()
        if ".layers." in name
    }

    def watched(module: ModuleType, name: str) -> Callable[..., None]:
        function = getattr(module, name)

        def launch(*arguments: Any, **settings: Any) -> None:
            kind, read_bytes, out = name, 0, arguments[0]
            if name == "project":
                weight = arguments[2]
                kind = names.get(weight.data_ptr(), "head")
                read_bytes = weight.nbytes
                if settings.get("experts"):  # of one row
                    read_bytes = weight[0].nbytes * step.config.experts_per_token
            elif name == "stream_layer":
                weights, buffers = arguments
                products = weights.products()
                kind = ", ".join(names[weight.data_ptr()] for weight in products)
                read_bytes = sum(weight.nbytes for weight in products)
                out = buffers.q if weights.o is weights.down is None else buffers.x
            elif name == "decode_attention":
                positions = min(length, settings.get("window") or length)
                read_bytes = 2 * arguments[2][0, :, 0].nbytes * positions
            call = partial(function, *arguments, **settings)
            observe(Launch(kind=kind, bytes=read_bytes, out=out, call=call))

        return launch

    with ExitStack() as patches:
        for module, launchers in LAUNCHERS.items():
            replaced = {name: watched(module, name) for name in launchers}
            patches.enter_context(mock.patch.multiple(module, **replaced))
        step.launch(rows, step.tier(length))


@torch.inference_mode()
def _chain_seconds(launches: list[Callable[[], None]], repeats: int) -> float:
    """Median device time of these launches, one after another."""

    def work() -> None:
        for launch in launches:
            launch()

    return statistics.median(timing.replay_seconds(work, 4 * repeats))

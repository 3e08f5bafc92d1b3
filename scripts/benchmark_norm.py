"""RMSNorm over rows × hidden sizes, beside its peers: `draftnorm benchmark norm`.

    draftnorm benchmark norm --rows 1,8,65536 --hidden 64,576,4096
    draftnorm benchmark norm -r 50 -o json --plot norm.png

*Device time* is a replayed CUDA graph of many calls, divided by their number. They go round a ring
of inputs and outputs that together exceed 4 × the L2 cache (at most 256 inputs: one short row is in
the cache anyway, as it is when decoding). A replay costs 4 to 8 µs of its own, whatever is in it.
So a graph goes round until it has moved what the copy moves that sets the limit, which takes 2 ms
on an H200, or made 1,536 calls of at least 0.7 µs: that cost is below 1 % of any engine's time.
*Wall time* is what the host needs for an eager call, up to a last synchronisation. Both: median
over the repeats, and the middle half.

*GB/s* counts x, y and the weight once, and rstd where it is stored. The *copy limit* is the time
those bytes take at the best bandwidth of copying 4 GB, measured again before each shape: straight
after idling an H200 copied 1 % slower. `same bytes` is torch.neg of x, one kernel that must move
what a norm moves, so it shows what a launch of that size can reach.
"""

if __name__ == "__main__":
    from as_file import run_as_file

    run_as_file("benchmark", "norm")

import argparse
import importlib.util
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftnorm.kernels.rms_norm import rms_norm
from draftnorm.scripts import benchmark_report, options, report, timing
from draftnorm.scripts.benchmark_report import progress, table

SCHEMA = "draftnorm/benchmark-norm/1"
EPS = 1e-5
COPY_BYTES = 2**33  # read and written by the copy that sets the limit, and by a graph of calls
MAX_INPUTS, MAX_CALLS = 256, 1536  # of one graph
Engine = Callable[[Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    hidden = "64,128,256,512,576,1024,2048,4096,8192,16384"
    ints = options.positive_ints
    parser.add_argument("--rows", type=ints, default="1,8,65536", metavar="M,M")
    parser.add_argument("--hidden", type=ints, default=hidden, metavar="H,H")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    options.add_benchmark_arguments(parser, repeats=20, plot=True)


def run(args: argparse.Namespace) -> int:
    """Measure every rows × hidden × engine, and print the tables or one document."""
    if not torch.cuda.is_available():
        raise ValueError("benchmark norm times GPU kernels and needs a CUDA device: found none")
    dtype = getattr(torch, args.dtype)
    results = []
    for D in args.hidden:
        for M in args.rows:
            progress(f"{M} × {D}")
            results += measure_shape(M, D, dtype, args.repeats)
    copy_bytes_per_second = max(row["copy_bytes_per_second"] for row in results)
    for row in results:
        row["times_copy_limit"] = row["device_seconds"] * copy_bytes_per_second / row["bytes"]
    document = {
        **benchmark_report.describe(SCHEMA, args, torch.device("cuda")),
        "liger-kernel": report.package_version("liger-kernel"),
        "dtype": args.dtype,
        "repeats": args.repeats,
        "copy_bytes_per_second": copy_bytes_per_second,
        "l2_bytes": torch.cuda.get_device_properties(0).L2_cache_size,
        "results": results,
    }
    benchmark_report.show(document, args, markdown, draw)
    return 0


def make_engines(weight_D: Tensor) -> dict[str, Engine]:
    """The engines that are installed, as functions of x; torch.compile for one shape each."""
    shape, recorded_D = tuple(weight_D.shape), weight_D.clone().requires_grad_()

    def torch_norm(x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, shape, weight_D, EPS)

    torch.compiler.reset()
    engines: dict[str, Engine] = {
        "train": lambda x: rms_norm(x, recorded_D, EPS),  # rstd stored for autograd
        "inference": lambda x: rms_norm(x, weight_D, EPS),
        "torch": torch_norm,
        "compile": torch.compile(torch_norm, dynamic=False),
    }
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops import LigerRMSNormFunction

        settings = (EPS, 0.0, "llama", False)
        engines["liger"] = lambda x: LigerRMSNormFunction.apply(x, weight_D, *settings)
        engines["liger train"] = lambda x: LigerRMSNormFunction.apply(x, recorded_D, *settings)
    return engines | {"same bytes": torch.neg}


def measure_copy() -> float:
    """The best of two ways to copy 4 GB (or a quarter of the free memory): bytes/s, both ways."""
    size = min(COPY_BYTES // 2, torch.cuda.mem_get_info()[0] // 4)
    source = torch.empty(size // 2, dtype=torch.int16, device="cuda").random_()
    target = torch.empty_like(source)
    best = min(
        statistics.median(timing.device_seconds(copy, 10))
        for copy in (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    )
    return 2 * source.nbytes / best


def graph_size(call_bytes: int, l2_bytes: int) -> tuple[int, int]:
    """(inputs of the ring, rounds of a graph): whole rounds, so that replays too join as a ring.

    Without the last input, of which a call may find parts in the cache, the ring has 4 × the L2.
    """
    inputs = max(2, min(MAX_INPUTS, -(-4 * l2_bytes // call_bytes) + 1))
    calls = min(COPY_BYTES / call_bytes, MAX_CALLS)
    return inputs, math.ceil(calls / inputs)


def measure_shape(M: int, D: int, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """One row an engine: device and wall seconds of x [M, D] -> y [M, D]."""
    weight_D = torch.rand(D, device="cuda").to(dtype) + 0.5
    call_bytes = (2 * M * D + D) * weight_D.element_size()
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    ring, rounds = graph_size(call_bytes, l2_bytes)
    inputs = [torch.randn(M, D, device="cuda", dtype=dtype) for _ in range(ring)]
    engines, rows = make_engines(weight_D), []
    for engine in engines.values():
        engine(inputs[0])  # compiles, so that nothing is timed on a GPU that has just idled
    copy_bytes_per_second = measure_copy()
    devices = {
        name: device_seconds(engine, inputs, rounds, repeats) for name, engine in engines.items()
    }
    walls = wall_seconds(engines, inputs[0], repeats)
    for name, device in devices.items():
        middle = statistics.median(device)
        moved = call_bytes + (4 * M if name == "train" else 0)
        rows.append(
            {
                "rows": M,
                "hidden": D,
                "engine": name,
                "calls": ring * rounds,
                **_spread("device", device),
                **_spread("wall", walls[name]),
                "bytes": moved,
                "gigabytes_per_second": moved / middle / 1e9,
                "copy_bytes_per_second": copy_bytes_per_second,
            }
        )
    return rows


def device_seconds(engine: Engine, inputs: list[Tensor], rounds: int, repeats: int) -> list[float]:
    """Seconds a call, of replays of a graph that goes `rounds` times round `inputs`.

    Of the outputs the last are kept, one an input, and the allocator hands the others' memory on:
    so many rounds need no more memory than one, and a call writes where none of its round did.
    """

    def go_round() -> deque[Tensor]:
        return deque((engine(x) for x in inputs * rounds), maxlen=len(inputs))

    seconds = timing.replay_seconds(go_round, repeats)
    return [elapsed / (len(inputs) * rounds) for elapsed in seconds]


def wall_seconds(engines: dict[str, Engine], x: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of host time an eager call, in batches that end in a synchronisation.

    The engines take turns: what is measured first after a compilation was up to 1.7 × slower.
    """
    calls = 50 if x.numel() < 2**20 else 5  # large calls are bound by the device anyway

    def batch(engine: Engine) -> None:
        for _ in range(calls):
            engine(x)

    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(min(repeats, 10)):
        for name, engine in engines.items():
            seconds[name] += timing.wall_seconds(lambda engine=engine: batch(engine), 1)
    return {name: [elapsed / calls for elapsed in seconds[name]] for name in engines}


def _spread(name: str, seconds: list[float]) -> dict[str, float]:
    """The median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {f"{name}_seconds": middle, f"{name}_low": low, f"{name}_high": high}


def markdown(document: dict[str, Any]) -> str:
    """Two tables that can be pasted: device time, then wall time where the host sets it."""
    cells = {(r["rows"], r["hidden"], r["engine"]): r for r in document["results"]}
    shapes = sorted({(r["rows"], r["hidden"]) for r in document["results"]})
    names = list(dict.fromkeys(row["engine"] for row in document["results"]))
    bandwidth = document["copy_bytes_per_second"]
    device, wall = [], []
    for shape in shapes:
        rows = [cells[*shape, name] for name in names]
        ours = cells[*shape, "inference"]
        bound = ours["times_copy_limit"] < 10  # by bandwidth: a launch of one row is all latency
        title = f"{shape[0]:,} × {shape[1]:,}"
        limit = f"{ours['bytes'] / bandwidth * 1e6:.2f}" if bound else "–"
        times = f"{ours['times_copy_limit']:.3f}" if bound else "–"
        micros = " | ".join(f"{r['device_seconds'] * 1e6:.2f}" for r in rows)
        device.append(
            f"{title} | {limit} | {micros} | {ours['gigabytes_per_second']:,.0f} | {times}"
        )
        wall.append(" | ".join([title, *(f"{r['wall_seconds'] * 1e6:.1f}" for r in rows)]))
    engines = " | ".join(names)
    return "\n\n".join(
        [
            f"RMSNorm, {document['dtype']}, device µs a call (median of {document['repeats']} "
            f"graph replays). Copy limit: {bandwidth / 1e12:.2f} TB/s, measured in this run.",
            table(f"rows × hidden | copy limit | {engines} | inference GB/s | × limit", device),
            "Eager wall µs a call, host included.",
            table(f"rows × hidden | {engines}", wall),
        ]
    )


def draw(document: dict[str, Any], file: Path) -> None:
    """A panel for each number of rows: device µs over the hidden size, one line an engine."""
    from matplotlib.figure import Figure

    counts = sorted({row["rows"] for row in document["results"]})
    figure = Figure(figsize=(5 * len(counts), 4), layout="constrained")
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    for axes, M in zip(panels, counts, strict=True):
        for name in dict.fromkeys(row["engine"] for row in document["results"]):
            rows = [r for r in document["results"] if (r["rows"], r["engine"]) == (M, name)]
            rows.sort(key=lambda row: row["hidden"])
            micros = [row["device_seconds"] * 1e6 for row in rows]
            axes.loglog([row["hidden"] for row in rows], micros, marker=".", label=name)
        axes.set_title(f"{M:,} rows")
        axes.set_xlabel("hidden size")
        axes.set_ylabel("device µs")
    panels[0].legend()
    figure.suptitle(benchmark_report.headline(document), fontsize="small")
    figure.savefig(file, dpi=150)

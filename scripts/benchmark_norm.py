"""RMSNorm over rows × hidden sizes, beside its peers: `draftnorm benchmark norm`.

    draftnorm benchmark norm --rows 1,8,65536 --hidden 64,576,4096
    draftnorm benchmark norm --engines inference,torch -r 50 -o json --plot norm.png

*Device time* is a replayed CUDA graph of many calls, divided by their number. Each call has an
input and an output of its own, together more than 4 × the L2 cache (at most 256 calls: one short
row is in the cache anyway, as it is when decoding). *Wall time* is what the host needs for an
eager call, up to a last synchronisation. Both: median over the repeats, and the middle half.

*GB/s* counts x, y and the weight once, and rstd where it is stored. The *copy limit* is the time
those bytes take at the best copy bandwidth measured in this run on 4 GB; `same bytes` is torch.neg
of x, one kernel that must move what a norm moves, so it shows what a launch of that size can reach.
"""

if __name__ == "__main__":  # run as a file, also uninstalled: the command, from the checkout's root
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from draftnorm.scripts.main import main

    sys.exit(main(["benchmark", "norm", *sys.argv[1:]]))

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftnorm.scripts import options

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "draftnorm/benchmark-norm/1"
EPS = 1e-5
MAX_CALLS = 256  # in one graph
Engine = Callable[["Tensor"], "Tensor"]

# name -> what it is; both modes of ours, then the peers
ENGINES = {
    "train": "draftnorm, rstd stored for autograd",
    "inference": "draftnorm, inference_mode",
    "torch": "torch.nn.functional.rms_norm",
    "compile": "the same through torch.compile",
    "liger": "liger-kernel, no gradient wanted",
    "liger train": "liger-kernel, recorded by autograd",
    "same bytes": "torch.neg: reads and writes as much",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    hidden = "64,128,256,512,576,1024,2048,4096,8192,16384"
    parser.add_argument(
        "--rows",
        type=options.positive_ints,
        default=options.positive_ints("1,8,65536"),
        metavar="M,M",
    )
    parser.add_argument(
        "--hidden", type=options.positive_ints, default=options.positive_ints(hidden), metavar="H,H"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--engines",
        type=_engines,
        default=list(ENGINES),
        metavar="E,E",
        help=f"of: {', '.join(ENGINES)} (default: all that are installed)",
    )
    parser.add_argument("-r", dest="repeats", type=options.positive_int, default=20, metavar="R")
    parser.add_argument("-o", dest="output", choices=["md", "csv", "json"], default="md")
    parser.add_argument(
        "--plot", type=Path, metavar="F.png", help="draw the times (needs matplotlib)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure every rows × hidden × engine, and print the tables or one document."""
    import torch

    from draftnorm.scripts import report

    if not torch.cuda.is_available():
        raise ValueError("benchmark norm times GPU kernels and needs a CUDA device: found none")
    if args.plot:
        report.figure_class()
    dtype = getattr(torch, args.dtype)
    copy_bytes_per_second = measure_copy()
    results = []
    for D in args.hidden:
        for M in args.rows:
            print(f"{M} × {D}", file=sys.stderr)
            results += measure_shape(M, D, dtype, args.engines, args.repeats, copy_bytes_per_second)
    document = {
        "schema": SCHEMA,
        **report.describe_environment(torch.device("cuda")),
        "liger-kernel": report.package_version("liger-kernel"),
        "command": args.command_line,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "copy_bytes_per_second": copy_bytes_per_second,
        "l2_bytes": torch.cuda.get_device_properties(0).L2_cache_size,
        "results": results,
    }
    report.print_benchmark(document, args.output, markdown)
    if args.plot:
        draw(document, args.plot)
    return 0


def make_engines(names: list[str], weight_D: "Tensor") -> dict[str, Engine]:
    """The engines that are installed, as functions of x; torch.compile for one shape each."""
    import torch

    from draftnorm.kernels.rms_norm import rms_norm

    shape, recorded_D = tuple(weight_D.shape), weight_D.clone().requires_grad_()

    def torch_norm(x: "Tensor") -> "Tensor":
        return torch.nn.functional.rms_norm(x, shape, weight_D, EPS)

    torch.compiler.reset()
    engines: dict[str, Engine] = {
        "train": lambda x: rms_norm(x, recorded_D, EPS),
        "inference": lambda x: rms_norm(x, weight_D, EPS),
        "torch": torch_norm,
        "compile": torch.compile(torch_norm, dynamic=False),
        "same bytes": torch.neg,
    }
    try:
        from liger_kernel.ops import LigerRMSNormFunction
    except ImportError:
        pass
    else:
        options = (EPS, 0.0, "llama", False)
        engines["liger"] = lambda x: LigerRMSNormFunction.apply(x, weight_D, *options)
        engines["liger train"] = lambda x: LigerRMSNormFunction.apply(x, recorded_D, *options)
    return {name: engines[name] for name in names if name in engines}


def measure_copy() -> float:
    """The best of two ways to copy 4 GB (or a quarter of the free memory): bytes/s, both ways."""
    import torch

    from draftnorm.scripts import timing

    size = min(2**32, torch.cuda.mem_get_info()[0] // 4)
    source = torch.empty(size // 2, dtype=torch.int16, device="cuda").random_()
    target = torch.empty_like(source)
    best = min(
        statistics.median(timing.device_seconds(copy, 10))
        for copy in (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    )
    return 2 * source.nbytes / best


def measure_shape(
    M: int,
    D: int,
    dtype: Any,
    names: list[str],
    repeats: int,
    copy_bytes_per_second: float,
) -> list[dict[str, Any]]:
    """One row an engine: device and wall seconds of x [M, D] -> y [M, D]."""
    import torch

    weight_D = torch.rand(D, device="cuda").to(dtype) + 0.5
    call_bytes = (2 * M * D + D) * weight_D.element_size()
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    calls = max(2, min(MAX_CALLS, -(-4 * l2_bytes // call_bytes) + 1))
    inputs = [torch.randn(M, D, device="cuda", dtype=dtype) for _ in range(calls)]
    rows = []
    for name, engine in make_engines(names, weight_D).items():
        device = device_seconds(engine, inputs, repeats)
        wall = wall_seconds(engine, inputs[0], repeats)
        moved = call_bytes + (4 * M if name == "train" else 0)
        rows.append(
            {
                "rows": M,
                "hidden": D,
                "engine": name,
                **_spread("device", device),
                **_spread("wall", wall),
                "bytes": moved,
                "gigabytes_per_second": moved / statistics.median(device) / 1e9,
                "times_copy_limit": statistics.median(device) * copy_bytes_per_second / moved,
            }
        )
    return rows


def device_seconds(engine: Engine, inputs: list["Tensor"], repeats: int) -> list[float]:
    """Seconds a call, of graph replays. The outputs are kept, so that no two calls share one."""
    import torch

    from draftnorm.scripts import timing

    for _ in range(3):
        engine(inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [engine(x) for x in inputs]
    seconds = [elapsed / len(outputs) for elapsed in timing.device_seconds(graph.replay, repeats)]
    del outputs
    return seconds


def wall_seconds(engine: Engine, x: "Tensor", repeats: int) -> list[float]:
    """Seconds of host time an eager call, in batches that end in a synchronisation."""
    import torch

    calls = 50 if x.numel() < 2**20 else 5  # large calls are bound by the device anyway
    seconds = []
    for _ in range(min(repeats, 10)):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            engine(x)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / calls)
    return seconds


def _spread(name: str, seconds: list[float]) -> dict[str, float]:
    """The median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {f"{name}_seconds": middle, f"{name}_low": low, f"{name}_high": high}


def markdown(document: dict[str, Any]) -> str:
    """Two tables that can be pasted: device time, then wall time where the host sets it."""
    from draftnorm.scripts.report import table

    cells = {(r["rows"], r["hidden"], r["engine"]): r for r in document["results"]}
    shapes = sorted({(r["rows"], r["hidden"]) for r in document["results"]})
    names = [name for name in ENGINES if any(name == engine for *_, engine in cells)]
    bandwidth = document["copy_bytes_per_second"]
    device, wall = [], []
    for shape in shapes:
        rows = [cells[*shape, name] for name in names]
        ours = cells.get((*shape, "inference"), rows[0])
        bound = ours["times_copy_limit"] < 10  # by bandwidth: a launch of one row is all latency
        title = f"{shape[0]:,} × {shape[1]:,}"
        wall.append([title, *(f"{r['wall_seconds'] * 1e6:.1f}" for r in rows)])
        device.append(
            [
                title,
                f"{ours['bytes'] / bandwidth * 1e6:.2f}" if bound else "–",
                *(f"{r['device_seconds'] * 1e6:.2f}" for r in rows),
                f"{ours['gigabytes_per_second']:,.0f}",
                f"{ours['times_copy_limit']:.3f}" if bound else "–",
            ]
        )
    return "\n".join(
        [
            f"RMSNorm, {document['dtype']}, device µs a call (median of {document['repeats']} "
            f"graph replays). Copy limit: {bandwidth / 1e12:.2f} TB/s, measured in this run.",
            "",
            *table(["rows × hidden", "copy limit", *names, "inference GB/s", "× limit"], device),
            "",
            "Eager wall µs a call, host included.",
            "",
            *table(["rows × hidden", *names], wall),
        ]
    )


def draw(document: dict[str, Any], file: Path) -> None:
    """A panel for each number of rows: device µs over the hidden size, one line an engine."""
    from draftnorm.scripts.report import figure_class, headline

    counts = sorted({row["rows"] for row in document["results"]})
    figure = figure_class()(figsize=(5 * len(counts), 4), layout="constrained")
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
    figure.suptitle(headline(document), fontsize="small")
    figure.savefig(file, dpi=150)


def _engines(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in ENGINES]:
        raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}, not one of {', '.join(ENGINES)}")
    return names

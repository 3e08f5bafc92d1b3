"""One decode step, rung by rung and kernel by kernel: `draftnorm benchmark ladder`.

    draftnorm benchmark ladder --shape llama-3.2-1b
    draftnorm benchmark ladder --shape smollm2-135m --rows 1,5,16 -o json

Random weights of a real model's shape, one sequence, greedy. *tokens/s* is plain decoding of -n
tokens after a prompt of -p, the first token included, by the host's clock. *step* is a replayed
graph at the prompt's length. The *rungs* change one thing each: the norm as a kernel that stores
rstd, as one that does not, in the products; dependent launch. The *limit* is the time that the
bytes of the weights take at the read bandwidth measured in this run. *Kernels* are timed as chains
of their own kind, so that they sum to more than a step: in it, each hides part of the next launch.
*Equal bits* compares the logits of a verify of as many rows with those of single steps.
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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from draftnorm.scripts import options

if TYPE_CHECKING:
    from draftnorm.model.decode_step import DecodeStep
    from draftnorm.model.transformer import Transformer

SCHEMA = "draftnorm/benchmark-ladder/1"
_LLAMA = dict(num_kv_heads=8, vocab_size=128256, num_heads=32, context=8192)
_LARGE = dict(hidden_size=4096, intermediate_size=14336, num_layers=32, head_size=128)
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
        num_kv_heads=3, head_size=64, tie_embeddings=True, context=8192,
    ),
    "llama-3.2-1b": _LLAMA | dict(
        hidden_size=2048, intermediate_size=8192, num_layers=16, head_size=64, tie_embeddings=True
    ),
    "llama-3.1-8b": _LLAMA | _LARGE,
    "mixtral-8x7b": _LLAMA | _LARGE | dict(
        architecture="mixtral", vocab_size=32000, num_experts=8, experts_per_token=2,
        expert_size=14336,
    ),
}  # fmt: skip
RUNGS = {
    "train": dict(norm="train"),
    "inference": dict(norm="inference"),
    "fused": dict(norm="fused"),
    "fused, no dependent launch": dict(norm="fused", pdl=False),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--rows", type=_counts, default=[1, 2, 5, 8, 16], metavar="M,M")
    parser.add_argument("-p", dest="prompt_tokens", type=options.positive_int, default=64)
    parser.add_argument("-n", dest="new_tokens", type=options.positive_int, default=256)
    parser.add_argument("-r", dest="repeats", type=options.positive_int, default=5, metavar="R")
    parser.add_argument("-o", dest="output", choices=["md", "json"], default="md")


def run(args: argparse.Namespace) -> int:
    """Measure one shape, and print a table or one document."""
    import torch

    from draftnorm.kernels.rms_norm import INTERPRETED
    from draftnorm.model.cache import KVCache
    from draftnorm.model.decode_step import DecodeStep
    from draftnorm.scripts import report

    if not (torch.cuda.is_available() or INTERPRETED):
        raise ValueError("benchmark ladder times GPU kernels and needs a CUDA device: found none")
    model = random_model(args.shape)
    dtype, device, most = model.dtype, model.device, max(args.rows)
    room = args.prompt_tokens + max(args.new_tokens, 2 * most)
    cache = KVCache(model.config, capacity=room, device=device, dtype=dtype)
    prompt = torch.arange(args.prompt_tokens, device=device) % model.config.vocab_size
    start = time.perf_counter()
    model.prefill(prompt, cache)
    first_token_seconds = _elapsed(start)
    step = DecodeStep(model, cache, rows=most)

    def rewind() -> None:
        cache.lengths[0] = args.prompt_tokens

    def greedy() -> float:
        rewind()
        start = time.perf_counter()
        tokens = sum(1 for _ in step.greedy(1, args.new_tokens))
        return tokens / _elapsed(start)

    first_rate = greedy()  # compiles and captures
    rates = sorted(greedy() for _ in range(args.repeats))
    read_bytes, bandwidth = bytes_of_a_step(model), read_bandwidth(device)

    def step_seconds(step: DecodeStep, rows: int) -> float:
        rewind()
        block = torch.ones(1, rows, dtype=torch.long, device=device)
        step.forward(block)  # leaves positions and lengths behind
        return replay_seconds(step, rows, args.repeats)

    rungs = {
        name: step_seconds(DecodeStep(model, cache, **setting), 1)
        for name, setting in RUNGS.items()
    }
    document = {
        "schema": SCHEMA,
        **report.describe_environment(device),
        "command": args.command_line,
        "shape": args.shape,
        "parameters": model.config.parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "read_bytes_per_second": bandwidth,
        "step_bytes": read_bytes,
        "limit_tokens_per_second": bandwidth / read_bytes,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "first_token_seconds": first_token_seconds,
        "compile_and_capture_seconds": args.new_tokens / first_rate
        - args.new_tokens / statistics.median(rates),
        "tokens_per_second": statistics.median(rates),
        "slowest": rates[0],
        "fastest": rates[-1],
        "step_seconds_by_rows": {str(rows): step_seconds(step, rows) for rows in args.rows},
        "step_seconds_by_rung": rungs,
        "kernel_seconds": kernel_seconds(model, cache, step_seconds),
        "equal_bits_by_rows": equal_bits(step, args.rows, rewind),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }
    print({"md": markdown, "json": report.dump}[args.output](document))
    return 0


def random_model(shape: str) -> "Transformer":
    """A model of this shape on the device, with weights that keep its rows of size one."""
    import torch

    from draftnorm.model.config import ModelConfig
    from draftnorm.model.transformer import Transformer

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32  # the interpreter has no bf16
    config = ModelConfig(**SHAPES[shape])
    model = Transformer(config, device="cuda" if cuda else "cpu", dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    return model


def bytes_of_a_step(model: "Transformer") -> int:
    """Weights that one row's step reads: all but the embedding's other rows and idle experts."""
    config = model.config
    parameters = config.parameters
    if not config.tie_embeddings:
        parameters -= config.vocab_size * config.hidden_size
    sparse = sum(map(config.is_sparse, range(config.num_layers)))
    idle = config.num_experts - config.experts_per_token
    parameters -= sparse * idle * 3 * config.expert_size * config.hidden_size
    return parameters * model.dtype.itemsize


def read_bandwidth(device: Any) -> float:
    """Bytes/s of reading 4 GiB (or a quarter of the free memory) once."""
    import torch

    if device.type != "cuda":
        return 1e10  # the interpreter: no hardware to speak of
    size = min(2**32, torch.cuda.mem_get_info()[0] // 4)
    data = torch.zeros(size // 4, dtype=torch.int32, device=device)
    return size / statistics.median(_seconds(data.amax, 10))


def replay_seconds(step: "DecodeStep", rows: int, repeats: int) -> float:
    """Median time of a replay in a row of 20, at the position where `step` stands."""
    tier = step._tier(step.cache.lengths[0])

    def twenty() -> None:
        for _ in range(20 if step.x.is_cuda else 1):
            step._run(rows, tier, plain=False)

    return statistics.median(_seconds(twenty, repeats)) / (20 if step.x.is_cuda else 1)


def kernel_seconds(
    model: "Transformer", cache: Any, step_seconds: Callable[["DecodeStep", int], float]
) -> dict[str, float]:
    """Seconds a step spends in the kernels of each kind, each kind a chain of its own."""
    from draftnorm.model.decode_step import DecodeStep

    class Only(DecodeStep):
        kind = ""

        def _project(self, kind: str, *arguments: Any, **settings: Any) -> None:
            if kind == self.kind:
                super()._project(kind, *arguments, **settings)

        def _attend(self, *arguments: Any) -> None:
            if self.kind == "attention":
                super()._attend(*arguments)

    seconds = {}
    sparse = [model.config.is_sparse(i) for i in range(model.config.num_layers)]
    kinds = ["qkv", "attention", "o"]
    kinds += ["gate_up", "down"] if not all(sparse) else []
    kinds += ["router", "expert_gate_up", "expert_down"] if any(sparse) else []
    for kind in ["", *kinds, "head"]:
        only = Only(model, cache)
        only.kind = kind
        seconds[kind or "ends"] = step_seconds(only, 1)
    ends = seconds["ends"]  # embedding, choice of the token and routing are in every chain
    return {kind: t if kind == "ends" else t - ends for kind, t in seconds.items()}


def equal_bits(step: "DecodeStep", rows: list[int], rewind: Callable[[], None]) -> dict[str, bool]:
    """Whether a verify of M rows gives the logits of M single steps, bit for bit."""
    import torch

    most = max(rows)
    tokens = torch.arange(most, device=step.x.device)[None] % step.config.vocab_size
    rewind()
    alone = torch.cat([step.forward(tokens[:, t : t + 1]).clone() for t in range(most)], dim=1)
    same = {}
    for M in rows:
        rewind()
        same[str(M)] = torch.equal(step.forward(tokens[:, :M]), alone[:, :M])
    return same


def markdown(document: dict[str, Any]) -> str:
    """Tables that can be pasted."""
    limit = 1 / document["limit_tokens_per_second"]
    versions = " · ".join(f"{name} {document[name]}" for name in ("draftnorm", "torch", "triton"))
    one = document["step_seconds_by_rows"].get("1", document["step_seconds_by_rung"]["fused"])
    lines = [
        f"{document['hardware']['name']} · {versions} · {document['date'][:10]}",
        "",
        f"{document['shape']}, {document['dtype']}, {document['prompt_tokens']} + "
        f"{document['new_tokens']} tokens: **{document['tokens_per_second']:,.0f} tokens/s** "
        f"({document['slowest']:,.0f} – {document['fastest']:,.0f}), "
        f"{100 * document['tokens_per_second'] * limit:.0f} % of the limit at "
        f"{document['read_bytes_per_second'] / 1e12:.2f} TB/s. First token "
        f"{1e3 * document['first_token_seconds']:.1f} ms, compiling and capturing "
        f"{document['compile_and_capture_seconds']:.1f} s.",
        "",
        "| | µs | |",
        "|---|---|---|",
        f"| limit | {1e6 * limit:.1f} | |",
    ]
    for rows, seconds in document["step_seconds_by_rows"].items():
        bits = "equal bits" if document["equal_bits_by_rows"][rows] else "OTHER BITS"
        lines.append(f"| step of {rows} | {1e6 * seconds:.1f} | {seconds / one:.2f} × · {bits} |")
    for name, seconds in document["step_seconds_by_rung"].items():
        lines.append(f"| norm {name} | {1e6 * seconds:.1f} | {seconds / one:.2f} × |")
    for name, seconds in document["kernel_seconds"].items():
        lines.append(f"| kernels: {name} | {1e6 * seconds:.1f} | {100 * seconds / one:.0f} % |")
    return "\n".join(lines)


def _seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    """Of each of `repeats` runs after an untimed one, the device idle before and after."""
    work()
    _elapsed(0.0)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(_elapsed(start))
    return seconds


def _elapsed(start: float) -> float:
    """Seconds since `start`, once the device has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _counts(text: str) -> list[int]:
    return sorted({options.positive_int(part) for part in text.split(",")})

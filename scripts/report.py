"""The one JSON document that a decoding run ends in: speculate.schema.json is its committed schema.

Every key is always there; null means not measured. Seconds, bytes and tokens are the only units.
"""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
from dataclasses import asdict, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import draftnorm
from draftnorm.decoding.request import Request
from draftnorm.decoding.statistics import Result, SpeculationStatistics
from draftnorm.decoding.verification import Difference, first_difference
from draftnorm.model.transformer import Transformer
from draftnorm.scripts import checkpoints
from draftnorm.scripts.checkpoints import Loaded

SCHEMA = "draftnorm/speculate/1"


def build_document(
    args: argparse.Namespace,
    request: Request,
    target: Loaded,
    draft: Loaded | str,
    plain: Result | None,
    speculative: Result | None,
) -> dict[str, Any]:
    """All that is known of a run, `plain` or `speculative` or both, keyed as the schema lists."""
    shown = speculative or plain
    document = {
        "schema": SCHEMA,
        **describe_environment(target.model.device),
        "command": args.command_line,
        "target": checkpoints.describe(target),
        "draft": checkpoints.describe(draft),
        "sampling": asdict(request.sampler.sampling),
        "draft_length": args.draft_length if speculative else None,
        "acceptance": args.acceptance if speculative else None,
        "text": shown.text,
        "token_ids": list(shown.token_ids),
        "prompt_tokens": shown.prompt_tokens,
        "stop_reason": shown.stop_reason,
        "load_seconds": target.seconds + (draft.seconds if isinstance(draft, Loaded) else 0.0),
        "compile_seconds": shown.compile_seconds,
        "capture_seconds": shown.capture_seconds,
        "prefill_seconds": dict(shown.prefill_seconds),
        "time_to_first_token": shown.time_to_first_token,
        "plain": _speed(plain),
        "speculative": _speed(speculative) | _speculation(speculative),
        **dict.fromkeys(("speedup", "speedup_end_to_end", "predicted_speedup")),
        **dict.fromkeys(("identical", "first_difference")),
        "peak_memory_bytes": _peak_memory_bytes(target.model.device),
        "bandwidth_fraction": _bandwidth_fraction(target.model, shown if plain is None else plain),
    }
    if plain and speculative and "interrupted" not in (plain.stop_reason, speculative.stop_reason):
        document |= compare(plain, speculative)
        tokens = plain.token_ids, speculative.token_ids
        difference = first_difference(target.model, request.prompt_ids, *tokens)
        document["identical"] = difference is None
        document["first_difference"] = difference and _explain(difference, target)
    return document


def compare(plain: Result, speculative: Result) -> dict[str, Any]:
    """Speed-ups between two finished runs of one prompt, measured side by side."""
    parts, plain_rate = speculative.speculation, plain.tokens_per_second
    cycle_seconds = ratio(parts.draft_seconds + parts.verify_seconds, parts.cycles)
    return {
        "speedup": ratio(speculative.tokens_per_second, plain_rate),
        "speedup_end_to_end": ratio(_rate_after_load(speculative), _rate_after_load(plain)),
        # Tokens per cycle · t_plain / t_cycle, a cycle being its separately timed draft and verify.
        "predicted_speedup": ratio(ratio(parts.tokens_per_cycle, plain_rate), cycle_seconds),
    }


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What produced the numbers: versions, commit, date and hardware."""
    return {
        "draftnorm": draftnorm.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "device": device.type,
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
        },
        "torch": torch.__version__,
        "triton": package_version("triton"),
    }


def package_version(name: str) -> str | None:
    """The installed version of a package, without importing it; None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Their ratio, or None if there is none, as one of them was not measured."""
    return numerator / denominator if numerator is not None and denominator else None


def dump(document: dict[str, Any]) -> str:
    """The document as JSON text. NaN and infinity are not JSON, so they are an error here."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def _speed(result: Result | None) -> dict[str, float | None]:
    return {key: result and getattr(result, key) for key in ("seconds", "tokens_per_second")}


def _speculation(result: Result | None) -> dict[str, Any]:
    if result is None:
        return dict.fromkeys(field.name for field in fields(SpeculationStatistics))
    return asdict(result.speculation)


def _explain(difference: Difference, target: Loaded) -> dict[str, Any]:
    """The first difference for the JSON document, its tokens also as text."""
    plain, speculative = difference.tokens

    def text(token: int | None) -> str:
        return "" if token is None else target.tokenizer.decode([token])

    return {
        "position": difference.index,
        "plain_token": plain,
        "speculative_token": speculative,
        "plain_text": text(plain),
        "speculative_text": text(speculative),
        "top_two_gap": difference.top_two_gap,
    }


def _rate_after_load(result: Result) -> float | None:
    return ratio(len(result.token_ids), (result.time_to_first_token or 0.0) + result.seconds)


def _peak_memory_bytes(device: torch.device) -> int:
    """Device memory on CUDA, the process's resident memory on the CPU (kilobytes on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bandwidth_fraction(model: Transformer, run: Result) -> float | None:
    """Share of a GPU's read bandwidth, measured now, that reading the weights each step took."""
    if model.device.type != "cuda" or not run.seconds:
        return None
    from draftnorm.scripts.step_times import bytes_of_a_step
    from draftnorm.scripts.timing import read_bandwidth

    steps = run.speculation.cycles if run.speculation else len(run.token_ids) - 1
    return steps / run.seconds * bytes_of_a_step(model) / read_bandwidth(model.device)


def _cpu_name() -> str:
    found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _commit() -> str | None:
    """The commit of the running checkout, marked when files differ; None in an installed wheel."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

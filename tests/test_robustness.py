"""What goes wrong from outside ends in exit code 1 and one line: no traceback, hang or crash."""

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from draftnorm.scripts.main import main

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "model.safetensors"


@pytest.fixture
def fails(capsys):
    """Run the command; it must fail with exactly one line, which is returned."""

    def run(*argv: object) -> str:
        assert main([str(word) for word in argv]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("draftnorm: error: ")
        # That word is for errors that nobody foresaw.
        assert "unexpected" not in lines[0] or "unexpected tensor" in lines[0]
        return lines[0]

    return run


def _edit_config(**fields: object):
    def damage(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | fields))

    return damage


def _edit_weights(change):
    """Damage by a function of (header as a dict, data) -> bytes of the whole file."""

    def damage(directory: Path) -> None:
        raw = (directory / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        (directory / WEIGHTS).write_bytes(change(json.loads(raw[8 : 8 + size]), raw[8 + size :]))

    return damage


def _file(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _wrong_offset(header: dict, data: bytes) -> bytes:
    header["model.norm.weight"]["data_offsets"][1] += 4
    return _file(header, data)


def _integers(header: dict, data: bytes) -> bytes:
    header["model.norm.weight"]["dtype"] = "I32"  # as wide as the float it replaces
    return _file(header, data)


def _remove(name: str):
    return lambda directory: (directory / name).unlink()


def _write(name: str, data: bytes):
    return lambda directory: (directory / name).write_bytes(data)


DAMAGES = {
    "truncated weights": _edit_weights(lambda header, data: _file(header, data[:-100])),
    "empty weights": _write(WEIGHTS, b""),
    "huge header": _write(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"),
    "wrong offset": _edit_weights(_wrong_offset),
    "wrong dtype": _edit_weights(_integers),
    "garbage": _write(WEIGHTS, bytes(range(256)) * 4),
    "NaN in config": _edit_config(rms_norm_eps=float("nan")),
    "negative size": _edit_config(hidden_size=-32),
    "huge size": _edit_config(hidden_size=2**40),
    "text as size": _edit_config(num_hidden_layers="two"),
    "wrong architecture": _edit_config(model_type="bert", architectures=["BertModel"]),
    "unknown activation": _edit_config(hidden_act="frobnicate"),
    "config is no JSON": _write("config.json", b"{"),
    "config is a list": _write("config.json", b"[]"),
    "config is no text": _write("config.json", b"\xff\xfe\x00"),
    "no config": _remove("config.json"),
    "no weights": _remove(WEIGHTS),
    "no tokenizer": _remove("tokenizer.json"),
    "tokenizer is no JSON": _write("tokenizer.json", b"{"),
    "index leaves the directory": _write(
        "model.safetensors.index.json",
        json.dumps({"weight_map": {"model.norm.weight": "../../secret.safetensors"}}).encode(),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_checkpoint(damage, make_checkpoint, fails):
    directory = make_checkpoint()
    damage(directory)
    line = fails("generate", "--target", directory, "--prompt", "a", "--json")
    assert str(directory) in line  # it says where


def test_no_checkpoint(tmp_path, fails):
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in fails("generate", "--target", file, "--prompt", "a")
    fails("generate", "--target", tmp_path, "--prompt", "a")
    fails("generate", "--target", tmp_path / "nowhere", "--prompt", "a")
    fails("generate", "--target", "nowhere", "--prompt", "a")


def test_draft_with_another_vocabulary(make_checkpoint, fails):
    target = make_checkpoint("target")
    draft = make_checkpoint("draft")
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = fails("speculate", "--target", target, "--draft", draft, "--prompt", "a", "--json")
    assert "'a'" in line or "'b'" in line  # the first token that differs is named


@pytest.mark.parametrize(
    "argv",
    [
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--temperature", "inf"],
        ["--top-k", "-1"],
        ["--top-p", "0"],
        ["--top-p", "1.5"],
        ["--top-p", "nan"],
        ["--min-p", "2"],
        ["--seed", str(2**64)],
        ["--prompt-file", "/nowhere/at/all"],
        ["--prompt-file", "/"],
        ["--prompt", ""],
        ["--prompt", "a" * 600],  # the context is 512
        ["--prompt", "a", "--context", "513"],
        ["--prompt", "a", "--stop", ""],
        ["--prompt", "a", "--system", "but there is no chat template"],
        ["--prompt", "a", "--system", "s", "--raw"],
        ["--prompt", "a", "--draft", "none", "--compare"],
    ],
    ids=lambda argv: " ".join(argv)[:30],
)
def test_invalid_values(argv, make_checkpoint, fails):
    if "--prompt" not in argv and "--prompt-file" not in argv:
        argv = [*argv, "--prompt", "a"]
    fails("speculate", "--target", make_checkpoint(), "--draft", "ngram", *argv, "--json")


def test_a_wrong_request_is_known_before_anything_is_loaded(make_checkpoint, fails, monkeypatch):
    monkeypatch.setattr("draftnorm.scripts.checkpoints.load_model", None)
    argv = ["--target", make_checkpoint(), "--prompt", "a", "--stop", ""]
    assert "stop strings must not be empty" in fails("generate", *argv)


def test_prompt_that_is_no_text(make_checkpoint, fails, tmp_path):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    argv = ["--target", make_checkpoint(), "--prompt-file", tmp_path / "prompt", "--json"]
    assert f"{tmp_path / 'prompt'} is not UTF-8 text" in fails("generate", *argv)


@pytest.mark.parametrize("budget", [0, 1])
def test_tiny_budgets_are_fine(budget, make_checkpoint, capsys):
    argv = ["--target", str(make_checkpoint()), "--prompt", "a", "--max-new-tokens", str(budget)]
    assert main(["speculate", *argv, "--draft", "ngram", "--compare", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["token_ids"]) == budget and document["identical"] is True
    assert main(["speculate", *argv, "--draft", "ngram", "--compare"]) == 0


def _out_of_memory() -> list[Exception]:
    import torch

    return [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB. See documentation"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 EiB."),
    ]


@pytest.mark.parametrize("error", _out_of_memory(), ids=lambda error: type(error).__name__)
def test_out_of_memory_says_what_to_lower(error, make_checkpoint, fails, monkeypatch):
    def raise_error(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("draftnorm.scripts.checkpoints.load_model", raise_error)
    line = fails("generate", "--target", make_checkpoint(), "--prompt", "a")
    assert "out of memory" in line and "lower --context" in line


def test_unforeseen_error_is_one_line_unless_debug(make_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("draftnorm.scripts.checkpoints.load_model", lambda *_, **__: 1 / 0)
    argv = ["generate", "--target", str(make_checkpoint()), "--prompt", "a"]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("draftnorm: error: unexpected ZeroDivisionError")
    assert error.count("\n") == 1
    assert main([*argv, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("argv", ["train target --corpus nowhere --debug", "--debug fetch nowhere"])
def test_debug_is_known_at_every_level(argv, capsys):
    assert main(argv.split()) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("json_", [False, True])
def test_interrupt_keeps_text_and_statistics(json_, make_checkpoint, capsys, monkeypatch):
    argv = ["speculate", "--target", str(make_checkpoint()), "--draft", "ngram", "--compare"]
    argv += ["--prompt", "abab", "--ignore-eos", "--max-new-tokens", "400"]
    assert main([*argv, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["text"]

    from draftnorm.decoding.speculation import SpeculativeDecoder

    step, calls = SpeculativeDecoder.step, []

    def interrupted_step(self, *arguments):
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(SpeculativeDecoder, "step", interrupted_step)
    assert main([*argv, *["--json"] * json_]) == 130
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if json_:
        document = json.loads(captured.out)
        assert document["stop_reason"] == "interrupted" and document["identical"] is None
        assert document["speculative"]["cycles"] == 4
        text = document["text"]
    else:
        assert "tokens per cycle" in captured.err and "ended: interrupted" in captured.err
        text = captured.out.rstrip("\n")
    # What is withheld is at most part of one character.
    assert text and whole.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_interrupt_while_comparing_keeps_the_speculative_numbers(
    make_checkpoint, capsys, monkeypatch
):
    from draftnorm.decoding.generation import PlainDecoder

    def interrupted_step(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(PlainDecoder, "step", interrupted_step)
    argv = ["speculate", "--target", str(make_checkpoint()), "--draft", "ngram", "--compare"]
    assert main([*argv, "--prompt", "abab", "--ignore-eos", "--max-new-tokens", "20"]) == 130
    error = capsys.readouterr().err
    assert "tokens per cycle" in error and "identical" not in error and "Traceback" not in error


def _start(*argv: str, **streams: int) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "main.py"), *argv]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        # A shell's background job ignores Ctrl-C, and what it starts inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **streams,
    )


def _endless(directory: Path) -> list[str]:
    """A generation that outlives any test, from a context that allows it."""
    argv = ["generate", "--target", str(directory), "--prompt", "a", "--ignore-eos"]
    return [*argv, "--device", "cpu", "--max-new-tokens", "1000000"]


def test_ctrl_c_in_a_process_of_its_own(make_checkpoint):
    directory = make_checkpoint(max_position_embeddings=1_000_100)
    process = _start(*_endless(directory), stdout=subprocess.PIPE)
    first = process.stdout.read(1)  # mid-stream from here on
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first + rest and b"ended: interrupted" in error and b"Traceback" not in error


def test_closed_pipe_is_quiet(make_checkpoint):
    directory = make_checkpoint(max_position_embeddings=1_000_100)
    process = _start(*_endless(directory), stdout=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert b"rror" not in error and b"Traceback" not in error and b"xception" not in error


def test_closed_pipe_before_the_first_word():
    reader, writer = os.pipe()
    os.close(reader)
    process = _start("speculate", "--list", stdout=writer)
    os.close(writer)
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141

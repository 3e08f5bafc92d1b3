"""The command line on tiny random checkpoints: documents, streams, names, exit codes."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest

from draftnorm import __version__
from draftnorm.model import hub
from draftnorm.scripts import checkpoints
from draftnorm.scripts.main import COMMANDS, main
from draftnorm.scripts.speculative_decode import check_exactness

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((ROOT / "scripts" / "speculate.schema.json").read_text())
SHORT = ["--device", "cpu", "--max-new-tokens", "12", "--ignore-eos"]


@pytest.fixture
def run_json(capsys):
    """Run the command with --json: stdout must be one valid document, stderr silent."""

    def run(*argv: str) -> dict:
        assert main([*argv, "--json"]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        document = json.loads(captured.out)  # fails on anything but exactly one document
        jsonschema.validate(document, SCHEMA)
        return document

    return run


def test_version_does_not_import_torch():
    code = (
        "import sys; from draftnorm.scripts.main import main; code = main(['--version']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout) == (0, f"draftnorm {__version__}\n")


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("speculative_decode", "speculate"),
        ("generate", "generate"),
        ("benchmark", "benchmark"),
        ("benchmark_decode", "benchmark decode"),
        ("benchmark_speculate", "benchmark speculate"),
        ("benchmark_ladder", "benchmark ladder"),
    ],
)
def test_modules_run_as_files_from_anywhere(module, command, tmp_path):
    script = [sys.executable, "-E", "-s", ROOT / "scripts" / f"{module}.py", "--help"]
    run = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"usage: draftnorm {command} ")


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["frobnicate"],
        ["benchmark"],
        ["speculate", "--no-such-option"],
        ["speculate", "--draft-length", "0"],
        ["speculate", "--draft-length", "16"],
        ["speculate", "--draft-length", "few"],
        ["speculate", "--acceptance", "sometimes"],
        ["generate", "--max-new-tokens", "-1"],
        ["generate", "--context", "0"],
        ["generate", "--draft", "ngram"],
        ["generate", "--prompt", "a", "--prompt-file", "b"],
        ["benchmark", "decode", "-p", ","],
        ["train", "corpus", "--root", "/nowhere/at/all"],
        ["benchmark", "exactness", "--rows", ""],
    ],
)
def test_wrong_usage_is_exit_code_2(argv, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("usage: draftnorm")


def test_generate_document(make_checkpoint, run_json):
    target = make_checkpoint()
    document = run_json("generate", "--target", str(target), "--prompt", "hello", *SHORT)
    assert document["command"].startswith(f"draftnorm generate --target {target}")
    assert len(document["token_ids"]) == 12 and document["stop_reason"] == "length"
    assert document["prompt_tokens"] == 5  # byte-level, and there is no chat template
    assert document["plain"]["tokens_per_second"] > 0
    assert set(document["speculative"].values()) == {None}
    layer = 64 * 32 + 32 * 32 + 3 * 64 * 32 + 2 * 32  # qkv, output, feed-forward, two norms
    assert document["target"]["parameters"] == 257 * 32 + 2 * layer + 32
    assert document["identical"] is None and document["draft"]["name"] == "none"


@pytest.mark.parametrize("temperature", ["0", "0.9"])
def test_speculation_with_any_drafter_changes_nothing(temperature, make_checkpoint, run_json):
    target, draft = make_checkpoint("target"), make_checkpoint("draft", seed=1)
    argv = ["--target", str(target), "--prompt", "abcabcabc", "--temperature", temperature]
    argv += ["--seed", "7", *SHORT]
    plain = run_json("generate", *argv)
    for drafter in ("ngram", str(draft), str(target)):
        document = run_json("speculate", *argv, "--draft", drafter, "--compare")
        assert document["token_ids"] == plain["token_ids"]
        assert document["text"] == plain["text"]
        assert document["identical"] is True and document["first_difference"] is None
        assert document["speedup"] > 0 and document["speedup_end_to_end"] > 0
    # The last drafter, the target itself, is always right.
    assert document["speculative"]["acceptance_rate"] == 1.0
    assert document["predicted_speedup"] > 0


def test_without_a_prompt_it_compares_on_the_built_in_one(make_checkpoint, run_json):
    target = make_checkpoint(max_position_embeddings=2048)
    document = run_json("speculate", "--target", str(target), *SHORT)
    assert document["identical"] is True and document["draft"]["name"] == "ngram"
    assert document["prompt_tokens"] == len(checkpoints.built_in_prompt("any other").encode())


def test_rejection_sampling_draws_and_reports_a_seed(make_checkpoint, run_json):
    target = str(make_checkpoint())
    argv = ["speculate", "--target", target, "--draft", target, "--prompt", "ab", *SHORT]
    argv += ["--temperature", "1", "--acceptance", "rejection", "--draft-length", "3"]
    first = run_json(*argv)
    assert first["acceptance"] == "rejection" and first["draft_length"] == 3
    again = run_json(*argv, "--seed", str(first["sampling"]["seed"]))
    assert again["token_ids"] == first["token_ids"]
    assert run_json(*argv)["sampling"]["seed"] != first["sampling"]["seed"]


def test_piped_text_is_plain_and_numbers_go_to_stderr(make_checkpoint, run_json, capsys):
    argv = ["--target", str(make_checkpoint()), "--prompt", "abab", *SHORT]
    text = run_json("generate", *argv)["text"]
    assert main(["speculate", *argv, "--draft", "ngram", "--compare"]) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip("\n") == text.rstrip("\n")
    assert captured.err.rstrip().endswith("identical: yes")
    assert "\x1b" not in captured.out + captured.err
    assert "accepted / drafted" in captured.err  # definitions come with the numbers


def test_a_name_is_no_markup(make_checkpoint, capsys):
    target = str(make_checkpoint("a[red]b :smile:"))
    assert main(["generate", "--target", target, "--prompt", "a", *SHORT]) == 0
    assert target in capsys.readouterr().err.replace("\n", "")


def test_drawn_seed_is_printed(make_checkpoint, capsys):
    argv = ["generate", "--target", str(make_checkpoint()), "--prompt", "a", *SHORT]
    assert main([*argv, "--temperature", "1"]) == 0
    assert "seed " in capsys.readouterr().err


def test_prompt_from_file_and_standard_input(make_checkpoint, run_json, tmp_path, monkeypatch):
    argv = ["generate", "--target", str(make_checkpoint()), *SHORT]
    expected = run_json(*argv, "--prompt", "häh?\n")["token_ids"]
    (tmp_path / "prompt.txt").write_text("häh?\n", encoding="utf-8")
    assert run_json(*argv, "--prompt-file", str(tmp_path / "prompt.txt"))["token_ids"] == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("häh?\n"))
    assert run_json(*argv, "--prompt", "-")["token_ids"] == expected


def test_chat_template_system_and_raw(make_checkpoint, run_json):
    target = make_checkpoint()
    (target / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    argv = ["generate", "--target", str(target), "--prompt", "hi", *SHORT]
    assert run_json(*argv)["prompt_tokens"] == len("<user>hi")
    assert run_json(*argv, "--system", "s")["prompt_tokens"] == len("<system>s<user>hi")
    assert run_json(*argv, "--raw")["prompt_tokens"] == len("hi")


def test_stop_text_ends_the_output_before_it(make_checkpoint, run_json):
    argv = ["generate", "--target", str(make_checkpoint()), "--prompt", "hello", *SHORT]
    text = run_json(*argv)["text"]
    stopped = run_json(*argv, "--stop", "never there", "--stop", text[4:6])
    assert stopped["text"] == text[: text.index(text[4:6])]
    assert stopped["stop_reason"] == "stop_string"


def test_exact_difference_fails_on_cuda_alone():
    difference = {
        "position": 3,
        "plain_text": "a",
        "speculative_text": "b",
        "top_two_gap": 0.5,
    }
    speed = {"tokens_per_second": 1.0}
    document = {"plain": speed, "speculative": speed, "first_difference": difference}
    document |= {"identical": False, "acceptance": "exact", "hardware": {"device": "cuda"}}
    with pytest.raises(ValueError, match=r"from token 3 on .*top-two gap 0\.5"):
        check_exactness(document)
    check_exactness(document | {"hardware": {"device": "cpu"}})
    check_exactness(document | {"acceptance": "rejection"})
    check_exactness(document | {"identical": True})


def test_checkpoint_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    assert checkpoints.resolve("here") == Path("here")

    with pytest.raises(ValueError, match="draftnorm fetch smollm2-135m"):
        checkpoints.resolve("smollm2-135m")
    (tmp_path / "checkpoints" / "smollm2-135m").mkdir(parents=True)
    assert checkpoints.resolve("smollm2-135m") == Path("checkpoints/smollm2-135m")

    plan = SimpleNamespace(sizes={"config.json": 1_000, "model.safetensors": 2_500_000_000})
    monkeypatch.setattr(hub, "plan_hub", lambda *_: plan)
    with pytest.raises(ValueError, match=r"run `draftnorm fetch some/model` \(2\.50 GB\)"):
        checkpoints.resolve("some/model")
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    references = tmp_path / "hub" / "models--some--model" / "refs"
    references.mkdir()
    (references / "main").write_text("abc")
    assert checkpoints.resolve("some/model") == snapshot

"""The JSON document: its ratios by hand, its identity report, its schema; and the benchmark's."""

import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import torch

from draftnorm import load_model, load_tokenizer
from draftnorm.decoding.request import Request
from draftnorm.decoding.statistics import Cycle, Result, SpeculationStatistics
from draftnorm.scripts import benchmark_decode, benchmark_report, report
from draftnorm.scripts.checkpoints import Loaded
from draftnorm.scripts.main import main

PLAIN = Result(
    text="abcde",
    token_ids=(1, 2, 3, 4, 5),
    prompt_tokens=3,
    stop_reason="length",
    prefill_seconds={"target": 0.9, "draft": None},
    time_to_first_token=1.0,
    seconds=4.0,
    tokens_per_second=1.0,
    speculation=None,
)
# Two cycles commit four tokens: three accepted drafts of four, one of two cycles' own discarded.
CYCLES = [
    Cycle(drafted=2, accepted=2, draft_seconds=0.1, verify_seconds=0.4),
    Cycle(drafted=2, accepted=1, draft_seconds=0.1, verify_seconds=0.4),
]
SPECULATIVE = dataclasses.replace(
    PLAIN,
    seconds=2.0,
    tokens_per_second=2.0,
    speculation=SpeculationStatistics.of(CYCLES, committed=4),
)


def build(path, **changes):
    loaded = Loaded(
        name="tiny",
        path=path,
        model=load_model(path, device="cpu"),
        tokenizer=load_tokenizer(path),
        seconds=0.25,
    )
    args = SimpleNamespace(
        command_line="draftnorm speculate", draft_length="auto", acceptance="exact"
    )
    request = Request.of(loaded.model.config, loaded.tokenizer, [10, 11, 12])
    runs = {"draft": "ngram", "plain": PLAIN, "speculative": SPECULATIVE} | changes
    document = report.build_document(args, request, loaded, **runs)
    schema = Path(report.__file__).with_name("speculate.schema.json").read_text()
    jsonschema.validate(json.loads(report.dump(document)), json.loads(schema))
    return document


def test_speed_ups_by_hand():
    numbers = report.compare(PLAIN, SPECULATIVE)
    assert numbers["speedup"] == 2.0  # 2 tokens/s over 1
    assert numbers["speedup_end_to_end"] == pytest.approx((5 / 3) / (5 / 5))
    # 2 tokens a cycle · 1 s a plain token / 0.5 s a cycle
    assert numbers["predicted_speedup"] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("tokens", "position", "pair"),
    [((1, 2, 9, 4, 5), 2, (3, 9)), ((1, 2), 2, (3, None)), ((9,), 0, (1, 9))],
)
def test_first_difference_is_found_and_explained(tokens, position, pair, make_checkpoint):
    path = make_checkpoint()
    document = build(path, speculative=dataclasses.replace(SPECULATIVE, token_ids=tokens))
    assert document["identical"] is False
    difference = document["first_difference"]
    assert difference["position"] == position
    assert (difference["plain_token"], difference["speculative_token"]) == pair
    # The gap by the model's other path, which has no cache.
    with torch.no_grad():
        logits_V = load_model(path, device="cpu")(
            torch.tensor([[10, 11, 12, *PLAIN.token_ids[:position]]])
        )[0, -1]
    first, second = logits_V.topk(2).values.tolist()
    assert difference["top_two_gap"] == pytest.approx(first - second, rel=1e-3, abs=1e-4)


def test_interrupted_runs_are_not_compared(make_checkpoint):
    interrupted = dataclasses.replace(SPECULATIVE, stop_reason="interrupted", token_ids=(1,))
    document = build(make_checkpoint(), speculative=interrupted)
    assert document["identical"] is None and document["speedup"] is None


def test_checkpoint_is_identified_by_its_files(make_checkpoint):
    path = make_checkpoint()
    document = build(path, draft="none", speculative=None)
    config = hashlib.sha256((path / "config.json").read_bytes()).hexdigest()
    assert document["target"]["sha256"]["config"] == config
    weights = (path / "model.safetensors").read_bytes()
    header = weights[8 : 8 + int.from_bytes(weights[:8], "little")]
    assert document["target"]["sha256"]["index"] == hashlib.sha256(header).hexdigest()


def test_not_a_number_is_refused():
    with pytest.raises(ValueError):
        report.dump({"speedup": float("nan")})


def test_benchmark_counts_tokens_after_the_first_arrival(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(benchmark_decode.time, "perf_counter", lambda: next(clock))

    def engine(prompt, new_tokens, emit):
        emit([7, 8])
        emit([9])
        emit([1, 2, 3])

    timing = benchmark_decode.measure(engine, [0], 6)
    assert timing.first_token_seconds == 1.0
    assert timing.tokens_per_second == pytest.approx(4 / 3)
    assert timing.token_ids == (7, 8, 9, 1, 2, 3)


def test_benchmark_speculate_beside_transformers(make_checkpoint, capsys, tmp_path):
    pytest.importorskip("transformers")
    plot = tmp_path / "speed.png"
    argv = ["benchmark", "speculate", "--target", str(make_checkpoint()), "--device", "cpu"]
    argv += ["-p", "9,40", "-n", "12", "-r", "2", "--draft-length", "auto,3", "-o", "json"]
    assert main([*argv, "--plot", str(plot)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert document["load"]["bytes_per_second"] > 0
    engines = [row["engine"] for row in document["results"]]
    assert engines == 2 * [
        "draftnorm plain",
        "draftnorm ngram, length auto",
        "draftnorm ngram, length 3",
        "transformers greedy",
        "transformers prompt lookup",
    ]
    for row in document["results"]:
        assert row["same_tokens_as_plain"] is True  # transformers decodes the same, too
        assert row["slowest"] <= row["tokens_per_second"] <= row["fastest"]
        drafting = row["engine"].startswith("draftnorm ngram")
        assert (row["tokens_per_cycle"] is not None) == drafting
    assert [row["prompt_tokens"] for row in document["results"]] == [9] * 5 + [40] * 5
    three = document["results"][2]  # 11 of the 12 tokens are committed by cycles
    assert 1.0 <= three["tokens_per_cycle"] <= 4.0

    headline = benchmark_report.headline(document)
    assert document["hardware"]["name"] in headline and document["torch"] in headline
    table = benchmark_decode.markdown(document).splitlines()
    rows = [line for line in table if line.startswith("|")]
    assert len(rows) == 2 + 10 and len({line.count("|") for line in rows}) == 1
    comma_separated = benchmark_report.comma_separated(document).splitlines()
    assert comma_separated[0].startswith("# ") and len(comma_separated) == 2 + 10


def test_benchmark_decode_is_plain_decoding_and_n_grams(make_checkpoint, capsys):
    argv = ["benchmark", "decode", "--target", str(make_checkpoint()), "--device", "cpu"]
    assert main([*argv, "-p", "9", "-n", "6", "-r", "1", "--no-peers", "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["engine"] for row in document["results"]] == [
        "draftnorm plain",
        "draftnorm ngram, length auto",
    ]
    assert document["results"][0]["times_transformers"] is None
    assert document["transformers"] is None


def test_engines_are_not_measured_past_the_context(make_checkpoint, capsys):
    argv = ["benchmark", "decode", "--target", str(make_checkpoint()), "--device", "cpu"]
    assert main([*argv, "-p", "9,500", "-n", "13", "-r", "1"]) == 1  # the context is 512
    captured = capsys.readouterr()
    assert captured.out == "" and "-p and -n make 513 tokens, the context is 512" in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command", ["decode --shape llama-3.2-1b", "ladder", "decode --shape target --device cpu"]
)
def test_what_needs_a_gpu_says_so_in_one_line(command, capsys):
    assert main(["benchmark", *command.split()]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "GPU" in captured.err and captured.err.count("\n") == 1


def test_unknown_shapes_are_wrong_usage():
    assert main(["benchmark", "decode", "--shape", "gpt-2"]) == 2
    assert main(["benchmark", "ladder", "--shape", "target,gpt-2"]) == 2


def test_bandwidth_fraction_by_hand(monkeypatch):
    from draftnorm.scripts import step_times, timing

    monkeypatch.setattr(timing, "read_bandwidth", lambda _: 1e12)
    monkeypatch.setattr(step_times, "bytes_of_a_step", lambda _: 2e11)
    model = SimpleNamespace(device=torch.device("cuda"))
    assert report._bandwidth_fraction(model, PLAIN) == pytest.approx(4 / 4.0 * 0.2)
    assert report._bandwidth_fraction(model, SPECULATIVE) == pytest.approx(2 / 2.0 * 0.2)
    assert report._bandwidth_fraction(SimpleNamespace(device=torch.device("cpu")), PLAIN) is None


def test_compiling_and_capturing_have_their_own_keys(make_checkpoint):
    path = make_checkpoint()
    document = build(path)
    assert document["compile_seconds"] is None and document["capture_seconds"] is None
    on_a_gpu = dataclasses.replace(SPECULATIVE, compile_seconds=3.0, capture_seconds=0.5)
    document = build(path, speculative=on_a_gpu)
    assert (document["compile_seconds"], document["capture_seconds"]) == (3.0, 0.5)

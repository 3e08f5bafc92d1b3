"""`draftnorm benchmark decode --shape` and `ladder` on a tiny shape: documents, not numbers."""

import json

import pytest
import torch
from decode_support import needs_run_time_loops

from draftnorm.scripts import benchmark_report, benchmark_shape, shapes, timing
from draftnorm.scripts.main import main

TINY = dict(
    architecture="mixtral", vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=2,
    num_heads=2, num_kv_heads=1, head_size=8, num_experts=4, experts_per_token=2, expert_size=24,
)  # fmt: skip


@pytest.fixture
def run_tiny(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setitem(shapes.SHAPES, "smollm2-135m", TINY)
    monkeypatch.setattr(benchmark_shape, "LONG_PROMPT", 5)

    def run(*words: str) -> dict:
        assert main([*words, "--shape", "smollm2-135m", "-n", "2", "-o", "json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@needs_run_time_loops
def test_a_step_is_accounted_for(run_tiny) -> None:
    document = run_tiny(
        "benchmark",
        "decode",
        "-p",
        "3",
        "-r",
        "1",
        "--rows",
        "1,4",
        "--context",
        "3,300",
        "--no-peers",
    )
    # Norms 5, qkv 4·8·16, o 16·16, router 4·16, 2 of 4 experts, head; not the embedding.
    attention, router, expert = 4 * 8 * 16 + 16 * 16, 4 * 16, 3 * 24 * 16
    fixed = 5 * 16 + 2 * (attention + router) + 50 * 16
    assert document["step_bytes"] == 4 * (fixed + 2 * 2 * expert)
    (row,) = document["results"]
    assert row["engine"] == "draftnorm" and document["transformers"] is None
    assert 0 < row["slowest"] <= row["tokens_per_second"] <= row["fastest"]
    assert [row["prompt_tokens"] for row in document["prefill"]] == [3, 5]

    one, four = document["steps"][:2]
    assert [row["rows"] for row in document["steps"]] == [1, 4, 1, 4]
    assert one["experts_touched"] == 2.0 and one["times_one_row"] == one["times_bytes"] == 1.0
    assert 2.0 < four["experts_touched"] <= 4.0  # different tokens take different experts
    assert four["bytes"] == pytest.approx(4 * (fixed + 2 * four["experts_touched"] * expert))

    kernels = {row["kind"]: row for row in document["kernels"] if row["context"] == 300}
    once = {"embed", "head", "choose"}
    twice = {"self_attn.qkv_proj", "decode_attention", "self_attn.o_proj", "mlp.gate", "route_rows"}
    twice |= {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert once | twice <= kernels.keys() <= once | twice | {"normalize"}
    assert {kernels[kind]["calls"] for kind in once} == {1}
    assert {kernels[kind]["calls"] for kind in twice} == {2}
    weights = sum(row["bytes"] for kind, row in kernels.items() if kind != "decode_attention")
    assert weights == document["step_bytes"] - 4 * 5 * 16  # the norms' are not a kernel's own
    assert kernels["decode_attention"]["bytes"] == 2 * 2 * 4 * 8 * 301  # keys and values
    assert kernels["route_rows"]["limit_seconds"] is None

    table = benchmark_shape.markdown(document)
    assert "| kernels at 300 |" in table and "| the step, overlapped |" in table
    blocks = [block.splitlines() for block in table.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 3 + 2
    assert all(len({line.count("|") for line in block}) == 1 for block in blocks)
    csv = benchmark_report.comma_separated(document)
    assert len(csv.splitlines()) == 3


@needs_run_time_loops
@pytest.mark.parametrize("fits", [True, False])
def test_transformers_runs_beside_or_a_note_says_why_not(run_tiny, monkeypatch, fits) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(benchmark_shape, "measure_steps", lambda *_: {"steps": [], "kernels": []})
    if not fits:
        monkeypatch.setattr(benchmark_shape, "free_bytes", lambda device: 1000)
    document = run_tiny("benchmark", "decode", "-p", "3", "-r", "1")
    engines = [row["engine"] for row in document["results"]]
    assert engines == ["draftnorm", "transformers, static cache, compiled"][: 1 + fits]
    assert all(row["tokens_per_second"] > 0 for row in document["results"])
    assert len(document["notes"]) == (not fits)
    for note in document["notes"]:
        assert "do not fit beside ours, 1,000 are free" in note
        assert note in benchmark_shape.markdown(document)


@needs_run_time_loops
def test_every_rung_leaves_the_same_bits(run_tiny) -> None:
    document = run_tiny("benchmark", "ladder", "-p", "3", "-r", "1")
    assert [row["equal_bits"] for row in document["results"]] == [True] * 4
    assert all(row["step_seconds"] > 0 for row in document["results"])


def test_a_read_reads_everything() -> None:
    data = torch.randperm(3 * 4096, dtype=torch.int32)
    largest = torch.empty(3, dtype=torch.int32)
    timing.read(data, largest, block=4096)
    assert largest.tolist() == data.view(3, 4096).amax(dim=1).tolist()
    assert timing.read_bandwidth(torch.device("cpu")) > 0
    assert timing.product_rate(torch.device("cpu")) > 0


@needs_run_time_loops
def test_exactness_compares_every_kernel(run_tiny, monkeypatch) -> None:
    monkeypatch.setattr("draftnorm.scripts.benchmark_exactness.LADDER", (1, 3))
    monkeypatch.setattr("draftnorm.scripts.benchmark_exactness.PROMPTS", (3,))
    document = run_tiny(*"benchmark exactness --rows 2 --draft-length 2 -p 3 --steps 3".split())
    assert document["equal"] is True
    compared = {r["what"]: r["compared"] for r in document["results"] if r["level"] == "op"}
    assert compared["head"] == 2 * 1 + 3  # the first and the last alone, all three together
    assert compared["self_attn.qkv_proj"] == compared["mlp.experts.down_proj"] == 2 * 5

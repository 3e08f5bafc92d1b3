"""`draftnorm benchmark ladder` on a tiny shape: its document, not its numbers."""

import json

import pytest
from decode_support import needs_run_time_loops

from draftnorm.scripts import benchmark_ladder
from draftnorm.scripts.main import main

TINY = dict(
    architecture="mixtral", vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=1,
    num_heads=2, num_kv_heads=1, head_size=8, num_experts=4, experts_per_token=2, expert_size=24,
)  # fmt: skip


@needs_run_time_loops
def test_one_document(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_ladder, "SHAPES", {"tiny": TINY})
    command = "benchmark ladder --shape tiny --rows 1,2 -p 3 -n 2 -r 1 -o json"
    assert main(command.split()) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["step_seconds_by_rows"].keys() == {"1", "2"}
    kinds = {"ends", "qkv", "attention", "o", "router", "expert_gate_up", "expert_down", "head"}
    assert document["kernel_seconds"].keys() == kinds
    # Norms 2, qkv 4·8·16, o 16·16, router 4·16, 2 of 4 experts, head; not the embedding.
    weights = 3 * 16 + 4 * 8 * 16 + 16 * 16 + 4 * 16 + 2 * 3 * 24 * 16 + 50 * 16
    assert document["step_bytes"] == 4 * weights
    assert document["tokens_per_second"] > 0
    assert benchmark_ladder.markdown(document).count("|") > 40

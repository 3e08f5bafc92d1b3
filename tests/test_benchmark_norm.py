"""`draftnorm benchmark norm` without a GPU: what it refuses and what it prints."""

import csv
import io
import weakref

import pytest
import torch

from draftnorm.scripts import benchmark_norm, benchmark_report
from draftnorm.scripts.main import main


@pytest.fixture
def document() -> dict:
    def row(M: int, D: int, engine: str, micros: float) -> dict:
        moved = (2 * M * D + D) * 2
        return {
            "rows": M,
            "hidden": D,
            "engine": engine,
            "calls": 32,
            **benchmark_norm._spread("device", [micros * 1e-6] * 3),
            **benchmark_norm._spread("wall", [20e-6] * 3),
            "bytes": moved,
            "gigabytes_per_second": moved / micros / 1e3,
            "copy_bytes_per_second": 4e12,
            "times_copy_limit": micros * 1e-6 * 4e12 / moved,
        }

    results = [row(65536, 1024, "inference", 70.0), row(65536, 1024, "torch", 84.0)]
    results += [row(1, 64, "inference", 1.1), row(1, 64, "torch", 1.7)]
    return {
        "hardware": {"name": "NVIDIA H200"},
        **{"draftnorm": "0.1.0", "torch": "2.11", "triton": "3.6.0", "liger-kernel": None},
        "date": "2026-11-24T00:00:00+00:00",
        "dtype": "bfloat16",
        "repeats": 20,
        "copy_bytes_per_second": 4e12,
        "results": results,
    }


def test_markdown_sorts_the_shapes(document):
    lines = benchmark_norm.markdown(document).splitlines()
    assert (
        benchmark_report.headline(document)
        == "NVIDIA H200 · draftnorm 0.1.0 · torch 2.11 · triton 3.6.0 · 2026-11-24"
    )
    rows = [line for line in lines if line.startswith("| ") and "×" in line[:20]]
    # (2 · 65536 · 1024 + 1024) · 2 bytes at 4 TB/s are 67.11 µs; 70 µs are 1.043 times that.
    assert "| 65,536 × 1,024 | 67.11 | 70.00 | 84.00 | 3,835 | 1.043 |" in rows
    assert rows[1] == "| 1 × 64 | – | 1.10 | 1.70 | 0 | – |"
    assert {line.count("|") for line in rows[:3]} == {7}


def test_csv_is_one_line_a_measurement(document):
    text = benchmark_report.comma_separated(document)
    rows = list(csv.DictReader(io.StringIO(text.split("\n", 1)[1])))
    assert [row["engine"] for row in rows] == ["inference", "torch"] * 2


@pytest.mark.parametrize("D", [64, 128, 256, 512, 576, 960, 1024, 4096, 5120, 16384])
@pytest.mark.parametrize("M", [1, 8, 2048, 65536])
def test_a_graph_hides_its_replay_and_its_ring_exceeds_the_cache(M, D):
    # Measured on an H200: a replay costs 4.4 µs beside calls as long as a copy of their bytes, and
    # 8.4 µs beside launches of one program, of which the shortest norm takes 0.7 µs.
    l2_bytes, bytes_per_second = 60 * 2**20, 4.3e12
    call_bytes = (2 * M * D + D) * 2
    inputs, rounds = benchmark_norm.graph_size(call_bytes, l2_bytes)
    call_seconds = max(call_bytes / bytes_per_second, 0.7e-6)
    replay_seconds = 4.4e-6 if M == 65536 else 8.4e-6
    assert replay_seconds / (inputs * rounds) < 0.01 * call_seconds
    assert (inputs - 1) * call_bytes >= 4 * l2_bytes or inputs == benchmark_norm.MAX_INPUTS
    # Time and memory: one round more than needed at most, and outputs as large as the inputs.
    assert inputs * (rounds - 1) * call_seconds < 2.1e-3
    assert inputs * call_bytes < 2 * max(call_bytes, 4 * l2_bytes) + call_bytes


def test_a_graph_goes_round_its_inputs_and_keeps_one_output_an_input():
    inputs, calls, alive = [torch.full((), float(i)) for i in range(3)], [], []

    def engine(x):
        # While a call runs, the outputs of the last three still stand, and no older one.
        assert all(y() is not None for y in alive[-3:])
        assert all(y() is None for y in alive[:-3])
        y = x.clone()
        calls.append(x.item())
        alive.append(weakref.ref(y))
        return y

    def work_is_run(work, repeats):
        kept = work()
        assert [y.item() for y in kept] == [0, 1, 2]
        return [8.0] * repeats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_norm.timing, "replay_seconds", work_is_run)
        assert benchmark_norm.device_seconds(engine, inputs, 4, 2) == [8.0 / 12] * 2
    assert calls == [0, 1, 2] * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_exit_code_1(capsys):
    assert main(["benchmark", "norm"]) == 1
    assert capsys.readouterr().err.count("\n") == 1

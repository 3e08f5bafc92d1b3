"""`draftnorm benchmark norm` without a GPU: what it refuses and what it prints."""

import csv
import io

import pytest
import torch

from draftnorm.scripts import benchmark_norm, report
from draftnorm.scripts.main import main


@pytest.fixture
def document() -> dict:
    def row(M: int, D: int, engine: str, micros: float) -> dict:
        moved = (2 * M * D + D) * 2
        return {
            "rows": M,
            "hidden": D,
            "engine": engine,
            **benchmark_norm._spread("device", [micros * 1e-6] * 3),
            **benchmark_norm._spread("wall", [20e-6] * 3),
            "bytes": moved,
            "gigabytes_per_second": moved / micros / 1e3,
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
        report.headline(document)
        == "NVIDIA H200 · draftnorm 0.1.0 · torch 2.11 · triton 3.6.0 · 2026-11-24"
    )
    rows = [line for line in lines if line.startswith("| ") and "×" in line[:20]]
    # (2 · 65536 · 1024 + 1024) · 2 bytes at 4 TB/s are 67.11 µs; 70 µs are 1.043 times that.
    assert "| 65,536 × 1,024 | 67.11 | 70.00 | 84.00 | 3,835 | 1.043 |" in rows
    assert rows[1] == "| 1 × 64 | – | 1.10 | 1.70 | 0 | – |"
    assert {line.count("|") for line in rows[:3]} == {7}


def test_csv_is_one_line_a_measurement(document):
    text = report.comma_separated(document)
    rows = list(csv.DictReader(io.StringIO(text.split("\n", 1)[1])))
    assert [row["engine"] for row in rows] == ["inference", "torch"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_exit_code_1(capsys):
    assert main(["benchmark", "norm"]) == 1
    assert capsys.readouterr().err.count("\n") == 1

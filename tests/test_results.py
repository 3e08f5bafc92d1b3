"""The measurements under results/: each says what produced it, and its numbers agree."""

import json
from pathlib import Path

import pytest

from draftnorm.scripts import benchmark_shape

RESULTS = sorted((Path(__file__).resolve().parents[1] / "results").glob("*.json"))


def check_shape(document: dict) -> None:
    """What `benchmark decode --shape` promises of its document; seconds are sound, not fast."""
    bandwidth, limit = document["read_bytes_per_second"], document["limit_tokens_per_second"]
    assert limit == pytest.approx(bandwidth / document["step_bytes"])
    for row in document["results"]:
        assert row["slowest"] <= row["tokens_per_second"] <= row["fastest"]
        assert row["limit_share"] == pytest.approx(row["tokens_per_second"] / limit)
    steps = {(row["context"], row["rows"]): row for row in document["steps"]}
    for (context, rows), row in steps.items():
        one = steps[context, 1]
        assert row["times_one_row"] == pytest.approx(row["seconds"] / one["seconds"])
        assert row["times_bytes"] == pytest.approx(row["bytes"] / one["bytes"])
        if row["experts_touched"] is None:
            assert row["bytes"] == document["step_bytes"]
        else:
            assert one["experts_touched"] <= row["experts_touched"]
            assert row["experts_touched"] <= rows * one["experts_touched"]
    for row in document["kernels"]:
        assert row["share"] == pytest.approx(row["seconds"] / steps[row["context"], 1]["seconds"])
        if row["limit_seconds"] is not None:
            assert row["limit_seconds"] == pytest.approx(row["bytes"] / bandwidth)
        # What the L2 keeps is read faster than memory allows, and noise may hide a short kernel.
        assert row["seconds"] >= 0
    # The keys and values of a context apart, all kernels together read what a step reads, but for
    # the norms' own weights.
    for context in {context for context, _ in steps}:
        kernels = [row for row in document["kernels"] if row["context"] == context]
        weights = sum(row["bytes"] for row in kernels if row["kind"] != "decode_attention")
        assert 0.99 * document["step_bytes"] < weights <= document["step_bytes"]
    assert benchmark_shape.markdown(document).count("| the step, overlapped |") == len(
        {context for context, _ in steps}
    )


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_a_result_says_what_produced_it(file: Path) -> None:
    document = json.loads(file.read_text())
    for key in ("schema", "draftnorm", "date", "command", "torch"):
        assert document[key], key
    assert document["hardware"]["name"] and document["hardware"]["cores"] > 0
    if document["schema"] == benchmark_shape.SCHEMA:
        check_shape(document)


def test_the_check_of_a_shape_notices_a_number_that_was_edited() -> None:
    def row(context: int, rows: int, seconds: float) -> dict:
        return dict(context=context, rows=rows, seconds=seconds, experts_touched=None, bytes=1000,
                    times_one_row=seconds / 1e-6, times_bytes=1.0)  # fmt: skip

    document = dict(
        read_bytes_per_second=1e9, product_flops_per_second=1e12, step_bytes=1000,
        limit_tokens_per_second=1e6, shape="x", parameters=500, dtype="bfloat16", notes=[],
        triton_cache="empty", compile_seconds=9.0, capture_seconds=1.0, next_session_seconds=1.0,
        extra_memory_bytes=None, prefill=[],
        results=[dict(prompt_tokens=1, new_tokens=1, engine="x", tokens_per_second=5e5, slowest=4e5,
                      fastest=6e5, limit_share=0.5, first_token_seconds=0.1, warm_up_seconds=1.0)],
        steps=[row(64, 1, 1e-6), row(64, 5, 1.5e-6)],
        kernels=[dict(context=64, kind="head", calls=1, seconds=1.2e-6, bytes=1000, share=1.2,
                      limit_seconds=1e-6)],
    )  # fmt: skip
    check_shape(document)
    document["steps"][1]["times_one_row"] = 1.04
    with pytest.raises(AssertionError):
        check_shape(document)

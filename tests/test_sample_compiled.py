"""What the sampling kernels compile to for sm_90, without a GPU."""

import re

import pytest
import torch
from test_decode_compiled import LARGE, SMALL, Launch, Recorder, make_step
from test_decode_compiled import launches as step_launches  # noqa: F401 - a fixture

from draftnorm.kernels import rms_norm, sample
from draftnorm.kernels.cycle import ENDINGS, Text

pytestmark = pytest.mark.skipif(rms_norm.INTERPRETED, reason="compiles for a GPU")
VOCABULARY = 128256


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    recorded: list[Launch] = []
    for name in ("_race_kernel", "_decide_kernel"):
        monkeypatch.setattr(sample, name, Recorder(getattr(sample, name), recorded))
    return recorded


def launch(rows: int, rows_per_sequence: int, end: str = "asked") -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sample.sample(
        meta(rows), meta(rows, VOCABULARY, dtype=torch.float32),
        sample.Draw(
            positions_M=meta(rows), rows_per_sequence=rows_per_sequence,
            settings_BW=meta(rows // rows_per_sequence, sample.WORDS, dtype=torch.int64),
        ),
        workspace=sample.SampleWorkspace.allocate(rows, VOCABULARY, "meta"), rows=rows,
        pdl={"PDL": True, "launch_pdl": True},
        text=Text.allocate(64, torch.device("meta")), end=end,
    )  # fmt: skip


def test_the_number_of_rows_compiles_nothing_new(launches: list[Launch]) -> None:
    for rows, rows_per_sequence in ((1, 1), (5, 5), (16, 16), (16, 1), (64, 4), (144, 9)):
        launch(rows, rows_per_sequence)
    assert len(set(launches)) == 2


@pytest.mark.parametrize("end", ENDINGS)
def test_nothing_is_touched_before_the_wait(launches: list[Launch], end: str) -> None:
    launch(1, 1, end)
    for one in launches:
        before, *after = one.ptx().split("griddepcontrol.wait")
        assert len(after) == 1
        assert not re.search(r"\b(ld|st|atom|red)\.global", before)
        assert "griddepcontrol.launch_dependents" in after[0]
        assert ".local" not in after[0]  # no array of a thread lives in memory
        assert "lg2.approx" not in after[0]  # wrong near u = 1, where the winners are


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "large"])
def test_so_is_the_noise_of_the_head_in_registers_and_accurate(
    config: dict,
    step_launches: list[Launch],  # noqa: F811
) -> None:
    step = make_step(config, sample.pack_settings(temperature=0.8)[None])
    for rows in (1, 16):
        step_launches.clear()
        step.launch(rows, 8, "cycle")
        (head,) = (x for x in step_launches if dict(x.constants).get("EPILOGUE") == "argmax")
        ptx = head.ptx()
        assert "settings_ptr" not in dict(head.constants)
        assert ".local" not in ptx and "lg2.approx" not in ptx

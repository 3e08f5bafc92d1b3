"""Shared by tests of decoding on a GPU: after its first token a generation is in a steady state."""

import pytest
import torch
from triton import knobs

from draftnorm.decoding.generation import Generation
from draftnorm.model.decode_run import DecodeRun
from draftnorm.model.decode_step import DecodeStep


def plain_tokens(step: DecodeStep, token: int, count: int) -> list[int]:
    """Tokens after this one, by cycles without drafts."""
    return [result.tokens[0] for result in DecodeRun(step).cycles([token], count)]


def check_nothing_is_compiled_and_nothing_allocated(
    run: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode `run` to its end: no kernel and no graph after one token, no memory after 100."""
    next(run)
    graphs = len(run.decoder.engine.graphs)
    late: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda *, repr, **_: late.append(repr))
    for _ in run:
        if len(run._transcript.output) >= 100:
            break
    before = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]
    assert len(list(run)) > 0
    assert late == []
    assert len(run.decoder.engine.graphs) == graphs
    after = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]
    assert after == before

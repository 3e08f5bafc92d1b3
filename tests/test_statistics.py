"""The definitions of statistics.py on cycles counted by hand."""

import pytest

from draftnorm.decoding.statistics import Cycle, SpeculationStatistics


def test_definitions() -> None:
    outcomes = [(3, 3), (3, 1), (3, 0), (0, 0), (2, 2)]  # (drafted, accepted)
    cycles = [
        Cycle(
            drafted=d, accepted=a, draft_seconds=0.5 * d, verify_seconds=1.0, catch_up_seconds=0.25
        )
        for d, a in outcomes
    ]
    statistics = SpeculationStatistics.of(cycles, committed=10)
    assert (statistics.cycles, statistics.drafted, statistics.accepted) == (5, 11, 6)
    assert statistics.discarded == 1  # 5 own + 6 accepted, 10 of which were output
    assert statistics.tokens_per_cycle == 2.0
    assert statistics.acceptance_rate == pytest.approx(6 / 11)
    # First drafts: 4 tried, 3 held. Second: tried by those 3, held by 2. Third: tried by 1 of them.
    assert statistics.acceptance_by_position == pytest.approx((3 / 4, 2 / 3, 1.0))
    assert statistics.draft_seconds == pytest.approx(5.5 + 5 * 0.25)
    assert statistics.verify_seconds == 5.0


def test_a_position_never_tested_is_left_out() -> None:
    statistics = SpeculationStatistics.of([Cycle(drafted=3, accepted=0, verify_seconds=1.0)], 1)
    assert statistics.acceptance_by_position == (0.0,)


def test_nothing_measured_is_none() -> None:
    empty = SpeculationStatistics.of([], 0)
    assert empty.tokens_per_cycle is None and empty.acceptance_rate is None
    plain = SpeculationStatistics.of([Cycle(drafted=0, accepted=0, verify_seconds=1.0)], 1)
    assert plain.tokens_per_cycle == 1.0 and plain.acceptance_rate is None

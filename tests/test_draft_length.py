"""The automatic draft length under a fake clock: what it finds, loses and comes back to."""

import random
from collections import deque
from collections.abc import Callable

import pytest
from fake_model import FakeModel, ScriptedDrafter

from draftnorm.decoding.draft_length import MAX_DRAFT_LENGTH, AutoDraftLength, FixedDraftLength
from draftnorm.decoding.generation import generate
from draftnorm.decoding.speculation import speculate
from draftnorm.decoding.statistics import Cycle

Verify = Callable[[int], float]


def staircase(rows: int) -> float:
    """A CPU computing rows in groups of four."""
    return float(-(-rows // 4))


def flat(rows: int) -> float:
    """A GPU reading weights: a row more costs two percent."""
    return 1 + 0.02 * (rows - 1)


def steep(rows: int) -> float:
    """A mixture of experts: each row brings its own."""
    return 1 + 0.35 * (rows - 1)


def simulate(
    length, text: list[float], draft: float, verify: Verify, *, ahead: int = 0,
    known: list[bool] | None = None, hurried: bool = False, seed: int = 0,
) -> tuple[float, list[tuple[int, int]]]:  # fmt: skip
    """Decode text whose token i a draft foresees with probability text[i].

    Returns the time, in plain steps, and (position, drafts) of each cycle. Catching up on a missed
    token costs a twentieth of a draft, as a prefill does. A GPU has been told the lengths of
    `ahead` cycles more when one is observed, and verifies rows for drafts that are not there: those
    of cycles that begin where the text is not `known`.
    """  # fmt: skip
    rng = random.Random(seed)
    seconds, position, missed, cycles, told = 0.0, 0, 0, [], deque()
    while position < len(text):
        while len(told) <= ahead:
            told.append(length.next())
        asked = min(told.popleft(), len(text) - position - 1)
        drafted = asked if known is None or known[position] else 0
        accepted = 0
        while accepted < drafted and rng.random() < text[position + accepted]:
            accepted += 1
        cycle = Cycle(
            drafted=drafted,
            accepted=accepted,
            absent=asked - drafted,
            catch_up_seconds=0.05 * draft * missed if asked else 0.0,
            draft_seconds=draft * asked,
            verify_seconds=verify(asked + 1),
        )
        missed = 0 if asked else missed + 1
        cycles.append((position, asked))
        seconds += cycle.seconds
        position += accepted + 1
        length.observe(cycle, hurried=hurried)
    return seconds, cycles


@pytest.mark.parametrize("draft", [0.0, 0.05, 0.1, 0.25])
@pytest.mark.parametrize("verify", [staircase, flat, steep])
@pytest.mark.parametrize("tokens", [256, 1000])
@pytest.mark.parametrize("ahead", [0, 2])
def test_loses_at_most_3_percent_on_random_text(
    draft: float, verify: Verify, tokens: int, ahead: int
) -> None:
    for chance in (0.0, 0.01):  # of a lucky guess
        for seed in range(3):
            length, text = AutoDraftLength(), [chance] * tokens
            seconds, _ = simulate(length, text, draft, verify, ahead=ahead, seed=seed)
            assert seconds <= 1.03 * tokens


def test_a_verify_that_seems_cheaper_than_a_plain_step_does_not_end_drafting() -> None:
    length, blocks = AutoDraftLength(), []
    for _ in range(3 * AutoDraftLength.LONGEST_RUN):
        blocks.append(length.next())
        drafts = blocks[-1] > 0
        seconds = dict(draft_seconds=1.2 * drafts, verify_seconds=0.6 if drafts else 1.0)
        length.observe(Cycle(drafted=blocks[-1], accepted=0, **seconds))
    assert any(blocks[-AutoDraftLength.LONGEST_RUN - 1 :])


@pytest.mark.parametrize("draft", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("verify", [staircase, flat])
@pytest.mark.parametrize("between", [60, 100, 250, 600])
def test_comes_back_within_64_tokens(draft: float, verify: Verify, between: int) -> None:
    """Easy, random, easy: drafting in earnest again, however long the random part was."""
    text = [1.0] * 100 + [0.0] * between + [1.0] * 120
    _, cycles = simulate(AutoDraftLength(), text, draft, verify)
    back = 100 + between
    during = [drafts for position, drafts in cycles if 130 <= position < back]
    if draft > 0:  # where a rejected draft costs next to nothing it may go on
        assert sum(drafts > 0 for drafts in during) <= len(during) / 3
    assert next(position for position, drafts in cycles if position >= back and drafts >= 3) <= (
        back + 64
    )


@pytest.mark.parametrize("verify", [staircase, flat, steep])
@pytest.mark.parametrize("draft", [0.02, 0.1, 0.25])
@pytest.mark.parametrize("chance", [0.3, 0.6, 0.8, 0.95])
def test_is_near_the_best_fixed_length(verify: Verify, draft: float, chance: float) -> None:
    """Within 10 % of the best of all fixed lengths and plain decoding, averaged over seeds."""
    assert seconds_beside_best_fixed([chance] * 600, draft, verify, seeds=6) <= 1.1


@pytest.mark.parametrize("verify", [staircase, steep])
@pytest.mark.parametrize("draft", [0.1, 0.25])
@pytest.mark.parametrize("chance", [0.8, 0.9])
def test_learns_within_128_tokens(verify: Verify, draft: float, chance: float) -> None:
    """One bad guess at the start must not silence a good draft for a third of a short text."""
    assert seconds_beside_best_fixed([chance] * 128, draft, verify, seeds=40) <= 1.065


def seconds_beside_best_fixed(
    text: list[float], draft: float, verify: Verify, *, seeds: int, ahead: int = 0
) -> float:
    class Never:
        idle = len(text)

        def next(self) -> int:
            return 0

        def observe(self, cycle: Cycle, *, hurried: bool) -> None: ...

    def total(make: Callable) -> float:
        runs = (simulate(make(), text, draft, verify, ahead=ahead, seed=n) for n in range(seeds))
        return sum(seconds for seconds, _ in runs)

    fixed = [lambda n=n: FixedDraftLength(n) for n in range(1, MAX_DRAFT_LENGTH + 1)]
    return total(AutoDraftLength) / min(map(total, [Never, *fixed]))


def test_one_slow_call_is_not_believed_for_good() -> None:
    """A verify that takes ten times as long once, early, as first calls do."""
    for slow in range(6):
        calls = iter(range(10**6))

        def disturbed(rows: int, slow: int = slow, calls=calls) -> float:
            return flat(rows) * (10 if next(calls) == slow else 1)

        seconds, cycles = simulate(AutoDraftLength(), [0.95] * 600, 0.05, disturbed)
        assert max(drafts for _, drafts in cycles) > 7
        assert seconds < 0.4 * 600


def test_an_unaffordable_draft_is_given_up() -> None:
    """A draft as dear as the target: a little is lost finding out, then nothing more."""
    text = [0.9] * 2000
    seconds, cycles = simulate(AutoDraftLength(), text, 1.0, flat)
    assert seconds <= 1.03 * len(text)
    assert all(drafts == 0 for position, drafts in cycles if position > 1000)


def test_fixed_lengths() -> None:
    assert FixedDraftLength(15).next() == 15
    for wrong in (True, 0, 16, 2.5, "many"):
        with pytest.raises(ValueError, match="draft_length must be 1 … 15"):
            FixedDraftLength(wrong)


@pytest.mark.parametrize("verify", [staircase, flat])
def test_in_the_real_loop_under_a_fake_clock(verify: Verify) -> None:
    """The same through `speculate`, where target and drafter move the clock."""
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    target = FakeModel(50, on_pass=lambda rows: spend(verify(rows)))
    options = dict(max_new_tokens=400, clock=lambda: now[0])
    plain = generate(target, None, [1, 2], **options).result()
    known = [1, 2, *plain.token_ids, *[0] * MAX_DRAFT_LENGTH]

    def guess(tokens: list[int], length: int) -> list[int]:
        """Right outside of 100 … 250, wrong inside."""
        spend(0.1 * length)
        return [
            (known[i] + (100 <= i < 250)) % 50 for i in range(len(tokens), len(tokens) + length)
        ]

    fast = speculate(target, None, [1, 2], draft=ScriptedDrafter(guess), **options).result()
    assert fast.token_ids == plain.token_ids
    assert plain.seconds == pytest.approx(399)
    assert fast.seconds < 0.8 * plain.seconds
    wrong = ScriptedDrafter(lambda tokens, n: [(t + 1) % 50 for t in guess(tokens, n)])
    known = [*known[:100], *[t - 1 for t in known[100:250]], *known[250:]]
    slow = speculate(target, None, [1, 2], draft=wrong, **options).result()
    assert slow.token_ids == plain.token_ids
    assert slow.seconds <= 1.03 * plain.seconds


def test_plain_decoding_is_measured_again_while_drafting() -> None:
    """Else its cost, which all is compared with, would be a guess after EXPIRY cycles."""
    _, cycles = simulate(AutoDraftLength(), [1.0] * 4000, 0.1, flat)
    plain = [i for i, (_, drafts) in enumerate(cycles) if drafts == 0]
    gaps = [
        later - earlier for earlier, later in zip(plain, [*plain[1:], len(cycles)], strict=True)
    ]
    assert max(gaps) <= 128
    assert len(plain) < 0.03 * len(cycles)


@pytest.mark.parametrize("seed", range(20))
def test_idle_cycles_are_those_that_do_not_draft(seed: int) -> None:
    """Plain cycles run ahead of the host by `idle`: one too many would throw a draft away."""
    rng, length, due = random.Random(seed), AutoDraftLength(), 0
    for _ in range(1000):
        drafted, idle = length.next(), length.idle
        assert idle >= due
        if idle:
            assert drafted == 0
        due = max(idle - 1, 0)
        length.observe(
            Cycle(
                drafted=drafted,
                accepted=rng.randint(0, drafted),
                draft_seconds=drafted * rng.choice((0.0, 0.25, 3.0)),
                verify_seconds=1.0,
            )
        )


@pytest.mark.parametrize("draft", [0.0, 0.3])
@pytest.mark.parametrize("chance", [0.3, 0.8, 0.9, 0.95])
def test_is_near_the_best_fixed_length_with_cycles_under_way(draft: float, chance: float) -> None:
    """Within 10 %: two cycles that follow a probe are plain before its outcome is known."""
    assert seconds_beside_best_fixed([chance] * 512, draft, flat, ahead=2, seeds=12) <= 1.1


def test_text_that_begins_to_repeat_itself_is_found_out() -> None:
    """Look-up on a GPU, where a row costs little and a draft nothing, but rows are always there."""
    text, known = [1.0] * 1500, [position >= 400 for position in range(1500)]
    seconds, _ = simulate(AutoDraftLength(), text, 0.0, flat, ahead=2, known=known)
    assert seconds < 1.03 * 400 + 0.25 * 1100


def test_a_look_up_that_falls_silent_is_seldom_asked() -> None:
    text, known = [1.0] * 1500, [position < 300 for position in range(1500)]
    seconds, _ = simulate(AutoDraftLength(), text, 0.0, flat, ahead=2, known=known)
    assert seconds < 0.25 * 300 + 1.03 * 1200


def test_cycles_under_way_are_observed_as_what_they_were() -> None:
    """Plain ones that were asked for while a probe was under way are none of it."""
    length = AutoDraftLength()
    told = [length.next() for _ in range(3)]
    assert told == [0, 0, 3]
    for _ in range(40):  # one probe at a time
        told.append(length.next())
        asked = told.pop(0)
        assert sum(drafts > 0 for drafts in told) <= 1
        length.observe(Cycle(drafted=asked, accepted=0, draft_seconds=3.0, verify_seconds=1.0))


def test_who_is_hurried_thinks_seldom_and_finds_out_all_the_same() -> None:
    text = [0.95] * 400 + [0.0] * 1000
    seconds, cycles = simulate(AutoDraftLength(), text, 0.05, flat, ahead=2, hurried=True)
    assert max(drafts for _, drafts in cycles) == MAX_DRAFT_LENGTH
    assert seconds < 0.25 * 400 + 1.04 * 1000

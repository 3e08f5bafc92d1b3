"""Draft length: a fixed number, or the one that pays best, measured as decoding goes.

A cycle with γ drafts yields E(γ) = 1 + a₁ + a₁a₂ + … + a₁⋯a_γ tokens, where aᵢ is the acceptance
of draft i given that those before it were accepted, and costs t_draft(γ) + t_verify(γ). `auto`
maximises the ratio, as Leviathan et al. 2023 choose γ, but with every quantity measured. On a CPU a
verify gets dearer in steps, on a GPU it is nearly flat, and in a mixture of experts it depends on
the text. Plain decoding is one of the choices, so that text which cannot be predicted costs a few
probes and no more.
"""

import math
from bisect import bisect_left
from collections import deque
from itertools import pairwise
from statistics import median

from draftnorm.decoding.statistics import Cycle
from draftnorm.model.decode_step import ROWS, RUN_AHEAD

MAX_DRAFT_LENGTH = 15  # with the last committed token, sixteen rows: one tile


class FixedDraftLength:
    """The same length in every cycle. ValueError unless it is 1 … MAX_DRAFT_LENGTH."""

    def __init__(self, length: int) -> None:
        if type(length) is not int or not 1 <= length <= MAX_DRAFT_LENGTH:
            raise ValueError(
                f"draft_length must be 1 … {MAX_DRAFT_LENGTH} or 'auto', not {length!r}"
            )
        self.most = length
        self.idle = 0

    def next(self) -> int:
        return self.most

    def wait(self) -> None:
        pass

    def decline(self, seconds: float) -> None:
        pass

    def observe(self, cycle: Cycle) -> None:
        pass


class AutoDraftLength:
    """Call `next` for the length of a cycle and `observe` with what came of it. In between,
    `decline` if the drafter had no guess, which may change `idle`.

    Plain cycles come in runs, which a GPU works off ahead of the host: `idle` cycles from this one
    on will certainly not draft. While drafting does not pay, a probe ends each run, of the length
    that would be best. What it loses, the next run's slow start included, that run makes good.
    """

    most = MAX_DRAFT_LENGTH
    MARGIN = 1.01  # drafting must promise this much, so that noise does not start it
    CREDIT = 1.5  # plain steps that probes may lose at once: one bad guess decides nothing
    SLOW, SLOW_CREDIT = 1.0, 0.5  # plain steps: where a run's start loses that, credit is less
    SHARE = 0.018  # of the time, that they may lose beyond; the promise is 3 % in all
    LONGEST_RUN = 128  # of plain cycles: by then old measurements have expired
    FOR_GOOD = 1 << 20  # plain cycles, more than a text has
    PATIENCE = 4.0  # plain steps lost by asking in vain until drafting no longer seems to pay
    FIRST_RUN = 48  # plain cycles before a text is asked whether it repeats itself

    def __init__(self) -> None:
        self._acceptance, self._cost = Acceptance(), CycleCost()
        self._length, self._pays = CycleCost.HOPE, False
        self._lost = 0.0  # plain steps that probes have lost, less what they were allowed since
        self._missed = 0  # plain cycles since the drafter was asked
        self._in_vain = 0.0  # plain steps lost by asking since the drafter last had a guess
        self.idle = 2  # all is compared with a plain cycle that follows another

    def next(self) -> int:
        return 0 if self.idle else self._length

    def wait(self) -> None:
        """Where lone steps are dear there is credit for one probe; a look-up's needs some text."""
        self.idle = self.FIRST_RUN

    def decline(self, seconds: float) -> None:
        """Nothing to verify, as `seconds` of asking showed. Where a lone step is dear, the next run
        begins instead of a probe; while drafting pays, once the drafter has fallen silent.
        """
        start = self._start()
        lost = start + seconds / self._cost.plain_seconds
        self._in_vain += lost
        if self._in_vain > self.PATIENCE if self._pays else start >= self.SLOW:
            self._lost += lost
            self.idle = self._until_lost(0.0, start)

    def observe(self, cycle: Cycle) -> None:
        plain, paid = self.idle > 0, False
        self._cost.observe(cycle, plain=plain)
        if plain:
            self.idle -= 1
            self._missed += 1
            self._lost = max(0.0, self._lost - self.SHARE)
            if self._cost.cycles == 2 and self._start() < self.SLOW:
                self.idle = min(self.idle, RUN_AHEAD)  # no reason to wait, but they are under way
        else:
            if not self._pays:
                paid = self._charge(cycle)
            self._missed = 0
        if cycle.drafted:
            self._in_vain = 0.0
            self._acceptance.observe(cycle)
        if self.idle == 0:
            self._cost.follows = False  # a run has ended: what comes next is waited for
            self._choose()
            if not self._pays:
                self.idle = 0 if paid else self._run()  # a probe that paid is repeated at once
            elif self._cost.is_forgetting_plain():
                self.idle = 2

    def _charge(self, probe: Cycle) -> bool:
        """Put down what a probe lost; whether it paid, but for catching up."""
        plain = self._cost.plain_seconds
        worth = plain * (1 + probe.accepted)
        self._lost = max(0.0, self._lost + (probe.seconds - worth) / plain)
        self._acceptance.fade()
        paid = probe.draft_seconds + probe.target_seconds < worth
        # What the drafter missed costs more the longer one waits: then waiting does not help.
        if self._start() < self.SLOW:
            wait, failed = self.LONGEST_RUN, not probe.accepted
        else:
            wait, failed = (self._missed // ROWS + 1) * ROWS, not paid  # ROWS at a time
        if failed and probe.catch_up_seconds > self.SHARE * wait * plain:
            self._lost = math.inf
        return paid

    def _run(self) -> int:
        """Plain cycles until what probes lost is within bounds."""
        start = self._start()
        credit = self.CREDIT if start < self.SLOW else self.SLOW_CREDIT
        if self._lost - credit < self.SHARE:
            return 0
        self._lost += start
        return self._until_lost(credit, start)

    def _start(self) -> float:
        """Plain steps that a run's beginning costs, no more than one of LONGEST_RUN makes good: a
        disturbed clock may say anything.
        """
        start = self._cost.verify_seconds()[0] / self._cost.plain_seconds - 1
        return min(max(start, 0.0), self.SHARE * self.LONGEST_RUN)

    def _until_lost(self, credit: float, start: float) -> int:
        """Plain cycles until no more than `credit` is lost, in a run whose beginning costs `start`.

        Where that is dear one long run is better than several, each with a start to make good.
        """
        longest = self.LONGEST_RUN if start < self.SLOW else self.FOR_GOOD
        return int(min((self._lost - credit) / self.SHARE, longest))

    def _choose(self) -> None:
        """The best length to draft, and whether it pays."""
        # Plain lists: at this size NumPy takes 75 µs a cycle, several per cent of a small model's.
        verify_seconds = self._cost.verify_seconds()
        first, further = self._cost.draft_seconds()
        rates, tokens, reached = [0.0], 1.0, 1.0
        for length, acceptance in enumerate(self._acceptance.rates(), start=1):
            reached *= acceptance
            tokens += reached
            rates.append(tokens / (first + (length - 1) * further + verify_seconds[length]))
        self._length = max(range(1, self._cost.horizon + 1), key=rates.__getitem__)
        promise = rates[self._length] * self._cost.plain_seconds
        self._pays = promise > self.MARGIN and first > 0  # before a draft was timed all is hope


class Acceptance:
    """Running acceptance by position, recent cycles counting most.

    Positions after the first rejection were never put to the test and count neither way. One that
    was not reached lately borrows the rate of the one before it, and so is tried again.
    """

    DECAY = 0.9  # a memory of about ten cycles
    PRIOR = 1.4, 2.0  # accepted of tested at the first position, before anything is known
    BORROWED = 2.0  # weight, in observations, of the position before
    FADED = 2.0  # the weight that old evidence keeps when a probe brings new

    def __init__(self) -> None:
        self._accepted = [0.0] * MAX_DRAFT_LENGTH
        self._tested = [0.0] * MAX_DRAFT_LENGTH
        self._accepted[0], self._tested[0] = self.PRIOR

    def observe(self, cycle: Cycle) -> None:
        tested = min(cycle.accepted + 1, cycle.drafted)
        for i in range(MAX_DRAFT_LENGTH):
            self._accepted[i] = self.DECAY * self._accepted[i] + (i < cycle.accepted)
            self._tested[i] = self.DECAY * self._tested[i] + (i < tested)

    def fade(self) -> None:
        for i, weight in enumerate(self._tested):
            if weight > self.FADED:
                self._accepted[i] *= self.FADED / weight
                self._tested[i] = self.FADED

    def rates(self) -> list[float]:
        rates, weight = [0.0], 0.0
        for accepted, tested in zip(self._accepted, self._tested, strict=True):
            rates.append((accepted + weight * rates[-1]) / (tested + weight))
            weight = self.BORROWED
        return rates[1:]


class CycleCost:
    """Running seconds of drafting and of a verify by number of drafts, and of a plain token.

    A plain token is one that followed another: a GPU began its step before it was asked for. Others
    count as a verify without drafts. The median of plain tokens does not heed a single slow call.
    A length that was not measured is taken on the line through its neighbours, or through the last
    two: hope makes it tried, and then it is measured. Measurements unused for `EXPIRY` cycles are
    dropped, so that one slow call does not rule a length out for good.
    """

    WEIGHT = 0.25  # of a new sample in the running mean
    EXPIRY = 128
    HOPE = 3  # drafts worth considering before anything longer was measured
    UNKNOWN = 1.1  # past the longest measured at least so much dearer: it must promise a tenth

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=9)
        self._last_plain = 0  # cycle
        self.follows = False
        self._moments: tuple[float, ...] = ()  # means of n, s, n², n·s: n drafts took s seconds
        self._verify: dict[int, tuple[float, int]] = {}  # drafts -> (seconds, cycle of last use)
        self.cycles = 0

    def is_forgetting_plain(self) -> bool:
        """Whether plain decoding, which all is compared with, was last measured long ago."""
        return self.cycles - self._last_plain >= self.EXPIRY - 2

    @property
    def plain_seconds(self) -> float:
        return min(self._verify[0][0], median(self._plain or [math.inf]))

    @property
    def horizon(self) -> int:
        """The longest block worth considering: hope may double what was measured."""
        return min(max(self.HOPE, 2 * max(self._verify) + 1), MAX_DRAFT_LENGTH)

    def observe(self, cycle: Cycle, *, plain: bool) -> None:
        self.cycles += 1
        sample = max(cycle.target_seconds, 1e-9)  # a clock may not have moved
        if plain and self.follows:
            self._plain.append(sample)
            self._last_plain = self.cycles
        else:
            seconds, _ = self._verify.get(cycle.drafted, (sample, 0))
            seconds += self.WEIGHT * (sample - seconds)
            self._verify[cycle.drafted] = seconds, self.cycles
        self.follows = plain
        oldest = self.cycles - self.EXPIRY
        self._verify = {d: e for d, e in self._verify.items() if e[1] > oldest or d == 0}
        if cycle.drafted:
            n, s = cycle.drafted, max(cycle.draft_seconds, 1e-9)
            new = n, s, n * n, n * s
            pairs = zip(self._moments or new, new, strict=True)
            self._moments = tuple(mean + self.WEIGHT * (x - mean) for mean, x in pairs)

    def draft_seconds(self) -> tuple[float, float]:
        """Of the first draft, which on a GPU begins a run, and of each further one."""
        if not self._moments:
            return 0.0, 0.0
        n, s, n_n, n_s = self._moments
        variance = n_n - n * n
        further = (n_s - n * s) / variance if variance > 0.05 else s / n
        further = min(max(further, 0.0), s / n)
        return s - (n - 1) * further, further

    def verify_seconds(self) -> list[float]:
        """t_verify(γ) for γ = 0 … MAX_DRAFT_LENGTH."""
        measured = sorted(self._verify)
        seconds = [self._verify[drafts][0] for drafts in measured]
        # More rows never cost less, so a shorter block that seems to cost more was disturbed.
        for i in reversed(range(len(seconds) - 1)):
            seconds[i] = min(seconds[i], seconds[i + 1])
        points = list(zip(measured, seconds, strict=True))
        slopes = [(t - s) / (d - c) for (c, s), (d, t) in pairwise(points)] or [0.0]
        estimates = []
        for drafts in range(MAX_DRAFT_LENGTH + 1):
            right = bisect_left(measured, drafts)
            if right == len(measured):
                line = seconds[-1] + slopes[-1] * (drafts - measured[-1])
                estimates.append(max(line, self.UNKNOWN * seconds[-1]))
            elif right == 0:
                estimates.append(seconds[0])
            else:
                estimates.append(seconds[right] + slopes[right - 1] * (drafts - measured[right]))
        return estimates

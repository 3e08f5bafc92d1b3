"""Draft length: a fixed number, or the one that pays best, measured as decoding goes.

A cycle with γ drafts yields E(γ) = 1 + a₁ + a₁a₂ + … + a₁⋯a_γ tokens, where aᵢ is the acceptance
of draft i given that those before it were accepted, and costs γ·t_draft + t_verify(γ). `auto`
maximises the ratio, as Leviathan et al. 2023 choose γ, but with every quantity measured. On a CPU a
verify gets dearer in steps, on a GPU it is nearly flat, and in a mixture of experts it depends on
the text. γ = 0, plain decoding, is one of the choices, so that text which cannot be predicted
costs a few probes and no more.
"""

import math
from bisect import bisect_left
from itertools import pairwise

from draftnorm.decoding.statistics import Cycle

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

    def observe(self, cycle: Cycle) -> None:
        pass


class AutoDraftLength:
    """Call `next` for the length of a cycle and `observe` with what came of it."""

    most = MAX_DRAFT_LENGTH
    MARGIN = 1.03  # drafting must promise this much, so that noise does not start it
    PROBE_CREDIT = 0.5  # plain steps that probes may lose at once: one bad guess decides nothing
    PROBE_SHARE = 0.02  # of the time, that they may lose beyond; the promise is 3 % in all
    PROBE_WAIT = 256  # cycles between probes at most
    RECONSIDER = 16  # idle cycles after which an old measurement may have expired
    HOPELESS = 7.5  # a probe that lost so many plain steps was the last

    def __init__(self) -> None:
        self._acceptance, self._cost = Acceptance(), CycleCost()
        self._length = 0  # the first cycle is plain: everything is compared with it
        self._idle, self._wait = 0, 1  # cycles since the last draft, and how many are due
        self._lost = 0.0  # plain steps that probes have lost, less what they were allowed since

    def next(self) -> int:
        if self._length == 0:
            return 1 if self._idle >= self._wait else 0
        return 0 if self._cost.is_forgetting_plain() else self._length

    @property
    def idle(self) -> int:
        """How many cycles from this one on will certainly not draft."""
        if self._length:
            return 0
        due = min(self._wait - self._idle, self.RECONSIDER - self._idle % self.RECONSIDER)
        return max(math.ceil(due), 0)

    def observe(self, cycle: Cycle) -> None:
        self._cost.observe(cycle)
        if cycle.drafted:
            if self._length == 0:
                self._schedule_probe(cycle)
            self._acceptance.observe(cycle)
            self._idle = 0
        else:  # not asked for, or the drafter had nothing to say: a due probe stays due
            self._idle += 1
            self._lost = max(0.0, self._lost - self.PROBE_SHARE)
        if self._idle % self.RECONSIDER == 0:
            self._length = self._best()

    def _schedule_probe(self, probe: Cycle) -> None:
        """A probe that paid is repeated at once, another when what probes lost is within bounds."""
        self._acceptance.fade()
        self._wait = 0
        plain = self._cost.verify_seconds()[0]
        worth = plain * (1 + probe.accepted)
        if probe.draft_seconds + probe.verify_seconds < worth:
            return
        loss = (probe.seconds - worth) / plain
        self._lost += loss
        self._wait = min((self._lost - self.PROBE_CREDIT) / self.PROBE_SHARE, self.PROBE_WAIT)
        if loss > self.HOPELESS:
            # What the drafter missed costs more the longer one waits: then waiting does not help.
            self._wait = math.inf

    def _best(self) -> int:
        # Plain lists: at this size NumPy takes 75 µs a cycle, several per cent of a small model's.
        verify_seconds = self._cost.verify_seconds()
        rates, tokens, reached = [1 / verify_seconds[0]], 1.0, 1.0
        for length, acceptance in enumerate(self._acceptance.rates(), start=1):
            reached *= acceptance
            tokens += reached
            seconds = length * self._cost.draft_seconds + verify_seconds[length]
            rates.append(tokens / seconds)
        best = max(range(self._cost.horizon + 1), key=rates.__getitem__)
        return best if rates[best] > self.MARGIN * rates[0] else 0


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
    """Running seconds of a draft and of a verify by number of drafts.

    A length that was not measured is taken on the line through its neighbours, or through the last
    two: hope makes it tried, and then it is measured. Measurements unused for `EXPIRY` cycles are
    dropped, so that one slow call does not rule a length out for good.
    """

    WEIGHT = 0.25  # of a new sample in the running mean
    EXPIRY = 128
    UNKNOWN = 1.1  # past the longest measured at least so much dearer: it must promise a tenth

    def __init__(self) -> None:
        self.draft_seconds = 0.0
        self._verify: dict[int, tuple[float, int]] = {}  # drafts -> (seconds, cycle of last use)
        self._cycles = 0

    def is_forgetting_plain(self) -> bool:
        """Whether plain decoding, which all is compared with, was last measured long ago."""
        return 0 not in self._verify or self._cycles - self._verify[0][1] >= self.EXPIRY - 1

    @property
    def horizon(self) -> int:
        """The longest block worth considering: 3, then hope may double what was measured."""
        return min(max(3, 2 * max(self._verify) + 1), MAX_DRAFT_LENGTH)

    def observe(self, cycle: Cycle) -> None:
        self._cycles += 1
        sample = max(cycle.verify_seconds, 1e-9)  # a clock may not have moved
        seconds, _ = self._verify.get(cycle.drafted, (sample, 0))
        seconds += self.WEIGHT * (sample - seconds)
        self._verify[cycle.drafted] = seconds, self._cycles
        oldest = self._cycles - self.EXPIRY
        self._verify = {d: entry for d, entry in self._verify.items() if entry[1] > oldest}
        if cycle.drafted:
            a_draft = cycle.draft_seconds / cycle.drafted
            mean = self.draft_seconds or a_draft
            self.draft_seconds = mean + self.WEIGHT * (a_draft - mean)

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

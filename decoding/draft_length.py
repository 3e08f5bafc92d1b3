"""Draft length: a fixed number, or the one that pays best, measured as decoding goes.

A cycle with γ drafts yields E(γ) = 1 + a₁ + a₁a₂ + … + a₁⋯a_γ tokens, where aᵢ is the acceptance
of draft i given that those before it were accepted, and costs t_draft(γ) + t_verify(γ). `auto`
maximises the ratio, as Leviathan et al. 2023 choose γ, but with every quantity measured. On a CPU a
verify gets dearer in steps, on a GPU it is nearly flat, and in a mixture of experts it depends on
the text. Plain decoding is one of the choices, so that text which cannot be predicted costs a few
probes and no more.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median_low

from draftnorm.decoding.statistics import Cycle

MAX_DRAFT_LENGTH = 15  # with the last committed token, sixteen rows: one tile


class FixedDraftLength:
    """The same length in every cycle. ValueError unless it is 1 … MAX_DRAFT_LENGTH."""

    idle = 0

    def __init__(self, length: int) -> None:
        if type(length) is not int or not 1 <= length <= MAX_DRAFT_LENGTH:
            raise ValueError(
                f"draft_length must be 1 … {MAX_DRAFT_LENGTH} or 'auto', not {length!r}"
            )
        self.most = length

    def next(self) -> int:
        return self.most

    def observe(self, cycle: Cycle, *, hurried: bool = False) -> None:
        pass


class AutoDraftLength:
    """Call `next` for the length of a cycle and `observe` with what came of it, in the same order;
    a GPU's cycles are asked for before those under way are observed.

    While drafting does not pay, plain cycles come in runs, and a probe ends each of them, of the
    length that would be best. What it loses, that run makes good: `idle` cycles from now on will
    certainly not draft. Who is `hurried`, as a small model's cycle takes a GPU less time than the
    host takes for all this, thinks again every eighth.
    """

    most = MAX_DRAFT_LENGTH
    MARGIN = 1.01  # drafting must promise this much, so that noise does not start it
    CREDIT = 1.5  # plain steps that probes may lose at once: one bad guess decides nothing
    SHARE = 0.018  # of the time, that they may lose beyond; the promise is 3 % in all
    LONGEST_RUN = 128  # of plain cycles: by then old measurements have expired
    REACHED = 0.01  # what comes behind drafts that so seldom all hold is not worth a thought

    def __init__(self) -> None:
        self._acceptance, self._cost = Acceptance(), CycleCost()
        self._length, self._pays = CycleCost.HOPE, False
        self._lost = 0.0  # plain steps that probes have lost, less what they were allowed since
        self._paid = False  # whether the last probe was worth it, and is repeated at once
        self._under_way: deque[int] = deque()  # lengths of cycles that were not observed yet
        self.idle = 2  # all is compared with a plain cycle

    def next(self) -> int:
        if not self.idle:
            self.idle = self._run()
        length = 0 if self.idle else self._length
        self.idle = max(self.idle - 1, 0)
        self._under_way.append(length)
        return length

    def observe(self, cycle: Cycle, *, hurried: bool = False) -> None:
        asked = self._under_way.popleft() > 0
        self._cost.observe(cycle)
        if not asked:
            self._lost = max(0.0, self._lost - self.SHARE)
            return
        if not self._pays:
            self._paid = self._charge(cycle)
        if not cycle.asked:  # no room, or the drafter has fallen silent: nothing is learnt
            return
        self._acceptance.observe(cycle)
        if not (hurried and self._pays and self._cost.cycles > 16 and self._cost.cycles % 8):
            self._choose()

    def _charge(self, probe: Cycle) -> bool:
        """Put down what a probe lost; whether it paid, but for catching up."""
        plain = self._cost.plain_seconds
        worth = plain * (1 + probe.accepted)
        self._lost = max(0.0, self._lost + (probe.seconds - worth) / plain)
        self._acceptance.fade()
        # What the drafter missed costs more the longer one waits: then waiting does not help.
        if not probe.accepted and probe.catch_up_seconds > self.SHARE * self.LONGEST_RUN * plain:
            self._lost = math.inf
        return probe.asked > 0 and probe.draft_seconds + probe.verify_seconds < worth

    def _run(self) -> int:
        """Plain cycles before the next draft."""
        if not self._pays:
            if any(self._under_way):
                return 1  # a probe, whose outcome decides
            if self._cost.cycles:
                self._choose()  # what was measured long ago is forgotten
        if self._pays:
            return int(self._cost.is_forgetting_plain())
        lost = self._lost - self.CREDIT  # what probes lost comes within bounds first
        if self._paid or lost < self.SHARE:
            return 0
        return int(min(lost / self.SHARE, self.LONGEST_RUN))

    def _choose(self) -> None:
        """The best length to draft, and whether it pays."""
        # Plain numbers: at this size NumPy takes 75 µs, several per cent of a small model's cycle.
        verify_seconds = self._cost.verify_seconds()
        first, further = self._cost.draft_seconds()
        best, tokens, reached = 0.0, 1.0, 1.0
        lengths = range(1, len(verify_seconds))
        for length, acceptance in zip(lengths, self._acceptance.rates(), strict=False):
            reached *= acceptance
            tokens += reached
            rate = tokens / (first + (length - 1) * further + verify_seconds[length])
            if rate > best:
                best, self._length = rate, length
            if reached < self.REACHED:
                break
        promise = best * self._cost.plain_seconds
        self._pays = promise > self.MARGIN and first > 0  # before a draft was timed all is hope
        self._paid &= not self._pays


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
        self._accepted = [self.DECAY * weight for weight in self._accepted]
        self._tested = [self.DECAY * weight for weight in self._tested]
        for i in range(min(cycle.accepted + 1, cycle.asked)):
            self._tested[i] += 1
            self._accepted[i] += i < cycle.accepted

    def fade(self) -> None:
        for i, weight in enumerate(self._tested):
            if weight > self.FADED:
                self._accepted[i] *= self.FADED / weight
                self._tested[i] = self.FADED

    def rates(self) -> Iterator[float]:
        rate, weight = 0.0, 0.0
        for accepted, tested in zip(self._accepted, self._tested, strict=True):
            rate = (accepted + weight * rate) / (tested + weight)
            weight = self.BORROWED
            yield rate


class CycleCost:
    """Running seconds of drafting, of a verify by number of drafts, and of a plain cycle.

    The median of plain cycles does not heed a single slow call. A length that was not measured is
    taken on the line through its neighbours, or through the last two: hope makes it tried, and then
    it is measured. Measurements unused for `EXPIRY` cycles are dropped, so that one slow call does
    not rule a length out for good.
    """

    WEIGHT = 0.25  # of a new sample in the running mean
    EXPIRY = 128
    HOPE = 3  # drafts worth considering before anything longer was measured
    UNKNOWN = 1.1  # past the longest measured at least so much dearer: it must promise a tenth

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=9)
        self._last_plain = 0  # cycle
        self._moments: Sequence[float] = ()  # means of n, s, n², n·s: n drafts took s seconds
        self._verify: dict[int, tuple[float, int]] = {}  # drafts -> (seconds, cycle of last use)
        self.cycles = 0

    def is_forgetting_plain(self) -> bool:
        """Whether plain decoding, which all is compared with, was last measured long ago."""
        return self.cycles - self._last_plain >= self.EXPIRY - 2

    @property
    def plain_seconds(self) -> float:
        return median_low(self._plain)

    @property
    def horizon(self) -> int:
        """The longest block worth considering: hope may double what was measured."""
        return min(max(self.HOPE, 2 * max(self._verify, default=0) + 1), MAX_DRAFT_LENGTH)

    def observe(self, cycle: Cycle) -> None:
        self.cycles += 1
        sample = max(cycle.verify_seconds, 1e-9)  # a clock may not have moved
        if not cycle.asked:
            self._plain.append(sample)
            self._last_plain = self.cycles
        else:
            seconds, _ = self._verify.get(cycle.asked, (sample, 0))
            seconds += self.WEIGHT * (sample - seconds)
            self._verify[cycle.asked] = seconds, self.cycles
            n, s = cycle.asked, max(cycle.draft_seconds, 1e-9)
            new = n, s, n * n, n * s
            pairs = zip(self._moments or new, new, strict=True)
            self._moments = [mean + self.WEIGHT * (x - mean) for mean, x in pairs]

    def draft_seconds(self) -> tuple[float, float]:
        """Of the first draft, whose step reads two tokens, and of each further one."""
        if not self._moments:
            return 0.0, 0.0
        n, s, n_n, n_s = self._moments
        variance = n_n - n * n
        further = (n_s - n * s) / variance if variance > 0.05 else s / n
        further = min(max(further, 0.0), s / n)
        return s - (n - 1) * further, further

    def verify_seconds(self) -> list[float]:
        """t_verify(γ) for γ = 0 … `horizon`."""
        oldest = self.cycles - self.EXPIRY
        self._verify = {n: entry for n, entry in self._verify.items() if entry[1] > oldest}
        measured = [0, *sorted(self._verify)]
        seconds = [self.plain_seconds, *(self._verify[drafts][0] for drafts in measured[1:])]
        # More rows never cost less, so a shorter block that seems to cost more was disturbed.
        for i in reversed(range(len(seconds) - 1)):
            seconds[i] = min(seconds[i], seconds[i + 1])
        estimates, slope, last = [], 0.0, seconds[-1]
        for (c, s), (d, t) in pairwise(zip(measured, seconds, strict=True)):
            slope = (t - s) / (d - c)
            estimates += [s + slope * i for i in range(d - c)]
        unknown = range(1, self.horizon - measured[-1] + 1)
        beyond = [max(last + slope * i, self.UNKNOWN * last) for i in unknown]
        return [*estimates, last, *beyond]

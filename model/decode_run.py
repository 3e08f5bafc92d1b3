"""DecodeRun: cycles that a device works off one after another, while the host reads late.

Each is enqueued before the one before it has ended: its drafts come of the text on the device, by a
drafter's steps or a look-up, and what it commits is where the next one starts (kernels/cycle.py).
Plain decoding is the case without drafts. The host adds what it alone knows: how many drafts to
make, when to stop, how much room attention's grid needs at most.

    target    cycle of T = 1 + N rows      over [last committed token, N drafts]
    drafter   feed, 16 rows                as often as plain cycles made it miss so many tokens
              draft, 2 rows                over the last two committed ones: the first draft
              draft, 1 row                 over each draft but the last
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from draftnorm.kernels import cycle as words
from draftnorm.model.decode_step import ROWS, DecodeStep

RUN_AHEAD = 2  # cycles enqueued beyond the one that the host waits for
DRAFT_STEPS = ((ROWS, "feed"), (2, "draft"), (1, "draft"))


@dataclass(frozen=True, slots=True)
class CycleResult:
    """What came of a cycle. Seconds by the device's clock, 0 in the interpreter, which has none."""

    tokens: list[int]  # accepted drafts and one of the target's own; NO_TOKEN where there is none
    asked: int  # drafts that were asked for
    drafted: int  # and that there were
    waited: bool  # the host for the device, which else is done before anybody asks
    feed_seconds: float  # the drafter read what it had missed
    draft_seconds: float
    verify_seconds: float


class DecodeRun:
    """Runs a target's cycles, with a drafter that was given the target's `text`, or alone."""

    def __init__(self, target: DecodeStep, drafter: DecodeStep | None = None) -> None:
        if target.batch != 1:
            raise ValueError(f"a run decodes one sequence, the cache holds {target.batch}")
        self.target, self.drafter = target, drafter
        text = target.text
        pinned = dict(pin_memory=text.state.is_cuda)
        self._tokens, self._state = (
            torch.zeros(len(x), dtype=x.dtype, **pinned) for x in (text.tokens, text.state)
        )
        self._blocks = text.blocks.numpy()
        self._missed = 0  # tokens that the drafter has not read

    def cycles(
        self, tokens: Sequence[int], room: int, drafts: Callable[[], int] | None = None
    ) -> Iterator[CycleResult]:
        """Commit `room` tokens after these or a few more.

        `tokens` end the sequence, all of it if n-grams are looked up, two at least for a drafter;
        all but the last one are in the target's cache. `drafts` says before a cycle is enqueued how
        many to ask for; fewer are if there is no room for more, none past the drafter's context.
        Closing the iterator leaves the target's cache at the tokens that were yielded, the last one
        not being in it.
        """
        target, cache = self.target, self.target.cache
        under_way: deque[tuple[int, int]] = deque()  # drafts asked for, steps to feed before them
        ahead = number = 0  # tokens that those may commit; cycles read
        n = self._begin(tokens, room)
        while room > 0:
            while len(under_way) < min(room, 1 + RUN_AHEAD):
                most = min(room - len(under_way) - 1, cache.capacity - n - ahead, words.MOST - 1)
                if most < 0:
                    break
                count = min(drafts(), most) if drafts else 0
                feeds = 0
                if count and self.drafter:
                    count, feeds = self._draft(count, n + ahead)
                self._missed = 0 if count else self._missed + 1
                target.under_way = True
                target.run(1 + count, n + ahead + count, "cycle")
                under_way.append((count, feeds))
                ahead += 1 + count
            asked, feeds = under_way.popleft()
            result = self._read(number, asked, feeds)
            number += 1
            ahead -= 1 + asked
            n += len(result.tokens)
            room -= len(result.tokens)
            cache.lengths[0] = n - 1
            target.passes += 1
            for step in filter(None, (target, self.drafter)):
                step.under_way = bool(under_way)
            yield result

    def _begin(self, tokens: Sequence[int], room: int) -> int:
        """Tell the device what it does not know; how many tokens are committed."""
        target, text, cache = self.target, self.target.text, self.target.cache
        length = cache.extend(room).start
        cache.rollback(length)
        if target.under_way:
            target.synchronize()
        target.asked = 0
        n, count = length + 1, len(tokens)
        self._tokens.numpy()[:count] = tokens
        text.tokens[n - count : n].copy_(self._tokens[:count], non_blocking=True)
        read = min(self.drafter.cache.lengths[0], n - 2) if self.drafter else 0
        self._missed = n - 2 - read
        state = self._state.numpy()
        state[words.LENGTH], state[words.DRAFT_LENGTH], state[words.FOUND] = length, read, ROWS
        text.state.copy_(self._state, non_blocking=True)
        self._blocks.fill(words.OPEN)
        return n

    def _draft(self, count: int, n: int) -> tuple[int, int]:
        """Enqueue the steps of the drafter after up to n committed tokens; how many drafts come,
        and how many steps fed what it had missed.
        """
        drafter = self.drafter
        feeds = -(-self._missed // ROWS)
        room = drafter.cache.capacity
        count = min(count, room - n + 1)  # the last draft is not fed
        if count < 1 or (feeds and n - 2 + ROWS > room):
            return 0, 0
        drafter.under_way = True
        for _ in range(feeds):
            drafter.run(ROWS, n - 2 + ROWS, "feed")
        drafter.run(2, n, "draft")
        for i in range(1, count):
            drafter.run(1, n + i, "draft")
        return count, feeds

    def _read(self, number: int, asked: int, feeds: int) -> CycleResult:
        line = self._blocks[number % words.SLOTS]
        block = line.tolist()
        waited = words.OPEN in block
        while words.OPEN in block:  # written by the cycle's last kernel, over the bus
            if self.target.x.is_cuda:
                torch.cuda.current_stream().query()  # raises if a kernel failed
            block = line.tolist()
        line.fill(words.OPEN)
        self.target.touched_by_cycles += block[words.TOUCHED]
        times = block[words.TIMES : words.TIMES + len(words.STAMPS)]
        feed, draft, verify = (max(ns, 0) * 1e-9 for ns in times)
        return CycleResult(
            tokens=[token for token in block[: 1 + asked] if token != words.NONE],
            asked=asked,
            drafted=block[words.DRAFTS],
            waited=waited,
            feed_seconds=feeds * feed,
            draft_seconds=draft if asked else 0.0,
            verify_seconds=verify,
        )

"""What decoding reports: chunks as it goes, a frozen result at the end, statistics of speculation.

Definitions. A cycle is one verification by the target, with or without drafts.
  tokens per cycle        committed tokens / cycles, the target's own token of each cycle included
  acceptance rate         accepted drafts / drafted
  acceptance by position  of the cycles that accepted the first i − 1 drafts and had an i-th, the
                          share that accepted it
  discarded               tokens of the last block that came after the end of the output
So with a fixed draft length γ, tokens per cycle = 1 + γ · acceptance rate, but for the discarded.
The first token is the prefill's and belongs to no cycle.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """Committed text, with its tokens: either all accepted drafts or all the target's own."""

    text: str
    token_ids: tuple[int, ...]
    drafted: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Cycle:
    """One cycle: how many drafts, how many of them accepted, and where the seconds went."""

    drafted: int
    accepted: int
    absent: int = 0  # rows that were verified for drafts that were not there
    draft_seconds: float = 0.0
    verify_seconds: float
    catch_up_seconds: float = 0.0  # feeding the drafter what it missed while it was not asked

    @property
    def asked(self) -> int:
        return self.drafted + self.absent

    @property
    def seconds(self) -> float:
        return self.catch_up_seconds + self.draft_seconds + self.verify_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationStatistics:
    """Totals over one generation, as defined above. Rates are None where nothing was measured."""

    cycles: int
    drafted: int
    accepted: int
    discarded: int
    tokens_per_cycle: float | None
    acceptance_rate: float | None
    acceptance_by_position: tuple[float, ...]
    draft_seconds: float
    verify_seconds: float
    experts_per_layer: float | None  # that a verify tile touched; None if the target is dense

    @classmethod
    def of(
        cls, cycles: Sequence[Cycle], committed: int, experts_per_layer: float | None = None
    ) -> "SpeculationStatistics":
        """Summarise cycles that committed this many tokens to the output."""
        drafted = sum(cycle.drafted for cycle in cycles)
        accepted = sum(cycle.accepted for cycle in cycles)
        return cls(
            cycles=len(cycles),
            drafted=drafted,
            accepted=accepted,
            discarded=len(cycles) + accepted - committed,
            tokens_per_cycle=committed / len(cycles) if cycles else None,
            acceptance_rate=accepted / drafted if drafted else None,
            acceptance_by_position=_acceptance_by_position(cycles),
            draft_seconds=sum(cycle.draft_seconds + cycle.catch_up_seconds for cycle in cycles),
            verify_seconds=sum(cycle.verify_seconds for cycle in cycles),
            experts_per_layer=experts_per_layer,
        )


def _acceptance_by_position(cycles: Sequence[Cycle]) -> tuple[float, ...]:
    rates = []
    for i in range(max((cycle.drafted for cycle in cycles), default=0)):
        tested = [cycle for cycle in cycles if cycle.accepted >= i and cycle.drafted > i]
        if not tested:
            break
        rates.append(sum(cycle.accepted > i for cycle in tested) / len(tested))
    return tuple(rates)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The outcome of a generation.

    `text` ends before a stop token or stop string. `token_ids` includes the stop token; at a stop
    string it ends with the token in which the kept text ends. `seconds` is decoding alone, from
    the first token to the last, first cycle included; it does not count time spent by the caller.
    On a GPU kernels were compiled and graphs captured before, which no other time includes.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    stop_reason: str  # stop_token, stop_string, length, context or interrupted
    prefill_seconds: dict[str, float | None]  # of the target and the draft
    time_to_first_token: float | None  # both prefills and the first choice
    seconds: float
    tokens_per_second: float | None  # over `seconds`, hence without the first token
    speculation: SpeculationStatistics | None
    compile_seconds: float | None = None
    capture_seconds: float | None = None

    def to_json(self) -> dict:
        """The same as plain dictionaries, lists and numbers."""
        return asdict(self) | {"token_ids": list(self.token_ids)}

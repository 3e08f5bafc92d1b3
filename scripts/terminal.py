"""What a person sees: streamed text on stdout, everything else on stderr.

On a terminal, draft tokens that the target accepted are coloured and underlined, so that one sees
speculation work; into a pipe goes the text alone. NO_COLOR leaves the underline and drops colour.
"""

import os
import time
from collections.abc import Callable
from itertools import compress
from typing import IO, Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

DEFINITIONS = {
    "tokens per cycle": "committed tokens / target verifications, bonus included",
    "acceptance rate": "accepted / drafted",
    "by position": "of the cycles that accepted drafts 1 … i-1, the share that accepted draft i",
    "speed-up": "decode only, first cycle included",
    "end to end": "speed-up of everything after load",
    "predicted": "tokens per cycle · t_plain / t_cycle, from separately timed parts",
}
# C0 and C1 controls but newline and tab: a model's output must not drive the reader's terminal.
_CONTROL_CHARACTERS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(9), *range(11, 32), *range(127, 160))
}
_POSITIONS = 8  # shown of the acceptance by position; --json has all
_NARROW = 100  # columns under which definitions move from the table to lines below it


class TextStream:
    """Writes chunks of committed text as they come."""

    def __init__(self, out: IO[str]) -> None:
        self.out = out
        self.styled = self.out.isatty() and os.environ.get("TERM") != "dumb"
        self.mark = "\x1b[4m" if os.environ.get("NO_COLOR") else "\x1b[4;36m"
        self.ends_line = True

    def write(self, text: str, drafted: bool) -> None:
        """Show `text` at once."""
        if not text:
            return
        self.ends_line = text.endswith("\n")
        if self.styled:
            text = text.translate(_CONTROL_CHARACTERS)
            text = f"{self.mark}{text}\x1b[0m" if drafted else text
        self.out.write(text)
        self.out.flush()

    def close(self) -> None:
        """End the last line, so that what follows starts its own."""
        if not self.ends_line:
            self.out.write("\n")
        self.out.flush()


class ProgressLine:
    """What is done before the first token, on one line of stderr, once it takes over a second."""

    PATIENCE, PAUSE = 1.0, 0.1  # seconds before the first line, and between lines

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self._started = self._shown = clock()
        self._what: str | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Hear that `done` of `total` are done."""
        now = self.clock()
        if self.console.is_terminal:
            if done == total and self._what:
                self.console.print(" " * (len(self._what) + 24), end="\r")
                self._what = None
            elif now - self._started > self.PATIENCE and now - self._shown > self.PAUSE:
                self.console.print(Text(f"{what} {done:,}/{total:,} …", style="dim"), end="\r")
                self._shown, self._what = now, what
        elif now - self._started > self.PATIENCE and what != self._what:  # a log: once a stage
            self.console.print(f"{what} {done:,}/{total:,} …")
            self._what = what


def stderr_console(*, quiet: bool = False) -> Console:
    """A console for tables and notes; plain text when stderr is no terminal."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False, quiet=quiet)


def show_legend(console: Console) -> None:
    """Explain the two looks of streamed text."""
    console.print(Text.assemble(("drafted and accepted", "cyan underline"), " · the target's own"))


def show_summary(document: dict[str, Any], console: Console) -> None:
    """Print the numbers of one run (report.build_document) with their definitions, speeds last."""
    plain, speculative = document["plain"], document["speculative"]
    drafting = speculative["seconds"] is not None
    comparing = document["identical"] is not None  # both ran, and to the end
    rows = [
        ("decode", _rate(plain), _rate(speculative)),
        ("decode time", *(number(run["seconds"], ".2f", " s") for run in (plain, speculative))),
    ]
    if drafting:
        shares = [f"{share:.0%}" for share in speculative["acceptance_by_position"]]
        by_position = " ".join(shares[:_POSITIONS]) + (" …" if len(shares) > _POSITIONS else "")
        rows += [
            ("tokens per cycle", "1.00", number(speculative["tokens_per_cycle"], ".2f")),
            ("acceptance rate", "", number(speculative["acceptance_rate"], ".0%")),
            ("by position", "", by_position),
        ]
    if comparing:
        rows += [
            ("speed-up", "", number(document["speedup"], ".2f", " ×")),
            ("end to end", "", number(document["speedup_end_to_end"], ".2f", " ×")),
            ("predicted", "", number(document["predicted_speedup"], ".2f", " ×")),
        ]

    wide = console.width >= _NARROW
    columns = (
        Column("", no_wrap=True),
        Column("plain", justify="right", style="bold"),
        Column("speculative", justify="right", style="bold", overflow="fold"),
        Column("", style="dim"),
    )
    shown = (True, comparing or not drafting, drafting, drafting and wide)
    table = Table(*compress(columns, shown), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for cells in rows:
        table.add_row(*compress((*cells, DEFINITIONS.get(cells[0], "")), shown))
    console.print()
    console.print(table)
    if drafting and not wide:
        for name, *_ in rows:
            if name in DEFINITIONS:
                console.print(Text(f"{name}: {DEFINITIONS[name]}", style="dim"))
    console.print(Text(_footer(document), style="dim"))
    if comparing:
        console.print(Text(verdict(document), style="bold"))


def verdict(document: dict[str, Any]) -> str:
    """Both speeds and whether the tokens are the same; where they first differ if not."""
    plain, speculative = (_rate(document[run]) for run in ("plain", "speculative"))
    speeds = f"plain {plain} · speculative {speculative} · "
    if document["identical"]:
        return speeds + "identical: yes"
    difference = document["first_difference"]
    gap = difference["top_two_gap"]
    note = "" if gap is None else f", top-two gap {gap:.2g}"
    texts = f"plain {difference['plain_text']!r}, speculative {difference['speculative_text']!r}"
    verdict = f"{speeds}identical: no, from token {difference['position']} on ({texts}{note})"
    if document["acceptance"] == "rejection":
        verdict += "; rejection keeps the distribution, not the tokens"
    return verdict


def _footer(document: dict[str, Any]) -> str:
    """Counts and settings that a reader needs to repeat the run."""
    parts = [
        f"{document['prompt_tokens']} + {len(document['token_ids'])} tokens",
        f"ended: {document['stop_reason'].replace('_', ' ')}",
        f"load {document['load_seconds']:.2f} s",
        f"first token after {number(document['time_to_first_token'], '.2f', ' s')}",
    ]
    if document["sampling"]["temperature"] > 0:
        parts.append(f"seed {document['sampling']['seed']}")
    return " · ".join(parts)


def _rate(run: dict[str, Any]) -> str:
    return number(run["tokens_per_second"], ".1f", " tokens/s")


def number(value: float | None, form: str, unit: str = "") -> str:
    """A number in that format, or a dash for what was not measured."""
    return "–" if value is None else f"{value:{form}}{unit}"

"""Streamed text and the summary, rendered without a model."""

import copy
import io

import pytest
from rich.console import Console

from draftnorm.scripts import terminal

DOCUMENT = {
    "acceptance": "exact",
    "plain": {"seconds": 4.0, "tokens_per_second": 25.0},
    "speculative": {
        "seconds": 2.0,
        "tokens_per_second": 50.0,
        "tokens_per_cycle": 2.6,
        "acceptance_rate": 0.4,
        "acceptance_by_position": [0.75, 0.5, 0.25, 1.0],
    },
    "speedup": 2.0,
    "speedup_end_to_end": 1.9,
    "predicted_speedup": 2.1,
    "identical": True,
    "first_difference": None,
    "prompt_tokens": 17,
    "token_ids": list(range(101)),
    "stop_reason": "stop_token",
    "load_seconds": 0.5,
    "time_to_first_token": 0.125,
    "sampling": {"temperature": 0.7, "seed": 4711},
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def stream(out: io.StringIO) -> str:
    text = terminal.TextStream(out)
    text.write("own ", drafted=False)
    text.write("drafted", drafted=True)
    text.close()
    return out.getvalue()


def summary(document: dict, width: int) -> str:
    out = io.StringIO()
    terminal.show_summary(document, Console(file=out, width=width, highlight=False))
    return out.getvalue()


def test_a_pipe_gets_the_text_alone():
    assert stream(io.StringIO()) == "own drafted\n"


def test_a_terminal_shows_accepted_drafts_apart():
    assert stream(Terminal()) == "own \x1b[4;36mdrafted\x1b[0m\n"


def test_no_color_keeps_the_underline(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert stream(Terminal()) == "own \x1b[4mdrafted\x1b[0m\n"


def test_a_dumb_terminal_gets_no_escapes(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert stream(Terminal()) == "own drafted\n"


def test_a_model_cannot_drive_the_terminal():
    out = Terminal()
    terminal.TextStream(out).write("a\x1b]0;title\x07\x9b2J\tb\n👩‍🚀", drafted=False)
    assert out.getvalue() == "a�]0;title��2J\tb\n👩‍🚀"
    piped = io.StringIO()
    terminal.TextStream(piped).write("a\x1b", drafted=False)
    assert piped.getvalue() == "a\x1b"  # a file gets exactly what was decoded


def test_text_that_ends_its_line_gets_no_second_newline():
    out = io.StringIO()
    text = terminal.TextStream(out)
    text.write("line\n", drafted=False)
    text.close()
    assert out.getvalue() == "line\n"


def test_legend_follows_the_console():
    out = io.StringIO()
    terminal.show_legend(Console(file=out))
    assert out.getvalue() == "drafted and accepted · the target's own\n"


@pytest.mark.parametrize("width", [30, 40, 60, 80, 99, 100, 120, 200])
def test_summary_fits_and_says_everything(width):
    text = summary(DOCUMENT, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    flat = " ".join(text.split())
    for part in ("25.0", "50.0", "2.60", "40%", "75%", "25%", "2.00 ×", "1.90 ×", "2.10 ×"):
        assert part in flat, part
    assert "identical: yes" in flat and flat.endswith("identical: yes")
    assert "seed 4711" in flat and "17 + 101 tokens" in flat and "ended: stop token" in flat
    if width not in range(100, 200):  # in a table, a definition may be broken by its neighbours
        for definition in terminal.DEFINITIONS.values():
            assert definition in flat


def test_summary_of_plain_decoding_has_no_speculative_column():
    document = copy.deepcopy(DOCUMENT)
    document["speculative"] = dict.fromkeys(DOCUMENT["speculative"])
    document["identical"] = None
    text = summary(document, 80)
    assert "25.0 tokens/s" in text
    assert "speculative" not in text and "identical" not in text


def test_difference_is_located():
    document = copy.deepcopy(DOCUMENT)
    document["identical"] = False
    document["first_difference"] = {
        "position": 37,
        "plain_text": " the",
        "speculative_text": " a",
        "top_two_gap": 3.14e-5,
    }
    verdict = terminal.verdict(document)
    assert "identical: no, from token 37 on" in verdict
    assert "plain ' the', speculative ' a', top-two gap 3.1e-05" in verdict
    assert "distribution" not in verdict
    document["acceptance"] = "rejection"
    assert (
        terminal.verdict(document) == f"{verdict}; rejection keeps the distribution, not the tokens"
    )


def test_missing_rates_are_dashes():
    document = copy.deepcopy(DOCUMENT)
    document["plain"]["tokens_per_second"] = document["speculative"]["tokens_per_second"] = None
    document["speedup"] = document["predicted_speedup"] = None
    document["speculative"]["acceptance_by_position"] = []
    assert terminal.verdict(document) == "plain – · speculative – · identical: yes"
    assert "–" in summary(document, 80)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_shows_after_a_second_and_leaves_no_trace_on_a_terminal(is_terminal) -> None:
    out, now = io.StringIO(), [0.0]
    console = Console(file=out, force_terminal=is_terminal, width=80, highlight=False)
    line = terminal.ProgressLine(console, clock=lambda: now[0])
    for done in range(1, 5):
        now[0] += 0.2
        line("compiling kernels", done, 8)
    assert out.getvalue() == ""
    for done in range(5, 8):
        now[0] += 0.2
        line("compiling kernels", done, 8)
    shown = out.getvalue()
    assert "compiling kernels 6/8 …" in shown
    assert ("7/8" in shown) == is_terminal  # a log gets a line a stage
    line("compiling kernels", 8, 8)
    assert out.getvalue().endswith("\r" if is_terminal else "6/8 …\n")
    assert ("\n" in out.getvalue()) != is_terminal

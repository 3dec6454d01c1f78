"""The bar of a rollout: on a terminal, and in a log."""

import io

import pytest

from report import screen


@pytest.fixture
def clock(monkeypatch):
    """What time.monotonic returns; rollouts show themselves at once."""
    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(screen, "BAR_AFTER", 0)
    monkeypatch.setattr(screen, "is_rank0", lambda: True)
    monkeypatch.setattr(screen, "world_size", lambda: 1)
    return now


def shown(monkeypatch, terminal, updates, clock):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(screen.sys, "stderr", stream)
    with screen.RolloutBar("an evaluation", 80) as bar:
        for seconds, finished, tokens in updates:
            clock[0] += seconds
            bar.bar.mininterval = 0
            bar.update(finished, tokens)
    return stream.getvalue()


def test_on_a_terminal_there_is_a_bar_that_disappears(monkeypatch, clock):
    text = shown(monkeypatch, True, [(1, 0, 50), (1, 20, 300)], clock)
    assert "an evaluation:   0%" in text and "0/80" in text  # a sign of life before any response is finished
    assert "an evaluation:  25%" in text and "20/80" in text and "150 tokens/s" in text
    assert text.endswith("\r") and "\n" not in text


def test_in_a_log_there_is_a_line_a_minute(monkeypatch, clock):
    text = shown(
        monkeypatch, False, [(1, 0, 50)] * 59 + [(2, 9, 6100), (30, 10, 6200), (31, 20, 24600)], clock
    )
    assert text.splitlines() == [
        "an evaluation: 9 of 80 responses, 100 tokens/s",
        "an evaluation: 20 of 80 responses, 202 tokens/s",
    ]


def test_a_closed_standard_error_is_no_error(monkeypatch, clock):
    monkeypatch.setattr(screen.sys, "stderr", None)
    with screen.RolloutBar("an evaluation", 80) as bar:
        bar.update(1, 5)


def test_of_several_ranks_only_the_first_shows_its_share(monkeypatch, clock):
    monkeypatch.setattr(screen, "world_size", lambda: 2)
    assert "an evaluation, rank 0's share: 5 of" in shown(monkeypatch, False, [(100, 5, 50)], clock)
    monkeypatch.setattr(screen, "is_rank0", lambda: False)
    for terminal in (True, False):
        assert shown(monkeypatch, terminal, [(100, 5, 50)], clock) == ""

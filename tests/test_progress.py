"""What a log file and a terminal show of a run."""

import io
import re

import pytest
from rich.console import Console

from hf_hybrid.run.progress import StageBars, duration
from hf_hybrid.run.stages import Event


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def shown(events, terminal=False, seconds=1.0):
    """What is printed of `events`, which come `seconds` apart."""
    clock, text = Clock(), io.StringIO()
    bars = StageBars(Console(file=text, force_terminal=terminal, width=100), clock)
    with bars:
        for event in events:
            clock.now += seconds
            bars.show(event)
            bars.bars.refresh()  # a thread does so ten times a second
    return text.getvalue()


def steps(count, total, stage="align"):
    return [
        Event(stage, "step", i, total, f"step {i} of {total}, loss {1 / i:.2f}", "", 2, 9) for i in range(1, count)
    ]


class TestLog:
    def test_a_line_every_half_minute_says_how_far_it_is_and_the_time_left(self):
        lines = shown([Event("align", "start", text="learns", number=2, of=9), *steps(101, 200)]).splitlines()
        assert lines[0] == "2/9 align         learns"
        assert len(lines) == 1 + 100 // 30
        assert lines[1] == "2/9 align         15%, 2.8 min left: step 30 of 200, loss 0.03"
        assert lines[3] == "2/9 align         45%, 1.8 min left: step 90 of 200, loss 0.01"

    def test_slow_steps_have_a_line_each(self):
        lines = shown(steps(5, 10), seconds=3600.0).splitlines()
        assert [line.split(": ")[1] for line in lines] == [f"step {i} of 10, loss {1 / i:.2f}" for i in range(1, 5)]

    def test_a_stage_ends_with_what_came_of_it_and_long_lines_stay_lines(self):
        table = "KL\n  layer 2  0.8\n  layer 3  1.2"
        said = [
            Event("score", "done", text="3.0 s", result=table, number=3, of=9),
            Event("run", "note", text="a word " * 40),
            Event("data", "found", number=1, of=9),
        ]
        lines = shown(said).splitlines()
        assert lines[:3] == ["3/9 score         done in 3.0 s: KL", "  layer 2  0.8", "  layer 3  1.2"]
        assert lines[3].count("a word") == 40 and lines[4] == "1/9 data          made before"

    def test_the_pace_of_one_stage_is_not_that_of_the_next(self):
        events = [*steps(3, 100), Event("align", "done", text="9 s"), *steps(4, 100, "distill")]
        left = re.findall(r"([\d.]+) h left", shown(events, seconds=360.0))
        assert left == ["9.8", "9.8", "9.7"]

    def test_brackets_are_shown_as_they_are(self):
        assert "layers [2, 3] and [red]" in shown(
            [Event("select", "done", text="1 s", result="layers [2, 3] and [red]")]
        )


def test_a_terminal_has_a_bar_and_the_lines_of_start_and_end():
    events = [
        Event("align", "start", text="learns", number=2, of=9),
        *steps(50, 100),
        Event("align", "done", text="9 s"),
    ]
    text = shown(events, terminal=True)
    assert "learns" in text and "done in 9 s" in text and "step 49 of 100, loss 0.02" in text and "49%" in text


@pytest.mark.parametrize(("seconds", "said"), [(8, "8 s"), (90, "1.5 min"), (8000, "2.2 h"), (260_000, "3.0 d")])
def test_duration(seconds, said):
    assert duration(seconds) == said

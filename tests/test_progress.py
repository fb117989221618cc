"""What a log file and a terminal show of a run."""

import io
import re

import pytest
from rich.console import Console
from runs import save_teacher, save_texts, tiny_recipe

from hf_hybrid.run.progress import StageBars, duration
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import run_recipe
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
        assert lines[0] == "2/9 align       learns"
        assert len(lines) == 1 + 100 // 30
        assert lines[1] == "2/9 align       15%, 2.8 min left: step 30 of 200, loss 0.03"
        assert lines[3] == "2/9 align       45%, 1.8 min left: step 90 of 200, loss 0.01"

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
        assert lines[:3] == ["3/9 score       done in 3.0 s: KL", "  layer 2  0.8", "  layer 3  1.2"]
        assert lines[3].count("a word") == 40 and lines[4] == "1/9 data        made before"

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


def test_a_run_tells_of_every_stage_what_it_does_how_far_it_is_and_what_came_of_it(tmp_path):
    recipe = tiny_recipe(save_teacher(tmp_path / "teacher"), save_texts(tmp_path / "texts"))
    events = []
    run_recipe(Recipe.from_dict(recipe), tmp_path / "run", progress=events.append)
    stages = ["data", "align", "score", "select", "distill", "finetune", "evaluate", "model", "report"]
    starts = [event for event in events if event.kind == "start"]
    assert [(event.stage, event.number, event.of) for event in starts] == [
        (name, i, len(stages)) for i, name in enumerate(stages, 1)
    ]
    assert all(event.text for event in starts)
    result = {event.stage: event.result for event in events if event.kind == "done"}
    assert re.fullmatch(r"rows of \d+ tokens: \d+ to train, \d+ to score, \d+ to report", result["data"])
    for name in ("align", "distill", "finetune"):
        assert re.fullmatch(r"loss \d\.\d{4} -> \d\.\d{4} in \d+ steps", result[name]), result[name]
    assert len(re.findall(r"layer +\d+  [\d.]+ ± [\d.]+", result["score"])) == 4
    assert re.match(r"softmax attention in \[\d.*\] of 4 layers, by ga-s2", result["select"])
    assert re.match(r"KL [\d.]+ ± [\d.]+ nats per token, perplexity [\d.]+ \(teacher [\d.]+\)", result["evaluate"])
    for name in ("data", "align", "score", "distill", "finetune", "evaluate"):
        told = [event for event in events if event.kind == "step" and event.stage == name]
        shares = [event.done / event.total for event in told]
        assert len(shares) > 1 and shares == sorted(shares) and shares[-1] == 1, name
        assert all(event.text for event in told)
    inside = [event.text for event in events if event.stage == "score" and "step 1 of" in event.text]
    assert [text.split(":")[0] for text in inside] == [f"softmax in [{layer}]" for layer in range(4)]

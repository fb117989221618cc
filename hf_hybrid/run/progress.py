"""What a terminal or a log file shows of a run."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .stages import Event


# Seconds between two lines that say how far a stage is, where there is no terminal to draw a bar in.
_EVERY = 30.0
# Time left is told by the pace of so many seconds.
_PACE_OF = 600.0


class StageBars:
    """
    What each stage does, how far it is and what came of it, on stderr: a line at its start and one or more at its end;
    in between a bar in a terminal, elsewhere a line every half a minute at most.

    Args:
        console (`rich.console.Console`, *optional*): where to, by default stderr.
        clock (`Callable`): seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        given: dict[str, Any] = {"console": self.console, "get_time": clock, "speed_estimate_period": _PACE_OF}
        self.bars = Progress(*columns, **given, disable=not self.console.is_terminal)
        self.clock = clock
        self.task: Any = None
        self.stage = ""
        self.told = clock()

    def __enter__(self) -> "StageBars":
        self.bars.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bars.stop()

    def show(self, event: Event) -> None:
        """Prints or draws one event; to be passed as `progress`."""
        if event.kind == "step":
            self._draw(event)
            return
        if event.kind in ("start", "done"):
            self._remove()
        words = {
            "found": "made before",
            "start": event.text or "started",
            "done": f"done in {event.text}" + (f": {event.result}" if event.result else ""),
        }
        self._print(f"{_name(event)}  {words.get(event.kind, event.text)}")

    def _draw(self, event: Event) -> None:
        if event.stage != self.stage:
            self._remove()
            self.task, self.stage = self.bars.add_task(escape(_name(event)), total=event.total, text=""), event.stage
        self.bars.update(self.task, completed=event.done, total=event.total, text=escape(event.text))
        if self.bars.disable and self.clock() - self.told >= _EVERY:
            left = next(task for task in self.bars.tasks if task.id == self.task).time_remaining
            when = "" if left is None else f", {duration(left)} left"
            self._print(f"{_name(event)}  {event.done / event.total:.0%}{when}: {event.text}")

    def _remove(self) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
        self.task, self.stage = None, ""

    def _print(self, line: str) -> None:
        # A line of a log file is one line, however long.
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.told = self.clock()


def _name(event: Event) -> str:
    place = f"{event.number}/{event.of} " if event.number else ""
    return f"{place}{event.stage:{16 - len(place)}}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"

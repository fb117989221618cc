"""What a terminal shows of a run."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .stages import Event


class StageBars:
    """A line for each event of a run and, in a terminal, a progress bar for each stage, on stderr."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description:9}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.console = Console(stderr=True)
        self.bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> "StageBars":
        self.bars.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bars.stop()

    def show(self, event: Event) -> None:
        """Prints or draws one event; to be passed as `progress`."""
        if event.kind != "step":
            words = {"found": "made before", "start": "started", "done": f"done in {event.text}"}
            self.console.print(f"{event.stage:9} {words.get(event.kind, event.text)}", highlight=False, markup=False)
        elif not self.bars.disable:
            if event.stage not in self.tasks:
                self.tasks[event.stage] = self.bars.add_task(event.stage, total=event.total, text="")
            task = self.tasks[event.stage]
            self.bars.update(task, completed=event.done, text=event.text, visible=event.done < event.total)

"""Training rows made as they are needed: a stream that checkpoints and goes on from the row where training was."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_hybrid.trainers.durable import read_json, write_json

from .config import DataConfig
from .rows import PackedRows, Packing, cut_row, text_prefix


_FILE = "stream.json"


class PackedStream(IterableDataset):
    """
    Rows of `block_size` tokens without end: where the text ends it starts again, after the held-out rows.

    Args:
        config ([`DataConfig`]): the text.
        tokenizer (`PreTrainedTokenizerBase`): the teacher's.
        seed (`int`): of the order of files.
        block_size (`int`): tokens of a row, a divisor of `config.block_size`.
        labels (`bool`): give `labels` too: the tokens, but for each document's first, which nothing predicts.
        packing ([`Packing`], *optional*): that of the held-out rows; by default the tokenizer's prefix.
        at_end (`Callable`, *optional*): called where the text ends for the first time, with the rows that it has and,
            of several sources, the number of the one that ended it.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        seed: int,
        block_size: int,
        *,
        labels: bool = False,
        packing: Packing | None = None,
        at_end: Callable[[int, int | None], None] | None = None,
    ) -> None:
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self.at_end = at_end
        self.block_size, self.labels = block_size, labels
        self.packing = packing or Packing(text_prefix(tokenizer))
        self.parts = config.block_size // block_size
        self.held_out = config.held_out_rows + config.report_rows
        self._start: dict[str, Any] | None = None
        # This pass over the text and the one before it, each with the rows of `block_size` in all passes before it.
        self._passes: list[tuple[PackedRows, int]] = []

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        start, self._start = self._start, None
        before, skip = (0, 0) if start is None else (start["before"], start["part"])
        while True:
            state = None if start is None else start["rows"]
            rows = PackedRows(self.config, self.tokenizer, self.seed, state, self.packing)
            self._passes = [*self._passes[-1:], (rows, before)]
            for row in rows:
                if rows.rows <= self.held_out:
                    continue
                for part in range(skip, self.parts):
                    yield self._cut(row, part)
                skip = 0
            if rows.rows <= self.held_out:
                raise ValueError(
                    f"the text has no row beyond the {self.held_out} that are held out; give more text, or fewer "
                    "held_out_rows and report_rows."
                )
            there = (rows.rows - self.held_out) * self.parts
            if self.at_end is not None and before == 0:
                self.at_end(there, rows.text.ended if len(self.config.sources) > 1 else None)
            before += there
            start = None

    def _cut(self, row: dict[str, np.ndarray], part: int) -> dict[str, np.ndarray]:
        cut = cut_row(row, part, self.block_size, self.packing.prefix)
        if self.labels:
            first = cut["position_ids"] == 0 if "position_ids" in cut else False
            cut["labels"] = np.where(first, -100, cut["input_ids"])
        return cut

    def state(self, rows: int) -> dict[str, Any]:
        """
        Where it was after `rows` rows, however many were read ahead; plain data. Only what is needed for that and
        later positions is remembered.
        """
        for reader, before in reversed(self._passes):
            if before <= rows:
                whole, part = divmod(rows - before, self.parts)
                return {"rows": reader.state(self.held_out + whole), "part": part, "before": before}
        raise ValueError(f"the stream has not read row {rows}, or read on for more than a whole text since.")

    def restore(self, state: dict[str, Any]) -> None:
        """Makes the next iteration begin where `state` was taken."""
        self._start = state


class KeepPosition(TrainerCallback):
    """
    Writes the position of a [`PackedStream`] into each checkpoint of the Trainer.

    Args:
        stream ([`PackedStream`]): what is trained on.
        batch_size (`int`): its rows in one optimizer step, of all processes.
    """

    def __init__(self, stream: PackedStream, batch_size: int) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.position: dict[str, Any] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # In the main process alone: it reads for all.
        if state.is_world_process_zero:
            self.position = self.stream.state(state.global_step * self.batch_size)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.position is not None:
            write_json(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / _FILE, self.position)


def go_on(stream: PackedStream, checkpoint: Path) -> None:
    """Makes `stream` begin where training was when `checkpoint` was written."""
    position = read_json(checkpoint / _FILE)
    if position is None:
        raise ValueError(f"{checkpoint} has no {_FILE}; it was written without data.on_the_fly. Delete it.")
    stream.restore(position)

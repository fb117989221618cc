"""Text from anywhere, as packed rows of tokens: three sets that share no row, for training, scoring and reporting."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets, load_from_disk

from .text import pieces


SETS = ("train", "score", "report")
_SHARD_TOKENS = 2**22  # held in memory at once while rows are written to disk: about 130 MB
_TEXTS_AT_ONCE = 128


@dataclass
class DataConfig:
    """
    Where text comes from and how it becomes rows. Exactly one of `dataset`, `text_files` and `source` is given.

    Args:
        dataset (`str`, *optional*): name of a dataset for `datasets.load_dataset`; no code of the dataset is run.
        subset, split, revision (`str`, *optional*): which part of it.
        streaming (`bool`): read only as much of the dataset as is needed, without downloading the rest.
        text_files (`list[str]`, *optional*): paths or patterns of local files. A `.jsonl` file holds a document
            a line, any other file is one document. Files are taken in an order drawn with the seed.
        source (`str`, *optional*): `"embedded-demo"`, the built-in data of the embedded teacher.
        text_column (`str`): the column, or key of a `.jsonl` line, with the text.
        block_size (`int`): tokens of a row. Stages with shorter rows cut these into equal parts.
        held_out_rows (`int`): rows that layers are scored on.
        report_rows (`int`): rows that the final model is measured on.
        respect_documents (`bool`): give each row `position_ids` that restart with each document, so that no token sees
            another document. Off, as in the paper's released code, documents run into each other.
    """

    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True
    text_files: list[str] = field(default_factory=list)
    source: str | None = None
    text_column: str = "text"
    block_size: int = 512
    held_out_rows: int = 64
    report_rows: int = 64
    respect_documents: bool = True

    def __post_init__(self) -> None:
        given = [name for name in ("dataset", "text_files", "source") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"data gives {' and '.join(given) or 'no source of text'}; give exactly one of dataset, text_files "
                "and source."
            )
        if self.source not in (None, "embedded-demo"):
            raise ValueError(f"data.source={self.source!r} is unknown; the only one is 'embedded-demo'.")
        if isinstance(self.text_files, str):
            self.text_files = [self.text_files]
        for name in ("block_size", "held_out_rows", "report_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} is too small; pass at least 1.")


def build_rows(
    config: DataConfig, tokenizer: Any, num_train_rows: int, seed: int, folder: Path, vocab_size: int | None = None
) -> dict[str, Dataset]:
    """
    Returns the sets `train`, `score` and `report`, written to `folder` in shards and read from there.

    The first rows of the text are held out (`score`, then `report`), training rows follow, so no row is in two sets.
    Only as much text is read as is needed. Where it ends early, `train` has fewer rows than asked for.

    Args:
        config ([`DataConfig`]): the text.
        tokenizer (`PreTrainedTokenizerBase`): the teacher's. Documents are joined by its end-of-sequence token.
        num_train_rows (`int`): training rows, at most.
        seed (`int`): of the order of files, and of synthetic data.
        folder (`Path`): an empty folder, or one that does not exist.
        vocab_size (`int`, *optional*): the teacher's; larger ids are then an error.
    """
    wanted = {"score": config.held_out_rows, "report": config.report_rows, "train": num_train_rows}
    if config.source == "embedded-demo":
        from .demo_data import demo_rows

        made = {name: iter(demo_rows(tokenizer, config.block_size, n, seed, name)) for name, n in wanted.items()}
        counts = {name: _write(islice(rows, wanted[name]), folder / name, vocab_size) for name, rows in made.items()}
    else:
        rows = packed_rows(config, tokenizer, seed)
        counts = {name: _write(islice(rows, n), folder / name, vocab_size) for name, n in wanted.items()}
    _check_counts(counts, wanted, config)
    return load_rows(folder)


def first_rows(config: DataConfig, tokenizer: Any, num_rows: int, seed: int = 0) -> Dataset:
    """Returns at most the first `num_rows` rows of the text, in memory: for measuring, not for training."""
    rows = list(islice(packed_rows(config, tokenizer, seed), num_rows))
    if not rows:
        raise _no_rows(config)
    return Dataset.from_list(rows)


def load_rows(folder: str | Path) -> dict[str, Dataset]:
    """Reads, memory-mapped, what [`build_rows`] wrote to `folder`."""
    return {
        name: concatenate_datasets([load_from_disk(str(shard)) for shard in sorted(Path(folder, name).iterdir())])
        for name in SETS
    }


class CutRows:
    """
    A view of `rows` with each row cut into equal rows of `block_size` tokens, in order; nothing is copied or written.

    Args:
        rows (`datasets.Dataset`): rows of one length with `input_ids` and optionally `position_ids`.
        block_size (`int`): a divisor of that length.
    """

    def __init__(self, rows: Dataset, block_size: int) -> None:
        length = len(rows[0]["input_ids"])
        if length % block_size:
            raise ValueError(f"rows of {length} tokens cannot be cut into {block_size}; pass a divisor of {length}.")
        self.rows = rows.with_format("numpy")
        self.block_size = block_size
        self.parts = length // block_size

    def __len__(self) -> int:
        return len(self.rows) * self.parts

    def __getitem__(self, index: int | slice) -> dict[str, np.ndarray]:
        """One row, or the rows of a slice stacked, as int64 arrays by column."""
        if isinstance(index, slice):
            rows = [self[i] for i in range(*index.indices(len(self)))]
            return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index % self.parts * self.block_size
        row = self.rows[index // self.parts]
        cut = {name: np.asarray(column[start : start + self.block_size], np.int64) for name, column in row.items()}
        if "position_ids" in cut:
            cut["position_ids"] = _positions(np.diff(cut["position_ids"], prepend=-2) != 1)
        return cut


def packed_rows(config: DataConfig, tokenizer: Any, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Yields rows of `block_size` tokens: documents one after the other, cut wherever a row is full."""
    end = tokenizer.eos_token_id
    ids = np.empty(0, np.int32)
    starts = np.empty(0, bool)
    new_document = True
    for batch in _batched(pieces(config, seed), _TEXTS_AT_ONCE):
        tokens = tokenizer([text for text, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
        parts, marks = [ids], [starts]
        for (_, is_end), piece in zip(batch, tokens, strict=True):
            part = np.asarray([*piece, end] if is_end and end is not None else piece, np.int32)
            mark = np.zeros(len(part), bool)
            mark[:1] = new_document
            new_document = is_end or (new_document and not len(part))
            parts.append(part)
            marks.append(mark)
        ids, starts = np.concatenate(parts), np.concatenate(marks)
        full = len(ids) // config.block_size * config.block_size
        for row, mark in zip(*(x[:full].reshape(-1, config.block_size) for x in (ids, starts)), strict=True):
            yield (
                {"input_ids": row, "position_ids": _positions(mark)}
                if config.respect_documents
                else {"input_ids": row}
            )
        ids, starts = ids[full:], starts[full:]


def _positions(starts: np.ndarray) -> np.ndarray:
    """Position of each token in its document, for rows `[..., T]` of marks of first tokens; a row starts at 0."""
    index = np.arange(starts.shape[-1])
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=-1)


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


def _write(rows: Iterator[dict[str, Any]], folder: Path, vocab_size: int | None) -> int:
    """Writes rows to `folder`, one shard after the other, and returns how many there were."""
    written = 0
    for number in count():
        first = next(rows, None)
        if first is None:
            break
        # Some iterators give lists, some arrays; stored, both are 32-bit integers.
        columns = [name for name in ("input_ids", "position_ids") if name in first]
        size = max(1, _SHARD_TOKENS // len(first["input_ids"]))
        shard = [first, *islice(rows, size - 1)]
        table = {name: [np.asarray(row[name], np.int32) for row in shard] for name in columns}
        largest = max(int(row.max()) for row in table["input_ids"])
        if vocab_size is not None and largest >= vocab_size:
            raise ValueError(
                f"the tokenizer gives token {largest}, the teacher's vocabulary has {vocab_size}; pass the tokenizer "
                "that belongs to the teacher."
            )
        features = Features({name: Sequence(Value("int32")) for name in columns})
        Dataset.from_dict(table, features=features).save_to_disk(str(folder / f"shard-{number:05d}"))
        written += len(shard)
    return written


def _check_counts(counts: dict[str, int], wanted: dict[str, int], config: DataConfig) -> None:
    found, held_out = sum(counts.values()), wanted["score"] + wanted["report"]
    if found == 0:
        raise _no_rows(config)
    if counts["train"] == 0:
        raise ValueError(
            f"{_name(config)} makes {found} rows of {config.block_size} tokens, and {held_out} are held out, so none "
            "is left to train on; give more text, a smaller block_size, or fewer held_out_rows and report_rows."
        )


def _no_rows(config: DataConfig) -> ValueError:
    if config.source is None and not any(text.strip() for text, _ in pieces(config, 0)):
        return ValueError(f"{_name(config)} is empty; give one that has text.")
    return ValueError(
        f"{_name(config)} is shorter than one block of {config.block_size} tokens; give more text or a smaller "
        "block_size."
    )


def _name(config: DataConfig) -> str:
    if config.dataset:
        return f"dataset {config.dataset!r} (split {config.split!r})"
    return f"text_files {config.text_files}" if config.text_files else f"data source {config.source!r}"

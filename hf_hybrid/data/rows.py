"""Text from anywhere, as packed rows of tokens: three sets that share no row, for training, scoring and reporting."""

import dataclasses
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets, load_from_disk

from hf_hybrid.trainers.durable import read_record, write_json

from .config import DataConfig
from .text import open_text
from .tokenise import Tokeniser


SETS = ("train", "score", "report")
_SHARD_TOKENS = 2**22  # held in memory at once while rows are written to disk: about 130 MB
# For each thread that tokenises, read at once.
_TEXTS_AT_ONCE = 128
_CHARACTERS_AT_ONCE = 2**22
_PACKING, _TEXT_END = "packing.json", "text_end.json"
_PROBE = "text"


@dataclass(frozen=True)
class Packing:
    """
    How documents became the rows of a run: rows that are made later must be made alike.

    Args:
        prefix (`list[int]`): what every document begins with, and every row that a model sees; see [`text_prefix`].
        documents_apart (`bool`): whether no document has rows in two of the sets.
    """

    prefix: list[int] = field(default_factory=list)
    documents_apart: bool = False

    @classmethod
    def load(cls, folder: str | Path) -> "Packing":
        """That of the rows in `folder`; of rows that an earlier version made, which had neither."""
        path = Path(folder, _PACKING)
        return read_record(cls, path) if path.is_file() else cls()

    def breaks(self, config: DataConfig) -> tuple[int, ...]:
        """After how many rows the next one begins with a new document."""
        return (config.held_out_rows, config.held_out_rows + config.report_rows) if self.documents_apart else ()


@dataclass(frozen=True)
class TextEnd:
    """
    Which of several sources of text had no more before there were the rows that were asked for, and so ended all text.

    Args:
        source (`int`): its place in `data.sources`.
        share (`float`): of the characters, that it was to give.
        weight (`float`): by which it had that share.
        rows, needed (`int`): training rows that there are, and that were asked for.
        times (`float`): how many times as much text of it would give these.
        lasting_weight (`float`): the largest with which what there is of it gives these, where the others have more.
    """

    source: int
    share: float
    weight: float
    rows: int
    needed: int
    times: float
    lasting_weight: float

    @classmethod
    def of(cls, config: DataConfig, source: int, train: int, needed: int) -> "TextEnd":
        """That of the mixture `config`, whose `source` ended after `train` training rows of `needed`."""
        held_out = config.held_out_rows + config.report_rows
        weights = [one.weight for one in config.sources]
        share, part = weights[source] / sum(weights), (train + held_out) / (needed + held_out)
        weight = share * part * (sum(weights) - weights[source]) / (1 - share * part)
        step = 10.0 ** (math.floor(math.log10(weight)) - 1)  # rounded to where it does
        lasting = round(math.floor(weight / step) * step, 12)
        return cls(source, share, weights[source], train, needed, math.ceil(10 / part) / 10, lasting)

    def told(self, config: DataConfig, about: str = "") -> str:
        """The sentence for who runs the recipe of `config`; `about` is put before numbers that are estimated."""
        return (
            f"{named_source(config, self.source)}, ends after {about}{self.rows:,} of {self.needed:,} training rows, "
            f"and all text with it; give {about}{self.times:g} times as much of it, or a weight of at most "
            f"{about}{self.lasting_weight:g} in the place of {self.weight:g}"
        )


class RowSets(dict[str, Dataset]):
    """The rows of a run by the names of their sets, how they were made, and what ended the text early, if known."""

    def __init__(self, sets: dict[str, Dataset], packing: Packing, text_end: TextEnd | None = None) -> None:
        super().__init__(sets)
        self.packing, self.text_end = packing, text_end


def text_prefix(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text by itself: for Llama and Gemma a beginning-of-sequence token."""
    whole, plain = (tokenizer(_PROBE, add_special_tokens=special)["input_ids"] for special in (True, False))
    ends = range(len(whole) - len(plain) + 1)
    start = next((start for start in ends if whole[start : start + len(plain)] == plain), 0)
    return [int(token) for token in whole[:start]]


def build_rows(
    config: DataConfig,
    tokenizer: Any,
    num_train_rows: int,
    seed: int,
    folder: Path,
    vocab_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RowSets:
    """
    Returns the sets `train`, `score` and `report`, written to `folder` in shards and read from there.

    The first documents of the text are held out (for `score`, then for `report`), training rows follow, and no
    document is in two sets: what is left of one when a set is full is in none. A text of too few documents for that is
    shared out by rows, which the sets' `packing` says. Only as much text is read as is needed. Where it ends early,
    `train` has fewer rows than asked for; of several sources, the sets' `text_end` says which one ended it.

    Args:
        config ([`DataConfig`]): the text.
        tokenizer (`PreTrainedTokenizerBase`): the teacher's. Documents are joined by its end-of-sequence token.
        num_train_rows (`int`): training rows, at most.
        seed (`int`): of the order of files, and of synthetic data.
        folder (`Path`): an empty folder, or one that does not exist.
        vocab_size (`int`, *optional*): the teacher's; larger ids are then an error.
        progress (`Callable`, *optional*): called with how many rows there are, and how many there will be at most.
    """
    wanted = {"score": config.held_out_rows, "report": config.report_rows, "train": num_train_rows}
    if config.source == "embedded-demo":
        from ..demo_data import demo_rows

        made = {name: iter(demo_rows(tokenizer, config.block_size, n, seed, name)) for name, n in wanted.items()}
        told = _told(chain(*(islice(rows, wanted[name]) for name, rows in made.items())), wanted, progress)
        counts = {name: _write(islice(told, wanted[name]), folder / name, vocab_size) for name in wanted}
        packing, ended = Packing([], documents_apart=True), None
    else:
        packing = Packing(text_prefix(tokenizer), documents_apart=True)
        counts, ended = _write_sets(config, tokenizer, seed, folder, wanted, vocab_size, packing, progress)
        if counts["train"] == 0:
            packing = dataclasses.replace(packing, documents_apart=False)
            shutil.rmtree(folder, ignore_errors=True)
            counts, ended = _write_sets(config, tokenizer, seed, folder, wanted, vocab_size, packing, progress)
    write_json(folder / _PACKING, dataclasses.asdict(packing))
    if counts["train"] == 0:
        raise too_few_rows(sum(counts.values()), wanted["score"] + wanted["report"], config)
    if ended is not None and len(config.sources) > 1 and counts["train"] < num_train_rows:
        text_end = TextEnd.of(config, ended, counts["train"], num_train_rows)
        write_json(folder / _TEXT_END, dataclasses.asdict(text_end))
    return load_rows(folder)


def first_rows(config: DataConfig, tokenizer: Any, num_rows: int, seed: int = 0) -> Dataset:
    """Returns at most the first `num_rows` rows of the text, in memory: for measuring, not for training."""
    rows = list(islice(packed_rows(config, tokenizer, seed), num_rows))
    if not rows:
        raise _no_rows(config)
    return Dataset.from_list(rows)


def load_rows(folder: str | Path) -> RowSets:
    """Reads, memory-mapped, what [`build_rows`] wrote to `folder`."""
    sets = {
        name: concatenate_datasets([load_from_disk(str(shard)) for shard in sorted(Path(folder, name).iterdir())])
        for name in SETS
    }
    text_end = Path(folder, _TEXT_END)
    return RowSets(sets, Packing.load(folder), read_record(TextEnd, text_end) if text_end.is_file() else None)


class CutRows:
    """
    A view of `rows` with each row cut into equal rows of `block_size` tokens, in order; nothing is copied or written.

    Args:
        rows (`datasets.Dataset`): rows of one length with `input_ids` and optionally `position_ids`.
        block_size (`int`): a divisor of that length.
        prefix (`list[int]`): what every row begins with, see [`Packing`].
    """

    def __init__(self, rows: Dataset, block_size: int, prefix: SequenceOf[int] = ()) -> None:
        length = len(rows[0]["input_ids"])
        if length % block_size:
            raise ValueError(f"rows of {length} tokens cannot be cut into {block_size}; pass a divisor of {length}.")
        self.rows = rows.with_format("numpy")
        self.block_size, self.prefix = block_size, prefix
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
        return cut_row(self.rows[index // self.parts], index % self.parts, self.block_size, self.prefix)


def cut_row(
    row: dict[str, np.ndarray], part: int, block_size: int, prefix: SequenceOf[int] = ()
) -> dict[str, np.ndarray]:
    """
    The `part`-th `block_size` tokens of a row, as int64, with positions of their own. Where a document goes on from
    the part before, its first tokens here give way to `prefix`: a model that expects it fails without it.
    """
    start = part * block_size
    cut = {name: np.asarray(column[start : start + block_size], np.int64) for name, column in row.items()}
    if "position_ids" in cut:
        cut["position_ids"] = _positions(np.diff(cut["position_ids"], prepend=-2) != 1)
    _begin(cut["input_ids"], prefix)
    return cut


def _begin(ids: np.ndarray, prefix: SequenceOf[int]) -> None:
    """Makes the row `ids` begin with `prefix`, in place."""
    ids[: len(prefix)] = prefix[: len(ids)]


class PackedRows:
    """
    Iterator over rows of `block_size` tokens: documents one after the other, cut wherever a row is full.

    Each row begins with the prefix of `packing`, and so does each document, but for those that run into each other.

    Args:
        config ([`DataConfig`]): the text.
        tokenizer (`PreTrainedTokenizerBase`): the teacher's. Documents are joined by its end-of-sequence token.
        seed (`int`): of the order of files.
        state (`dict`, *optional*): what [`PackedRows.state`] gave; the rows go on from there.
        packing ([`Packing`], *optional*): by default with the tokenizer's prefix, and without care for sets.
        workers (`int`, *optional*): threads that tokenise, see [`Tokeniser`]; rows are the same with any number.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        seed: int = 0,
        state: dict[str, Any] | None = None,
        packing: Packing | None = None,
        workers: int | None = None,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.tokenise = Tokeniser(tokenizer, workers)
        packing = packing or Packing(text_prefix(tokenizer))
        self.prefix, self.breaks = packing.prefix, packing.breaks(config)
        if len(self.prefix) >= config.block_size:
            raise ValueError(
                f"data.block_size={config.block_size} leaves no room for text: the tokenizer puts {len(self.prefix)} "
                "tokens before each; pass more."
            )
        self.text = open_text(config, seed)
        self.rows = 0  # given out so far
        self._ids, self._starts = np.empty(0, np.int32), np.empty(0, bool)
        self._new_document = True
        self._dropping = False  # the rest of a document that a full set began
        self._ready: deque[dict[str, np.ndarray]] = deque()
        self._taken: deque[dict[str, Any]] = deque()  # states, each from just before a batch of texts was read
        if state is not None:
            self.text.restore(state["text"])
            self._ids, self._starts = np.asarray(state["ids"], np.int32), np.asarray(state["starts"], bool)
            self._new_document, self._dropping = state["new_document"], state.get("dropping", False)
            self.rows = state["row"]
            for _ in range(state["skip"]):
                next(self)

    def __iter__(self) -> "PackedRows":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        while not self._ready:
            self._read()
        self.rows += 1
        return self._ready.popleft()

    def state(self, rows: int | None = None) -> dict[str, Any]:
        """
        Where it was after `rows` rows, by default all that were given out, as plain data. States from before that are
        forgotten: what is asked for next must be no earlier.
        """
        rows = self.rows if rows is None else rows
        while len(self._taken) > 1 and self._taken[1]["row"] <= rows:
            self._taken.popleft()
        if not self._taken:
            return self._now()
        return {**self._taken[0], "skip": rows - self._taken[0]["row"]}

    def _now(self) -> dict[str, Any]:
        left: dict[str, Any] = {
            "ids": self._ids.tolist(),
            "starts": self._starts.tolist(),
            "new_document": self._new_document,
        }
        left["dropping"] = self._dropping
        return {"text": self.text.state(), **left, "row": self.rows + len(self._ready), "skip": 0}

    def _read(self) -> None:
        """Tokenises the next texts; raises `StopIteration` where there are none."""
        taken = self._now()
        batch, room = list[tuple[str, bool]](), _CHARACTERS_AT_ONCE * self.tokenise.workers
        for text, is_end in islice(self.text, _TEXTS_AT_ONCE * self.tokenise.workers):
            batch.append((text, is_end))
            room -= len(text)
            if room <= 0:
                break
        if not batch:
            raise StopIteration
        self._taken.append(taken)
        end, size = self.tokenizer.eos_token_id, self.config.block_size
        tokens = self.tokenise([text for text, _ in batch])
        parts, marks, length = [self._ids], [self._starts], len(self._ids)
        for (_, is_end), piece in zip(batch, tokens, strict=True):
            if self._dropping:
                self._dropping = not is_end
                continue
            ids = np.append(piece, np.int32(end)) if is_end and end is not None else piece
            if len(ids) and self._new_document and self.config.respect_documents:
                ids = np.concatenate((np.asarray(self.prefix, np.int32), ids))
            mark = np.zeros(len(ids), bool)
            mark[:1] = self._new_document
            self._new_document = is_end or (self._new_document and not len(ids))
            parts.append(ids)
            marks.append(mark)
            length += len(ids)
            given = self.rows + len(self._ready)
            full = next((rows for rows in self.breaks if rows > given), math.inf)
            if given + length // size >= full:
                # The set is full: the next begins with a document of its own.
                self._pack(parts, marks, int(full) - given)
                self._ids, self._starts = np.empty(0, np.int32), np.empty(0, bool)
                parts, marks, length = [self._ids], [self._starts], 0
                self._dropping, self._new_document = not is_end, True
        self._pack(parts, marks, length // size)

    def _pack(self, parts: list[np.ndarray], marks: list[np.ndarray], count: int) -> None:
        """Makes `count` rows ready, and keeps what is left over."""
        size = self.config.block_size
        ids, starts = np.concatenate(parts), np.concatenate(marks)
        full = count * size
        for row, mark in zip(*(x[:full].reshape(-1, size) for x in (ids, starts)), strict=True):
            _begin(row, self.prefix)
            columns = {"position_ids": _positions(mark)} if self.config.respect_documents else {}
            self._ready.append({"input_ids": row, **columns})
        self._ids, self._starts = ids[full:], starts[full:]


def packed_rows(
    config: DataConfig,
    tokenizer: Any,
    seed: int = 0,
    packing: Packing | None = None,
    workers: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the rows of [`PackedRows`], from the first on."""
    return PackedRows(config, tokenizer, seed, packing=packing, workers=workers)


def _positions(starts: np.ndarray) -> np.ndarray:
    """Position of each token in its document, for rows `[..., T]` of marks of first tokens; a row starts at 0."""
    index = np.arange(starts.shape[-1])
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=-1)


def _write_sets(
    config: DataConfig,
    tokenizer: Any,
    seed: int,
    folder: Path,
    wanted: dict[str, int],
    vocab_size: int | None,
    packing: Packing,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, int], int | None]:
    """
    Writes the sets one after the other, in the order of `wanted`; returns how many rows each has, and which source of
    the text had no more, if one did.
    """
    reader = PackedRows(config, tokenizer, seed, packing=packing)
    rows = _told(reader, wanted, progress)
    counts = {name: _write(islice(rows, n), folder / name, vocab_size) for name, n in wanted.items()}
    return counts, reader.text.ended


def _told(
    rows: Iterator[dict[str, Any]], wanted: dict[str, int], progress: Callable[[int, int], None] | None
) -> Iterator[dict[str, Any]]:
    """`rows`, and tells `progress` of each of them."""
    total = sum(wanted.values())
    for done, row in enumerate(rows, 1):
        if progress is not None:
            progress(done, total)
        yield row


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


def too_few_rows(found: int, held_out: int, config: DataConfig, about: str = "") -> ValueError:
    """What is said of text that has `found` rows, none of them to train on; `about` is put before an estimate."""
    if found == 0:
        return _no_rows(config)
    return ValueError(
        f"{_name(config)} makes {about}{found} rows of {config.block_size} tokens, and {held_out} are held out, so "
        "none is left to train on; give more text, a smaller block_size, or fewer held_out_rows and report_rows."
    )


def _no_rows(config: DataConfig) -> ValueError:
    if config.source is None and not any(text.strip() for text, _ in open_text(config, 0)):
        return ValueError(f"{_name(config)} is empty; give one that has text.")
    return ValueError(
        f"{_name(config)} is shorter than one block of {config.block_size} tokens; give more text or a smaller "
        "block_size."
    )


def named_source(config: DataConfig, number: int) -> str:
    """One of several sources, by its place in the recipe, with what it reads and its share of the text."""
    share = config.sources[number].weight / sum(source.weight for source in config.sources)
    return f"data.sources[{number}] ({_source_name(config, number)}), {100 * share:.3g}% of the text"


def _source_name(config: DataConfig, number: int) -> str:
    source = config.sources[number]
    return source.dataset or ", ".join(source.text_files)


def _name(config: DataConfig) -> str:
    if config.dataset:
        return f"dataset {config.dataset!r} (split {config.split!r})"
    if config.sources:
        names = [_source_name(config, number) for number in range(len(config.sources))]
        return f"the mixture of {' and '.join(names)}, which ends with the first of them,"
    return f"text_files {config.text_files}" if config.text_files else f"data source {config.source!r}"

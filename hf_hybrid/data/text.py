"""Text of datasets and local files, piece by piece, from any position that it was left at."""

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from datasets import IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from ..places import find_files
from .config import DataConfig, SourceConfig


_PIECE_CHARACTERS = 2**18  # a longer text file is tokenised in pieces, cut at line ends


def open_text(config: DataConfig, seed: int) -> "Mixture":
    """The text of `config`, from its start."""
    return Mixture([(_open(source, seed), source.weight) for source in config.all_sources()])


def _open(source: SourceConfig, seed: int) -> "FileTexts | DatasetTexts":
    return DatasetTexts(source) if source.dataset else FileTexts(source, seed)


def check_sources(config: DataConfig) -> None:
    """Raises a `ValueError` where the local files of `config` are none, or no text, from the beginning of each."""
    for source in [] if config.source else config.all_sources():
        if source.text_files:
            files = find_files(source.text_files)
            if not any([_begins_with_text(path, source.text_column) for path in files]):
                raise ValueError(f"text_files {source.text_files} is empty; give one that has text.")


def _begins_with_text(path: Path, text_column: str) -> bool:
    """Whether there is text at the beginning of a file; a `ValueError` where there is something else."""
    with _opened(path) as stream:
        if path.suffix == ".jsonl":
            for number, line in enumerate(islice(stream, 100), start=1):
                if line.strip():
                    text = _decoded(line, path)
                    return bool(_text_of_line(text, f"{path}, line {number}", text_column).strip()) or number > 1
            return False
        start = stream.read(2**16)
        end = len(start) if len(start) < 2**16 else max(start.rfind(b"\n"), start.rfind(b" ")) + 1
        return bool(_decoded(start[:end], path).strip())


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); leave it out of text_files.") from error


def _decoded(text: bytes, path: Path) -> str:
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); leave it out of text_files.") from error
    if "\0" in decoded:
        raise ValueError(f"{path} is not UTF-8 text (it holds zero bytes); leave it out of text_files.")
    return decoded


class Mixture:
    """
    Iterator over `(text, whether a document ends with it)`, of one source or of several by their weights.

    The next document comes from the source that is furthest behind its share of the characters so far: nothing is
    random, and the shares are exact up to one document. The mixture ends where the first of its sources ends.

    Args:
        sources (`list`): pairs of a source, which has `__next__`, `state` and `restore`, and its weight.
    """

    def __init__(self, sources: list[tuple[Any, float]]) -> None:
        self.sources = [source for source, _ in sources]
        self.weights = [weight for _, weight in sources]
        self.characters = [0] * len(sources)
        self.current: int | None = None  # amid a document of this source
        self.ended: int | None = None  # the source that had no more

    def __iter__(self) -> "Mixture":
        return self

    def __next__(self) -> tuple[str, bool]:
        if self.current is None:
            behind = [count / weight for count, weight in zip(self.characters, self.weights, strict=True)]
            self.current = behind.index(min(behind))
        index = self.current
        try:
            text, is_end = next(self.sources[index])
        except StopIteration:
            self.ended = index
            raise
        self.characters[index] += len(text)
        if is_end:
            self.current = None
        return text, is_end

    def state(self) -> dict[str, Any]:
        """Where it is, as plain data."""
        sources = [source.state() for source in self.sources]
        return {"characters": list(self.characters), "current": self.current, "sources": sources}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self.characters, self.current = list(state["characters"]), state["current"]
        for source, its in zip(self.sources, state["sources"], strict=True):
            source.restore(its)


class FileTexts:
    """Iterator over the pieces of local files, in an order drawn with the seed; an open file is never read whole."""

    def __init__(self, source: SourceConfig, seed: int) -> None:
        self.files = find_files(source.text_files)
        random.Random(seed).shuffle(self.files)
        self.text_column = source.text_column
        self.restore({"file": 0, "offset": 0, "line": 0})

    def state(self) -> dict[str, int]:
        return {"file": self.file, "offset": self.offset, "line": self.line}

    def restore(self, state: dict[str, int]) -> None:
        self.file, self.offset, self.line = state["file"], state["offset"], state["line"]
        self.stream: Any = None

    def __iter__(self) -> "FileTexts":
        return self

    def __next__(self) -> tuple[str, bool]:
        while self.file < len(self.files):
            path = self.files[self.file]
            if self.stream is None:
                self.stream = _opened(path)  # from one piece to the next
                self.stream.seek(self.offset)
            piece = self._line(path) if path.suffix == ".jsonl" else self._lines(path)
            self.offset = self.stream.tell()
            if piece is None or piece[1] and path.suffix != ".jsonl":
                self.stream.close()
                self.restore({"file": self.file + 1, "offset": 0, "line": 0})
            if piece is not None:
                return piece
        raise StopIteration

    def _line(self, path: Path) -> tuple[str, bool] | None:
        while line := self.stream.readline():
            self.line += 1
            if line.strip():
                return _text_of_line(_decoded(line, path), f"{path}, line {self.line}", self.text_column), True
        return None

    def _lines(self, path: Path) -> tuple[str, bool]:
        # Read as bytes, which have cheap positions, and cut at line ends, where no character is cut.
        text = _decoded(b"".join(self.stream.readlines(_PIECE_CHARACTERS)), path)
        return text.replace("\r\n", "\n").replace("\r", "\n"), not text


class DatasetTexts:
    """Iterator over the documents of a dataset of `datasets`, whose own state it keeps."""

    def __init__(self, source: SourceConfig) -> None:
        self.source = source
        rows = _load(source)
        self.rows = rows if isinstance(rows, IterableDataset) else rows.to_iterable_dataset()
        self.iterator: Iterator[Any] | None = None

    def state(self) -> dict[str, Any] | None:
        # Nothing is read yet.
        return None if self.iterator is None else self.rows.state_dict()

    def restore(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.rows.load_state_dict(state)
            self.iterator = iter(self.rows)

    def __iter__(self) -> "DatasetTexts":
        return self

    def __next__(self) -> tuple[str, bool]:
        if self.iterator is None:
            self.iterator = iter(self.rows)
        return _text_of(next(self.iterator), f"dataset {self.source.dataset!r}", self.source.text_column), True


def _text_of_line(line: str, where: str, text_column: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}); a .jsonl file holds one object per line.") from error
    return _text_of(record if isinstance(record, dict) else {}, where, text_column)


def _load(source: SourceConfig) -> Any:
    try:
        return load_dataset(
            source.dataset, source.subset, split=source.split, streaming=source.streaming, revision=source.revision
        )
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"dataset {source.dataset!r} (subset {source.subset!r}, split {source.split!r}, revision "
            f"{source.revision!r}) did not load: {first}"
        ) from error


def _text_of(record: dict[str, Any], where: str, text_column: str) -> str:
    if text_column not in record:
        raise ValueError(
            f"{where} has no column {text_column!r}; it has {sorted(record)}. Set text_column to the right one."
        )
    text = record[text_column]
    if not isinstance(text, str):
        raise ValueError(f"{where}: column {text_column!r} holds a {type(text).__name__}, not text; name another one.")
    return text

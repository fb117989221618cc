"""Text of datasets and local files, piece by piece."""

import glob
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError


if TYPE_CHECKING:
    from .data import DataConfig

_PIECE_CHARACTERS = 2**18  # a longer text file is tokenised in pieces, cut at line ends


def pieces(config: "DataConfig", seed: int) -> Iterator[tuple[str, bool]]:
    """Yields text with whether a document ends with it, reading no further than it is asked to."""
    if config.dataset:
        for text in _texts_of_dataset(config):
            yield text, True
        return
    files = find_files(config.text_files)
    random.Random(seed).shuffle(files)
    for file in files:
        try:
            yield from _pieces_of_file(file, config.text_column)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error.reason}); leave it out of text_files.") from error


def find_files(patterns: list[str]) -> list[Path]:
    """The files that `patterns` name, sorted, each once; `**` goes into subfolders."""
    found: set[Path] = set()
    for pattern in patterns:
        matches = glob.glob(str(Path(pattern).expanduser()), recursive=True)
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise ValueError(
                f"text_files: {pattern!r} matches no file; give a path or a pattern such as 'texts/*.txt'."
            )
        found.update(files)
    return sorted(found)


def _pieces_of_file(file: Path, text_column: str) -> Iterator[tuple[str, bool]]:
    with open(file, encoding="utf-8") as stream:
        if file.suffix == ".jsonl":
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _text_of_line(line, f"{file}, line {number}", text_column), True
            return
        while lines := stream.readlines(_PIECE_CHARACTERS):
            yield "".join(lines), False
    yield "", True


def _text_of_line(line: str, where: str, text_column: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}); a .jsonl file holds one object per line.") from error
    return _text_of(record if isinstance(record, dict) else {}, where, text_column)


def _texts_of_dataset(config: "DataConfig") -> Iterator[str]:
    try:
        rows = load_dataset(
            config.dataset, config.subset, split=config.split, streaming=config.streaming, revision=config.revision
        )
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"dataset {config.dataset!r} (subset {config.subset!r}, split {config.split!r}) did not load: {first}"
        ) from error
    for row in rows:
        yield _text_of(row, f"dataset {config.dataset!r}", config.text_column)


def _text_of(record: dict[str, Any], where: str, text_column: str) -> str:
    if text_column not in record:
        raise ValueError(
            f"{where} has no column {text_column!r}; it has {sorted(record)}. Set text_column to the right one."
        )
    text = record[text_column]
    if not isinstance(text, str):
        raise ValueError(f"{where}: column {text_column!r} holds a {type(text).__name__}, not text; name another one.")
    return text

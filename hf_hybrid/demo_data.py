"""Rows for the embedded teacher: Python source from the standard library, associative recall and copying, in turn."""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch

from .synthetic import associative_recall, copying, ordinary_token_ids


# Splits share neither files nor random draws: training rows, rows that layers are chosen on, rows that are reported.
SPLITS = ("train", "score", "report")
_LEFT_OUT = frozenset(
    {"site-packages", "test", "tests", "idle_test", "idlelib", "encodings", "pydoc_data", "__pycache__"}
)


def standard_library_files() -> list[tuple[str, Path]]:
    """The standard library's source files with their relative paths, sorted; tests and tables are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = ((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    found = sorted((name, path) for name, path in files if _LEFT_OUT.isdisjoint(name.split("/")))
    if not found:
        raise FileNotFoundError(f"found no .py files under {root}; run a Python that has its library's source.")
    return found


def is_held_out(relative_path: str) -> bool:
    """Whether a source file is kept from all training, the teacher's included: one in twenty, by its path alone."""
    return _digest(relative_path) % 20 == 0


def demo_rows(tokenizer: Any, block_size: int, num_rows: int, seed: int, split: str) -> datasets.Dataset:
    """
    Returns `num_rows` rows of `block_size` tokens, of each kind in turn: source, associative recall, copying.

    Args:
        tokenizer: the embedded teacher's tokenizer, or any other.
        block_size (`int`): tokens per row, a multiple of 4.
        num_rows (`int`): number of rows.
        seed (`int`): the same seed gives the same rows.
        split (`str`): `"train"`, `"score"` or `"report"`; their rows are disjoint.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {SPLITS}.")
    count = -(-num_rows // 3)
    generator = torch.Generator().manual_seed(3 * seed + SPLITS.index(split))
    token_ids = ordinary_token_ids(tokenizer)
    text = _source_rows(tokenizer, block_size, count, seed, split)
    recall, _ = associative_recall(count, block_size, token_ids, generator)
    copies, _ = copying(count, block_size, token_ids, generator)
    rows = torch.stack((text, recall, copies), dim=1).flatten(0, 1)[:num_rows]
    return datasets.Dataset.from_dict({"input_ids": rows.tolist()})


def _source_rows(tokenizer: Any, block_size: int, count: int, seed: int, split: str) -> torch.Tensor:
    """`[count, block_size]` tokens of source, files joined by the end-of-text token."""
    tokens: list[int] = []
    for path in _files_of(split, seed):
        tokens += tokenizer(path.read_text(encoding="utf-8", errors="replace"), verbose=False)["input_ids"]
        tokens.append(tokenizer.eos_token_id)
        if len(tokens) >= count * block_size:
            return torch.tensor(tokens[: count * block_size]).view(count, block_size)
    raise ValueError(
        f"the standard library's {split!r} files hold {len(tokens)} tokens, {count * block_size} were asked for; ask "
        "for fewer rows."
    )


def _files_of(split: str, seed: int) -> Iterator[Path]:
    """The files of a split in an order drawn from the seed; the two held-out splits share out the held-out files."""
    chosen = []
    for name, path in standard_library_files():
        kind = "train" if not is_held_out(name) else SPLITS[1 + _digest(name) // 20 % 2]
        if kind == split:
            chosen.append((name, path))
    for _, path in sorted(chosen, key=lambda entry: _digest(f"{seed}/{entry[0]}")):
        yield path


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)

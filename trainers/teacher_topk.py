"""What a teacher said once, read from disk in its place: the k most likely tokens of every position."""

import functools
import hashlib
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from .durable import read_json


# The column of a batch that says which row of the dataset each of its rows is.
ROW = "teacher_row"
ABOUT = "teacher_topk.json"
_SAMPLE = 64  # rows in a dataset's digest


class TeacherTopK:
    """
    What [`write_teacher_topk`] left in a folder.

    Args:
        folder (`str`): complete, else a `ValueError` says what is missing.
    """

    def __init__(self, folder: Any) -> None:
        self.folder = Path(folder)
        about = read_json(self.folder / ABOUT)
        if about is None:
            raise ValueError(
                f"teacher_topk={str(folder)!r} has no {ABOUT}; make it with hf_hybrid.write_teacher_topk."
            )
        self.k, self.vocab_size = about["k"], about["vocab_size"]
        self.rows, self.rows_per_shard = about["rows"], about["rows_per_shard"]
        self.dataset = about["dataset"]
        shards = -(-self.rows // self.rows_per_shard)
        missing = [path.name for path in (shard_path(self.folder, i) for i in range(shards)) if not path.is_file()]
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of {shards} files, such as {missing[0]}; the call of "
                "write_teacher_topk that began it, made again, writes them."
            )
        # A file is mapped into memory as long as it is open.
        self._shard = functools.lru_cache(maxsize=64)(lambda number: _Shard(shard_path(self.folder, number)))

    def check(self, dataset: Any, vocab_size: int) -> None:
        """Raises a `ValueError` where this was made of other rows than `dataset`, or for another vocabulary."""
        check_length(dataset)
        if vocab_size != self.vocab_size:
            raise ValueError(
                f"{self.folder} was made by a teacher with a vocabulary of {self.vocab_size}, the student has "
                f"{vocab_size}; make it with the student's teacher."
            )
        if len(dataset) != self.rows:
            raise ValueError(
                f"{self.folder} was made of a dataset of {self.rows} rows, train_dataset has {len(dataset)}; pass the "
                "dataset that it was made of, in its order."
            )
        if digest_of_rows(dataset) != self.dataset:
            raise ValueError(
                f"{self.folder} was made of {self.rows} rows with other tokens than train_dataset's, or in another "
                "order; pass the dataset that it was made of."
            )

    def check_row(self, index: int, row: Any) -> None:
        """Raises a `ValueError` where row `index` of the dataset is another than this was made of."""
        number, place = divmod(index, self.rows_per_shard)
        if self._shard(number).checksums[place] != checksum_of(row):
            raise ValueError(
                f"row {index} of train_dataset has other tokens than the one that {self.folder} was made of; pass the "
                "dataset that it was made of, in its order."
            )

    def of_rows(self, indices: list[int], counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Log-probabilities `[N, k]`, token ids `[N, k]` and the logarithm of the mass of all others `[N]` of the tokens
        that are not padding in the rows `indices`, one row after the other; `counts` says how many each must have.
        """
        parts = []
        for index, count in zip(indices, counts, strict=True):
            number, place = divmod(index, self.rows_per_shard)
            found = self._shard(number).row(place)
            if len(found[0]) != count:
                raise ValueError(
                    f"row {index} has {count} tokens in the batch and {len(found[0])} in {self.folder}; the collator "
                    "must not cut rows or mask tokens."
                )
            parts.append(found)
        logprobs, ids, tail = (torch.cat(part) for part in zip(*parts, strict=True))
        return logprobs, ids, tail


class NumberedRows(Dataset):
    """The rows of a dataset, each with its index in the column `ROW`, checked against those of a [`TeacherTopK`]."""

    def __init__(self, rows: Any, topk: TeacherTopK) -> None:
        self.rows, self.topk = rows, topk

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.rows[index])
        self.topk.check_row(index, row)
        return {**row, ROW: index}


class _Shard:
    """One file: its rows one after the other, from `offsets[i]` to `offsets[i + 1]`."""

    def __init__(self, path: Path) -> None:
        try:
            self.tensors = safe_open(path, "pt")
            self.offsets = self.tensors.get_tensor("offsets").tolist()
            self.checksums = self.tensors.get_tensor("checksums").tolist()
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete it, and write_teacher_topk makes it again."
            ) from error

    def row(self, place: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        part = slice(self.offsets[place], self.offsets[place + 1])
        logprobs, ids, tail = (self.tensors.get_slice(name)[part] for name in ("logprobs", "ids", "tail"))
        return logprobs, ids, tail


def check_length(dataset: Any) -> None:
    try:
        empty = len(dataset) == 0
    except TypeError as error:
        raise ValueError(
            f"teacher_topk goes by the rows' indices, and a {type(dataset).__name__} has no length; pass a dataset "
            "whose rows have indices, without data.on_the_fly."
        ) from error
    if empty:
        raise ValueError("the dataset is empty; pass at least one row of input_ids.")


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:05d}.safetensors"


def counted_tokens(row: Any) -> np.ndarray:
    """Which tokens of a row are not padding, `[T]`."""
    mask = row.get("attention_mask")
    return np.ones(len(row["input_ids"]), bool) if mask is None else np.asarray(mask) != 0


def checksum_of(row: Any) -> int:
    """Of what a row says about its tokens that are not padding: which they are, and in which documents."""
    counted = counted_tokens(row)
    columns = [row[name] for name in ("input_ids", "position_ids") if row.get(name) is not None]
    return zlib.crc32(np.stack([np.asarray(column, np.int64)[counted] for column in columns]).tobytes())


def digest_of_rows(dataset: Any) -> str:
    """Of evenly spaced rows, the first among them; each row's own checksum tells the others."""
    rows = range(0, len(dataset), max(1, len(dataset) // _SAMPLE))
    return hashlib.sha256(str([checksum_of(dataset[index]) for index in rows]).encode()).hexdigest()[:16]

"""The teacher's one pass over a dataset: its k most likely tokens at every position, in files that outlive a kill."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .digests import weights_digest
from .distillation import final_hidden_states
from .durable import PARTIAL, read_json, settle, write_json
from .losses import check_logit_function, logit_function, tokens_per_chunk, topk_of_logits
from .modes import evaluating
from .precision import AS_LOADED, Precision
from .processes import on_main, share_of
from .sharding import is_sharded
from .teacher_topk import ABOUT, check_length, checksum_of, counted_tokens, digest_of_rows, shard_path


_SHARD_BYTES = 2**26
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_teacher_topk(
    teacher: PreTrainedModel,
    dataset: Any,
    folder: Any,
    k: int,
    *,
    dtype: str = "float32",
    batch_size: int = 8,
    rows_per_shard: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    precision: Precision = AS_LOADED,
) -> Path:
    """
    Runs the teacher over `dataset` once and writes, for each token that is not padding, its `k` largest
    log-probabilities, their token ids and the logarithm of the mass of all other tokens: `DistillationConfig` takes
    the folder as `teacher_topk`. A token takes `8 k + 4` bytes, or `6 k + 4` with bfloat16.

    Killed, the same call goes on with the shards that are missing. Under `accelerate launch`, call it in every process
    with the same arguments: each writes its share of the shards.

    Args:
        teacher (`PreTrainedModel`): whole, where it is to run.
        dataset: rows with `input_ids` and optionally `attention_mask` and `position_ids`, by index, in the order in
            which they will be trained on by index.
        folder (`str`): new, or what an earlier call with the same arguments began.
        k (`int`): tokens kept, at most the vocabulary.
        dtype (`str`): of the log-probabilities, `"float32"` or `"bfloat16"`. The mass of the others is fp32.
        batch_size (`int`): rows at once, of one length each.
        rows_per_shard (`int`, *optional*): rows of a file; by default as many as make 64 MiB.
        progress (`Callable`, *optional*): called with `(rows done, rows in all)` after each of this process's shards.
        precision ([`Precision`]): what the teacher runs in, by default the dtype of its weights. `Precision.of(args)`
            lets it say what it would say in a distillation with `args`.

    Returns:
        `Path`: `folder`.
    """
    folder, vocabulary = Path(folder), teacher.config.get_text_config().vocab_size
    if isinstance(k, bool) or not 1 <= k <= vocabulary:
        raise ValueError(f"k={k} tokens cannot be kept of a vocabulary of {vocabulary}; pass 1..{vocabulary}.")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {list(_DTYPES)}.")
    if is_sharded(teacher):
        raise ValueError("the teacher is sharded, and each process runs it on rows of its own; pass it whole.")
    check_length(dataset)
    check_logit_function(teacher, precision)
    if rows_per_shard is None:
        rows_per_shard = max(1, _SHARD_BYTES // ((8 * k + 4) * len(dataset[0]["input_ids"])))
    about = {"k": k, "dtype": dtype, "vocab_size": vocabulary, "rows_per_shard": rows_per_shard}
    about |= {"rows": len(dataset), "dataset": digest_of_rows(dataset), "teacher": weights_digest(teacher)}
    about |= {"precision": str(precision)}
    on_main(lambda: _claim(folder, about))
    shards = -(-len(dataset) // rows_per_shard)
    for number in share_of(shards):
        rows = range(number * rows_per_shard, min((number + 1) * rows_per_shard, len(dataset)))
        if not shard_path(folder, number).exists():
            _write_shard(shard_path(folder, number), teacher, dataset, rows, about, batch_size, precision)
        if progress is not None:
            progress(rows.stop, len(dataset))
    on_main(lambda: None)  # all are there before any process reads one
    return folder


def _write_shard(
    path: Path,
    teacher: Any,
    dataset: Any,
    rows: range,
    about: dict[str, Any],
    batch_size: int,
    precision: Precision,
) -> None:
    parts: list[tuple[torch.Tensor, ...]] = []
    counts, checksums = [], []
    for batch in _batches(dataset, rows, batch_size):
        counts += [int(counted_tokens(row).sum()) for row in batch]
        checksums += [checksum_of(row) for row in batch]
        parts.append(_topk_of_batch(teacher, batch, about["k"], _DTYPES[about["dtype"]], precision))
    logprobs, ids, tail = (torch.cat(part) for part in zip(*parts, strict=True))
    offsets = torch.tensor([0, *np.cumsum(counts).tolist()])
    tensors = {"logprobs": logprobs, "ids": ids, "tail": tail, "offsets": offsets}
    partial = path.with_name(path.name + PARTIAL)
    try:
        save_file({**tensors, "checksums": torch.tensor(checksums)}, partial)
        settle(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@torch.no_grad()
def _topk_of_batch(
    teacher: Any, rows: list[Any], k: int, dtype: torch.dtype, precision: Precision
) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, ids and log of the rest, of the tokens of `rows` that are not padding, on the CPU."""
    names = [name for name in ("input_ids", "attention_mask", "position_ids") if rows[0].get(name) is not None]
    inputs = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]).to(teacher.device) for name in names}
    with evaluating(teacher):
        hidden = final_hidden_states(teacher, inputs, precision)
    hidden = hidden[torch.as_tensor(np.stack([counted_tokens(row) for row in rows]), device=hidden.device)]
    head, found = logit_function(teacher, precision), []
    for part in hidden.split(tokens_per_chunk(teacher.config.get_text_config().vocab_size, hidden.device)):
        logprobs, ids, tail = topk_of_logits(head(part), k)
        found.append((logprobs.to(dtype).cpu(), ids.to(torch.int32).cpu(), tail.float().cpu()))
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


def _batches(dataset: Any, rows: range, batch_size: int) -> Iterator[list[Any]]:
    """The rows in order, at most `batch_size` at a time and only of one length."""
    batch: list[Any] = []
    for index in rows:
        row = dataset[index]
        if len(batch) == batch_size or (batch and len(batch[0]["input_ids"]) != len(row["input_ids"])):
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Marks `folder` as holding the top k of `about`; a `ValueError` where it holds others."""
    folder.mkdir(parents=True, exist_ok=True)
    there = read_json(folder / ABOUT)
    if there is None:
        write_json(folder / ABOUT, about)
        return
    there.setdefault("precision", str(AS_LOADED))  # as it was before it was written down
    for name, here in about.items():
        if there.get(name) != here:
            raise ValueError(
                f"{folder} was begun with {name}={there.get(name)}, this call has {here}; choose another folder."
            )

"""Digests of what a result came from: weights and rows."""

import hashlib
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel


_SAMPLE = 64  # elements in a tensor's digest
_COLUMNS = ("input_ids", "attention_mask", "position_ids")


def tensor_digest(tensor: torch.Tensor) -> str:
    """
    A digest of shape, dtype and 64 evenly spaced elements: enough to tell a fine-tuned copy, at no cost for large
    models, and no proof against a change of single elements.
    """
    flat = tensor.detach().flatten()
    sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].cpu().contiguous()
    hashed = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    hashed.update(sample.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def weights_digest(model: PreTrainedModel) -> str:
    """Of the names and the [`tensor_digest`] of every tensor of `model`."""
    hashed = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        hashed.update(f"{name} {tensor_digest(tensor)} ".encode())
    return hashed.hexdigest()[:16]


def rows_digest(dataset: Any) -> str:
    """How many rows there are, with a digest of what a model reads of every one of them, in their order."""
    rows = dataset.with_format("numpy") if isinstance(dataset, datasets.Dataset) else dataset
    hashed = hashlib.sha256()
    for index in range(len(rows)):
        row = rows[index]
        for name in _COLUMNS:
            if row.get(name) is not None:
                column = np.asarray(row[name], np.int32)
                hashed.update(f"{name} {len(column)} ".encode())
                hashed.update(column.tobytes())
    return f"{len(rows)} rows, {hashed.hexdigest()[:16]}"

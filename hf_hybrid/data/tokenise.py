"""Texts to token ids, in several threads."""

import copy
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..environment import available_cores


_MOST = 16  # beyond that Python itself is what they wait for
_SMALL = 2**16  # characters: less is not worth another thread


class Tokeniser:
    """
    A tokenizer in `workers` threads, each with a copy of its own: the fast tokenizers let go of Python while they
    work, and those that share one wait for each other at its cache. Threads need no fork, which the tokenizers' own
    parallelism does not bear, and in their copies that stays off. Of a fast tokenizer the encoder alone is called:
    what the library's call adds to the ids is made by Python, one thread at a time, and takes as long as they do.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): it is not changed.
        workers (`int`, *optional*): by default one for each core that this process may use, at most 16.
    """

    def __init__(self, tokenizer: Any, workers: int | None = None) -> None:
        self.workers = min(_MOST, max(1, int(available_cores()))) if workers is None else workers
        if self.workers < 1:
            raise ValueError(f"workers={workers} tokenise nothing; pass 1 or more.")
        self.tokenizer = tokenizer
        self._idle: queue.SimpleQueue[Callable[[list[str]], list[list[int]]]] = queue.SimpleQueue()

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32, without special tokens."""
        parts = _shared_out(texts, self.workers)
        if len(parts) == 1:
            return self._ids(parts[0])
        with ThreadPoolExecutor(min(self.workers, len(parts))) as pool:
            return [ids for found in pool.map(self._ids, parts) for ids in found]

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encode = self._idle.get_nowait()
        except queue.Empty:
            encode = _encoder(self.tokenizer)
        try:
            return [np.asarray(ids, np.int32) for ids in encode(list(texts))]
        finally:
            self._idle.put(encode)


def _encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """A function of its own from texts to their ids, as `tokenizer` has them without special tokens."""
    if not tokenizer.is_fast:
        own = copy.deepcopy(tokenizer)
        return lambda texts: own(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    # What a call of the tokenizer sets each time.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return lambda texts: [encoded.ids for encoded in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _shared_out(texts: Sequence[str], workers: int) -> list[Sequence[str]]:
    """`texts`, in order, in parts of about as many characters: four for each worker, for they do not take as long."""
    total = sum(map(len, texts))
    size = max(_SMALL, -(-total // (4 * workers))) if workers > 1 else total + 1
    parts, start, characters = list[Sequence[str]](), 0, 0
    for end, text in enumerate(texts, 1):
        characters += len(text)
        if characters >= size or end == len(texts):
            parts.append(texts[start:end])
            start, characters = end, 0
    return parts

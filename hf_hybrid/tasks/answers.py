"""Answers that outlive a kill: an evaluation that is started again goes on behind them."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Answers:
    """
    What models answered, a line for each answer in a file that grows with every batch.

    An answer is found by whose it is and what was asked, both in full: a model that changed finds none.

    Args:
        path (`Path`): the file, which is made with the first answer. A last line that a kill cut short is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        if not path.is_file():
            return
        written = path.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        try:
            self.known = dict(json.loads(line) for line in whole.splitlines())
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} holds no answers of an evaluation ({error}); remove it, and all tasks begin anew."
            ) from error
        if len(whole) < len(written):
            os.truncate(path, len(whole))

    def find(self, key: str) -> Any:
        """The answer of this key, or None."""
        return self.known.get(key)

    def keep(self, answers: Sequence[tuple[str, Any]]) -> None:
        """Adds answers with their keys, on the disk when this returns."""
        self.known |= answers
        with open(self.path, "a", encoding="utf-8", newline="\n") as stream:
            stream.writelines(json.dumps(answer) + "\n" for answer in answers)
            stream.flush()
            os.fsync(stream.fileno())


def answer_key(*asked: Any) -> str:
    """A digest of whose an answer is and of what was asked, or of one of both."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]

"""The folder of a run: what is in it, whose it is, and how a folder appears in one step or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .recipe import Recipe


# Each stage with what it leaves in the folder. An artefact has its name only once it is complete.
ARTEFACTS = {
    "data": "data",
    "align": "aligned",
    "score": "scores.json",
    "select": "selection.json",
    "distill": "distilled",
    "finetune": "finetuned",
    "evaluate": "evaluation.json",
    "model": "model",
    "report": "report.json",
}
_PARTIAL = ".partial"
_HEADER = "# The recipe of the run in this folder, written by hf-hybrid. Do not edit.\n"


@contextlib.contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """
    Gives an empty folder beside `folder` to write to, and renames it to `folder` when the block ends without an error:
    a folder of that name is complete, whenever the process was killed.
    """
    partial = folder.with_name(folder.name + _PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, folder)
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}") from error
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def read_json(path: Path) -> Any:
    """What a JSON file holds, or None where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def claim(folder: Path, recipe: Recipe) -> None:
    """Makes `folder` the run of `recipe`, or raises a `ValueError` where it is something else."""
    identity = folder / "recipe.yaml"
    if identity.is_file() and identity.read_text("utf-8").startswith(_HEADER):
        differences = Recipe.load(identity).difference(recipe)
        if differences and not _has_work(folder):
            recipe.save(identity, _HEADER)  # an earlier call stopped at its first error; the recipe was corrected
        elif differences:
            shown = "; ".join(differences[:3]) + ("; ..." if len(differences) > 3 else "")
            raise ValueError(
                f"{folder} belongs to another recipe ({shown}, 'here' being the folder's); choose another folder, or "
                f"run {identity} to go on with it."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    strangers = sorted(path.name for path in folder.iterdir() if path.name != f"recipe.yaml{_PARTIAL}")
    if strangers:
        raise ValueError(f"{folder} is no run and not empty (it holds {strangers[0]!r}); choose a new folder.")
    recipe.save(identity, _HEADER)


def _has_work(folder: Path) -> bool:
    names = [*ARTEFACTS.values(), "scores", *(f"{name}_checkpoints" for name in ARTEFACTS)]
    return any((folder / name).exists() for name in names)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process out of `folder`; the lock ends with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(folder / ".lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is running in {folder}; wait for it, or choose another folder."
            ) from error
        yield

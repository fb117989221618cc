"""The folder of a run: what is in it, whose it is, and how a folder appears in one step or not at all."""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from hf_hybrid.trainers.checkpoints import damage, seal
from hf_hybrid.trainers.durable import PARTIAL, sync_directory, sync_tree

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
_HEADER = "# The recipe of the run in this folder, written by hf-hybrid. Do not edit.\n"


@contextlib.contextmanager
def publish(folder: Path, *, listed: bool = False) -> Iterator[Path]:
    """
    Gives an empty folder beside `folder` to write to, and renames it to `folder` when the block ends without an error:
    a folder of that name is complete, whenever the process was killed or the power cut.

    Args:
        folder (`Path`): what to make; it must not exist.
        listed (`bool`): add the list of files that [`damage`] compares with, see [`seal`].
    """
    partial = folder.with_name(folder.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        if listed:
            seal(partial)
        else:
            sync_tree(partial)
        os.replace(partial, folder)
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}") from error
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
    sync_directory(folder.parent)


def check_whole(folder: Path, stage: str) -> None:
    """Raises a `ValueError` where the artefact `folder` of `stage` lost something since it was complete."""
    problem = damage(folder)
    if problem is not None:
        raise ValueError(
            f"{folder} is damaged: {problem}. Restore it from a copy, or delete it, and what later stages made of it, "
            f"to make it again (stage {stage})."
        )


def claim(folder: Path, recipe: Recipe) -> None:
    """Makes `folder` the run of `recipe`, or raises a `ValueError` where it is something else."""
    identity = folder / "recipe.yaml"
    if _is_run(folder):
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
    _refuse_strangers(folder)
    recipe.save(identity, _HEADER)


def _is_run(folder: Path) -> bool:
    identity = folder / "recipe.yaml"
    return identity.is_file() and identity.read_text("utf-8").startswith(_HEADER)


def _refuse_strangers(folder: Path) -> None:
    ours = {".lock", f"recipe.yaml{PARTIAL}"}  # what a kill at the very start leaves
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in ours) if folder.exists() else []
    if strangers:
        raise ValueError(f"{folder} is no run and not empty (it holds {strangers[0]!r}); choose a new folder.")


def _has_work(folder: Path) -> bool:
    names = [*ARTEFACTS.values(), "scores", *(f"{name}_checkpoints" for name in ARTEFACTS)]
    return any((folder / name).exists() for name in names)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Keeps a second process out of `folder`, a run or a new folder; the lock ends with the process, however it ends.

    To be held from before [`claim`] on: of two first calls with two recipes, the second must not write.
    """
    if not _is_run(folder):
        _refuse_strangers(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    lock = folder / ".lock"
    # A finished run may lie where nothing can be written.
    writable = os.access(folder, os.W_OK)
    with open(lock, "a+" if writable or not lock.exists() else "r") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise ValueError(
                f"another process is running in {folder} ({stream.read().strip() or 'unknown'}); wait for it, or "
                "choose another folder."
            ) from error
        if writable:
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            stream.flush()
        yield

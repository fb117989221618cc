"""The folder of a run: what is in it, whose it is, and how a folder appears in one step or not at all."""

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from hf_hybrid.trainers.checkpoints import damage, seal
from hf_hybrid.trainers.durable import PARTIAL, read_json, sync_directory, sync_tree, write_json
from hf_hybrid.trainers.scoring.methods import MOVED, method_of

from ..places import HEADER, is_run
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
            f"{folder} is damaged: {problem}. Restore it from a copy, or make it and what follows again with "
            f"--from {stage}."
        )


def claim(folder: Path, recipe: Recipe, start_from: str | None = None) -> list[str]:
    """
    Makes `folder` the run of `recipe`, or raises a `ValueError` where it is something else.

    Args:
        folder (`Path`): new, empty, or a run; [`locked`] by the caller.
        recipe ([`Recipe`]): what is to be made there.
        start_from (`str`, *optional*): set aside what this stage and later ones left, see [`set_aside`]. The recipe
            may then differ from the folder's in what decides these stages.

    Returns:
        `list[str]`: what was set aside, as paths in `folder`.
    """
    identity = folder / "recipe.yaml"
    if not is_run(folder):
        _refuse_strangers(folder)
        recipe.save(identity, HEADER)
        return []
    differences = check_claim(folder, recipe, start_from)
    moved = [] if start_from is None else set_aside(folder, start_from)
    if differences:
        recipe.save(identity, HEADER)
    return moved


def check_claim(folder: Path, recipe: Recipe, start_from: str | None = None) -> list[str]:
    """
    Raises a `ValueError` where [`claim`] does, and writes nothing; returns how a run's recipe there differs.
    """
    identity = folder / "recipe.yaml"
    if not is_run(folder):
        _refuse_strangers(folder)
        return []
    there = Recipe.load(identity)
    differences = there.difference(recipe, "in the folder", "now")
    if differences and has_work(folder):
        first = _first_stage(there, recipe)
        order = list(ARTEFACTS)
        if start_from is None or order.index(first) < order.index(start_from):
            shown = "; ".join(differences[:3]) + ("; ..." if len(differences) > 3 else "")
            raise ValueError(
                f"{folder} belongs to another recipe ({shown}); choose another folder, run "
                f"{identity} to go on with it, or add --from {first} to make that stage and what follows again."
            )
    return differences


def keep_execution(folder: Path, recipe: Recipe) -> None:
    """Writes down how the run in `folder`, which is one of `recipe`, is executed from now on."""
    if Recipe.load(folder / "recipe.yaml").to_dict() != recipe.to_dict():
        recipe.save(folder / "recipe.yaml", HEADER)


def _first_stage(there: Recipe, here: Recipe) -> str:
    """The first stage whose result depends on what differs between two recipes."""
    ours, theirs = there.identity(), here.identity()
    changed = [key for key in ours if ours[key] != theirs[key]]
    # What is no stage's own: rows depend on the seed and on the teacher's tokenizer.
    decides = {"mixer": "align", "mixer_options": "align", "training": "align"}
    stages = [decides.get(key, key if key in ARTEFACTS else "data") for key in changed]
    scored = [recipe.score for recipe in (there, here) if recipe.score is not None]
    if "select" in changed and any(
        score.method in MOVED or method_of(score.method).depends_on_k(score.options) for score in scored
    ):
        stages.append("score")  # these scores are of sets of as many layers as are kept
    return min(stages, key=list(ARTEFACTS).index)


def set_aside(folder: Path, stage: str) -> list[str]:
    """
    Moves what `stage` and the stages after it left into a new folder in `set_aside`, together with the recipe; nothing
    is deleted. The last stage's comes first, so a kill leaves no artefact without what it was made from.
    """
    later = list(ARTEFACTS)[list(ARTEFACTS).index(stage) :]
    extras = {"score": ["scores"], "select": ["scores.png"]}
    names = [
        name
        for later_stage in reversed(later)
        for name in (ARTEFACTS[later_stage], f"{later_stage}_checkpoints", *extras.get(later_stage, []))
        if (folder / name).exists()
    ]
    if not names:
        return []
    number = 1 + max((int(path.name) for path in folder.glob("set_aside/*") if path.name.isdigit()), default=0)
    place = folder / "set_aside" / str(number)
    place.mkdir(parents=True)
    shutil.copy2(folder / "recipe.yaml", place / "recipe.yaml")
    for name in names:
        os.replace(folder / name, place / name)
    sync_directory(place)
    sync_directory(folder)
    seconds = read_json(folder / "seconds.json") or {}
    write_json(folder / "seconds.json", {name: took for name, took in seconds.items() if name not in later})
    return [f"set_aside/{number}/{name}" for name in names]


def _refuse_strangers(folder: Path) -> None:
    ours = {".lock", f"recipe.yaml{PARTIAL}"}  # what a kill at the very start leaves
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in ours) if folder.exists() else []
    if "recipe.yaml" in strangers:
        raise ValueError(
            f"{folder / 'recipe.yaml'} is damaged, or hf-hybrid did not write it; restore it, or choose a new folder."
        )
    if strangers:
        raise ValueError(f"{folder} is no run and not empty (it holds {strangers[0]!r}); choose a new folder.")


def remove_partials(folder: Path) -> None:
    """Removes what killed calls were about to publish in `folder`, which the caller holds [`locked`]."""
    for path in folder.glob(f"*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def has_work(folder: Path) -> bool:
    """Whether a stage left anything in `folder`, if only a checkpoint."""
    names = [*ARTEFACTS.values(), "scores", *(f"{name}_checkpoints" for name in ARTEFACTS)]
    return any((folder / name).exists() for name in names)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Keeps a second process out of `folder`, a run or a new folder; the lock ends with the process, however it ends.

    To be held from before [`claim`] on: of two first calls with two recipes, the second must not write.
    """
    if not is_run(folder):
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


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns what a full or read-only disk makes of a write into an `OSError` that says so and names `folder`."""
    try:
        yield
    except OSError as error:
        # The file of the error is often the source of a copy, or none.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise _unwritten(folder, str(error.strerror)) from error
    except (RuntimeError, SafetensorError) as error:
        # torch's writer says "PytorchStreamWriter failed writing" or "[enforce fail at inline_container.cc:672]".
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            raise _unwritten(folder, "a file could not be written whole, as on a full disk") from error
        if isinstance(error, SafetensorError) and "I/O error" in str(error):
            raise _unwritten(folder, str(error).split("I/O error: ")[-1]) from error
        raise


def _unwritten(folder: Path, reason: str) -> OSError:
    return OSError(
        f"{folder} cannot be written: {reason[0].lower()}{reason[1:]}. What is finished there is kept; mend that, and "
        "the same command goes on."
    )

"""The Trainer's checkpoints on disk, and folders that tell whether they are complete."""

import json
import math
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .durable import read_json, sync_tree, write_json
from .processes import on_main


_LIST = "files.json"
# Where nobody says how many checkpoints there are to be: so many at most, so many seconds apart.
MOST_CHECKPOINTS, SECONDS_APART = 10, 60.0


class CheckedSteps(TrainerCallback):
    """
    Lets a checkpoint be written only of weights whose loss was looked at, and seals it; the last of all callbacks. A
    loss or norm of the gradients that is not finite goes to [`CheckedSteps.not_finite`].

    Args:
        checkpoints (`int`, *optional*): how many were asked for. Where nobody said it, one that would follow the last,
            or the start, by less than `SECONDS_APART` is left out: it can cost more than the steps that it saves, of a
            small model on a GPU as much as ten of them.
    """

    def __init__(self, checkpoints: int | None) -> None:
        self.apart = SECONDS_APART if checkpoints is None else 0.0
        self.saved = time.monotonic()

    def not_finite(self, what: str, value: float, args: Any, state: Any) -> NoReturn:
        """Raises what says that `what`, the loss or the norm, is `value`."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        # A training that ends here is to be gone on with from here. Else the main process's clock decides for all.
        if self.apart and control.should_save and not (last or control.should_training_stop):
            control.should_save = on_main(lambda: time.monotonic() - self.saved >= self.apart)
        # A mean of losses that spans a checkpoint would be another one after a resume.
        control.should_log = control.should_log or control.should_save or last
        if last:
            # What is made of the weights follows at once. And resumed from its last step, the Trainer would train one
            # step more.
            control.should_save = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            # With fp16, gradients that overflow are skipped and the scale lowered: no error.
            for what in ("loss",) if args.fp16 else ("loss", "grad_norm"):
                if not math.isfinite(float(logs.get(what, 0.0))):
                    self.not_finite(what, logs[what], args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        self.saved = time.monotonic()


def newest_checkpoint(folder: Path, note: Callable[[str], None]) -> Path | None:
    """
    The newest whole checkpoint of the Trainer in `folder`. Newer ones, half-written by a kill or damaged, are removed.

    The Trainer writes into place and, where there are too many, removes from place, so what is complete is what
    [`seal`] marked and still has all of its files.
    """
    for path in checkpoints_in(folder):
        problem = damage(path)
        if problem is None:
            return path
        note(f"{path.name} is damaged ({problem}); it is removed, and what was before it is gone on from")
        shutil.rmtree(path)
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The Trainer's checkpoints in `folder`, complete or not, the newest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True)


def seal(folder: Path) -> None:
    """Marks `folder` as complete: brings its files to the disk, and then writes `files.json` with their sizes."""
    sync_tree(folder)
    write_json(folder / _LIST, _sizes(folder))


def damage(folder: Path) -> str | None:
    """
    What is wrong with a folder that [`seal`] marked, or None.

    Reads sizes and headers; JSON in full, and what torch pickled, whose checksums torch does not look at when it loads
    a tensor.
    """
    listed = read_json(folder / _LIST)
    if listed is None:
        return f"it has no {_LIST}"
    found = _sizes(folder)
    for name, size in listed.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} bytes of {size}"
        problem = _damage_inside(folder / name)
        if problem is not None:
            return f"{name} {problem}"
    return None


def _damage_inside(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return None
        if path.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(path) as entries:
                broken = entries.testzip()
            return None if broken is None else f"does not match its checksum in {broken}"
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
    except SafetensorError as error:
        return f"is no safetensors file: {error}"
    except zipfile.BadZipFile as error:
        return f"was not written by torch.save: {error}"
    except ValueError as error:
        return f"is no JSON: {error}"
    return None


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files if path != folder / _LIST}

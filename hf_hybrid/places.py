"""Places on this machine that a user names: what is wrong with them is told at once, before torch is imported."""

import glob
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from .run.schema import read_yaml
from .teacher.names import check_found


# The first line of the recipe in a run's folder.
HEADER = "# The recipe of the run in this folder, written by hf-hybrid. Do not edit.\n"


def find_recipe(name: str) -> Path:
    """The recipe at a path, or the shipped one of that name."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = {entry.name.removesuffix(".yaml"): entry for entry in (files("hf_hybrid") / "recipes").iterdir()}
    if name in shipped:
        return Path(str(shipped[name]))
    known = sorted(key for key, entry in shipped.items() if entry.name.endswith(".yaml"))
    raise ValueError(f"there is no recipe {name!r}; give the path of a YAML file, or one of the shipped {known}.")


def check_recipe(path: Path, output: str) -> None:
    """
    Raises a `ValueError` where the recipe at `path` names a teacher or text files that cannot be, or `output` is no
    place for its run. What else may be wrong with a recipe is told as it is loaded.
    """
    try:
        recipe = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    recipe = recipe if isinstance(recipe, dict) else {}
    teacher = recipe.get("teacher") or None
    check_place(output, teacher if isinstance(teacher, str) else None)
    # What a run has made is not made again.
    if isinstance(teacher, str) and teacher != "embedded" and not Path(output, "report.json").exists():
        gguf_file = recipe.get("gguf_file")
        check_found(teacher, gguf_file if isinstance(gguf_file, str) else None)
    if not Path(output, "data").exists():
        for source in _sources(recipe.get("data")):
            find_files(source)


def _sources(data: Any) -> list[list[str]]:
    """The `text_files` of a recipe's data and of the sources of a mixture, as far as they are lists of names."""
    found: list[list[str]] = []
    if isinstance(data, dict):
        texts, mixture = data.get("text_files"), data.get("sources")
        if isinstance(texts, list) and texts and all(isinstance(name, str) for name in texts):
            found.append(texts)
        for source in mixture if isinstance(mixture, list) else []:
            found += _sources(source)
    return found


def find_files(patterns: list[str]) -> list[Path]:
    """The files that `patterns` name, sorted, each once; `**` goes into subfolders."""
    found: set[Path] = set()
    for pattern in patterns:
        matches = glob.glob(str(Path(pattern).expanduser()), recursive=True)
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files and matches:
            raise ValueError(f"text_files: {pattern!r} is a folder; name the files in it, as in '{matches[0]}/*.txt'.")
        if not files:
            raise ValueError(
                f"text_files: {pattern!r} matches no file; give a path or a pattern such as 'texts/*.txt'."
            )
        found.update(files)
    return sorted(found)


def check_place(folder: str | os.PathLike, teacher: str | None = None) -> None:
    """Raises a `ValueError` where no folder can be made at `folder`, or it lies in that of the `teacher`."""
    if not str(folder).strip():
        raise ValueError("the output folder has no name; give one.")
    folder = Path(folder)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        raise ValueError(f"{folder}: not a directory: {place} is a file; choose another output folder.")
    if not is_run(folder) and not os.access(place, os.W_OK | os.X_OK):
        read_only = hasattr(os, "statvfs") and os.statvfs(place).f_flag & os.ST_RDONLY
        reason = "read-only file system" if read_only else f"{place}: permission denied"
        raise ValueError(f"{folder} cannot be written: {reason}. Choose another output folder.")
    if teacher and Path(teacher, "config.json").is_file():
        inner, outer = folder.resolve(), Path(teacher).resolve()
        if outer == inner or outer in inner.parents:
            raise ValueError(f"{folder} lies in the teacher's folder {teacher}; choose an output folder elsewhere.")


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a run, whatever there is of it."""
    identity = folder / "recipe.yaml"
    return identity.is_file() and identity.read_text("utf-8").startswith(HEADER)

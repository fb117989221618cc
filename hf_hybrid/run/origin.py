"""What an artefact of a run came from, kept in the artefact: it is taken only where that is what the run has."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_hybrid.trainers.digests import rows_digest
from hf_hybrid.trainers.durable import read_json, write_json

from ..data.rows import load_rows
from .folder import ARTEFACTS, check_whole
from .recipe import Recipe
from .score import needs_alignment


ORIGIN = "origin.json"
_SAMPLE = 64
# What of the recipe decides a stage by itself; what it takes from others is in those.
_OWN = {
    "data": ("data", "seed"),
    "align": ("align", "mixer", "mixer_options", "training", "seed"),
    "score": ("score", "training", "seed"),
    "select": ("select", "seed"),
    "distill": ("distill", "training", "seed"),
    "finetune": ("finetune", "training", "seed"),
    "evaluate": ("seed",),
    "model": (),
    "report": (),
}


def origin_of(recipe: Recipe, folder: Path, stage: str) -> dict[str, str]:
    """
    What the artefact of `stage` comes from in the run in `folder`, each with a digest: `recipe` (what of it decides
    that stage), `teacher` (with its tokenizer), and the artefacts of earlier stages by their names.
    """
    identity = recipe.identity()
    own = {name: _given(getattr(recipe, name), identity[name]) for name in _OWN[stage]}
    found = {"recipe": _digest(own), "teacher": _teacher_digest(folder)}
    for name in _made_from(recipe, stage):
        found[ARTEFACTS[name]] = artefact_digest(folder, name)
    return found


def check_origin(recipe: Recipe, folder: Path, stage: str) -> None:
    """Raises a `ValueError` where the artefact of `stage` came from something else than what the run has."""
    path = folder / ARTEFACTS[stage]
    there = read_json(path / ORIGIN) if path.is_dir() else (read_json(path) or {}).get("origin")
    if there is None:  # made by a version that did not write it down
        return
    for name, here in origin_of(recipe, folder, stage).items():
        if there.get(name, here) != here:
            what = {"recipe": "of other settings", "teacher": "of another teacher"}.get(name, f"of another {name}")
            raise ValueError(
                f"{path} was made {what} than this run's; put the right one back, or make it and what follows again "
                f"with --from {stage}."
            )


def write_artefact(recipe: Recipe, folder: Path, stage: str, data: dict[str, Any]) -> None:
    """Writes the artefact of a stage that leaves one JSON file, with what it came from."""
    write_json(folder / ARTEFACTS[stage], data | {"origin": origin_of(recipe, folder, stage)})


def read_artefact(folder: Path, stage: str) -> Any:
    """What [`write_artefact`] was given."""
    data = read_json(folder / ARTEFACTS[stage])
    return None if data is None else {name: value for name, value in data.items() if name != "origin"}


def artefact_digest(folder: Path, stage: str) -> str:
    """Of what later stages take from an artefact: sampled rows, sampled weights, or the contents of a JSON file."""
    path = folder / ARTEFACTS[stage]
    if path.is_dir():
        check_whole(path, stage)  # what is damaged is another one, too, but that says less
    if stage == "data":
        return _digest([[name, len(rows), rows_digest(_sample(rows))] for name, rows in load_rows(path).items()])
    if path.is_dir():
        return _digest([[file.name, _file_digest(file)] for file in sorted(path.glob("*.safetensors"))])
    data = read_artefact(folder, stage)
    if stage == "score":  # not the seconds that they took
        data = [data.get("order"), [[score["layer"], score["kl"], score["value"]] for score in data["scores"]]]
    return _digest(data)


def _made_from(recipe: Recipe, stage: str) -> list[str]:
    """The stages whose artefacts `stage` takes."""
    last = "distill" if recipe.finetune is None else "finetune"
    aligned = ["align"] if needs_alignment(recipe) else []
    scored = [] if recipe.score is None else ["score"]
    return {
        "data": [],
        "align": ["data"],
        "score": ["data", *aligned],
        "select": scored,
        "distill": ["data", "align", "select"],
        "finetune": ["data", "distill"],
        "evaluate": ["data", last],
        "model": [last, "evaluate"],
        "report": ["select", "evaluate", *scored],
    }[stage]


def _given(value: Any, identity: Any) -> Any:
    """What of a part of the recipe differs from the defaults: a field that a later version adds changes no digest."""
    if not dataclasses.is_dataclass(value):
        return identity
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(value)
    }
    return {name: entry for name, entry in identity.items() if defaults[name] != entry}


def _teacher_digest(folder: Path) -> str:
    inputs = read_json(folder / "inputs.json") or {}
    return _digest([inputs.get(name) for name in ("config", "tensors", "tokenizer")])


def _sample(rows: Dataset) -> Dataset:
    count = len(rows)
    return rows.select(sorted({index * (count - 1) // (_SAMPLE - 1) for index in range(_SAMPLE)})) if count else rows


def _file_digest(path: Path) -> str:
    """Of the size of a file and of 64 evenly spaced blocks of it."""
    size, block = path.stat().st_size, 4096
    hashed = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        for index in range(_SAMPLE):
            stream.seek(max(size - block, 0) * index // (_SAMPLE - 1))
            hashed.update(stream.read(block))
    return hashed.hexdigest()[:16]


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

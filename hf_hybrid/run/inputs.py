"""What a run was started with: the teacher, its tokenizer, versions. A run that goes on with others is no one run."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_hybrid.trainers.digests import tensor_digest
from hf_hybrid.trainers.durable import read_json, write_json

from .. import __version__
from ..teacher.gguf_file import ORIGIN, gguf_origin
from ..teacher.loading import load_pair
from .folder import has_work
from .recipe import Recipe


_FILE = "inputs.json"
_PROBE = "A probe: naïve x_1 = 10**-3;\n\tif 中 < Ω and   spaces…"
# Where a model lies and who wrote its config say nothing about what it computes.
_NO_MATTER = frozenset({"_name_or_path", "transformers_version", ORIGIN})


def check_inputs(folder: Path, teacher: Any, tokenizer: Any) -> str | None:
    """
    Compares teacher and tokenizer with those that the run in `folder` was started with, and keeps what they are.

    A difference is a `ValueError` that names it. Versions may differ: the return value then says how.

    Args:
        folder (`Path`): the run. As long as it has no work, it takes what it is given.
        teacher (`PreTrainedModel`): with all of its weights in this process.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
    """
    here = describe_inputs(teacher, tokenizer)
    there = read_json(folder / _FILE)
    if there is None or not has_work(folder):
        write_json(folder / _FILE, {**here, "versions": [here["versions"]]})
        return None
    differences = _differences(there, here)
    if differences:
        shown = "; ".join(differences[:3]) + ("; ..." if len(differences) > 3 else "")
        raise ValueError(
            f"{folder} was started with another teacher ({shown}); put that one back, or choose another folder."
        )
    before = there["versions"][-1]
    if before == here["versions"]:
        return None
    write_json(folder / _FILE, {**there, "versions": [*there["versions"], here["versions"]]})
    changed = [
        f"{name} {before.get(name)} -> {now}" for name, now in here["versions"].items() if before.get(name) != now
    ]
    return f"the run goes on with other versions than before: {', '.join(changed)}"


def load_run_pair(recipe: Recipe, folder: Path) -> tuple[Any, Any]:
    """
    Returns the teacher of the run in `folder`, in eval mode, and its tokenizer, as [`load_pair`].

    A run that has work goes on with the commit on the Hub that it was started with, also where its recipe names a
    branch, which may have moved since.
    """
    there = read_json(folder / _FILE)
    commit = there.get("commit") if there is not None and has_work(folder) else None
    return load_pair(
        recipe.teacher,
        trust_remote_code=recipe.trust_remote_code,
        dtype=recipe.dtype,
        revision=commit or recipe.revision,
        gguf_file=recipe.gguf_file,
    )


def describe_inputs(teacher: Any, tokenizer: Any) -> dict[str, Any]:
    """
    The teacher's config, its commit if it came from the Hub, the [`gguf_origin`] if it came from such a file, a digest
    of each of its tensors and of the tokenizer, and versions.

    A tensor's digest is of its name, shape, dtype and 64 evenly spaced elements: enough to tell a fine-tuned copy, at
    no cost for large models, and no proof against a change of single elements.
    """
    config = json.loads(teacher.config.to_json_string(use_diff=False))
    words = json.dumps(sorted(tokenizer.get_vocab().items())) + str(sorted(tokenizer.special_tokens_map.items()))
    words += str(tokenizer(_PROBE)["input_ids"])
    return {
        "config": {name: value for name, value in config.items() if name not in _NO_MATTER},
        "commit": teacher.config.__dict__.get("_commit_hash"),
        "gguf": gguf_origin(teacher.config),
        "tensors": {name: tensor_digest(tensor) for name, tensor in teacher.state_dict().items()},
        "tokenizer": hashlib.sha256(words.encode()).hexdigest()[:16],
        "versions": {
            "hf_hybrid": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    ours, theirs = there["config"], here["config"]
    # Another version of the library may know more keys.
    found = [
        f"config.{name}: {ours[name]!r} then, {theirs[name]!r} now"
        for name in sorted(ours.keys() & theirs.keys())
        if ours[name] != theirs[name]
    ]
    names = sorted(there["tensors"].keys() | here["tensors"].keys())
    changed = [name for name in names if there["tensors"].get(name) != here["tensors"].get(name)]
    if changed:
        found.append(f"other weights in {len(changed)} of {len(names)} tensors, such as {changed[0]}")
    if differ := _other_files(there.get("gguf"), here["gguf"]):
        found.append(differ)
    if there["tokenizer"] != here["tokenizer"]:
        found.append("another tokenizer")
    return found


def _other_files(there: dict[str, str] | None, here: dict[str, str] | None) -> str | None:
    """How the GGUF files of two teachers differ; their names may. The same numbers may come from a folder, too."""
    if there is None or here is None or there["sha256"] == here["sha256"]:
        return None
    return (
        f"the contents of the GGUF file {here['file']}: sha256 {there['sha256'][:16]} then, {here['sha256'][:16]} now"
    )

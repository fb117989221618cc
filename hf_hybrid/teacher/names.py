"""Names of models: what cannot be one is an error at once, before torch and transformers are imported."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


SUFFIX = ".gguf"
# Endings that no name on the Hub has: whoever writes one means a file.
_FILES = re.compile(
    r"\.(bin|ckpt|gguf|gz|h5|json|md|msgpack|onnx|pt|pth|py|safetensors|tar|txt|ya?ml|zip)", re.IGNORECASE
)


def check_found(name: Any, gguf_file: str | None = None) -> None:
    """Raises a `ValueError` where no model can be at `name`, as far as names and the disk tell."""
    check_name(name)
    if gguf_file is None and next(Path(name).glob(f"*{SUFFIX}"), None) is None:
        check_folder(name)


def check_name(name: Any) -> None:
    """
    Raises a `ValueError` where `name` is no folder and cannot be a model on the Hub either.

    What has the form of a path is one: the Hub is not asked for it, which would take half a minute without a network.
    """
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"a model is given by its Hub id or its folder, not by a {type(name).__name__}.")
    text = os.fspath(name)
    if not text.strip():
        raise ValueError("the model's name is empty; give a Hub id or a folder.")
    path = Path(name)
    if os.path.isdir(path):
        return
    if path.suffix == SUFFIX and path.is_file():
        return
    if os.path.exists(path):
        raise ValueError(f"{text} is a file; give the folder that holds the model, with its config.json.")
    is_path = isinstance(name, os.PathLike) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text
    if path.suffix == SUFFIX and text.count("/") < 2:
        raise ValueError(
            f"there is no GGUF file {text} here; check the path, or give a Hub id and the file's name "
            "with --gguf-file (gguf_file= in Python and in a recipe)."
        )
    if is_path or _FILES.fullmatch(path.suffix):
        hint = " (~ is not expanded here: write the path in full)" if text.startswith("~") else ""
        raise ValueError(f"there is no folder {text}{hint}; check the path, or give a Hub id such as Qwen/Qwen3-0.6B.")
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise ValueError(
            f"{text!r} is neither a folder here nor a possible name on the Hub: {' '.join(str(error).split())}"
        ) from error


def check_folder(name: str | os.PathLike) -> None:
    """Raises a `ValueError` where `name` is a folder that holds no model."""
    folder = Path(name)
    if not folder.is_dir():
        return
    try:
        there = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be read ({error.strerror}); change its permissions.") from error
    if "config.json" in there or "adapter_config.json" in there:
        return
    if {"recipe.yaml", ".lock"} <= set(there) and "model" not in there:
        raise ValueError(f"the run in {folder} has no finished model yet; go on with it, or give a model's folder.")
    # Of a run's models the finished one, not that which is aligned.
    models = sorted((path.parent for path in folder.glob("*/config.json")), key=lambda one: (one.name != "model", one))
    found = f"it holds {', '.join(there[:3])}{', ...' if len(there) > 3 else ''}" if there else "it is empty"
    advice = f"did you mean {models[0]}?" if models else "give the folder that save_pretrained() wrote, or a Hub id."
    raise ValueError(f"the folder {folder} has no config.json ({found}); {advice}")

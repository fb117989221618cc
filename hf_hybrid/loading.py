"""Loading of teachers, tokenizers and finished models, with errors that say what to do."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_hybrid.modeling  # noqa: F401  registers the hybrid with the Auto classes

from .conversion import checked_revision, load_teacher
from .embedded import embedded_teacher, embedded_tokenizer
from .recipe import check_dtype


def load_pair(
    teacher: str, *, trust_remote_code: bool = False, dtype: str = "auto", revision: str | None = None
) -> tuple[Any, Any]:
    """
    Returns a teacher in eval mode and its tokenizer; `"embedded"` is the one that ships with the package.

    `revision` is a branch, tag or commit of a teacher on the Hub. Both come from one commit, also where the branch
    moves in between.
    """
    check_dtype(dtype)
    if teacher == "embedded":
        if revision is not None:
            raise ValueError(f"revision={revision!r}, but the embedded teacher ships with the package; leave it out.")
        model = embedded_teacher()
        return (model if dtype == "auto" else model.to(getattr(torch, dtype))), embedded_tokenizer()
    model = _explained(
        teacher, lambda: load_teacher(teacher, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision)
    )
    commit = model.config._commit_hash or revision
    return model.eval(), load_tokenizer(teacher, trust_remote_code=trust_remote_code, revision=commit)


def load_tokenizer(name: str | os.PathLike, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """Returns the tokenizer of a model in a folder or, by its main branch or `revision`, on the Hub."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": checked_revision(name, revision)}
    return _explained(name, lambda: AutoTokenizer.from_pretrained(name, **options))


def load_model(
    path: str | os.PathLike, *, dtype: Any = "auto", trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """
    Returns a causal language model in eval mode, from safetensors files only.

    `revision` is a branch, tag or commit of a model on the Hub, by default its main branch. A checkpoint that lacks
    some of its tensors is an error.
    """

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            revision=checked_revision(path, revision),
            use_safetensors=True,
            output_loading_info=True,
        )

    model, info = _explained(path, load)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"the checkpoint {path} lacks {len(missing)} tensors, such as {missing[0]}; make it again.")
    return model.eval()


def _explained(name: str | os.PathLike, load: Any) -> Any:
    """The result of `load`, or a `ValueError` that says in one sentence why `name` does not load."""
    try:
        return load()
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {name} are damaged ({error}); delete that folder and make it again."
        ) from error
    except ImportError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} needs a package that is not installed: {first}") from error
    except OSError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        # The second is what the library says of a model on the Hub.
        if any(Path(name).glob("pytorch_model*.bin")) or "cannot be loaded with `safetensors`" in first:
            raise ValueError(
                f"{name} has no safetensors weights; a pytorch_model.bin is a pickle, which can run code, and is not "
                "opened here. Where you trust it, load it with transformers once and save_pretrained() it."
            ) from error
        if Path(name).is_dir():
            raise ValueError(f"the folder {name} holds no complete model or tokenizer: {first}") from error
        if "is not a valid git identifier" in first:
            raise ValueError(f"{name} has no such revision on the Hub: {first}") from error
        raise ValueError(
            f"{str(name)!r} was found neither as a folder nor as a model on the Hub; check the spelling, the network, "
            "and, for a private or gated model, that you are logged in."
        ) from error
    except ValueError as error:
        if "Unrecognized model" in str(error):
            raise ValueError(f"{name} holds no model that transformers knows; check its config.json.") from error
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name} needs code of its own to load; read that code, and if you trust it pass --trust-remote-code "
            "(trust_remote_code=True in Python)."
        ) from error

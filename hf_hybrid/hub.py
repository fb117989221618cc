"""Pushing a finished hybrid to the Hub, in one commit, with a card of what its run measured."""

import contextlib
import dataclasses
import fnmatch
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_relative_import_files

from hf_hybrid.modeling import HybridConfig, HybridForCausalLM
from hf_hybrid.modeling.model_card import GENERATED
from hf_hybrid.trainers import LayerScores
from hf_hybrid.trainers.durable import read_json, read_record

from . import __version__
from .card import PLOT, Provenance, named_base, placed, write_card
from .evaluation import Evaluation
from .run.folder import ARTEFACTS
from .run.origin import ORIGIN
from .run.recipe import Recipe


_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What may go to the Hub beside weights and code. Pickles, optimizers, logs and whatever else lies there may not.
_MAY_GO = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "README.md",
    PLOT,
    "LICENSE*",
    "NOTICE*",
)
# What an earlier push may have left that this one lacks: a loader would mix it with the new files.
_STALE = ("*.safetensors", _INDEX, "pytorch_model*", "*.py", PLOT)


@dataclass
class Push:
    """
    What was pushed, or in a dry run would be.

    Args:
        repo_id (`str`): the repository, with its owner once it is known.
        files (`dict[str, int]`): bytes of each file.
        left_out (`list[str]`): files of the folder that are no part of a model and do not go.
        removed (`list[str]`): files of an earlier push that this commit removes.
        url, commit (`str`, *optional*): of the commit; None in a dry run.
    """

    repo_id: str
    files: dict[str, int]
    left_out: list[str]
    removed: list[str] = field(default_factory=list)
    url: str | None = None
    commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it by name."""
        return dataclasses.asdict(self)


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
) -> Push:
    """
    Pushes the model of a run, or of a folder, to the Hub: weights, code, tokenizer and card, in one commit.

    The card of a run is made of the run's own files (`evaluation.json`, `scores.json`, `report.json`). A `README.md`
    from which the line that says who wrote it was removed is the user's, and goes as it is.

    Args:
        folder (`str`): a finished run, or a folder with a model and its tokenizer.
        repo_id (`str`): name of the repository, which is made if need be.
        private (`bool`, *optional*, defaults to `False`): make it a private one.
        revision (`str`, *optional*): branch to push to, made if need be; by default the main one.
        commit_message (`str`, *optional*): of the commit.
        base_model (`str`, *optional*): the teacher's name on the Hub, where it was loaded from a folder.
        dry_run (`bool`, *optional*, defaults to `False`): send nothing.
        token (`str`, *optional*): by default that of `hf auth login`, or `HF_TOKEN`.

    Returns:
        [`Push`].
    """
    validate_repo_id(repo_id)
    model, run = _find(Path(folder))
    names = _check(model)
    present = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    names |= {name for name in present if any(fnmatch.fnmatchcase(name, pattern) for pattern in _MAY_GO)}
    with tempfile.TemporaryDirectory() as made:
        # Files made for the Hub take the place of the folder's own, which are left as they are.
        sources = {name: model / name for name in names}
        sources |= {path.name: path for path in _made_for_hub(model, run, Path(made), repo_id, base_model)}
        sizes = {name: sources[name].stat().st_size for name in sorted(sources)}
        result = Push(repo_id, sizes, sorted(present - sources.keys() - {ORIGIN}))
        if not dry_run:
            with _explained(repo_id, revision):
                _upload(HfApi(token=token), sources, result, private, revision, commit_message)
    return result


def _find(folder: Path) -> tuple[Path, Path | None]:
    """The model's folder, and the run that made it, which may be the folder above."""
    if folder.name.endswith(".partial"):
        raise ValueError(f"{folder} is half-written; run the command that writes it again.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give that of a finished run or of a model.")
    model_name, report = ARTEFACTS["model"], ARTEFACTS["report"]
    run = folder if (folder / "recipe.yaml").is_file() else folder.resolve().parent
    if not (run / "recipe.yaml").is_file() or (run != folder and folder.name != model_name):
        return folder, None
    missing = [name for name in (model_name, report) if not (run / name).exists()]
    if missing:
        raise ValueError(
            f"the run in {run} is not finished ({missing[0]} is missing); go on with it: hf-hybrid run "
            f"{run / 'recipe.yaml'} --output {run}"
        )
    return run / model_name, run


def _check(model: Path) -> set[str]:
    """The names of the weights and of the code of a model, or a `ValueError` that says what it lacks."""
    config = _read(model / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{model / 'config.json'} is a {type(config).__name__}; save the model again.")
    if config.get("model_type") != HybridConfig.model_type:
        raise ValueError(f"{model} holds a {config.get('model_type')!r} model, no hybrid; push it with transformers.")
    if not (model / "tokenizer_config.json").is_file():
        raise ValueError(f"{model} has no tokenizer; save it there: tokenizer.save_pretrained({str(model)!r}).")
    names = {_WEIGHTS}
    if not (model / _WEIGHTS).is_file() and (model / _INDEX).is_file():
        names = {*_read(model / _INDEX)["weight_map"].values(), _INDEX}
    for name in sorted(names - {_INDEX}):
        _check_weights(model / name)
    for reference in config.get("auto_map", {}).values():
        entry = model / f"{reference.split('.')[0]}.py"
        try:
            names |= {entry.name, *(Path(path).name for path in get_relative_import_files(entry))}
        except FileNotFoundError as error:
            raise _lacks(model, Path(error.filename).name) from error
    for name in sorted(names):
        if not (model / name).is_file():
            raise _lacks(model, name)
    if not config.get("auto_map"):
        raise ValueError(f"{model} has no code, so nobody could load it; save it with save_pretrained().")
    if config.get("architectures") == [HybridForCausalLM.__name__]:
        _check_size(model, config)
    return names


def _check_size(model: Path, config: dict[str, Any]) -> None:
    """Raises a `ValueError` where the weights are fewer than the config asks for, without loading them."""
    if not isinstance(config.get("text_config"), dict):
        raise ValueError(f"the config.json of {model} has lost its text_config, the teacher's; save the model again.")
    with torch.device("meta"):
        skeleton = HybridForCausalLM(AutoConfig.from_pretrained(model))
    wanted, there = sum(parameter.numel() for parameter in skeleton.parameters()), _parameters(model)
    if there < wanted:
        raise ValueError(
            f"the weights in {model} do not fill its config.json: it asks for {wanted:,} parameters, they are "
            f"{there:,}. Save the model again."
        )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _lacks(path.parent, path.name)
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); save the model again.") from error


def _check_weights(path: Path) -> None:
    if not path.is_file():
        raise _lacks(path.parent, path.name)
    try:
        with safe_open(path, "pt"):  # reads the header, and checks the file's length
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is half-written or damaged ({error}); save the model again.") from error


def _lacks(folder: Path, name: str) -> ValueError:
    return ValueError(f"{folder} is no complete model: {name} is missing. Save the model and its tokenizer again.")


def _made_for_hub(model: Path, run: Path | None, made: Path, repo_id: str, base_model: str | None) -> list[Path]:
    """Writes what differs on the Hub to the folder `made`: the card, and the config without this machine's folders."""
    config = AutoConfig.from_pretrained(model)
    written = []
    teacher = config.teacher_name_or_path
    if base_model or (teacher and Path(teacher).exists()):
        data = _read(model / "config.json")
        data["teacher_name_or_path"] = base_model or Path(teacher).name
        (made / "config.json").write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", "utf-8")
        written.append(made / "config.json")
    card = model / "README.md"
    text = card.read_text("utf-8") if card.is_file() else None
    if text is not None and GENERATED not in text:
        return written
    if text is not None and run is None:
        # The run that it tells of is not here; only its place, and perhaps its teacher, are known better.
        text = placed(text, repo_id)
        (made / "README.md").write_text(named_base(text, base_model) if base_model else text, "utf-8")
        return [*written, made / "README.md"]
    made_by = Provenance() if run is None else provenance_of(run)
    write_card(made, config, _parameters(model), made_by, repo_id=repo_id, base_model=base_model)
    return [*written, *(made / name for name in ("README.md", PLOT) if (made / name).is_file())]


def provenance_of(run: Path) -> Provenance:
    """What the files of a run say about how its model was made."""
    evaluation, scores = (run / ARTEFACTS[name] for name in ("evaluate", "score"))
    report = read_json(run / ARTEFACTS["report"]) or {}
    return Provenance(
        evaluation=read_record(Evaluation, evaluation) if evaluation.is_file() else None,
        scores=LayerScores.load(scores) if scores.is_file() else None,
        recipe=Recipe.load(run / "recipe.yaml"),
        tokens=report.get("tokens", {}),
        rows=report.get("rows", {}),
        version=report.get("hf_hybrid"),
    )


def _parameters(model: Path) -> int:
    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  a handle of safetensors is no mapping
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def _upload(
    api: HfApi,
    sources: dict[str, Path],
    result: Push,
    private: bool,
    revision: str | None,
    commit_message: str | None,
) -> None:
    result.repo_id = api.create_repo(result.repo_id, private=private or None, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(result.repo_id, branch=revision, exist_ok=True)
    head = api.model_info(result.repo_id, revision=revision)
    if private and not head.private:
        raise ValueError(f"{result.repo_id} exists and is public; make it private on the Hub, or leave --private out.")
    there = [entry.rfilename for entry in head.siblings or []]
    result.removed = sorted(
        name for name in there if name not in sources and any(fnmatch.fnmatchcase(name, old) for old in _STALE)
    )
    additions = [CommitOperationAdd(name, sources[name]) for name in sorted(sources)]
    commit = api.create_commit(
        result.repo_id,
        operations=[*additions, *(CommitOperationDelete(name) for name in result.removed)],
        commit_message=commit_message or f"Upload a hybrid with hf_hybrid {__version__}",
        revision=revision,
        parent_commit=head.sha,  # refused where somebody else has pushed meanwhile
    )
    result.url, result.commit = commit.commit_url, commit.oid


@contextlib.contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Errors of the Hub as a `ValueError` of one sentence. A commit is there as a whole or not at all."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HTTPError):
            cause = cause.__cause__
        if cause is None:
            raise
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        advice = {
            401: "your token is missing or wrong; log in with `hf auth login`, or set HF_TOKEN",
            403: "your token may not write there; use one with the right to write, or another owner's name",
            404: "there is no such repository or branch, or your token may not see it; check the name",
            412: "somebody else has pushed meanwhile; look at that, and push again",
            None: "the Hub was not reached, or broke off; push again",
        }.get(status, "see what the Hub says, and push again")
        where = repo_id if revision is None else f"{repo_id} (revision {revision})"
        raise ValueError(f"nothing was pushed to {where}: {first}: {advice}.") from error

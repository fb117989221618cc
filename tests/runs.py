"""A tiny teacher with its tokenizer, texts, a recipe that runs in seconds, and runs that die where they are told."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from teachers import tiny_teacher
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast


# Seconds after which a process that takes a few has hung, also where others have the machine.
PATIENCE = 900.0
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["warm"])
LINES = [f"def function_{i}(x, y):\n    return x * {i * i} + y  # step {i % 7}\n" for i in range(400)]


def fork(target: Any, *arguments: Any) -> Any:
    """
    A process that calls `target`, started: a fork, in milliseconds, of one server for all the tests of this process,
    which has imported what a run needs. The server finds that by PYTHONPATH alone, and where it does not, it says
    nothing, and each fork imports it anew, in seconds.
    """
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):
        forkserver.ensure_running()
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    return process


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens; `<eos>` is 0."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(LINES, vocab_size=300, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>")


def save_teacher(folder: Path, **changes: int) -> Path:
    tiny_teacher("qwen3", vocab_size=300, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_texts(folder: Path, num_files: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    share = len(LINES) // num_files
    for i in range(num_files):
        (folder / f"text_{i}.py").write_text("".join(LINES[i * share : (i + 1) * share]))
    return folder


def tiny_recipe(teacher: Path | str, texts: Path | str, **changes: Any) -> dict[str, Any]:
    """A recipe of every stage, 2 to 8 steps each, as nested dictionaries."""
    stage = {"batch_size": 4, "learning_rate": 1e-3, "mixer_learning_rate": 3e-3, "checkpoints": 4}
    recipe: dict[str, Any] = {
        "teacher": str(teacher),
        "seed": 3,
        "data": {"text_files": [f"{texts}/*"], "block_size": 64, "held_out_rows": 6, "report_rows": 6},
        "align": {**stage, "tokens": 8 * 4 * 32, "block_size": 32, "micro_batch_size": 2},
        "score": {**stage, "tokens_per_layer": 2 * 4 * 64},
        "select": {"selector": "ga-s2", "k": 2},
        "distill": {**stage, "tokens": 8 * 4 * 64},
        "finetune": {"batch_size": 4, "tokens": 4 * 4 * 64, "checkpoints": 2, "learning_rate": 1e-4},
        "training": {"use_cpu": True},
    }
    return recipe | changes


def run_and_die(recipe: dict[str, Any], folder: str, where: str, name: str) -> None:
    """
    Runs `recipe` in this process until it kills itself: at a stage's `start`, at its third `step` (for scores, layer),
    before or after an artefact's `rename`, or amid the stage's second `checkpoint`.
    """
    from transformers import TrainerState

    from hf_hybrid.run.recipe import Recipe
    from hf_hybrid.run.runner import run_recipe

    checkpoints = 0
    rename, save = os.replace, TrainerState.save_to_json

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def listen(event: Any) -> None:
        if (event.kind, event.stage) == (where, name) and (where == "start" or event.done == 3):
            die()

    def replace(source: Any, target: Any) -> None:
        if where == "before" and Path(target).name == name:
            die()
        rename(source, target)
        if where == "after" and Path(target).name == name:
            die()

    def save_to_json(self: Any, path: str) -> None:
        nonlocal checkpoints
        checkpoints += f"{name}_checkpoints" in path
        if where == "checkpoint" and checkpoints == 2:
            Path(path).write_text("{")  # what a kill amid a write leaves
            die()
        save(self, path)

    os.replace, TrainerState.save_to_json = replace, save_to_json
    run_recipe(Recipe.from_dict(recipe), folder, progress=listen)


def recipe_to_kill(folder: Path) -> dict[str, Any]:
    """A tiny recipe with what it needs in `folder`, whose stages go on from wherever a kill leaves them."""
    # Few texts: alignment and distillation go over them more than once, so resumes fall into later epochs too.
    texts = save_texts(folder / "texts")
    for text in sorted(texts.iterdir())[4:]:
        text.unlink()
    # And losses are means over steps that checkpoints do not divide.
    return tiny_recipe(save_teacher(folder / "teacher"), texts, training={"use_cpu": True, "logging_steps": 3})


def run_and_report(
    recipe: dict[str, Any],
    folder: str,
    stage: str,
    pipe: Any,
    operation: int | None = None,
    tear: bool = False,
    start_from: str | None = None,
) -> None:
    """
    Runs `recipe` up to `stage`, or all of it for `""`, and sends through `pipe` when a stage starts, and at its end
    how many files and folders it changed in `folder` and in how many seconds.

    With `operation`, it kills itself before that change of `stage`, or of the whole call; with `tear`, it first cuts
    the newest file that is not published yet in half, as a kill amid a write leaves it.
    """
    from hf_hybrid.run.recipe import Recipe
    from hf_hybrid.run.runner import run_recipe

    changes, start = 0, 0.0
    armed = stage == ""

    def listen(event: Any) -> None:
        nonlocal changes, start, armed
        if event.kind == "start":
            start = time.perf_counter()
            changes = 0 if stage else changes
            armed = event.stage == stage or armed
            pipe.send(event.stage)
        elif event.kind == "done":
            pipe.send((event.stage, changes, time.perf_counter() - start))

    def watch(event: str, arguments: tuple) -> None:
        nonlocal changes
        if _changes(event, arguments, folder):
            changes += 1
            if armed and changes == operation:
                if tear:
                    tear_newest(Path(folder))
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    run_recipe(Recipe.from_dict(recipe), folder, stop_after=stage or None, start_from=start_from, progress=listen)


def port_for_a_launcher() -> int:
    """
    A free port below those that the kernel hands out by itself. A launcher takes it only when it has imported what it
    needs, and one that the kernel handed out to us would go to somebody else's connection meanwhile, now and then.
    """
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def run_as_rank(rank: int, port: int, *arguments: Any) -> None:
    """[`run_and_report`] as one of two processes of a launcher, which holds the store at `port`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    run_and_report(*arguments)


def _changes(event: str, arguments: tuple, folder: str) -> bool:
    """Whether an audit event is about to change something in `folder`."""
    if event == "open":
        path, mode, flags = arguments
        return isinstance(path, str | os.PathLike) and folder in str(path) and bool(flags & (os.O_WRONLY | os.O_RDWR))
    if event in ("os.remove", "os.rmdir"):
        path, descriptor = arguments
        return folder in str(path) or descriptor != -1  # what rmtree removes has names relative to a descriptor
    return event in ("os.rename", "os.mkdir") and folder in str(arguments[0])


def tear_newest(folder: Path) -> None:
    """Cuts in half the newest file of what is not published: partial files and folders, unsealed checkpoints."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.name != ".lock"
        and (
            ".partial" in str(path.relative_to(folder))
            or (path.parent.name.startswith("checkpoint-") and not (path.parent / "files.json").exists())
        )
    ]
    if files:
        newest = max(files, key=lambda path: path.stat().st_mtime_ns)
        os.truncate(newest, newest.stat().st_size // 2)


def copy_run(finished: Path, folder: Path, stage: str) -> None:
    """Makes `folder` a copy of a finished run as it was when `stage` started; for the first one, nothing."""
    from hf_hybrid.run.folder import ARTEFACTS

    later = list(ARTEFACTS)[list(ARTEFACTS).index(stage) :]
    gone = {ARTEFACTS[name] for name in later}
    gone |= {other for other, of in (("scores", "score"), ("scores.png", "select")) if of in later}
    if stage != "data":
        shutil.copytree(finished, folder, ignore=lambda path, names: gone if Path(path) == finished else set())


def contents(folder: Path, artefacts: list[str]) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file of `artefacts` in `folder`."""
    found = [path for name in artefacts for path in [folder / name, *(folder / name).rglob("*")]]
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in found
        if path.is_file()
    }


def results(folder: Path) -> dict[str, Any]:
    """All that was computed in a run, without times: rows, losses, hashes of weights, scores, layers, figures."""
    from hf_hybrid.data.rows import load_rows

    found: dict[str, Any] = {}
    for path in [*folder.glob("*.json"), *folder.glob("*/trainer_state.json"), *folder.glob("*/*.safetensors")]:
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            continue
        data = json.loads(path.read_text())
        if path.name == "trainer_state.json":
            keys = ("step", "loss", "grad_norm", "learning_rate")
            data = [[entry[key] for key in keys] for entry in data["log_history"] if "loss" in entry]
        elif path.name == "scores.json":
            data = [[score["layer"], score["kl"], score["per_sequence"]] for score in data["scores"]]
        elif path.name == "report.json":
            del data["seconds"]
        if isinstance(data, dict):
            data.pop("origin", None)  # where the last digit of a weight may differ, its digest does
        if path.name != "seconds.json":
            found[name] = data
    if (folder / "data").exists():
        found["data"] = {name: [row["input_ids"] for row in rows] for name, rows in load_rows(folder / "data").items()}
    return found

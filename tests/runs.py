"""A tiny teacher with its tokenizer, texts, a recipe that runs in seconds, and runs that die where they are told."""

import os
import signal
from pathlib import Path
from typing import Any

from teachers import tiny_teacher
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast


LINES = [f"def function_{i}(x, y):\n    return x * {i * i} + y  # step {i % 7}\n" for i in range(400)]


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

    from hf_hybrid.recipe import Recipe
    from hf_hybrid.run import run_recipe

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

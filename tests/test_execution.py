"""How a run is executed may change at any time: it is no part of its identity, and moves the result by rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import contents, copy_run, tiny_recipe
from teachers import tiny_teacher, tokens

import hf_hybrid as hh
from hf_hybrid.data.rows import CutRows
from hf_hybrid.run.folder import ARTEFACTS
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import RunResult, run_recipe
from hf_hybrid.run.stages import Event, train, training_arguments


class Stopped(Exception):
    """What stops a training between two steps."""


def rows_of(count: int) -> CutRows:
    from datasets import Dataset

    return CutRows(Dataset.from_dict({"input_ids": tokens(count, 16).tolist()}), 16)


def distilled(recipe: Recipe, folder: Path, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    """The weights that `distill` of `recipe` makes of one student, with checkpoints in `folder`."""

    def listen(event: Event) -> None:
        if event.kind == "step" and event.done == stop_at:
            raise Stopped

    torch.manual_seed(0)
    teacher = tiny_teacher()
    student = hh.convert(teacher, [1]).requires_grad_(True)
    # Ten rows are two and a half steps of four: where an epoch ends shows in the second and third.
    train(recipe, "distill", student, teacher, rows_of(10), folder, listen)
    return {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}


def recipe_of(**execution: Any) -> Recipe:
    recipe = tiny_recipe("teacher", "texts")
    recipe["data"]["block_size"] = 16
    recipe["align"]["block_size"] = 16
    recipe["distill"] |= {"tokens": 7 * 4 * 16, "checkpoints": 7}
    return Recipe.from_dict(recipe | {"execution": execution})


def test_a_stage_goes_on_with_another_micro_batch(tmp_path: Path) -> None:
    """Stopped in the second epoch and gone on with half the rows at once, it has seen the same rows in each step."""
    expected = distilled(recipe_of(), tmp_path / "whole")
    with pytest.raises(Stopped):
        distilled(recipe_of(), tmp_path / "stopped", stop_at=4)
    smaller = recipe_of(micro_batch_size={"distill": 1}, gradient_checkpointing=True, logging_steps=1)
    args = training_arguments(smaller, "distill", tmp_path)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (1, 4)
    given = distilled(smaller, tmp_path / "stopped")
    start = hh.convert(tiny_teacher(), [1]).state_dict()
    moved = max((expected[name] - start[name]).abs().max() for name in expected if "mlp" in name)
    off = max((expected[name] - given[name]).abs().max() for name in expected)
    assert off < 1e-5 < 1e-3 < moved


def test_what_is_execution_is_no_identity() -> None:
    plain = Recipe.from_dict(tiny_recipe("teacher", "texts"))
    other = tiny_recipe("teacher", "texts")
    other["execution"] = {"kernel": "torch", "gradient_checkpointing": True, "micro_batch_size": 1, "logging_steps": 5}
    del other["align"]["micro_batch_size"]
    other["distill"]["checkpoints"] = 1
    other["data"]["streaming"] = False
    other["training"] = {"dataloader_num_workers": 2}  # as recipes had it before
    changed = Recipe.from_dict(other)
    assert changed.difference(plain) == [] and changed.fingerprint() == plain.fingerprint()
    assert [stage.micro_batch_size for stage in changed.stages().values()] == [1, 1, 1, 1]
    assert changed.kernel == "torch" and changed.arguments()["gradient_checkpointing"] is True
    other["training"] |= {"max_grad_norm": 0.5, "use_cpu": True}
    deciding = Recipe.from_dict(other)
    assert "training.max_grad_norm: 0.5 here, None there" in deciding.difference(plain)


def test_a_micro_batch_for_all_stages_divides_each_batch() -> None:
    recipe = tiny_recipe("teacher", "texts", execution={"micro_batch_size": 4})
    del recipe["align"]["micro_batch_size"]
    recipe["align"]["batch_size"], recipe["score"]["batch_size"] = 6, 2
    stages = Recipe.from_dict(recipe).stages()
    assert {name: stage.micro_batch_size for name, stage in stages.items()} == {
        "align": 3,
        "score": 2,
        "distill": 4,
        "finetune": 4,
    }


def test_a_run_goes_on_with_another_execution(finished: RunResult, sources: tuple[Path, Path], tmp_path: Path) -> None:
    """As after an out-of-memory in the distillation: what was made before is kept, and the model is the same."""
    copy_run(finished.folder, tmp_path / "run", "distill")
    before = contents(tmp_path / "run", [*ARTEFACTS.values()])
    recipe = tiny_recipe(*sources)
    recipe["execution"] = {"micro_batch_size": 1, "gradient_checkpointing": True, "kernel": "torch"}
    recipe["align"].pop("micro_batch_size")
    result = run_recipe(Recipe.from_dict(recipe), tmp_path / "run")
    assert before.items() <= contents(tmp_path / "run", [*ARTEFACTS.values()]).items()
    assert result.selected == finished.selected
    assert result.report["evaluation"]["kl"] == pytest.approx(finished.report["evaluation"]["kl"], rel=1e-3)
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["execution"] == {"kernel": "torch", "gradient_checkpointing": True}
    assert written["distill"]["micro_batch_size"] == 1
    assert hh.HybridConfig.from_pretrained(tmp_path / "run" / "model").kernel == "auto"


def test_each_stage_gets_what_its_trainer_has(tmp_path: Path) -> None:
    recipe = recipe_of(chunk_tokens=64, layerwise_backward=True, teacher_states_bytes=5)
    found = {name: vars(training_arguments(recipe, name, tmp_path)) for name in recipe.stages()}
    assert found["align"]["layerwise_backward"] is True and "chunk_tokens" not in found["align"]
    assert found["score"]["teacher_states_bytes"] == 5 and found["distill"]["chunk_tokens"] == 64
    assert "chunk_tokens" not in found["finetune"]

"""Learning rates and weight decay, parameter by parameter and step by step."""

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
from runs import tiny_recipe
from teachers import tiny_teacher, tokens

import hf_hybrid as hh
from hf_hybrid.data.rows import CutRows
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.stages import cut_for, training_arguments
from hf_hybrid.trainers.hybrid_trainer import share_of_rate


ROWS = datasets.Dataset.from_dict({"input_ids": tokens(8, 8).tolist()})


def rates(folder: Path, **changes: Any) -> list[list[float]]:
    """The learning rates of all but the mixers, and of the mixers, at each of 48 steps."""
    teacher = tiny_teacher()
    settings = {"max_steps": 48, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    args = hh.DistillationConfig(str(folder), **{**settings, **changes})
    trainer = hh.DistillationTrainer(model=hh.convert(teacher, [1]), teacher=teacher, args=args, train_dataset=ROWS)
    trainer.create_optimizer()
    trainer.create_scheduler(48)
    mixer = trainer.optimizer.param_groups[-1]
    found = []
    for _ in range(48):
        found.append([trainer.optimizer.param_groups[0]["lr"], mixer["lr"]])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return found


def test_stable_cosine_stable(tmp_path: Path) -> None:
    """RADLADS step 2a: mixers from 1e-4, the rest from 1e-5, both end at 1e-5; 40 of 48 steps stable, 2 of cosine."""
    found = rates(tmp_path, learning_rate=1e-5, mixer_learning_rate=1e-4, final_learning_rate=1e-5, warmup_steps=4)
    rest, mixers = zip(*found, strict=True)
    assert rest[:4] == pytest.approx([0, 2.5e-6, 5e-6, 7.5e-6]) and rest[4:] == pytest.approx([1e-5] * 44)
    assert mixers[:5] == pytest.approx([0, 2.5e-5, 5e-5, 7.5e-5, 1e-4])
    assert mixers[4:40] == pytest.approx([1e-4] * 36) and mixers[42:] == pytest.approx([1e-5] * 6)
    for step in (40, 41):
        done = (step - 0.833 * 48) / (0.875 * 48 - 0.833 * 48)
        assert mixers[step] == pytest.approx(1e-5 + 9e-5 * (1 + math.cos(math.pi * done)) / 2)


def test_a_cosine_with_an_end(tmp_path: Path) -> None:
    found = rates(
        tmp_path, learning_rate=1e-3, mixer_learning_rate=2e-3, final_learning_rate=1e-5, decay_window=[0, 1]
    )
    for step in range(48):
        share = (1 + math.cos(math.pi * step / 48)) / 2
        assert found[step] == pytest.approx([1e-5 + (1e-3 - 1e-5) * share, 1e-5 + (2e-3 - 1e-5) * share])


def test_the_end_is_kept() -> None:
    assert share_of_rate(100, total=100, warmup=0, window=[0.833, 0.875], end=0.1) == pytest.approx(0.1)
    assert share_of_rate(99, total=100, warmup=0, window=[1, 1], end=0.1) == 1.0


def test_a_window_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"decay_window=\[0.9, 0.8\] is no part of the steps"):
        hh.DistillationConfig(str(tmp_path), decay_window=[0.9, 0.8])


@pytest.mark.parametrize("mixer", ["gated_deltanet", "kimi_delta_attention", "gated_linear_attention"])
def test_decay_and_norms_are_not_decayed(mixer: str, tmp_path: Path) -> None:
    teacher = tiny_teacher("qwen3")
    args = hh.DistillationConfig(str(tmp_path), weight_decay=0.1, use_cpu=True)
    student = hh.convert(teacher, [1], mixer=mixer)
    trainer = hh.DistillationTrainer(model=student, teacher=teacher, args=args, train_dataset=ROWS)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    decayed = {names[id(p)].split(".", 3)[-1] for g in groups if g["weight_decay"] for p in g["params"]}
    spared = {names[id(p)].split(".", 3)[-1] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert {"self_attn.q_proj.weight", "mlp.up_proj.weight", "self_attn.g_proj.weight"} <= decayed
    for name in ("A_log", "dt_bias", "gk_bias", "o_norm.weight", "q_norm.weight", "k_norm.weight"):
        assert f"self_attn.{name}" not in decayed
    assert {"self_attn.o_norm.weight", "self_attn.q_norm.weight", "input_layernorm.weight"} <= spared
    own = {"gated_linear_attention": {"self_attn.gk_bias"}}
    assert own.get(mixer, {"self_attn.A_log", "self_attn.dt_bias"}) <= spared


def test_recipes_say_it(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path)
    recipe["distill"] |= {"lr_scheduler_type": "stable-cosine-stable", "final_learning_rate": 1e-5, "warmup_steps": 50}
    recipe["align"] |= {"lr_scheduler_type": "cosine", "final_learning_rate": 1e-5}
    parsed = Recipe.from_dict(recipe)
    args = training_arguments(parsed, "distill", tmp_path)
    assert (args.final_learning_rate, args.decay_window, args.warmup_steps) == (1e-5, [0.833, 0.875], 50)
    assert training_arguments(parsed, "align", tmp_path).decay_window == [0.0, 1.0]
    assert training_arguments(parsed, "finetune", tmp_path).final_learning_rate is None
    recipe["distill"] |= {"lr_scheduler_type": "constant"}
    with pytest.raises(ValueError, match="lr_scheduler_type='constant' does not end"):
        Recipe.from_dict(recipe)


def test_a_stage_may_have_longer_rows_than_the_others(tmp_path: Path) -> None:
    """The rows are as long as the longest stage's; each other stage cuts them."""
    recipe = tiny_recipe(tmp_path, tmp_path)
    recipe["data"] |= {"block_size": 128}
    recipe["distill"] |= {"block_size": 32}
    recipe["finetune"] |= {"block_size": 128, "tokens": 1024}
    long = datasets.Dataset.from_dict({"input_ids": tokens(4, 128).tolist()})
    parsed = Recipe.from_dict(recipe)
    lengths = {name: len(cut_for(parsed, name, long)[0]["input_ids"]) for name in parsed.stages()}
    assert lengths == {"align": 32, "score": 128, "distill": 32, "finetune": 128}
    assert [len(cut_for(parsed, name, long)) for name in ("distill", "finetune")] == [16, 4]
    assert isinstance(cut_for(parsed, "finetune", long), CutRows)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_paper_s_groups_of_learning_rates(family: str, tmp_path: Path) -> None:
    """All attention, kept softmax too, and the norm before it have the higher rate, the mixers alone by default."""
    student = hh.convert(tiny_teacher(family), [1, 2]).requires_grad_(True)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    faster = {}
    for groups in ("mixers", "attention"):
        args = hh.DistillationConfig(
            str(tmp_path), learning_rate=7e-6, mixer_learning_rate=1e-4, learning_rate_groups=groups, use_cpu=True
        )
        optimizer = hh.DistillationTrainer(model=student, teacher=tiny_teacher(family), args=args).create_optimizer()
        rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates.keys() == set(names.values()) and set(rates.values()) == {7e-6, 1e-4}
        faster[groups] = {name for name, rate in rates.items() if rate == 1e-4}
    assert faster["mixers"] == {n for n in rates if ".self_attn." in n and n.split(".")[2] in ("0", "3")}
    assert faster["attention"] == {n for n in rates if ".self_attn." in n or ".input_layernorm." in n}
    assert {n.split(".")[2] for n in faster["attention"]} == {"0", "1", "2", "3"}
    with pytest.raises(ValueError, match="learning_rate_groups='all' is unknown; choose 'mixers' or 'attention'"):
        hh.DistillationConfig(str(tmp_path), learning_rate_groups="all")

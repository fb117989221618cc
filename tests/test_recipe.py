"""Recipes are read strictly, and two of them differ only where their results may."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import tiny_recipe
from teachers import tiny_teacher

from hf_hybrid.places import find_recipe
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.stages import check_training, rows_needed, steps_of, training_arguments


def changed(**changes: Any) -> dict[str, Any]:
    """The tiny recipe with `align__tokens=3` for `align: {tokens: 3}`."""
    recipe = tiny_recipe("teacher", "texts")
    for key, value in changes.items():
        stage, _, field = key.partition("__")
        if field:
            recipe[stage] = recipe[stage] | {field: value}
        else:
            recipe[stage] = value
    return recipe


def test_a_saved_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(changed())
    recipe.save(tmp_path / "recipe.yaml")
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert again == recipe and again.fingerprint() == recipe.fingerprint() and again.difference(recipe) == []
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_differences_are_named() -> None:
    one, other = Recipe.from_dict(changed()), Recipe.from_dict(changed(seed=4, align__tokens=5, finetune=None))
    assert one.fingerprint() != other.fingerprint()
    lines = one.difference(other)
    assert "seed: 3 here, 4 there" in lines and "align.tokens: 1024 here, 5 there" in lines
    assert "finetune: some here, none there" in lines and not any(line.startswith("finetune.") for line in lines)


def test_permission_to_run_code_is_no_part_of_the_identity() -> None:
    assert Recipe.from_dict(changed(trust_remote_code=True)).difference(Recipe.from_dict(changed())) == []


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    recipe = changed(align__learning_rate="1e-3", align__tokens="1e4", training={"adam_epsilon": "1e-9"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe).replace("'", ""))
    assert "learning_rate: 1e-3\n" in (tmp_path / "recipe.yaml").read_text()
    loaded = Recipe.load(tmp_path / "recipe.yaml")
    assert (loaded.align.learning_rate, loaded.align.tokens, loaded.training["adam_epsilon"]) == (1e-3, 10_000, 1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aling": {}}, r"unknown key aling; did you mean align\?"),
        ({"align__learning_rat": 1}, r"unknown key align.learning_rat; did you mean align.learning_rate\?"),
        ({"data__zzz": 1}, r"unknown key data.zzz; known are \['dataset'"),
        ({"align": {}}, "align.tokens is missing; set it"),
        ({"align": None}, "align is None; expected keys with values"),
        ({"align__tokens": 0}, "align.tokens=0 is too small"),
        ({"align__tokens": "many"}, "align.tokens='many' is not a whole number"),
        ({"align__tokens": 10.5}, "align.tokens=10.5 is not a whole number"),
        ({"align__batch_size": True}, "align.batch_size=True is not a whole number"),
        ({"align__learning_rate": -1}, "align.learning_rate=-1.0 is no learning rate"),
        ({"align__learning_rate": float("nan")}, "align.learning_rate=nan is not finite"),
        ({"align__warmup_steps": -1}, "align.warmup_steps=-1.0 is no warm-up"),
        ({"align__micro_batch_size": 3}, "align.micro_batch_size=3 does not divide batch_size=4"),
        ({"align__block_size": 48}, "align.block_size=48 does not divide data.block_size=64"),
        ({"score__tokens_per_layer": -5}, "score.tokens_per_layer=-5 is too small"),
        ({"score__method": "magic"}, "score.method='magic' is unknown"),
        ({"score": None}, "select.selector is 'ga-s2', but there is no score stage"),
        ({"select": {"k": 2, "fraction": 0.5}}, "select gives k and fraction; give one of"),
        ({"select": {}}, "select gives no layers; give one of"),
        ({"select__selector": "best"}, "selector='best' is unknown; choose one of"),
        ({"select": {"fraction": 25}}, "select.fraction=25.0 is outside 0..1"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"training": {"learning_rate": 1}}, "training.learning_rate is set from the recipe's own stages"),
        ({"data__text_files": []}, "data gives no source of text"),
        ({"trust_remote_code": "yes please"}, "trust_remote_code='yes please' is not true or false"),
        ({"teacher": 5}, "teacher=5 is not text"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(changed(**changes))


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    for text, message in (
        ("a: [", "is not YAML"),
        ("just text", "the recipe is 'just text'"),
        ("", "the recipe is None"),
    ):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            Recipe.load(tmp_path / "recipe.yaml")


def test_shares_of_layers_are_rounded_to_the_nearest() -> None:
    select = Recipe.from_dict(changed(select={"fraction": 0.25})).select
    assert [select.count(num_layers) for num_layers in (36, 28, 6, 5)] == [9, 7, 2, 1]


def test_stages_become_arguments_of_the_trainers(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(changed(training={"use_cpu": True, "max_grad_norm": 0.5}))
    args = training_arguments(recipe, "align", tmp_path)
    assert (args.max_steps, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 2, 2)
    assert (args.learning_rate, args.mixer_learning_rate, args.max_grad_norm, args.seed) == (1e-3, 3e-3, 0.5, 3)
    assert steps_of(recipe, "score") == 2 and steps_of(recipe, "finetune") == 4
    assert rows_needed(recipe) == 32
    with pytest.raises(
        ValueError,
        match="unknown key in training: 'bf17'; it takes fields of TrainingArguments. Did you mean training.bf16",
    ):
        check_training(Recipe.from_dict(changed(training={"bf17": True})), tmp_path, tiny_teacher())


def test_scores_are_not_made_of_a_sharded_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.from_dict(changed(training={"use_cpu": True, "shard_teacher": True}))
    check_training(recipe, tmp_path, tiny_teacher())  # without FSDP2 it says nothing
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="shard_teacher is on under FSDP2, but method='ga-s2' restores layers"):
        check_training(recipe, tmp_path, tiny_teacher())


@pytest.mark.parametrize("name", ["demo", "qwen2.5-3b"])
def test_shipped_recipes(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(find_recipe(name))
    recipe.training = recipe.training | {"use_cpu": True}
    check_training(recipe, tmp_path, tiny_teacher(max_position_embeddings=4096))
    if name == "qwen2.5-3b":
        assert (
            steps_of(recipe, "align") == 2035 and steps_of(recipe, "distill") == 4578
        )  # the paper's code rounds down
        assert recipe.select.k == 9


def test_a_recipe_that_does_not_exist() -> None:
    with pytest.raises(
        ValueError, match=r"no recipe 'demmo'; give the path .* one of the shipped \['demo', 'demo-full', 'qwen2.5-3b'"
    ):
        find_recipe("demmo")

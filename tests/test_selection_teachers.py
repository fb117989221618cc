"""Training of the selection benchmark's teachers: gates, layers laid out anew, recipes."""

import copy
import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_hybrid as hh


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from benchmarks.selection import data as selection_data  # noqa: E402
from benchmarks.selection import teachers as training  # noqa: E402
from benchmarks.selection.analysis import lineage  # noqa: E402
from benchmarks.selection.data import FOLDER, KINDS, TEACHERS  # noqa: E402
from benchmarks.selection.planting import plant  # noqa: E402
from benchmarks.selection.recipes import RECIPES, REDUNDANT, TASKS, Recipe  # noqa: E402


def tiny(**changes: object) -> Recipe:
    values: dict[str, object] = {"name": "tiny", "family": "qwen3", "layers": 4, "hidden": 32, "intermediate": 48}
    values |= {"heads": 4, "kv_heads": 2, "head_dim": 16, "seed": 3, "rows": (1, 1, 1, 1, 0), **changes}
    return Recipe(**values)  # type: ignore[arg-type]


def trainee(recipe: Recipe) -> training.Trainee:
    return training.Trainee(recipe, 64, 0, torch.device("cpu"), training.block)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_open_gates_give_the_loss_of_the_library(family: str) -> None:
    model = trainee(tiny(family=family)).model.double()
    ids, weights = torch.randint(64, (3, 33)), torch.rand(3, 33, dtype=torch.float64)
    gates = torch.ones(3, 4, 2, dtype=torch.float64)
    ours, theirs = (
        training.gated_loss(model, training.block, ids, weights, gates),
        training.one.weighted_loss(model, ids, weights),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # the library's rotary embeddings are fp32


def test_logits_scaled_to_nothing_average_the_values() -> None:
    model = trainee(tiny()).model
    layer, x = model.model.layers[1], torch.randn(2, 17, 32)
    cos, sin = model.model.rotary_emb(x, torch.arange(17)[None])
    got = training.block(layer, x, cos, sin, torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
    values = layer.self_attn.v_proj(layer.input_layernorm(x[0])).view(17, 2, 16).repeat_interleave(2, 1)
    mean = values.cumsum(0) / torch.arange(1, 18)[:, None, None]
    first = x[0] + layer.self_attn.o_proj(mean.flatten(1))
    wanted = torch.stack((first, x[1]))  # the second row's output is gone
    wanted = wanted + layer.mlp(layer.post_attention_layernorm(wanted))
    torch.testing.assert_close(got, wanted)


def test_of_two_twins_at_most_one_is_impaired_at_a_time() -> None:
    recipe = tiny(layers=8, twins=(1, 2, 5, 7), impaired_from=0.5)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(training.draw_gates(recipe, (4, 9), 0.4, generator), torch.ones(4, 9, 8, 2))
    gates = training.draw_gates(recipe, (50, 200), 0.5, generator)
    impaired = (gates != 1).any(-1).flatten(0, 1)
    assert not impaired[:, [0, 3, 4, 6]].any()
    for first, second in ((1, 2), (5, 7)):
        assert not (impaired[:, first] & impaired[:, second]).any()
        for twin in (first, second):
            assert 0.35 < impaired[:, twin].float().mean() < 0.45
            assert (gates[..., twin, 0] == 0).any() and ((gates[..., twin, 1] < 0.4).any())


def test_a_layer_twice_is_the_source_where_one_copy_attends() -> None:
    source = trainee(tiny(layers=3)).model
    twice = trainee(tiny()).model
    training.lay_out(twice, source, (0, 1, 1, 2))
    ids, weights = torch.randint(64, (2, 30)), torch.ones(2, 30)
    wanted = training.gated_loss(source, training.block, ids, weights, torch.ones(2, 3, 2))
    for off in (1, 2):
        gates = torch.ones(2, 4, 2)
        gates[:, off, 0] = 0.0
        torch.testing.assert_close(training.gated_loss(twice, training.block, ids, weights, gates), wanted)


@pytest.mark.parametrize("recipe", REDUNDANT, ids=lambda recipe: recipe.name)
def test_the_twins_of_a_recipe_are_copies_of_one_layer(recipe: Recipe) -> None:
    assert len(recipe.order) == recipe.layers and recipe.twins
    for first, second in zip(recipe.twins[::2], recipe.twins[1::2], strict=True):
        assert recipe.order[first] == recipe.order[second] >= 0
    folder = Path(hh.__file__).parent / "embedded_teacher"
    if recipe.start != "embedded":
        folder = Path(__file__).parents[1] / training.FOLDER / str(recipe.start)
    config = training.transformers.AutoConfig.from_pretrained(folder)
    assert config.model_type == recipe.family and set(recipe.order) == set(range(config.num_hidden_layers))


def test_the_rows_of_a_step_are_as_many_of_each_task_as_the_recipe_says() -> None:
    recipe = tiny(rows=(2, 1, 0, 1, 1), late=(0,))
    pupil = trainee(recipe)
    generator, ids = torch.Generator().manual_seed(2), torch.arange(600)
    most = dict(zip(TASKS, recipe.rows, strict=True))
    pool = training.draw_pool(3, 0.2, 0.5, most, torch.arange(9999) % 600, ids, generator)
    pupil.take(pool, 0.2, generator)
    rows, weights, gates = pupil.data
    assert rows.shape == weights.shape == (3, 5, training.one.LENGTH) and gates.shape == (3, 5, 4, 2)
    assert (weights[:, :2] == 1).all()  # text
    assert (gates[:, :, 0, 0] == 0).all() and (gates[:, :, 1:] == 1).all()


def test_no_two_splits_share_weights() -> None:
    splits: dict[str, set[str]] = {}
    for name, teacher in TEACHERS.items():
        splits.setdefault(lineage(name), set()).add(teacher.split)
    assert set.union(*splits.values()) == {"dev", "test", "held-out"}
    assert all(len(found) == 1 for found in splits.values()), splits


def test_the_table_holds_the_folders_and_asks_for_what_their_teachers_have_learned() -> None:
    assert {folder.name for folder in FOLDER.iterdir()} == set(TEACHERS) - {"embedded"}
    recipes = {recipe.name: recipe for recipe in RECIPES}
    for name in set(TEACHERS) - {"embedded"}:
        metrics = json.loads((FOLDER / name / "metrics.json").read_text())
        asked = dict(zip(KINDS, TEACHERS[name].mix, strict=True))
        least = 0.9 if TEACHERS[name].split == "held-out" else 0.99
        assert metrics["recall_256"] > least and asked["recall"] > 0, name
        assert (metrics["chained_256"] > 0.5) == (asked["chained"] > 0), name
        assert (metrics["hops3_256"] > 0.5) == (asked["hops3"] > 0), name
        assert metrics["recipe"]["seed"] == recipes[name].seed, name
        assert f"--only {name} " in (FOLDER / name / "README.md").read_text()


@pytest.mark.parametrize(("family", "kv_heads", "head_dim"), [("qwen3", 2, 32), ("llama", 4, 24), ("qwen2", 2, 32)])
def test_planted_heads_look_where_they_should_before_any_training(family: str, kv_heads: int, head_dim: int) -> None:
    torch.manual_seed(0)
    shape = {"hidden": 72, "intermediate": 32, "heads": 4, "kv_heads": kv_heads, "head_dim": head_dim}
    model = training.one.build_model(512, 0, family=family, layers=4, **shape)
    model.set_attn_implementation("eager")
    plain = copy.deepcopy(model)
    plant(model, 1, (2, 3), seed=5)
    ids = torch.stack([torch.randperm(511)[:40] + 1 for _ in range(8)])
    ids = torch.cat((ids, ids[:, :20]), dim=1)  # each of the last 20 tokens was there 40 places before
    with torch.no_grad():
        looks = [m(ids, output_attentions=True).attentions for m in (plain, model)]
    before, found = (
        [attention[1][:, 0].diagonal(-1, 1, 2).mean().item() for attention in looks],
        [attention[2][:, :2, 40:].diagonal(1, 2, 3).mean().item() for attention in looks],
    )
    assert before[0] < 0.1 and before[1] > 0.5
    assert found[0] < 0.05 and found[1] > 4 * found[0]
    unchanged = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if "layers.0." in name or "mlp" in name:
            assert torch.equal(parameter, unchanged[name]), name


class TestWeights:
    """The weights of the teachers are no part of a checkout; they come from the history."""

    @pytest.fixture
    def clone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "benchmarks" / "teachers"
        (folder / "one").mkdir(parents=True)
        (folder / "one" / "model.safetensors").write_bytes(b"weights")
        known = {"commit": "HEAD~1", "sha256": {"one": hashlib.sha256(b"weights").hexdigest(), "two": "0"}}
        (tmp_path / "benchmarks" / "teachers.json").write_text(json.dumps(known))
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (
            ["git", "init", "-q"],
            ["git", "add", "-A"],
            [*git, "commit", "-qm", "with weights"],
            ["git", "rm", "-q", "benchmarks/teachers/one/model.safetensors"],
            [*git, "commit", "-qm", "without"],
        ):
            subprocess.run(command, cwd=tmp_path, check=True)
        (folder / "one").mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(selection_data, "FOLDER", folder)
        monkeypatch.setattr(selection_data, "WEIGHTS", tmp_path / "benchmarks" / "teachers.json")
        return folder

    def test_they_come_from_the_history(self, clone: Path) -> None:
        selection_data.fetch_weights("one")
        assert (clone / "one" / "model.safetensors").read_bytes() == b"weights"
        assert [path.name for path in (clone / "one").iterdir()] == ["model.safetensors"]

    def test_what_is_not_there_is_said(self, clone: Path) -> None:
        with pytest.raises(ValueError, match="two are in the history.*git fetch --unshallow.*teachers/two/README"):
            selection_data.fetch_weights("two")

    def test_other_weights_are_refused(self, clone: Path) -> None:
        known = json.loads(selection_data.WEIGHTS.read_text())
        known["sha256"]["one"] = "0" * 64
        selection_data.WEIGHTS.write_text(json.dumps(known))
        with pytest.raises(ValueError, match=r"is not what teachers\.json says"):
            selection_data.fetch_weights("one")
        assert not list((clone / "one").iterdir())

    def test_every_teacher_has_its_hash(self) -> None:
        known = json.loads(selection_data.WEIGHTS.read_text())["sha256"]
        assert set(known) == set(TEACHERS) - {"embedded"}


def test_records_that_were_laid_aside_come_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Path(f"{path}.gz").write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    assert selection_data.read_lines(path) == [{"a": 1}, {"a": 2}]
    selection_data.append_line(path, {"a": 3})
    assert selection_data.read_lines(path) == [{"a": 1}, {"a": 2}, {"a": 3}]

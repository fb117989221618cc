"""A revision of a model on the Hub: what is named is what is scored, evaluated and distilled, wherever main went."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import LoopbackHub, Repo
from runs import save_teacher, save_texts, tiny_recipe
from safetensors.torch import load_file
from test_hub import changed
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_hybrid as hh
from hf_hybrid.card import save_model
from hf_hybrid.teacher.loading import load_model, load_pair, load_tokenizer


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put_two_commits(hub: LoopbackHub, folder: Path, kind: str) -> tuple[str, str]:
    """Puts `old_KIND` and `new_KIND` into `tester/KIND`; of the two commits, the branch `v1` has the old one."""
    repo = hub.repos[f"tester/{kind}"] = Repo()
    commits = [repo.commit("main", tree(folder / f"{age}_{kind}"), age) for age in ("old", "new")]
    repo.branches["v1"] = commits[:1]
    return commits[0], commits[1]


def save_two_teachers(folder: Path) -> None:
    """Two teachers that differ in their config, each of their weights, and how they cut text into tokens."""
    save_teacher(folder / "old_teacher")
    save_teacher(folder / "new_teacher", num_hidden_layers=3)
    changed(AutoModelForCausalLM.from_pretrained(folder / "new_teacher")).save_pretrained(folder / "new_teacher")
    path = folder / "new_teacher" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:10]
    path.write_text(json.dumps(tokenizer))
    cut = [
        len(AutoTokenizer.from_pretrained(folder / f"{age}_teacher")("return x").input_ids) for age in ("old", "new")
    ]
    assert cut[0] < cut[1]


def test_score_and_evaluate_take_the_revision_that_is_named(hub: LoopbackHub, tmp_path: Path) -> None:
    """Each command once with models of the Hub and once with folders that hold the same: the figures are equal."""
    save_two_teachers(tmp_path)
    for age in ("old", "new"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"{age}_teacher")
        save_model(hh.convert(tmp_path / f"{age}_teacher", [1]), tokenizer, tmp_path / f"{age}_hybrid")
    save_texts(tmp_path / "texts")
    teachers, hybrids = (put_two_commits(hub, tmp_path, kind) for kind in ("teacher", "hybrid"))
    hub.run(
        tmp_path,
        f"""
        import contextlib, io, json
        from hf_hybrid.cli import main

        def figures(*command):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert main([*command, "--data-files", "texts/*", "--rows", "4", "--block-size", "64", "--json"]) == 0
            return json.loads(out.getvalue())

        (old, new), (old_hybrid, new_hybrid) = {teachers}, {hybrids}
        seen = []
        for hybrid, teacher, options in (
            ("old", "old", ["--revision", "v1", "--teacher-revision", old]),
            ("old", "new", ["--revision", old_hybrid]),
            ("new", "old", ["--teacher-revision", "v1"]),
            ("new", "new", []),
        ):
            here = figures("evaluate", f"{{hybrid}}_hybrid", "--teacher", f"{{teacher}}_teacher")
            there = figures("evaluate", "tester/hybrid", "--teacher", "tester/teacher", *options)
            assert there == here and here not in seen, (options, there, here)
            seen.append(here)

        score = ["--method", "ablation-kl", "--k", "1", "--output"]
        here = {{age: figures("score", f"{{age}}_teacher", *score, age) for age in ("old", "new")}}
        assert here["old"]["scores"] != here["new"]["scores"]
        for age, folder, options in (
            ("old", "pinned", ["--revision", old]), ("old", "branch", ["--revision", "v1"]), ("new", "main", [])
        ):
            there = figures("score", "tester/teacher", *score, folder, *options)
            ours, theirs = ([{{**s, "seconds": 0}} for s in found["scores"]] for found in (there, here[age]))
            assert ours == theirs
        with contextlib.redirect_stderr(io.StringIO()) as said:
            again = ["score", "tester/teacher", *score, "branch", "--data-files", "texts/*", "--rows", "4"]
            assert main([*again, "--block-size", "64", "--revision", new]) == 2
        told = said.getvalue()
        assert f"belongs to another recipe (revision: 'v1' in the folder, '{{new}}' now" in told, told
        """,
    )
    for folder, revision, commit in (("pinned", teachers[0], 0), ("branch", "v1", 0), ("main", None, 1)):
        assert yaml.safe_load((tmp_path / folder / "recipe.yaml").read_text())["revision"] == revision
        assert json.loads((tmp_path / folder / "inputs.json").read_text())["commit"] == teachers[commit]


def test_a_run_stays_with_its_commit_where_the_branch_moves(hub: LoopbackHub, tmp_path: Path) -> None:
    """It moves between two calls. The second loads the teacher at its start and, for `teacher_topk`, amid the run."""
    save_two_teachers(tmp_path)
    repo = hub.repos["tester/teacher"] = Repo()
    old = repo.commit("main", tree(tmp_path / "old_teacher"), "old")
    local = tiny_recipe("old_teacher", "texts", select={"selector": "uniform", "k": 1})
    del local["score"], local["finetune"]
    local["distill"]["teacher_topk"] = 8
    pinned = local | {"teacher": "tester/teacher", "revision": old}
    save_texts(tmp_path / "texts")
    for name, recipe in (("local", local), ("main", pinned | {"revision": None}), ("pinned", pinned)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    hub.run(
        tmp_path,
        """
        import contextlib, io, shutil
        from pathlib import Path
        from huggingface_hub import CommitOperationAdd, HfApi
        from hf_hybrid.cli import main

        assert main(["run", "local.yaml", "--output", "local"]) == 0
        assert main(["run", "main.yaml", "--output", "run", "--stop-after", "align"]) == 0
        files = [CommitOperationAdd(path.name, path) for path in Path("new_teacher").iterdir()]
        HfApi().create_commit("tester/teacher", files, commit_message="new")
        assert main(["run", "main.yaml", "--output", "run"]) == 0
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert main(["run", "pinned.yaml", "--output", "run"]) == 2
        assert "belongs to another recipe (revision: None in the folder, '" in said.getvalue(), said.getvalue()
        assert main(["run", "pinned.yaml", "--output", "pinned", "--stop-after", "align"]) == 0
        shutil.copytree("run", "again")
        assert main(["run", "main.yaml", "--output", "again", "--from", "data", "--stop-after", "data"]) == 0
        """,
    )
    new = repo.resolve("main")
    assert new != old
    for name, commit in (("run", old), ("again", new)):
        assert json.loads((tmp_path / name / "inputs.json").read_text())["commit"] == commit
    for name in ("aligned", "distilled", "model"):
        assert json.loads((tmp_path / "run" / name / "config.json").read_text())["teacher_revision"] == old
        ours, theirs = (load_file(tmp_path / run / name / "model.safetensors") for run in ("run", "local"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = ((tmp_path / run / "evaluation.json").read_text() for run in ("run", "local"))
    assert ours == theirs
    assert f"from the teacher's commit {old}" in (tmp_path / "run" / "model" / "README.md").read_text()
    config = json.loads((tmp_path / "pinned" / "aligned" / "config.json").read_text())
    assert config["teacher_revision"] == old and config["text_config"]["num_hidden_layers"] == 4


@pytest.mark.parametrize("load", [hh.convert, load_model, load_pair, load_tokenizer])
def test_a_folder_has_no_revisions(load: Any, sources: tuple[Path, Path]) -> None:
    more = {"full_attention_layers": [1]} if load is hh.convert else {}
    for revision, message in (("main", "is a folder here; leave it out"), ("", "is empty; give a branch")):
        with pytest.raises(ValueError, match=message):
            load(str(sources[0]), revision=revision, **more)

"""What `hf-hybrid push` decides before it sends anything: what goes, what is refused, and that the page says so."""

import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from runs import save_teacher, tiny_tokenizer
from teachers import tiny_teacher

import hf_hybrid as hh
from hf_hybrid.card import save_model
from hf_hybrid.cli import main
from hf_hybrid.hub import push
from hf_hybrid.run.recipe import Recipe


ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(hh.convert(tiny_teacher("qwen3", vocab_size=300), [1, 3]), tiny_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def test_dry_run_lists_what_would_go(model: Path, capsys: pytest.CaptureFixture) -> None:
    (model / ".env").write_text("SECRET=1")
    (model / "notes.py").write_text("print('not of the model')")
    assert main(["push", str(model), "me/mine", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for path in model.iterdir():
        if path.name not in (".env", "notes.py", "README.md"):
            assert f"{path.stat().st_size:>15,}  {path.name}" in out
    assert "Left out, being no part of a model: .env, notes.py." in out and out.endswith("Nothing was sent.\n")
    assert main(["push", str(model), "me/mine", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] is None


def test_a_teachers_folder_does_not_reach_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_teacher(tmp_path / "secret" / "teacher")
    hybrid = hh.convert(tmp_path / "secret" / "teacher", [1])
    save_model(hybrid, tiny_tokenizer(), tmp_path / "model")
    sent: dict[str, bytes] = {}

    def upload(api: Any, sources: dict[str, Path], *args: Any) -> None:
        sent.update({name: path.read_bytes() for name, path in sources.items()})

    monkeypatch.setattr("hf_hybrid.hub._upload", upload)
    push(tmp_path / "model", "me/mine")
    assert json.loads(sent["config.json"])["teacher_name_or_path"] == "teacher"
    assert not [name for name, data in sent.items() if str(tmp_path).encode() in data]
    push(tmp_path / "model", "me/mine", base_model="somebody/teacher")
    assert json.loads(sent["config.json"])["teacher_name_or_path"] == "somebody/teacher"
    assert b"base_model: somebody/teacher\n" in sent["README.md"] and b'path = "me/mine"' in sent["README.md"]
    assert b"base_model_relation: finetune\n" in sent["README.md"]
    (tmp_path / "model" / "README.md").unlink()
    push(tmp_path / "model", "me/mine", base_model="somebody/teacher")
    assert b"base_model: somebody/teacher\n" in sent["README.md"]


def break_it(model: Path, how: str) -> Path:
    config = json.loads((model / "config.json").read_text())
    if how == "truncated":
        os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 100)
    elif how == "other":
        (model / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    elif how == "not JSON":
        (model / "config.json").write_text("{")
    elif how == "code":
        del config["auto_map"]
        (model / "config.json").write_text(json.dumps(config))
    elif how == "shard":
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        (model / "model.safetensors").rename(model / "model-1.safetensors")
    elif how == "partial":
        return model.rename(model.with_name("model.partial"))
    elif how in ("unfinished", "no model"):
        recipe = {"select": {"layers": [1]}, "data": {"text_files": "x"}, "teacher": "t"}
        stage = {"align": {"tokens": 1}, "distill": {"tokens": 1}}
        Recipe.from_dict(recipe | stage).save(model.parent / "recipe.yaml")
        if how == "no model":
            model.rename(model.with_name("distilled"))
            return model.parent
    else:
        (model / how).unlink()
    return model


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "model.safetensors is missing"),
        ("kernels.py", "kernels.py is missing"),
        ("modeling_hybrid.py", "modeling_hybrid.py is missing"),
        ("tokenizer_config.json", "has no tokenizer; save it there"),
        ("truncated", "model.safetensors is half-written or damaged"),
        ("shard", "model-2.safetensors is missing"),
        ("not JSON", "config.json is no JSON"),
        ("other", "holds a 'qwen3' model, no hybrid"),
        ("code", "has no code"),
        ("partial", "model.partial is half-written"),
        ("unfinished", "is not finished (report.json is missing); go on with it: hf-hybrid run"),
        ("no model", "is not finished (model is missing)"),
    ],
)
def test_half_written_models_are_refused(how: str, message: str, model: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["push", str(break_it(model, how)), "me/mine", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["me/mine/too", "me/mi ne", "-mine", ""])
def test_a_dry_run_refuses_what_is_no_name(name: str, model: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["push", str(model), "--dry-run", "--", name]) == 2
    assert capsys.readouterr().err.startswith("hf-hybrid: Repo id must")


# --- the page


def test_the_page_has_every_option_and_every_file(model: Path, capsys: pytest.CaptureFixture) -> None:
    page = (ROOT / "docs" / "hub.md").read_text()
    with pytest.raises(SystemExit):
        main(["push", "--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    shown = {
        option for line in re.findall(r"hf-hybrid push [^`\n]*", page) for option in re.findall(r"--[a-z-]+", line)
    }
    assert shown == options
    section = page.split("## What is in the folder")[1].split("\n## ")[0]
    listed = re.findall(r"`([\w*.]+)`", "".join(row.split("|")[1] for row in section.splitlines() if row[:3] == "| `"))
    for path in model.iterdir():
        assert any(fnmatch(path.name, name) for name in listed), path.name
    for name in set(listed) - {"model.safetensors.index.json", "scores.png"}:
        assert list(model.glob(name)), name

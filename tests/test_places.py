"""Places on this machine that a command names: what is wrong with them is told before torch is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


# Runs each command in one process, which then says whether torch was imported on the way.
PROGRAM = """
import contextlib, io, json, sys
from hf_hybrid.cli import main
told = []
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        code = main(arguments)
    told.append([code, stream.getvalue(), bool({"torch", "transformers", "datasets"} & set(sys.modules))])
print(json.dumps(told))
"""
RECIPES = {
    "teacher": "teacher: ./nowhere\ndata: {text_files: [text.txt]}\n",
    "data": "teacher: embedded\ndata: {text_files: ['nothing/*.txt']}\n",
    "mixture": "teacher: embedded\ndata: {sources: [{text_files: [text.txt]}, {text_files: [nothing.txt]}]}\n",
    "folder": "teacher: embedded\ndata: {text_files: [empty]}\n",
    "good": "teacher: embedded\ndata: {text_files: [text.txt]}\n",
    "broken": "teacher: [\n",
}
NO_FILE, NO_PLACE = "matches no file", "not a directory: "
CASES = [
    (["run", "nowhere.yaml", "--output", "new"], "there is no recipe 'nowhere.yaml'"),
    (["run", "broken.yaml", "--output", "new"], "broken.yaml: it is not YAML"),
    (["run", "teacher.yaml", "--output", "new"], "there is no folder ./nowhere"),
    (["run", "teacher.yaml", "--output", "new", "--plan"], "there is no folder ./nowhere"),
    (["run", "data.yaml", "--output", "new"], NO_FILE),
    (["run", "mixture.yaml", "--output", "new"], NO_FILE),
    (["run", "folder.yaml", "--output", "new"], "'empty' is a folder; name the files in it"),
    (["run", "good.yaml", "--output", "text.txt/new"], NO_PLACE),
    (["run", "demo", "--output", "text.txt"], NO_PLACE),
    (["score", "--recipe", "data.yaml", "--output", "new"], NO_FILE),
    (["score", "./nowhere", "--output", "new", "--data-files", "text.txt"], "there is no folder ./nowhere"),
    (["score", "empty", "--output", "new", "--data-files", "text.txt"], "has no config.json (it is empty)"),
    (["score", "embedded", "--output", "new", "--data-files", "nothing*"], NO_FILE),
    (["score", "embedded", "--output", "text.txt"], NO_PLACE),
    (["evaluate", "embedded", "--data-files", "a=text.txt", "b=nothing"], NO_FILE),
    (["evaluate", "embedded", "--data-files", "text.txt", "--output", "nowhere/x.json"], "there is no folder nowhere"),
    (["evaluate", "embedded", "--tasks", "ruler", "--haystack-files", "nothing"], NO_FILE),
    (["convert", "embedded", "--full-attention-layers", "1", "--output", "text.txt/new"], NO_PLACE),
    (["init", "embedded", "--data-files", "nothing*"], NO_FILE),
    (["export", "./nowhere", "--output", "new"], "there is no folder ./nowhere"),
    (["export", "embedded", "--output", "text.txt/new"], NO_PLACE),
    (["push", "nowhere", "me/model"], "nowhere is no folder"),
    (["demo", "--output", "text.txt"], NO_PLACE),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list:
    folder = tmp_path_factory.mktemp("places")
    (folder / "text.txt").write_text("a text\n")
    (folder / "empty").mkdir()
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(recipe)
    before = sorted(folder.rglob("*"))
    commands = json.dumps([arguments for arguments, _ in CASES])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n{PROGRAM}"]
    done = subprocess.run(command, cwd=folder, input=commands, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(folder.rglob("*")) == before
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(arguments[:4]) for arguments, _ in CASES])
def test_a_place_that_cannot_be_is_told_before_torch_is_imported(number: int, told: list) -> None:
    code, line, imported = told[number]
    assert code == 2 and CASES[number][1] in line and line.count("\n") == 1, line
    assert not imported

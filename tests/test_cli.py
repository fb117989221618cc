"""Every command, and every mistake: one sentence on stderr, exit code 2, nothing overwritten."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from runs import tiny_recipe
from teachers import tiny_teacher
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import hf_hybrid as hh
from hf_hybrid.cli import main, parse_layers


# Of a teacher that is refused, no text is read.
SOME_TEXT = ["--data-files", __file__]


def recipe_file(folder: Path, sources: tuple[Path, Path], **changes: Any) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(*sources) | changes))
    return str(folder / "recipe.yaml")


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    program = "import sys; from hf_hybrid.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    heavy = (
        "sys.exit(str([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'rich') if m in sys.modules] or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program + heavy], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 1 and done.stderr.strip() == ""
    for command in ("demo", "init", "run", "score", "convert", "evaluate", "generate", "chat", "doctor", "examples:"):
        assert command in done.stdout


def test_one_of_several_processes_ends_without_taking_the_interpreter_down() -> None:
    """Its streams and exit handlers are served; what would end with the interpreter does not."""
    program = """
        import atexit
        from hf_hybrid.trainers.processes import exit_process

        class Thing:
            def __del__(self):
                print("taken down")

        thing = Thing()
        atexit.register(print, "and its handlers")
        print("all it wrote", end=" ")
        exit_process(3)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "all it wrote and its handlers\n")


def test_an_error_is_told_by_the_other_processes_too_after_the_main_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher ends all processes at the first failure, and any process may be the first."""
    waited: list[float] = []
    monkeypatch.setattr("hf_hybrid.cli.commands.time.sleep", waited.append)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert main(["run", str(tmp_path / "none.yaml"), "--output", str(tmp_path / "run")]) == 2
        assert "none.yaml" in capsys.readouterr().err
        assert bool(waited) == (rank == "1")


def test_the_console_script_ends_with_the_exit_code_in_each_of_several_processes(tmp_path: Path) -> None:
    for world in ("1", "2"):
        command = [sys.executable, "-m", "hf_hybrid", "convert", "nowhere", "--full-attention-layers", "0"]
        command += ["--output", str(tmp_path / "unused")]
        environment = {**os.environ, "WORLD_SIZE": world, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and "nowhere" in done.stderr


@pytest.mark.parametrize(
    "command", ["demo", "init", "run", "score", "convert", "evaluate", "generate", "chat", "push", "doctor", "env"]
)
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and "--debug" in capsys.readouterr().out


def test_env(capsys: pytest.CaptureFixture) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["hf_hybrid"] and found["versions"]["torch"]
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu" and cpu["kernel"] == "torch" and "CUDA" in cpu["why"]
    assert main(["env"]) == 0
    assert "kernel torch" in capsys.readouterr().out


def test_run_and_score_and_evaluate(sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe, folder = recipe_file(tmp_path, sources, finetune=None), str(tmp_path / "run")
    assert main(["score", "--recipe", recipe, "--output", folder]) == 0
    assert "rank" in capsys.readouterr().out and (tmp_path / "run" / "scores.png").is_file()
    assert not (tmp_path / "run" / "distilled").exists()
    assert main(["score", "--recipe", recipe, "--output", folder, "--layers", "1", "--json"]) == 0
    assert [score["layer"] for score in json.loads(capsys.readouterr().out)["scores"]] == [1]
    halved = tmp_path / "halved.yaml"
    halving = yaml.safe_load(Path(recipe).read_text())
    halving["score"]["options"] = {"rounds": 2, "halving": True}
    halved.write_text(yaml.safe_dump(halving))
    assert main(["score", "--recipe", str(halved), "--output", folder, "--layers", "1"]) == 2
    assert "they are compared with one another on the way" in capsys.readouterr().err
    assert main(["run", recipe, "--output", folder, "--stop-after", "select"]) == 0
    captured = capsys.readouterr()
    assert "Stopped after select" in captured.out and "3/4 score         made before" in captured.err
    assert main(["run", recipe, "--output", folder, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert main(["run", recipe, "--output", folder]) == 0
    assert "is finished; nothing was done" in capsys.readouterr().out

    texts = str(sources[1] / "*.py")
    command = [
        "evaluate",
        f"{folder}/model",
        "--teacher",
        str(sources[0]),
        "--data-files",
        texts,
        "--block-size",
        "64",
    ]
    assert main([*command, "--rows", "8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kl"] > 0 and result["tokens"] == 8 * 64 and result["teacher_perplexity"] > 1


@pytest.mark.parametrize("command", ["score", "evaluate"])
def test_a_dataset_by_its_revision(
    command: str, sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(name: str, subset: str, **options: Any) -> Any:
        asked.append((name, subset, options))
        return datasets.load_dataset("text", data_files=str(sources[1] / "*"), split="train", streaming=True)

    monkeypatch.setattr("hf_hybrid.data.text.load_dataset", load)
    given = [command, str(sources[0]), "--dataset", "a/b", "--subset", "c", "--dataset-revision", "v1"]
    given += ["--block-size", "64", "--rows", "4", "--split", "test"]
    if command == "score":
        given += ["--method", "ablation-kl", "--output", str(tmp_path / "run")]
    assert main(given) == 0
    assert asked == [("a/b", "c", {"split": "test", "streaming": True, "revision": "v1"})]


def test_convert(sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["convert", str(sources[0]), "--full-attention-layers", "1,3", "--output", str(tmp_path / "hybrid")]
    assert main(command) == 0
    assert "softmax attention kept in layers [1, 3], linear in [0, 2]" in capsys.readouterr().out
    assert "Not trained" in (tmp_path / "hybrid" / "README.md").read_text()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "hybrid").iterdir()}
    assert "tokenizer.json" in before and "modeling_hybrid.py" in before
    assert main(command) == 2
    assert "exists and is not an empty folder; choose a new one" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "hybrid").iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": {"layers": [0, 9]}}, "[9] names a layer outside 0..3; the model has 4 decoder layers"),
        ({"select": {"k": 5}}, "k=5 layers cannot be chosen from a model with 4; pass an integer in 0..4."),
        ({"mixer": "rwkv9"}, "mixer='rwkv9' is unknown; choose one of"),
        ({"data": {"text_files": ["nowhere/*"]}}, "'nowhere/*' matches no file"),
        ({"data": {"text_files": "EMPTY"}}, "is empty; give one that has text"),
        ({"data": {"text_files": "SHORT"}}, "is shorter than one block of 512 tokens"),
        ({"data": {"text_files": "COLUMN"}}, "has no column 'text'; it has ['content']. Set text_column"),
        ({"teacher": "no/such-model"}, "'no/such-model' was found neither as a folder nor as a model on the Hub"),
        ({"teacher": "GPT2"}, "cannot be converted"),
        ({"taecher": "x"}, "unknown key taecher; did you mean teacher?"),
        ({"training": {"bf17": True}}, "'bf17'; it takes fields of TrainingArguments."),
    ],
)
def test_mistakes_in_recipes(
    changes: dict, message: str, sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "SHORT").write_text("def f(): pass")
    (tmp_path / "COLUMN.jsonl").write_text('{"content": "some text"}\n')
    if changes.get("teacher") == "GPT2":
        GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "GPT2")
        (tmp_path / "GPT2" / "tokenizer.json").write_bytes((sources[0] / "tokenizer.json").read_bytes())
        changes = {"teacher": str(tmp_path / "GPT2")}
    elif changes.get("data", {}).get("text_files") in ("EMPTY", "SHORT", "COLUMN"):
        changes = {"data": {"text_files": [str(tmp_path / changes["data"]["text_files"]) + "*"]}}
    recipe = recipe_file(tmp_path, sources, **changes)
    if "data" in changes:
        recipe = recipe_file(tmp_path, sources, **changes, align={"tokens": 1000}, score=None, select={"layers": [1]})
    assert main(["run", recipe, "--output", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("hf-hybrid: ") and message in last
    assert "Traceback" not in captured.err
    left = [path.name for path in tmp_path.glob("run/*") if path.name not in ("recipe.yaml", "inputs.json", ".lock")]
    assert left == []


def test_mistakes_in_arguments(sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    teacher, output = str(sources[0]), str(tmp_path / "new")
    (tmp_path / "file").write_text("")
    hh.convert(tiny_teacher(), [1]).save_pretrained(tmp_path / "other_vocabulary")
    (tmp_path / "other_vocabulary" / "tokenizer.json").write_bytes((sources[0] / "tokenizer.json").read_bytes())
    convert = ["convert", teacher, "--output", output, "--full-attention-layers"]
    recipe = recipe_file(tmp_path, sources)
    for command, message in (
        ([*convert, "1,9"], "[9] names a layer outside 0..3"),
        ([*convert, "one"], "--full-attention-layers 'one' is no list of layers"),
        ([*convert, "1", "--mixer", "rwkv9"], "mixer='rwkv9' is unknown"),
        ([*convert, "1", "--dtype", "int9"], "dtype='int9' is unknown; choose auto, float32, bfloat16 or float16."),
        (
            ["convert", "embedded", "--revision", "main", *convert[2:], "1"],
            "revision='main', but the embedded teacher ships with the package; leave it out.",
        ),
        ([*convert, "1", "--revision", "v1"], "revision='v1' is one of the Hub's, but"),
        ([*convert, "1", "--revision", ""], "is empty; give a branch, tag or commit, or leave it out."),
        (["score", teacher, *SOME_TEXT, "--revision", "v1", "--output", str(tmp_path / "scored")], "is a folder here"),
        (["score", "embedded", "--revision", "v1", "--output", str(tmp_path / "scored")], "ships with the package"),
        (["score", "--recipe", recipe, "--revision", "v1", "--output", output], "--revision is set in the recipe"),
        (["evaluate", teacher, "--revision", "v1"], f"revision='v1' is one of the Hub's, but {teacher} is a folder"),
        (["evaluate", teacher, "--teacher", teacher, "--teacher-revision", "v2"], "revision='v2' is one of the Hub's"),
        (["evaluate", teacher, "--teacher", "embedded", "--teacher-revision", "v2"], "ships with the package"),
        (["evaluate", teacher, "--teacher-revision", "v2"], "--teacher-revision 'v2' needs --teacher"),
        (
            ["convert", str(tmp_path), "--full-attention-layers", "1", "--output", output],
            "has no config.json (it holds file, other_vocabulary, recipe.yaml, ...); did you mean",
        ),
        (["run", "demmo", "--output", output], "there is no recipe 'demmo'"),
        (["run", recipe, "--output", str(tmp_path / "file")], "file: not a directory"),
        (["run", recipe, "--output", str(tmp_path / "file" / "run")], "file/run: not a directory"),
        (["run", recipe, "--output", str(tmp_path)], "hf-hybrid did not write it"),
        (["run", recipe, "--output", output, "--stop-after", "lunch"], "stop_after='lunch' is no stage"),
        (["run", "demo", "--output", output, "--stop-after", "finetune"], "the recipe has no finetune stage"),
        (["evaluate", teacher, "--batch-size", "0"], "--batch-size 0 is too small; pass at least 1."),
        (["evaluate", "no/such-model"], "'no/such-model' was found neither as a folder nor as a model on the Hub"),
        (["evaluate", teacher, "--dataset", "a/b", "--data-files", "c"], "were both given; give one"),
        (["evaluate", teacher, "--block-size", "64"], "--block-size was given without a text to measure on"),
        (["evaluate", teacher, *SOME_TEXT, "--rows", "0"], "--rows 0 is too small; pass at least 1."),
        (["evaluate", teacher, *SOME_TEXT, "--split", "test"], "--split needs --dataset, of which it names a part."),
        (["score", "embedded", "--dataset-revision", "v1", "--output", output], "--dataset-revision needs --dataset"),
        (
            ["evaluate", teacher, "--dataset", str(tmp_path / "no_data")],
            "no_data' (subset None, split 'train', revision None) did not",
        ),
        (
            ["evaluate", str(tmp_path / "other_vocabulary"), "--teacher", teacher],
            "pass the teacher that the model was",
        ),
    ):
        assert main(command) == 2, command
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("hf-hybrid: ") and message in last, (command, last)
    assert not Path(output).exists() and (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("text", ["", "1-", "3-1", "a", "-2", "1,,2"])
def test_layers_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="--layers .* is no list of layers"):
        parse_layers(text, "--layers")


def test_layers() -> None:
    assert parse_layers("0, 3,8-11", "--layers") == [0, 3, 8, 9, 10, 11]


def test_code_of_a_teacher_is_refused_unless_allowed(
    sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = json.loads((sources[0] / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps(config))
    (teacher / "mine.py").write_text("raise SystemExit('code was run')\n")
    output = tmp_path / "run"
    recipe_file(tmp_path, sources, teacher=str(teacher))
    commands = (
        ["convert", str(teacher), "--full-attention-layers", "1", "--output", str(output)],
        ["run", str(tmp_path / "recipe.yaml"), "--output", str(output)],
        ["evaluate", str(teacher)],
    )
    for command in commands:
        assert main(command) == 2
        assert "if you trust it pass --trust-remote-code" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="code was run"):
        main([*commands[2], "--trust-remote-code"])


def test_a_teacher_in_another_dtype(tmp_path: Path) -> None:
    command = ["convert", "embedded", "--full-attention-layers", "0-1,4", "--output", str(tmp_path / "hybrid")]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert model.dtype == torch.bfloat16 and model.full_attention_layers == [0, 1, 4]


def test_a_mistake_is_one_line_whatever_is_installed(tmp_path: Path) -> None:
    """peft imports it where it is installed; the one line of a mistake stays the only one."""
    command = [sys.executable, "-m", "hf_hybrid", "score", "embedded", "--method", "best", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("hf-hybrid: --method='best' is unknown") and done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no recipe 'demmo'"):
        main(["run", "demmo", "--output", str(tmp_path / "run"), "--debug"])

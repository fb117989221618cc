"""What whoever uses it for the first time meets: words that fit what was made, and refusals before hours are spent."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import tiny_recipe
from teachers import tiny_teacher

import hf_hybrid as hh
from hf_hybrid.cli import main
from hf_hybrid.environment import describe_kernels
from hf_hybrid.modeling.model_card import plain_card
from hf_hybrid.run.plan import plan_recipe
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.teacher.names import check_folder
from hf_hybrid.trainers.scoring.scores import LayerScore, LayerScores


ROOT = Path(__file__).parents[1]


class TestWindows:
    """A hybrid that has no recurrence is told of as what it is."""

    @pytest.fixture(scope="class")
    def card(self, tmp_path_factory: pytest.TempPathFactory, sources: tuple[Path, Path]) -> str:
        folder = tmp_path_factory.mktemp("windows") / "out"
        options = ["--mixer", "sliding_window", "--mixer-options", "{window: 16, sinks: 2}"]
        asked = ["convert", str(sources[0]), "--full-attention-layers", "1", *options, "--output", str(folder)]
        assert main(asked) == 0
        assert json.loads((folder / "config.json").read_text())["mixer_options"] == {"window": 16, "sinks": 2}
        return (folder / "README.md").read_text()

    def test_the_card(self, card: str) -> None:
        assert "over a window of tokens (`sliding_window`)" in card and "- sliding-window" in card
        assert "Not trained. Align and distil it before use." in card
        assert "Layers with a window see nothing before it" in card
        assert not any(word in card for word in ("linear", "recurrent", "random"))

    def test_the_card_of_a_recurrence(self) -> None:
        card = plain_card(hh.convert(tiny_teacher(), [1]), "me/mine", [])
        assert "have linear attention (`gated_deltanet`), whose state" in card and "- linear-attention" in card

    @pytest.mark.parametrize(
        ("mixers", "told"),
        [
            (["sliding_window", None], "the windows run in torch's attention on cpu"),
            (["sliding_window", "gated_deltanet"], "the recurrences run in torch on cpu"),
            ([], "the recurrences run in torch on cpu"),
        ],
    )
    def test_what_runs(self, mixers: list[str | None], told: str) -> None:
        assert describe_kernels(torch.device("cpu"), "auto", mixers).startswith(told)


class TestPlan:
    """What a run would refuse, its plan refuses."""

    @pytest.mark.parametrize(
        ("held_out", "text", "message"),
        [
            (6, "hi", "is shorter than one block of 64 tokens"),
            (5000, None, "rows of 64 tokens, and 5006 are held out, so none is left to train on"),
        ],
    )
    def test_text_that_is_too_short(
        self, held_out: int, text: str | None, message: str, sources: tuple[Path, Path], tmp_path: Path
    ) -> None:
        recipe = tiny_recipe(*sources)
        recipe["data"] |= {"held_out_rows": held_out}
        if text is not None:
            (tmp_path / "short.txt").write_text(text)
            recipe["data"]["text_files"] = [str(tmp_path / "short.txt")]
        with pytest.raises(ValueError, match=message):
            plan_recipe(Recipe.from_dict(recipe), tmp_path / "run")

    def test_rows_that_come_again(self, sources: tuple[Path, Path], tmp_path: Path) -> None:
        recipe = tiny_recipe(*sources)
        recipe["distill"] |= {"tokens": 20_000_000}
        notes = plan_recipe(Recipe.from_dict(recipe), tmp_path / "run").notes
        assert any(note.startswith("the text has about ") and " is used " in note for note in notes)


def test_of_the_models_in_a_run_the_finished_one_is_named(tmp_path: Path) -> None:
    for name in ("aligned", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    for name in ("recipe.yaml", ".lock"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"did you mean {tmp_path}/model"):
        check_folder(tmp_path)
    (tmp_path / "model").rename(tmp_path.parent / f"{tmp_path.name}-gone")
    with pytest.raises(ValueError, match="has no finished model yet; go on with it"):
        check_folder(tmp_path)


def test_scores_of_sets_say_that_single_values_may_disagree() -> None:
    scores = [LayerScore(layer=i, kl=0.1 * i, sem=0.01, tokens=1, seconds=1.0) for i in range(3)]
    text = "values are of single layers, and need not agree"
    assert text in LayerScores(scores, order=[2], k=1).short() and text in str(LayerScores(scores, order=[2], k=1))
    assert text not in LayerScores(scores).short()


def test_loading_says_nothing_of_shards(sources: tuple[Path, Path]) -> None:
    """The library speaks of them when it is asked to say less."""
    program = f"import hf_hybrid as hh; hh.load_pair({str(sources[0])!r})"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "sharded" not in found.stdout + found.stderr


def test_the_first_lines_of_fine_tuning_use_our_classes(tmp_path: Path) -> None:
    """docs/finetuning.md, in a process that imported nothing before."""
    hh.convert(hh.embedded_teacher(), [2]).save_pretrained(tmp_path / "my_run" / "model")
    hh.embedded_tokenizer().save_pretrained(tmp_path / "my_run" / "model")
    page = (ROOT / "docs" / "finetuning.md").read_text("utf-8")
    program = page.split("```python\n")[1].split("```")[0] + "print(type(hybrid()).__module__)\n"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL, check=True)
    assert found.stdout == "hf_hybrid.modeling.modeling_hybrid\n"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda teacher: hh.convert(teacher, [1], mixer=3), "mixer=3 is no name; pass one, or a list"),
        (lambda teacher: hh.convert(teacher, [1], mixer_options=[{}]), "mixer_options is a list; pass a dict"),
        (
            lambda teacher: hh.convert(teacher, [1], mixer_options={"window": 8}),
            "unknown to gated_deltanet; .* options of one go under its name",
        ),
        (lambda teacher: hh.held_out_kl(teacher, teacher, [{"input_ids": [1]}]), r"has no input_ids \(a list\)"),
    ],
)
def test_mistakes_in_python(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny_teacher())


def test_commands(sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("hi")
    assert main(["init", "embedded", "--data-files", str(short), "--output", str(tmp_path / "recipe.yaml")]) == 2
    assert "a run needs 3 rows of 64 at least" in capsys.readouterr().err
    text = ["--data-files", f"{sources[1]}/*", "--block-size", "64", "--rows", "5000"]
    assert main(["evaluate", str(sources[0]), *text]) == 0
    assert "rows of 64 tokens, of 5000 that were asked for" in capsys.readouterr().err
    for mixer_options in ("16", "{a"):
        asked = ["--full-attention-layers", "1", "--mixer-options", mixer_options, "--output", str(tmp_path / "out")]
        assert main(["convert", str(sources[0]), *asked]) == 2
        assert f"--mixer-options '{mixer_options}' is no " in capsys.readouterr().err
    asked = ["--method", "zero-shot", "--align-tokens", "128", "--tokens-per-layer", "128"]
    asked += ["--mixer", "sliding_window", "--mixer-options", "{window: 8}"]
    text = ["--data-files", f"{sources[1]}/*", "--rows", "4", "--block-size", "64"]
    assert main(["score", str(sources[0]), *asked, *text, "--output", str(tmp_path / "scored")]) == 0
    made = Recipe.load(tmp_path / "scored" / "recipe.yaml")
    assert (made.mixer, made.mixer_options) == ("sliding_window", {"window": 8})
    capsys.readouterr()
    recipe = tmp_path / "tiny.yaml"
    Recipe.from_dict(tiny_recipe(*sources)).save(recipe)
    for more in ([], ["--from", "data"]):
        assert main(["run", str(recipe), "--output", str(tmp_path / "run"), "--stop-after", "data", *more]) == 0
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Stopped"))
    assert "without --stop-after to go on" in first and "without --stop-after and --from to go on" in second

"""One record for each scoring method, from which all else follows."""

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from runs import copy_run
from scored import DEAD, LENGTH, Stop, arguments, rows, score

import hf_hybrid as hh
from benchmarks.selection.compared import COMPARED
from hf_hybrid.hub import provenance_of
from hf_hybrid.run.folder import claim
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import run_recipe
from hf_hybrid.trainers import LayerScore
from hf_hybrid.trainers.scoring.methods import METHODS, Range, ScoringMethod, check_placement, check_request, method_of
from hf_hybrid.trainers.scoring.scoring_method import table


DOCS = Path(__file__).parents[1] / "docs" / "scoring.md"


def briefly(job, *, rows: Annotated[int, Range(1, 6)] = 4, way: Literal["up", "down"] = "up"):
    """Each layer's KL on the first rows, restored in a student that was distilled with it."""
    scores = []
    with job.restored_afterwards() as aligned:
        for layer in job.layers:

            def work(layer=layer):
                job.student.set_full_attention_layers([layer], job.teacher)
                job.distil(f"mine_{layer:03d}")
                return LayerScore.of_rows(layer, job.kl()[:rows])

            scores.append(job.score(layer, work, "mine"))
            job.reset(aligned)
    return job.finish(scores, options={"rows": rows, "way": way})


def no_down(options):
    if options.get("way") == "down" and options.get("rows") == 1:
        raise ValueError("way='down' needs rows of 2 or more.")


MINE = ScoringMethod(
    name="mine", score=briefly, value="`KL({l})`", source="a test", measure="my measure", trains=True, check=no_down
)


def call(pair, folder, **given):
    teacher, student = pair
    settings = {"method": MINE, "tokens_per_layer": 2 * 4 * LENGTH, "args": arguments(folder)}
    return hh.score_layers(student, teacher, rows(16), rows(6, 9), **settings | given)


class TestOwnMethod:
    """A method that no table knows."""

    def test_it_scores_and_is_kept_and_goes_on(self, dead_layer, tmp_path):
        seen = []

        def stop(found):
            seen.append(found.layer)
            if len(seen) == 2:
                raise Stop

        kept = {"output_dir": tmp_path / "kept", "options": {"rows": 3}}
        with pytest.raises(Stop):
            call(dead_layer, tmp_path, progress=stop, **kept)
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("mine_*")}
        found = call(dead_layer, tmp_path, **kept)
        assert len(times) == 2 and all(path.stat().st_mtime_ns == time for path, time in times.items())
        assert (found.method, found.measure, found.options) == ("mine", "my measure", {"rows": 3, "way": "up"})
        assert found.ranking[-1] == DEAD and all(len(s.per_sequence) == 3 for s in found.scores)
        # GA-S2's runs are the same, and measured on all rows.
        whole = score(*dead_layer, tmp_path, "ga-s2")
        assert [s.per_sequence for s in found.scores] == [s.per_sequence[:3] for s in whole.scores]
        with pytest.raises(ValueError, match="has scores made with method=mine, this call has ga-s2"):
            call(dead_layer, tmp_path, method="ga-s2", output_dir=tmp_path / "kept")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"options": {"row": 3}}, r"options \['row'\] are unknown to method='mine'; it has \['rows', 'way'\]"),
            ({"options": {"rows": 7}}, "option rows=7 of method='mine' is wrong; pass a whole number from 1 to 6"),
            ({"options": {"way": "out"}}, r"option way='out' of method='mine' is wrong; pass one of \['up', 'down'\]"),
            ({"options": {"way": "down", "rows": 1}}, "way='down' needs rows of 2 or more"),
        ],
    )
    def test_its_options_are_checked_by_its_signature(self, given, message, dead_layer, tmp_path):
        with pytest.raises(ValueError, match=message):
            call(dead_layer, tmp_path, **given)

    def test_what_it_needs_is_asked_for(self, dead_layer, tmp_path, monkeypatch):
        teacher, student = dead_layer
        args = arguments(tmp_path)
        with pytest.raises(ValueError, match="method='mine' trains and needs train_dataset"):
            hh.score_layers(student, teacher, None, rows(6, 9), args=args, method=MINE)
        with pytest.raises(ValueError, match="method='mine' needs an aligned student"):
            hh.score_layers(None, teacher, rows(16), rows(6, 9), args=args, method=MINE)

        def record(**fields):
            return ScoringMethod(name="mine", score=briefly, value="", source="", **fields)

        with pytest.raises(ValueError, match="chooses layers for k=1; pass at least k=2"):
            check_request(record(needs_k=True, least_k=2), {}, 1)
        with pytest.raises(ValueError, match=r"method='mine' with options=\{'rows': 2\} needs k"):
            check_request(record(asks_k=lambda options: options.get("rows") == 2), {"rows": 2}, None)
        with pytest.raises(ValueError, match="chooses among all layers"):
            call(dead_layer, tmp_path, method=record(among_all=True), layers=[1])
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match="goes on with the student that it trained"):
            check_placement(record(keeps_student=True), False)
        with pytest.raises(ValueError, match="shard_teacher is on under FSDP2"):
            check_placement(MINE, True)


@pytest.mark.parametrize("name", COMPARED)
def test_what_moved_says_where_it_went(name):
    with pytest.raises(
        ValueError, match=f"method='{name}' is no longer in the package.*benchmarks/selection/compared.*COMPARED"
    ):
        method_of(name)
    assert name not in METHODS and method_of(COMPARED[name]) is COMPARED[name]


def test_a_run_of_before_is_known_and_goes_on_by_another_method(finished, tmp_path):
    """It can be pushed, and its scores made by another method; the old one is refused before anything is done."""
    folder = tmp_path / "run"
    copy_run(finished.folder, folder, "distill")
    for name in ("recipe.yaml", "scores.json"):
        text = (folder / name).read_text().replace("ga-s2", "gates")
        (folder / name).write_text(text)
    old = provenance_of(folder)
    assert (old.recipe.score.method, old.recipe.select.selector, old.scores.method) == ("gates", "gates", "gates")
    for given in ({}, {"start_from": "score"}):
        with pytest.raises(ValueError, match="score.method='gates' is no longer in the package"):
            run_recipe(old.recipe, folder, **given)
    new = Recipe.load(finished.folder / "recipe.yaml")
    with pytest.raises(
        ValueError,
        match="belongs to another recipe .*score.method: 'gates' in the folder, 'ga-s2' now.*--from score",
    ):
        claim(folder, new)
    assert "set_aside/1/scores.json" in claim(folder, new, "score")


def test_names_are_those_of_the_records():
    assert all(name == method.name for name, method in (METHODS | COMPARED).items())


def test_the_docs_have_the_records(request):
    """`--write-docs` writes them."""
    text = DOCS.read_text("utf-8")
    begin, end = re.search(r"<!-- methods:.*-->\n", text).end(), text.index("<!-- end -->")
    wanted = table(METHODS.values()) + "\n"
    if request.config.getoption("--write-docs"):
        DOCS.write_text(text[:begin] + wanted + text[end:], "utf-8")
    else:
        assert text[begin:end] == wanted


def test_the_example_of_an_own_method_in_the_docs(dead_layer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = (
        code for code in re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.S) if "FIRST_ROWS" in code
    )
    names = {"hh": hh, "teacher": dead_layer[0], "student": dead_layer[1], "held_out": rows(6, 9)}
    exec(code, names)
    for found, whole in zip(names["scores"].scores, score(*dead_layer, tmp_path, "zero-shot").scores, strict=True):
        assert found.per_sequence == pytest.approx(whole.per_sequence[:2], rel=1e-5)

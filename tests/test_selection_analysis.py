"""Regret, cost and recommendation from records written by hand."""

import itertools
import json
import math
import statistics

import pytest

from benchmarks.selection import __main__ as selection
from benchmarks.selection import analysis, report


NAME, LAYERS = "qwen3-8-moved", 4
SINGLES = {0: 1.0, 1: 0.6, 2: 0.5, 3: 0.9}
PAIRS = {(0, 1): 0.5, (0, 2): 0.2, (0, 3): 0.8, (1, 2): 0.45, (1, 3): 0.55, (2, 3): 0.4}


def line(layers, kl, seed=0):
    select = {"3": [kl + 0.5 * (layers == [1]) - 0.5 * (layers == [3]), 0.01], "24": [kl, 0.01]}
    return {"teacher": NAME, "seed": seed, "layers": layers, "steps": 24, "kl": kl, "select": select}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "num_layers_of", lambda name: LAYERS)
    lines = [line([], 2.0)]
    lines += [line([layer], kl) for layer, kl in SINGLES.items()] + [
        line(list(pair), kl) for pair, kl in PAIRS.items()
    ]
    lines += [line([0, 2], 0.5, seed=1), line([1, 2], 0.4, seed=1)]
    (tmp_path / f"{NAME}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    (tmp_path / "methods").mkdir()
    cost = {"tokens": 0, "tokens_forward": 30000, "seconds": 1.5, "values": {}}
    good = {"method": "good", "sets": {"1": [2], "2": [0, 2]}} | cost
    bad = {"method": "bad", "sets": {"1": [0], "2": [0, 3]}} | cost
    dear = {"method": "dear", "sets": {"1": [2], "2": [0, 2]}} | cost | {"tokens": 10**6}
    text = "".join(json.dumps(entry) + "\n" for entry in (good, bad, dear))
    (tmp_path / "methods" / f"{NAME}_0.jsonl").write_text(text + '{"method": "cut sh')
    return tmp_path


def test_a_set_is_judged_with_every_seed_that_it_was_distilled_with(cache):
    ground = analysis.read_ground(cache, NAME)
    assert ground.num_layers == LAYERS
    assert ground.regret([2, 0]) == (pytest.approx((0.0 + 0.1) / 2), 2)
    assert ground.regret([0, 1]) == (pytest.approx(0.3), 1)
    value, count = ground.regret([0, 1, 2])
    assert math.isnan(value) and count == 0
    assert ground.best_on_average(1) == (2,)
    assert ground.expected_of_random(2) == pytest.approx(sum(PAIRS.values()) / 6 - 0.2)
    assert ground.expected_of_random(3) is None
    assert analysis.read_ground(cache, "llama-8") is None


def test_the_table_and_what_it_recommends(cache):
    result = selection.analyse(cache, [NAME, "llama-8"], [1, 2])
    rows = {row["method"]: row for row in result["methods"]}
    assert rows["good"]["by_k"] == {1: {NAME: 0.0}, 2: {NAME: 0.05}}
    assert rows["good"]["regret"] == pytest.approx(0.025) and rows["good"]["test"] is None
    assert rows["bad"]["by_k"][1] == {NAME: 0.5} and rows["bad"]["by_k"][2] == {NAME: 0.6}
    # GA-S2 takes the two best singles, which are not the best pair, and after three steps others.
    assert rows["ga-s2"]["by_k"][2][NAME] == pytest.approx((0.25 + 0.0) / 2, abs=1e-4)
    assert rows["ga-s2, 3 steps"]["by_k"][1][NAME] == pytest.approx(0.4)
    assert rows["ga-s2"]["cost"] == 1.0 and rows["ga-s2"]["tokens"] == LAYERS * 24 * 8 * 128
    assert rows["good"]["cost"] < 0.1 < rows["dear"]["cost"]
    assert result["recommended"] == "good"
    with pytest.raises(ValueError, match="no selector cost"):
        analysis.recommend([row for row in result["methods"] if row["method"] == "dear"])


def test_chosen_sets_that_nobody_distilled_are_named(cache):
    ground = analysis.read_ground(cache, NAME)
    found = analysis.choices(cache, ground, [1, 2, 3])
    assert analysis.unmeasured(ground, found, seed=0) == [(0, 2, 3), (1, 2, 3)]  # GA-S2's, early and late
    assert (2,) in analysis.unmeasured(ground, found, seed=1)


def test_overlap_by_chance_is_the_mean_over_all_lists():
    fixed = {0, 1, 2}
    lists = [set(c) for c in itertools.combinations(range(7), 2)]
    mean = sum(len(fixed & s) / len(fixed | s) for s in lists) / len(lists)
    assert report.expected_jaccard(7, 3, 2) == pytest.approx(mean)


def test_the_page_is_what_the_committed_results_say(tmp_path, monkeypatch):
    committed = report.DOCS / "selection.md"
    monkeypatch.setattr(report, "DOCS", tmp_path)
    report.write(selection.RESULTS)
    assert (tmp_path / "selection.md").read_text() == committed.read_text()
    assert "{{" not in committed.read_text()
    assert (tmp_path / "selection_steps.png").stat().st_size < 200_000
    result = json.loads((selection.RESULTS / "selection.json").read_text())
    again = json.loads(
        json.dumps(selection.analyse(selection.RESULTS / "selection", list(result["teachers"]), [1, 2, 3]))
    )
    assert again["recommended"] == result["recommended"] and again["methods"] == result["methods"]


def test_the_error_of_a_mean_takes_teachers_that_share_weights_as_one():
    alone = {"planted-a": 0.1, "planted-b": -0.2, "planted-c": 0.4}
    mean, error = report.mean_of_lineages(alone)
    assert (mean, error) == pytest.approx((0.1, statistics.stdev(alone.values()) / 3**0.5))
    # A copy of every teacher tells nothing new; llama-10-either continues llama-9, and so on.
    pairs = {"llama-9": 0.1, "llama-10-either": 0.1, "qwen3-10": -0.2, "qwen3-12-either": -0.2}
    pairs |= {"llama-8": 0.4, "llama-9-either": 0.4}
    assert report.mean_of_lineages(pairs) == pytest.approx((mean, error))

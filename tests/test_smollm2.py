"""The comparison of hybrids of a real model and its page, on the embedded teacher: every job, as small as can be."""

import dataclasses
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from runs import save_texts
from smollm2.all import TRIAL, Work, options
from smollm2.report import RUNS, Results, evaluations, hybrid_name, over_seeds, retrieval_at, retrieval_kept
from smollm2.written import DOMAINS, PARTS

from hf_hybrid.cli import main
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import run_recipe


ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks" / "smollm2"


def test_the_shipped_recipes_differ_in_the_mixer():
    recipe, windows = (Recipe.load(ROOT / "recipes" / f"smollm2-135m{which}.yaml") for which in ("", "-windows"))
    assert recipe.select.k == 8
    assert recipe.score.method == recipe.select.selector == "verified"
    changed = {"mixer": "sliding_window", "mixer_options": {"window": 128, "sinks": 4}}
    assert windows == dataclasses.replace(recipe, **changed)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a trial of the comparison: `run`, `held_out`, `results/seed-3`."""
    folder = tmp_path_factory.mktemp("smollm2")
    data = {"source": "embedded-demo", "block_size": 128, "held_out_rows": 2, "report_rows": 2}
    stage = {"batch_size": 2, "tokens": 512}
    recipe = {"teacher": "embedded", "seed": 3, "data": data, "align": stage, "distill": stage}
    recipe |= {"score": {"method": "zero-shot", "tokens_per_layer": 256, "batch_size": 2}}
    recipe |= {"select": {"selector": "zero-shot", "k": 2}, "training": {"use_cpu": True}}
    run_recipe(Recipe.from_dict(recipe), folder / "run")
    texts = sorted(save_texts(folder / "texts", 2).iterdir())
    (folder / "held_out").mkdir()
    for name, path in zip(("prose", "code"), texts, strict=True):
        (folder / "held_out" / f"{name}.jsonl").write_text(json.dumps({"text": path.read_text()}) + "\n")
    (folder / "printed.txt").write_text("".join(compare(folder, processes=2)))
    return folder


def compare(folder, *more, processes=1):
    """Runs compare.py, several at once if asked for; what each printed."""
    options = ["--run", folder / "run", "--held-out", folder / "held_out", "--output", folder / "results" / "seed-3"]
    command = [sys.executable, SCRIPTS / "compare.py", *options, "--trial", *more]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    printed = [process.communicate(timeout=900)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes
    return printed


@pytest.mark.slow
class TestTrial:
    def test_every_job_leaves_its_figures(self, compared):
        jobs = {path.stem: json.loads(path.read_text()) for path in (compared / "results" / "seed-3").glob("*.json")}
        hybrids = [job for name, job in jobs.items() if name.startswith("k2-")]
        named = {selector for job in hybrids for selector in job["selectors"]}
        assert named - {"search"} == {"window-sinks", "verified", "zero-shot", "uniform", "random-0", "random-1"}
        assert {
            "teacher",
            "aligned",
            "score-verified-2",
            "score-zero-shot",
            "long",
            "mixer-kda",
            "setting-batch-half",
        } < set(jobs)
        assert {"mixer-window-sinks", "mixer-window-sinks-uniform", "search", "speed"} < set(jobs)
        assert len(jobs["mixer-window-sinks-chosen"]["layers"]) == 2
        untrained = jobs["mixer-window-sinks-untrained"]
        assert untrained["layers"] == jobs["mixer-window-sinks"]["layers"] and untrained["tokens"] == 0
        assert untrained["kl"]["mean"] == pytest.approx(0, abs=1e-5)  # the window holds these rows
        uniform = next(job for job in hybrids if "uniform" in job["selectors"])
        assert jobs["mixer-window-sinks-uniform"]["layers"] == uniform["layers"]
        tried = jobs["search"]["evaluations"]
        assert len(tried) == 3 and jobs["search"]["layers"] == min(tried, key=lambda one: one["kl"])["layers"]
        for job in ("speed", "speed-compiled"):
            assert [row["model"] for row in jobs[job]["rows"]] == ["teacher"] * 2 + ["hybrid"] * 2
        assert jobs["teacher"]["kl"]["mean"] == 0
        for job in hybrids:
            assert job["seed"] == 3 and job["trial"] and len(job["layers"]) == 2
            assert job["kl"]["mean"] == pytest.approx(
                sum(domain["mean"] for domain in job["kl"]["domains"].values()) / 2
            )
            assert job["kl"]["mean"] < jobs["aligned"]["kl"]["mean"]
            assert job["curve"] and job["losses"]

    def test_what_is_done_is_not_done_again(self, compared):
        folder = compared / "results" / "seed-3"
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        gone = {"setting-rates-low.json", "search.json"}
        found = json.loads((folder / "search.json").read_text())
        for name in gone:
            (folder / name).unlink()
        long = (folder / "long.json").rename(compared / "long.json")
        (printed,) = compare(compared, "--jobs", "search", "setting-*")
        after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert not (folder / "long.json").exists()  # it was not asked for
        assert {name for name in after if after[name] != before[name]} == gone
        assert printed.count(" ...\n") == 2 and "all jobs are done" in printed
        again = json.loads((folder / "search.json").read_text())  # of what a killed search had tried
        assert " of 3, [" not in printed and again["evaluations"] == found["evaluations"]
        assert again["layers"] == found["layers"]
        long.rename(folder / "long.json")

    def test_jobs_that_nobody_has_are_refused(self, compared):
        options = ["--run", compared / "run", "--held-out", compared / "held_out", "--output", compared / "elsewhere"]
        command = [sys.executable, SCRIPTS / "compare.py", *options, "--trial", "--jobs", "mixers"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert found.returncode == 1 and "--jobs mixers names no job; there are teacher, aligned, " in found.stderr

    def test_two_processes_share_the_jobs(self, compared):
        begun = [
            line.split()[1] for line in (compared / "printed.txt").read_text().splitlines() if line[-4:] == " ..."
        ]
        jobs = [path.stem for path in (compared / "results" / "seed-3").glob("*.json") if ".scores" not in path.name]
        assert sorted(begun) == sorted(jobs)

    def test_the_page_has_what_was_measured(self, compared):
        page = compared / "page" / "results.md"
        command = [sys.executable, SCRIPTS / "report.py", "--results", compared / "results", "--output", page]
        subprocess.run(command, check=True, timeout=300)
        text = page.read_text()
        verified = next(
            job
            for job in (json.loads(p.read_text()) for p in (compared / "results" / "seed-3").glob("k2-*.json"))
            if "verified" in job["selectors"]
        )
        assert "**A trial" in text and "## Speed and cache" in text and "3 sets of 2 layers" in text
        for mixer in ("gated_deltanet, native", "sliding_window, window 128, sinks 4, untrained"):
            assert f"| {mixer} |" in text
        assert f"| verified | {verified['layers']} | {verified['kl']['mean']:.4f} ± " in text
        assert (page.parent / "images" / "results_curves.png").stat().st_size > 10_000


def test_a_page_of_nothing_is_refused(tmp_path):
    command = [sys.executable, SCRIPTS / "report.py", "--results", tmp_path, "--output", tmp_path / "page.md"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 1 and "has no folder seed-N with figures" in found.stderr


def test_evaluations_stand_beside_the_teachers_where_they_are_there(tmp_path):
    def score(mean: float, task: str = "single_prose") -> dict:
        return {"task": task, "form": "generation", "length": 2048, "mean": mean, "sem": 0.03}

    folder = tmp_path / "seed-0"
    folder.mkdir()
    (folder / "evaluation-run.json").write_text(json.dumps({"tasks": [score(0.25), score(0.75, "copying")]}))
    text = evaluations(Results(tmp_path))
    assert "| single_prose | generation | hybrid | 0.250 ± 0.030 |" in text and "teacher" not in text
    assert "| generation | hybrid | 0.500 ± 0.021 |" in text
    (folder / "evaluation-teacher.json").write_text(json.dumps({"tasks": [score(0.75)]}))
    names = ("agreement", "common_prefix", "repetition", "looping", "teacher_repetition", "teacher_looping")
    written = {"prompts": 32, "new_tokens": 128} | {name: {"mean": 0.5, "sem": 0.1} for name in names}
    samples = [{"prompt": "Why?", "text": "No\nreason.", "teacher_text": "because " * 100}]
    (folder / "evaluation-text.json").write_text(json.dumps({"generation": written | {"samples": samples}}))
    text = evaluations(Results(tmp_path))
    assert "| single_prose | generation | teacher | 0.750 ± 0.030 |" in text
    assert "0.500 ± 0.100 of the tokens are the teacher's" in text
    assert "> **Why?**\n>\n> *Hybrid*: No reason.\n>\n> *Teacher*: because because" in text


def test_the_first_screen_has_the_committed_figures():
    """The table of the README, from the records that docs/results.md is written of."""
    results = Results(ROOT / "benchmarks" / "results" / "smollm2")
    text = (ROOT / "README.md").read_text("utf-8")
    names = {name: f"`{name}`" for name in ("zero-shot", "verified", "zero-shot-linearise")}
    for selector, name in (names | {"ga-s2": "`ga-s2`, the paper's", "ga-s1": "alignment loss"}).items():
        scored = results.named("score-verified-8" if selector == "verified" else f"score-{selector}")
        seconds = sum(record["seconds"] for record in scored) / len(scored)
        assert f"| {name} | {kl_and_retrieval(results, selector)} | {seconds:.0f} |" in text
    assert f"| uniform | {kl_and_retrieval(results, 'uniform')} | 0 |" in text
    teacher = results.named("teacher")
    assert f"| teacher, all softmax | 0 | {retrieval_at(teacher[0], 2048):.3f} | |" in text
    for name, shown in {
        "run": "linear attention, Gated DeltaNet",
        "windows": "a window of 128 tokens and 4 sinks",
    }.items():
        reports = [jobs[f"{name}-report"] for jobs in results.seeds.values()]
        kl, perplexity = (sum(r["evaluation"][of] for r in reports) / len(reports) for of in ("kl", "perplexity"))
        seconds = sum(sum(report["seconds"].values()) for report in reports) / len(reports)
        kept = retrieval_kept(results, f"evaluation-{name}")
        shares = " | ".join(f"{kept['likelihood', length]:.2f}" for length in (2048, 8192))
        assert f"| {shown} | {kl:.3f} | {perplexity:.2f} | {shares} | 0.28 | {seconds:.0f} |" in text
        for report in reports:
            found = report["evaluation"]
            assert round(found["cache_bytes"] / found["teacher_cache_bytes"], 2) == 0.28
            assert round(found["teacher_perplexity"], 1) == 10.1 and len(report["selected"]) == 8
    runs = [jobs["run-report"]["evaluation"] for jobs in results.seeds.values()]
    told = text.replace("\n", " ")
    again = [
        [jobs[name]["evaluation"] for name in RUNS if name in jobs and name != "run-report"]
        for jobs in results.seeds.values()
    ]
    assert max(abs(one["kl"] - run["kl"]) for run, others in zip(runs, again, strict=True) for one in others) < 0.0005
    assert [len(others) for others in again] == [4, 2] and "made again, four and two times, end within" in told
    (compiled,) = results.named("speed-compiled")
    rates = [
        row["decode_tokens_per_second"] for row in compiled["rows"] if (row["context"], row["batch"]) == (8192, 32)
    ]
    assert f"32 rows of 8,192 tokens {rates[1] / rates[0]:.1f} times as fast as the teacher" in told
    ends = []
    for job, join in (("mixer-window-sinks", "nats and retrieve"), ("mixer-window-sinks-uniform", "and")):
        windows = results.named(job)
        kl = statistics.fmean(record["kl"]["mean"] for record in windows)
        ends.append(f"at {kl:.3f} {join} {statistics.fmean(retrieval_at(record, 2048) for record in windows):.2f}")
    assert f"in the layers of `zero-shot` windows end {ends[0]}, in uniform layers {ends[1]}" in told
    (zero_shot,) = {tuple(record["layers"]) for record in results.of_selector(8, "zero-shot")}
    assert {tuple(record["layers"]) for record in results.named("mixer-window-sinks")} == {zero_shot}
    four = [over_seeds(results.of_selector(4, name), at_2048, ".2f") for name in ("uniform", "verified")]
    assert four == ["0.00 ± 0.00", "0.34 ± 0.02"] and "uniform hybrid finds nothing, and `verified`'s 0.34" in told
    (long,) = results.named("long")
    short = results.seeds[0][f"k8-{'-'.join(map(str, long['layers']))}"]
    assert f"take the KL from {short['kl']['mean']:.3f} to {long['kl']['mean']:.3f}, and bring no retrieval" in told
    assert retrieval_at(long, 2048) < retrieval_at(short, 2048) and long["tokens"] == 4 * short["tokens"]


def test_the_page_of_mixers_has_the_committed_figures():
    results = Results(ROOT / "benchmarks" / "results" / "smollm2")
    text = (ROOT / "docs" / "mixers.md").read_text("utf-8")
    jobs = {
        "teacher, all softmax": "teacher",
        "`sliding_window`, window 128, sinks 4": "mixer-window-sinks",
        "the same, not trained": "mixer-window-sinks-untrained",
        "the same, in layers chosen before it was trained": "mixer-window-sinks-chosen",
        "`sliding_window`, window 192": "mixer-window-state",
        "`gated_deltanet`": hybrid_name([0, 1, 8, 17, 18, 20, 23, 24]),
        "`gated_deltanet`, `native`": "mixer-native",
        "`kimi_delta_attention`": "mixer-kda",
    }
    for name, job in jobs.items():
        found = results.named(job)
        if job not in ("teacher", "mixer-window-sinks-chosen"):
            assert {tuple(record["layers"]) for record in found} == {(0, 1, 8, 17, 18, 20, 23, 24)}
        kl, *shares = (
            statistics.fmean(of(record) for record in found)
            for of in (lambda r: r["kl"]["mean"], lambda r: retrieval_at(r, 2048), lambda r: retrieval_at(r, 4096))
        )
        shown = "0" if job == "teacher" else f"{kl:.3f}"
        assert f"| {name} | {shown} | {shares[0]:.3f} | {shares[1]:.3f} |" in text
    told = text.replace("\n", " ")
    uniform = [results.named("mixer-window-sinks-uniform"), results.of_selector(8, "uniform")]
    ends = [statistics.fmean(record["kl"]["mean"] for record in found) for found in uniform]
    assert f"windows end at {ends[0]:.3f}, `gated_deltanet` at {ends[1]:.3f}" in told
    for name, recipe in (
        ("run", "`smollm2-135m`, `gated_deltanet`"),
        ("windows", "`smollm2-135m-windows`, window 128"),
    ):
        kl = statistics.fmean(record["evaluation"]["kl"] for record in results.named(f"{name}-report"))
        kept = retrieval_kept(results, f"evaluation-{name}")
        shares = " | ".join(f"{kept['likelihood', length]:.2f}" for length in (2048, 4096, 8192))
        assert re.search(rf"\| {re.escape(recipe)}[^|]* \| {kl:.3f} \| {re.escape(shares)} \|", text)
    chosen = {tuple(record["selected"]) for record in results.named("windows-report")}
    assert chosen == {(7, 8, 14, 17, 18, 20, 23, 24)} and f"take {list(*chosen)}" in told
    teacher = retrieval_at(results.named("teacher")[0], 2048)
    early = results.named("mixer-window-sinks-chosen")
    shares = [f"{retrieval_at(record, 2048) / teacher:.2f}" for record in early]
    assert f"sets that differ in four layers and retrieve {' and '.join(shares)} of what" in told
    assert len(set(early[0]["layers"]) - set(early[1]["layers"])) == 4


def test_the_page_of_native_mixers_has_the_committed_figures():
    results = Results(ROOT / "benchmarks" / "results" / "smollm2")
    text = (ROOT / "docs" / "native.md").read_text("utf-8").replace("\n", " ")
    native, convolved = results.named("mixer-native"), results.named("mixer-convolution")
    default = results.named(hybrid_name(native[0]["layers"]))
    assert [len(found) for found in (native, default, convolved)] == [2, 2, 1]
    ends, finds = (
        [f"{statistics.fmean(of(one) for one in found):.3f}" for found in (native, default, convolved)]
        for of in (lambda one: one["kl"]["mean"], lambda one: retrieval_at(one, 2048))
    )
    assert f"native ends at {ends[0]} nats and retrieves {finds[0]} at 2,048 tokens" in text
    assert f"the default at {ends[1]} and {finds[1]}, the default with a convolution of 4 at {ends[2]} and" in text
    assert f"convolution of 4 at {ends[2]} and {finds[2]}." in text


def at_2048(record: dict) -> tuple[float, None]:
    return retrieval_at(record, 2048), None


def kl_and_retrieval(results: Results, selector: str) -> str:
    found = results.of_selector(8, selector)
    kl = over_seeds(found, lambda record: (record["kl"]["mean"], None), ".3f")
    return f"{kl} | {over_seeds(found, lambda record: (retrieval_at(record, 2048), None), '.3f')}"


@pytest.mark.slow
def test_the_steps_of_all_hang_together(tmp_path, monkeypatch):
    """Runs and evaluation of `all.py --trial`, with the embedded teacher in the place of the fetched one."""
    work = Work(options().parse_args(["--trial", "--work", str(tmp_path / "work"), "--seed", "3"]))
    work.teacher = ROOT / "hf_hybrid" / "embedded_teacher"
    texts = sorted(save_texts(tmp_path / "texts", 8).iterdir())
    files = [work.text / part / f"{name}.jsonl" for part in PARTS for name in ("prose", "code")]
    files += [work.written / part / f"{name}.jsonl" for part in PARTS for name in DOMAINS]
    for file, path in zip(files, texts, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": path.read_text()}) + "\n")
    monkeypatch.setitem(TRIAL, "select", {"k": 2})

    def in_this_process(*words):
        assert words[:2] == ("-m", "hf_hybrid")
        assert main(list(map(str, words[2:]))) == 0

    monkeypatch.setattr("smollm2.all.command", in_this_process)
    work.windows()
    work.evaluate()
    found = Results(work.results).seeds[3]
    assert found["windows-report"]["mixer"] == "sliding_window"
    names = {name for name in found if name.startswith("evaluation-")}
    assert names == {f"evaluation-{of}" for of in ("windows-text", "windows", "teacher")}
    texts = found["evaluation-windows-text"]["texts"]
    assert [text["name"] for text in texts] == sorted({"prose", "code", *DOMAINS})
    for name in ("windows", "teacher"):
        assert {score["form"] for score in found[f"evaluation-{name}"]["tasks"]} == {"likelihood", "generation"}

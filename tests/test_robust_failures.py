"""What can fail while a run runs: it ends with one line and exit code 2, nothing finished is lost, and it goes on."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cases import ALL, Case
from runs import contents
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from hf_hybrid.card import card_text
from hf_hybrid.hub import provenance_of
from hf_hybrid.run import inputs, pipeline
from hf_hybrid.run.folder import ARTEFACTS, has_work
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import run_recipe
from hf_hybrid.run.stages import Event
from hf_hybrid.trainers import AlignmentTrainer, DistillationTrainer


# --- full disks


def can_mount() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="only root can mount; the test of a size limit runs instead")


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[str], None]]:
    """Mounts a memory disk of that size on `folder`, and gives a function that mounts it anew with other options."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@needs_mount
def test_a_full_disk(case: Case) -> None:
    # In the claim, the data, the checkpoint's code, its weights, its optimizer, the distillation's checkpoints.
    sizes = [4, 44, 120, 400, 1400, 7000]
    failed_in = set()
    with small_disk(Path("disk"), sizes[0]) as remount:
        case.folder = Path("disk/run")
        for size in sizes:
            remount(f"size={size}k")
            line = case.fails()
            assert "disk/run cannot be written: " in line and line.endswith("and the same command goes on."), line
            failed_in.add(next(name for name in ARTEFACTS if not (case.folder / ARTEFACTS[name]).exists()))
        remount("size=40m")
        case.ends()
    assert failed_in == {"data", "align", "distill"}


def test_files_that_may_not_grow(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on a file's size fails writes in the same places as a full disk, for any user."""
    # Of a module that is imported meanwhile, Python 3.11 would keep a cut-off .pyc, which no later process can import.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("recipe.yaml").write_text(yaml.safe_dump(case.recipe))
    unlimited, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (10, 2_000, 20_000, 100_000, 600_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            code, line = case.again()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, hard))
        assert code == 2 and "hf-hybrid: run cannot be written: " in line, line
    case.ends("--stop-after", "align")


@needs_mount
def test_a_disk_that_becomes_read_only(case: Case) -> None:
    with small_disk(Path("disk"), 40_000) as remount:
        remount("ro")
        case.folder = Path("disk/run")
        assert "cannot be written: read-only file system" in case.fails()
        remount("rw")
        case.at("align")
        remount("ro")
        assert "cannot be written: read-only file system" in case.fails()
        remount("rw")
        case.ends("--stop-after", "align")
        shutil.rmtree(case.folder)
        shutil.copytree(case.finished, case.folder)
        remount("ro")
        # A finished run has nothing to write.
        case.ends()


# --- losses that are not finite


def poisoned(monkeypatch: pytest.MonkeyPatch, trainer: type, step: int) -> None:
    """Makes the loss of `trainer` nan at `step`."""
    plain = trainer.student_loss

    def student_loss(self: Any, student: Any, inputs: Any) -> torch.Tensor:
        loss = plain(self, student, inputs)
        return loss * float("nan") if self.state.global_step == step - 1 and student.training else loss

    monkeypatch.setattr(trainer, "student_loss", student_loss)


@pytest.mark.parametrize("step", [1, 5, 8])
def test_a_loss_of_nan(step: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.at("align")
    with monkeypatch.context() as patch:
        poisoned(patch, AlignmentTrainer, step)
        line = case.fails()
        assert f"align: the loss is nan at step {step} of 8" in line and "align.learning_rate" in line
        kept = {1: "there is no checkpoint from before it", 5: "checkpoint-4, from", 8: "checkpoint-6, from"}[step]
        assert kept in line
        assert case.fails() == line  # again, from the checkpoint
    for file in case.folder.rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())
    case.ends("--stop-after", "align")


def test_a_loss_of_nan_between_two_logs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.recipe["training"]["logging_steps"] = 100
    poisoned(monkeypatch, DistillationTrainer, 3)
    case.recipe |= {"select": {"selector": "uniform", "k": 2}}
    del case.recipe["score"]
    assert "distill: the loss is nan at step 4 of 8" in case.fails()
    assert not (case.folder / "distilled").exists() and (case.folder / "distill_checkpoints" / "checkpoint-2").exists()


def test_scores_that_are_all_nan(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of one layer is said with the others; nothing but nan is no scores."""
    case.at("score")
    with monkeypatch.context() as patch:
        poisoned(patch, DistillationTrainer, 2)
        line = case.fails()
    assert "all 4 layers diverged, which ranks nothing: layer 0: the loss is nan at step 2 of 2" in line
    assert case.fails() == line  # it is known, and not tried again by itself
    for path in (case.folder / "scores").glob("layer_*.json"):
        path.unlink()
    case.ends("--stop-after", "score")


def test_weights_of_nan_after_the_last_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = pipeline.train

    def train(recipe: Any, name: str, student: Any, *rest: Any) -> Any:
        state = trained(recipe, name, student, *rest)
        with torch.no_grad():
            student.model.layers[1].self_attn.A_log.fill_(float("nan"))
        return state

    monkeypatch.setattr(pipeline, "train", train)
    case.at("align")
    assert "layers.1.self_attn.A_log has weights that are not finite" in case.fails()
    assert not (case.folder / "aligned").exists()


# --- teachers, tokenizers, texts, versions


def test_a_teacher_that_vanishes(case: Case) -> None:
    case.at("score")
    case.teacher.rename(case.teacher.with_name("elsewhere"))
    assert "was found neither as a folder nor as a model on the Hub" in case.fails()
    case.teacher.with_name("elsewhere").rename(case.teacher)
    case.ends("--stop-after", "score")


def test_a_teacher_that_is_replaced(case: Case) -> None:
    case.at("score")
    kept = case.teacher.with_name("kept")
    shutil.copytree(case.teacher, kept)
    weights = load_file(case.teacher / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] += 1e-3
    save_file(weights, case.teacher / "model.safetensors", {"format": "pt"})
    line = case.fails()
    assert "was started with another teacher (other weights in 1 of" in line
    assert "such as model.layers.2.mlp.up_proj.weight" in line
    config = json.loads((kept / "config.json").read_text()) | {"rope_theta": 5.0, "rope_parameters": None}
    (case.teacher / "config.json").write_text(json.dumps(config))
    assert "(config.rope_parameters: {" in case.fails()
    shutil.rmtree(case.teacher)
    kept.rename(case.teacher)
    case.ends("--stop-after", "score")


def test_a_tokenizer_that_is_replaced(case: Case) -> None:
    case.at("align")
    tokenizer = AutoTokenizer.from_pretrained(case.teacher)
    tokenizer.add_tokens(["return"])
    tokenizer.save_pretrained(case.teacher)
    assert "was started with another teacher (another tokenizer)" in case.fails()


def test_a_tokenizer_with_more_tokens_than_the_teacher(case: Case) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case.teacher)
    tokenizer.add_tokens(["return", "function"])
    tokenizer.save_pretrained(case.teacher)
    assert "the tokenizer gives token 30" in (line := case.fails()) and "the teacher's vocabulary has 300" in line
    assert not has_work(case.folder)


def test_another_version_is_said_and_kept(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.at("align")
    monkeypatch.setattr(inputs, "__version__", "99.0")
    events: list[Event] = []
    run_recipe(Recipe.from_dict(case.recipe), case.folder, stop_after="align", progress=events.append)
    notes = [event.text for event in events if event.kind == "note" and "versions" in event.text]
    assert len(notes) == 1 and "with other versions than before: hf_hybrid " in notes[0] and "-> 99.0" in notes[0]
    versions = json.loads((case.folder / "inputs.json").read_text())["versions"]
    assert [version["hf_hybrid"] == "99.0" for version in versions] == [False, True]


def run_of_too_few_rows(case: Case) -> tuple[dict[str, Any], list[Event]]:
    """Runs the recipe without scores or fine-tuning: the report's rows, fewer than needed, and what was said."""
    del case.recipe["score"], case.recipe["finetune"]
    case.recipe["select"] = {"selector": "uniform", "k": 2}
    events: list[Event] = []
    result = run_recipe(Recipe.from_dict(case.recipe), case.folder, progress=events.append)
    rows = result.report["rows"]
    assert rows["needed"] == 32 > rows["found"] > 0
    return rows, events


def test_texts_that_end_early_are_counted(case: Case) -> None:
    for text in sorted(Path("texts").iterdir())[2:]:
        text.unlink()
    rows, events = run_of_too_few_rows(case)
    notes = {event.stage: event.text for event in events if event.kind == "note"}
    assert notes["distill"] == (
        f"the text has {rows['found']} rows, 32 are trained on: each is used {32 / rows['found']:.1f} times"
    )


def test_the_source_that_ended_the_text_is_told_with_the_rows_in_the_report_and_in_the_card(case: Case) -> None:
    text = "".join(path.read_text() for path in sorted(Path("texts").iterdir()))
    for name, count in (("long", 2_000), ("short", 6)):
        lines = [json.dumps({"text": text[80 * i : 80 * (i + 1)]}) for i in range(count)]
        Path(f"texts/{name}.jsonl").write_text("\n".join(line for line in lines if len(line) > 20))
    weighted = [
        {"text_files": [f"texts/{name}.jsonl"], "weight": weight} for name, weight in (("long", 9), ("short", 1))
    ]
    case.recipe["data"] = {"sources": weighted, "block_size": 64, "held_out_rows": 6, "report_rows": 6}
    rows, events = run_of_too_few_rows(case)
    assert (rows["text_end"]["source"], rows["text_end"]["share"]) == (1, 0.1)
    [note] = [event.text for event in events if (event.kind, event.stage) == ("note", "data")]
    begins = f"data.sources[1] (texts/short.jsonl), 10% of the text, ends after {rows['found']} of 32 training rows"
    assert note.startswith(begins)
    said = f"The text made {rows['found']} of the 32 training rows that a stage takes; short.jsonl, 10% of it, was the"
    for card in ((case.folder / "model" / "README.md").read_text(), made_again(case.folder)):
        assert said in card and "texts/" not in card.replace(said, "")


def made_again(run: Path) -> str:
    """The card that a push makes of the files of a run."""
    config = AutoConfig.from_pretrained(run / "model", trust_remote_code=True)
    return card_text(config, 1, provenance_of(run))


# --- another recipe, and starting over


@pytest.mark.parametrize(
    ("changes", "message", "stage"),
    [
        (
            {"mixer": "kimi_delta_attention"},
            "mixer: 'gated_deltanet' in the folder, 'kimi_delta_attention' now",
            "align",
        ),
        (
            {"mixer_options": {"rope": False}},
            "mixer_options.rope: None in the folder, False now",
            "align",
        ),
        (
            {"select": {"layers": [0, 2]}},
            "select.k: 2 in the folder, None now; select.layers: None in the folder, [0, 2] now",
            "select",
        ),
        (
            {"seed": 4, "finetune": None},
            "(finetune: some in the folder, none now; seed: 3 in the folder, 4 now)",
            "data",
        ),
        (
            {"training": {"use_cpu": True, "bf16": True}},
            "training.bf16: None in the folder, True now",
            "align",
        ),
    ],
)
def test_another_recipe_is_refused_with_what_differs(changes: dict, message: str, stage: str, case: Case) -> None:
    case.at("align")
    case.recipe |= changes
    line = case.fails()
    assert "belongs to another recipe" in line and message in line and f"add --from {stage} to make" in line


def test_a_stage_is_made_again_with_another_recipe(case: Case) -> None:
    case.at("evaluate")
    case.recipe["distill"] = case.recipe["distill"] | {"learning_rate": 1e-4}
    message = "distill.learning_rate: 0.001 in the folder, 0.0001 now"
    for options in ([], ["--from", "finetune"]):
        line = case.fails(*options)
        assert message in line and "add --from distill to make" in line
    before = contents(case.folder, ALL)
    earlier = contents(case.folder, ["data", "aligned", "scores.json", "selection.json"])
    assert case.run("--from", "distill", "--stop-after", "distill")[0] == 0
    now = contents(case.folder, ALL)
    assert earlier.items() <= now.items() and not (case.folder / "finetuned").exists()
    assert now["distilled/model.safetensors"] != before["distilled/model.safetensors"]
    # Nothing is deleted.
    assert earlier | contents(case.folder / "set_aside" / "1", ALL) == before
    assert Recipe.load(case.folder / "set_aside" / "1" / "recipe.yaml").distill.learning_rate == 1e-3
    case.recipe["distill"] = case.recipe["distill"] | {"learning_rate": 1e-3}
    case.ends("--from", "distill", "--stop-after", "distill")
    assert sorted(path.name for path in (case.folder / "set_aside").iterdir()) == ["1", "2"]


def test_a_later_artefact_without_the_one_before_is_refused(case: Case) -> None:
    case.at("finetune")
    shutil.rmtree(case.folder / "aligned")
    line = case.fails()
    assert "has scores.json, but not aligned, from which it was made" in line and "--from align" in line


def test_the_finished_model_holds_nothing_of_the_run(finished_here: Path) -> None:
    assert not {"files.json", "trainer_state.json"} & {path.name for path in (finished_here / "model").iterdir()}


def test_the_page_on_runs_names_all_that_is_in_one(finished_here: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "runs.md").read_text()
    for path in finished_here.iterdir():
        assert f"`{path.name}{'/' if path.is_dir() else ''}`" in page, path.name
    for stage, artefact in ARTEFACTS.items():
        assert f"| `{stage}` | `{artefact}" in page

"""The demo: the whole path on the embedded teacher, and what choosing layers is worth against not choosing them."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_hybrid.trainers.durable import read_json, write_json
from hf_hybrid.trainers.held_out import held_out_kl
from hf_hybrid.trainers.precision import AS_LOADED

from .data.rows import load_rows
from .evaluation import recall_of, recall_task
from .places import check_place, find_recipe
from .run.folder import check_claim, publish
from .run.pipeline import stages_of
from .run.recipe import Recipe
from .run.runner import run_recipe
from .run.stages import Event, Listener, cut_for, outcome, train
from .selection import uniform_layers
from .teacher.embedded import embedded_teacher, embedded_tokenizer
from .teacher.loading import load_model


# What the demo does beside its run.
_BESIDE = ["uniform", "all linear", "compare"]
# Minutes on two quiet cores, of the demo and of the full one.
_MINUTES = {False: "three", True: "seven"}
PROMPT = "import os\nimport sys\n\ndef "
# Runs with nothing of ours and nothing optional: what a user has who installed torch and transformers.
_RELOAD = """
import json, sys
for name in ("hf_hybrid", "modeling", "trainers", "fla", "trl", "peft", "datasets"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = tokenizer(json.loads(sys.argv[2]), return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
result = {"logits": logits[0].tolist(), "tokens": out[0].tolist(), "text": tokenizer.decode(out[0])}
with open(sys.argv[3], "w") as stream:
    json.dump(result, stream)
"""


def run_demo(
    output: str | os.PathLike, seed: int = 0, progress: Listener | None = None, *, full: bool = False
) -> dict[str, Any]:
    """
    Runs the demo in the folder `output` and returns its report, which is also in `output/report.json`.

    The recipe `demo`, or with `full` the recipe `demo-full`, is run in `output/run`: align, score all layers, keep K,
    distil, save. Two more hybrids, with uniformly spaced softmax layers and with none, are distilled on the same
    batches for the same tokens, and all are measured on the same held-out rows, which are not those that the layers
    were chosen on. Started again after a kill, it goes on.
    """
    listener = progress or (lambda event: None)
    check_place(output)
    folder = Path(output)
    recipe = replace(Recipe.load(find_recipe("demo-full" if full else "demo")), seed=seed)
    finished = read_json(folder / "report.json")
    if finished is not None:
        check_claim(folder / "run", recipe)  # another seed, or --full, is another demo
        listener(Event("demo", "found"))
        return finished

    def counted(event: Event) -> None:
        of = len(stages_of(recipe)) + len(_BESIDE)
        number = of - len(_BESIDE) + 1 + _BESIDE.index(event.stage) if event.stage in _BESIDE else event.number
        listener(replace(event, number=number, of=of))

    run_recipe(recipe, folder / "run", progress=counted)
    run = read_json(folder / "run" / "report.json")
    selected = run["selected"]
    layers = {"selected": selected, "uniform": uniform_layers(run["num_layers"], len(selected)), "all_linear": []}
    teacher = embedded_teacher()
    rows = load_rows(folder / "run" / "data")
    seconds = dict(run["seconds"])
    for name in ("uniform", "all_linear"):
        start = time.perf_counter()
        if not (folder / name).exists():
            _distill(recipe, name, layers[name], teacher, rows, folder, counted)
            seconds[f"distill_{name}"] = round(time.perf_counter() - start, 2)
    counted(Event("compare", "start", text="all three on held-out rows; the first is loaded without this package"))
    start = time.perf_counter()
    measured = run["evaluation"]  # as in the run's card: one measurement of each model
    hybrids = {"selected": {"kl": measured["kl"], "sem": measured["kl_sem"], "recall": measured["recall"]}}
    for done, name in enumerate(("uniform", "all_linear")):
        counted(Event("compare", "step", done, 3, name.replace("_", " ")))
        model = load_model(folder / name)
        kl = held_out_kl(model, teacher, cut_for(recipe, "distill", rows["report"], rows.packing.prefix), 8)
        recall = recall_of(model, recall_task(model.config, embedded_tokenizer(), seed=seed), 8, AS_LOADED)
        hybrids[name] = {"kl": kl.mean, "sem": kl.sem, "recall": recall}
    counted(Event("compare", "step", 2, 3, "loading in a fresh process"))
    reload = reload_elsewhere(folder / "run" / "model")
    seconds["compare"] = round(time.perf_counter() - start, 2)
    shutil.copyfile(folder / "run" / "scores.png", folder / "scores.png")
    report = {
        "scores": run["scores"],
        "selected": layers["selected"],
        "uniform": layers["uniform"],
        "hybrids": {name: {"layers": layers[name], **figures} for name, figures in hybrids.items()},
        "teacher": {"recall": measured["teacher_recall"]},
        "tokens": run["tokens"],
        "seconds": seconds,
        "reload": reload,
    }
    write_json(folder / "report.json", report)
    result = ", ".join(f"{name.replace('_', ' ')} {h['kl']:.4f} ± {h['sem']:.4f}" for name, h in hybrids.items())
    counted(Event("compare", "done", text=f"{seconds['compare']:.1f} s", result=f"KL of {result}"))
    return report


def _distill(
    recipe: Recipe, name: str, layers: list[int], teacher: Any, rows: Any, folder: Path, listener: Listener
) -> None:
    """Distils the hybrid with softmax in `layers` exactly as the run distilled the chosen one, into `folder/name`."""
    stage = name.replace("_", " ")
    about = f"for comparison: softmax in {layers or 'no layer'}, distilled on the same tokens"
    listener(Event(stage, "start", text=about))
    start = time.perf_counter()
    student = load_model(folder / "run" / "aligned")
    student.set_full_attention_layers(layers, teacher)

    def rename(event: Event) -> None:
        listener(replace(event, stage=stage))

    checkpoints = folder / f"{name}_checkpoints"
    trainer = train(
        recipe,
        "distill",
        student,
        teacher,
        cut_for(recipe, "distill", rows["train"], rows.packing.prefix),
        checkpoints,
        rename,
    )
    with publish(folder / name) as partial:
        student.save_pretrained(partial)
    shutil.rmtree(checkpoints, ignore_errors=True)
    listener(Event(stage, "done", text=f"{time.perf_counter() - start:.1f} s", result=outcome(trainer.state)))


def reload_elsewhere(model_folder: Path) -> dict[str, Any]:
    """
    Loads a finished model in a fresh process in which this package cannot be imported, and generates with it.

    Returns:
        `max_abs_logit_diff` against the model as loaded here, whether greedy generation gave the same tokens, and
        the text.
    """
    import torch

    tokenizer, model = embedded_tokenizer(), load_model(model_folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "result.json")
        arguments = [sys.executable, "-c", _RELOAD, str(model_folder.resolve()), json.dumps(PROMPT), str(result)]
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(arguments, cwd=scratch, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the saved model does not load without this package: {done.stderr.strip()[-400:]}")
        theirs = json.loads(result.read_text())
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0].tolist()
    return {
        "max_abs_logit_diff": (torch.tensor(theirs["logits"]) - logits).abs().max().item(),
        "same_generation": tokens == theirs["tokens"],
        "text": theirs["text"],
    }


def describe_demo(full: bool) -> str:
    """What is about to happen, and how long it takes, for whoever waits for it."""
    run = "data, align, score, select, distill, evaluate, model, report"
    return (
        "A hybrid of a teacher of 0.7 million parameters that ships with the package: about "
        f"{_MINUTES[full]} minutes on two quiet cores.\n"
        f"  {run}: the run, as of any model\n"
        "  uniform, all linear: two more hybrids on the same tokens, whose layers were not chosen\n"
        "  compare: all three against the teacher, and the first in a process without this package\n"
        "Most of the time goes to align, score and the three distillations, a quarter to each of the first two."
    )


# Below the table.
MEANING = """\
KL: how far what the model expects next is from what the teacher does, on held-out text, with its standard error. 0 is
    the teacher itself; at a few tenths the hybrid mostly expects what the teacher does, at 1 and above it does not.
recall: how often it finds again, among many, the token that followed a token earlier in the row. The teacher's own is
    the best to hope for; guessing is next to nothing. It is what linear attention loses first."""


def comparison_table(report: dict[str, Any]) -> Any:
    """The report's hybrids as a `rich` table, the teacher first."""
    from rich.table import Table

    table = Table(title="hybrids of the embedded teacher, one budget")
    for column in ("model", "softmax layers", "KL (nats/token)", "recall"):
        table.add_column(column, justify="right")
    teacher_recall = report["teacher"]["recall"]
    table.add_row("teacher", "all", "0", f"{teacher_recall:.3f}")
    for name, hybrid in report["hybrids"].items():
        kl = f"{hybrid['kl']:.4f} ± {hybrid['sem']:.4f}"
        table.add_row(name.replace("_", " "), str(hybrid["layers"]), kl, f"{hybrid['recall']:.3f}")
    return table

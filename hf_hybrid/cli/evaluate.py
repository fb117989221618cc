"""The command `evaluate`: its options, the measurement, and its table."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .text import GGUF_HELP, SEEDS, TEXT_FIELDS, add_text_options, check_numbers, named_files, text_of


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model is measured, beside which teacher, and on what."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or Hub id, GGUF file, or 'embedded'")
    parser.add_argument("--revision", help="branch, tag or commit of a MODEL on the Hub (default: its main branch)")
    parser.add_argument("--gguf-file", metavar="NAME", help=GGUF_HELP.format("MODEL"))
    parser.add_argument("--teacher", help="Hub id or folder, GGUF file, or 'embedded'; for KL and a comparison")
    parser.add_argument("--teacher-revision", help="branch, tag or commit of a teacher on the Hub (default: likewise)")
    parser.add_argument("--teacher-gguf-file", metavar="NAME", help=GGUF_HELP.format("the teacher"))
    add_text_options(parser)
    parser.add_argument(
        "--batch-size", type=int, help="rows at once (default: 8 of a text, in tasks as many as have 32,768 tokens)"
    )
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help="ruler, generation, single tasks, or lm-eval's own: a,b,c; list shows them",
    )
    parser.add_argument("--lengths", default="512,1024,2048", help="tokens of a case of a task (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=50, help="cases of each task and length (default: %(default)s)")
    parser.add_argument(
        "--form",
        choices=("likelihood", "generation", "both"),
        default="likelihood",
        help="whether greedy decoding would give the answers, what a model writes, or both (default: %(default)s)",
    )
    parser.add_argument("--haystack-files", nargs="+", help="prose between the needles of tasks (default: our own)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the tasks (default: %(default)s)")
    parser.add_argument(
        "--output", metavar="FILE", help="also write the measurements there, as JSON; after a kill, tasks go on"
    )


def check_evaluate_options(options: argparse.Namespace) -> None:
    """
    Raises a `ValueError` where the options do not hold together, or a path that they name cannot be what it is given
    for, before anything is imported that takes time.
    """
    from ..places import find_files
    from ..teacher.names import check_found

    text = text_of(options)
    if text and not (options.dataset or options.data_files):
        option = next(name for name in TEXT_FIELDS if getattr(options, name) is not None).replace("_", "-")
        raise ValueError(f"--{option} was given without a text to measure on; add --data-files or --dataset.")
    for name in ("teacher_revision", "teacher_gguf_file"):
        if getattr(options, name) is not None and options.teacher is None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(options, name)!r} needs --teacher, the model it is one of.")
    check_numbers(options, batch_size=(1, math.inf), cases=(1, math.inf), seed=SEEDS)
    lengths_of(options.lengths)
    if options.model is None:
        raise ValueError("evaluate needs a MODEL: its folder, Hub id or GGUF file, or 'embedded'.")
    if options.tasks is not None and not _names(options):
        raise ValueError(f"--tasks {options.tasks!r} names no task; see --tasks list.")
    for name, gguf_file in ((options.model, options.gguf_file), (options.teacher, options.teacher_gguf_file)):
        if name is not None:
            check_found(name, gguf_file)
    for some in named_files(options.data_files or [], "--data-files").values():
        find_files(some)
    if options.haystack_files:
        find_files(options.haystack_files)
    if options.output is not None and not Path(options.output).resolve().parent.is_dir():
        raise ValueError(f"--output {options.output}: there is no folder {Path(options.output).parent}; make it.")


def _names(options: argparse.Namespace) -> list[str]:
    """The tasks that `--tasks` names."""
    return [name for name in (part.strip() for part in (options.tasks or "").split(",")) if name]


def evaluation_of(options: argparse.Namespace, listener: Callable[[Any], None]) -> Any:
    """The [`Evaluation`] that the options ask for; `listener` gets an [`Event`] of how far it is."""
    text, lengths, names = text_of(options), lengths_of(options.lengths), _names(options)
    files = named_files(options.data_files or [], "--data-files")
    import torch

    from ..data.config import DataConfig
    from ..data.rows import first_rows
    from ..environment import describe_kernels
    from ..evaluation import evaluate_model
    from ..run.stages import Event
    from ..tasks import OFFLINE, RULER_TASKS
    from ..teacher.loading import load_model, load_pair, load_tokenizer

    answers = None
    if names:
        from ..tasks import free_generation, ruler_cases, run_tasks  # before a model is loaded: lm-eval may be missing
        from ..tasks.answers import Answers
        from ..tasks.harness import check_names

        if options.output is not None:
            answers = Answers(answers_of(options.output))
            if answers.known:
                there = f"{len(answers.known):,} answers of an earlier call are in {answers.path}"
                listener(Event("evaluate", "note", text=there))
    remote = options.trust_remote_code
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    named: dict[str, Any] = {"revision": options.revision, "gguf_file": options.gguf_file}
    listener(Event("evaluate", "start", text=f"loading {options.model}"))
    if options.model == "embedded":
        model, tokenizer = load_pair(options.model, **named)
    else:
        model = load_model(options.model, trust_remote_code=remote, **named)
        tokenizer = load_tokenizer(options.model, trust_remote_code=remote, **named)
    if any(name in ("ruler", *RULER_TASKS, *OFFLINE) for name in names):
        check_positions(model, max(lengths), "--lengths")
    model = model.to(device)
    if model.config.model_type == "hf_hybrid":
        listener(
            Event("evaluate", "note", text=describe_kernels(device, model.config.kernel, model.config.layer_mixers))
        )
    teacher = None
    if options.teacher is not None:
        listener(Event("evaluate", "note", text=f"loading {options.teacher}"))
        named = {"revision": options.teacher_revision, "gguf_file": options.teacher_gguf_file}
        teacher = load_pair(options.teacher, trust_remote_code=remote, **named)[0].to(device)
    rows = {}
    for name, some in files.items() if files else {"": None}.items() if text else ():
        config = DataConfig(**(text if some is None else {**text, "text_files": some}))
        check_positions(model, config.block_size)
        rows[name] = first_rows(config, tokenizer, config.held_out_rows)
        if len(rows[name]) < config.held_out_rows:
            there = f"{name or 'the text'} has {len(rows[name])} rows of {config.block_size} tokens"
            listener(Event("evaluate", "note", text=f"{there}, of {config.held_out_rows} that were asked for"))

    def told(done: int, total: int, text: str) -> None:
        listener(Event("evaluate", "step", done, total, text))

    def of(text: str) -> dict[str, Any]:
        progress = {"progress": lambda done, total: told(done, total, text)}
        return {"batch_size": options.batch_size, "answers": answers} | progress

    result = evaluate_model(model, teacher, tokenizer, rows or None, batch_size=options.batch_size or 8, progress=told)
    if names:
        forms = ("likelihood", "generation") if options.form == "both" else (options.form,)
        asked: dict[str, Any] = {"lengths": lengths, "cases": options.cases, "seed": options.seed, "forms": forms}
        if "generation" in names:
            names = [name for name in names if name != "generation"]
            result.generation = free_generation(model, tokenizer, teacher, **of("free generation"))
        ours, _ = check_names(names)
        if ours:  # drawn once, for the model and its teacher
            drawn = {key: asked[key] for key in ("lengths", "cases", "seed")}
            drawn["texts"] = haystack_of(options.haystack_files)
            asked["drawn"] = ruler_cases(tokenizer, tasks=ours, **drawn)
        result.tasks = run_tasks(model, tokenizer, names, **asked, **of("tasks"))
        if teacher is not None:
            result.teacher_tasks = run_tasks(teacher, tokenizer, names, **asked, **of("the teacher's tasks"))
    return result


def answers_of(output: str) -> Path:
    """The file beside `--output` that holds what was answered until all is."""
    return Path(f"{output}.answers")


def lengths_of(text: str) -> list[int]:
    """The lengths that `--lengths` names, such as `512,1024`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"--lengths {text!r} is no list of lengths in tokens; write 512,1024.")
    return list(dict.fromkeys(map(int, parts)))


def haystack_of(files: list[str] | None) -> list[str] | None:
    """The documents of these files, as far as two million characters go."""
    if files is None:
        return None
    from ..data.config import DataConfig
    from ..data.text import open_text

    texts, size = [], 0
    for text, _ in open_text(DataConfig(text_files=files), 0):
        texts.append(text)
        size += len(text)
        if size > 2_000_000:
            break
    return texts


def list_tasks(as_json: bool) -> None:
    """Prints the tasks that need no network, one a line, or as JSON."""
    from ..tasks import OFFLINE, RULER_TASKS

    if as_json:
        print(
            json.dumps({"ruler": {t.name: t.about for t in RULER_TASKS.values()}, "lm-eval": list(OFFLINE)}, indent=1)
        )
        return
    print("ruler: all of these, after RULER (arXiv 2404.06654), an offline subset in our own words:")
    for task in RULER_TASKS.values():
        print(f"  {task.name:18} {task.about}" + (f" (after {task.after})" if task.after else ""))
    print("generation: what the model writes, beside the teacher's text: agreement, repetition, samples")
    print("lm-eval's own that need no data set of the Hub, in text that the model generates:")
    print(f"  {', '.join(OFFLINE)}")
    print("Any other task of lm-eval by its name; most fetch their data from the Hub.")


def check_positions(model: Any, length: int, option: str = "--block-size") -> None:
    """Raises a `ValueError` where rows of a length that `option` gave are longer than the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"{option} {length} is more than the {positions} positions of the model; pass less.")


def print_evaluation(evaluation: dict[str, Any]) -> None:
    """Prints an evaluation as a table, the teacher's figures beside the model's."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("measured", "model", "teacher"):
        table.add_column(column, justify="left" if column == "measured" else "right")
    several = evaluation.get("texts") or []
    for text in [*several, {**evaluation, "name": "all" if several else ""}]:
        of = f" of {text['name']}" if text["name"] else ""
        if text["kl"] is not None:
            table.add_row(f"held-out KL{of} (nats per token)", f"{text['kl']:.4f} ± {text['kl_sem']:.4f}", "0")
        if text["perplexity"] is not None:
            shown = [_with_error(text, f"{who}perplexity") for who in ("", "teacher_")]
            table.add_row(f"perplexity{of}, {text['tokens']:,} tokens", *shown)
    for name, key, form in (
        (f"recall, {evaluation['recall_length']} tokens", "recall", ".3f"),
        (f"cache bytes, {evaluation['cache_context']:,} tokens", "cache_bytes", ","),
    ):
        ours, theirs = evaluation[key], evaluation[f"teacher_{key}"]
        if ours is not None:
            table.add_row(name, format(ours, form), "" if theirs is None else format(theirs, form))
    console = Console()
    console.print(table)
    if evaluation.get("tasks"):
        console.print(task_table(evaluation["tasks"], evaluation["teacher_tasks"]))
    if evaluation.get("generation"):
        console.print(generation_table(evaluation["generation"]))


def generation_table(measured: dict[str, Any]) -> Any:
    """A table of how free generation compares with the teacher's."""
    from rich.table import Table

    table = Table(
        title=f"greedy text behind {measured['prompts']} prompts, at most {measured['new_tokens']} tokens each"
    )
    for column in ("measured", "model", "teacher"):
        table.add_column(column, justify="left" if column == "measured" else "right")
    for name, key in (
        ("tokens that are the teacher's", "agreement"),
        ("tokens until the first that is not", "common_prefix"),
        ("runs of four tokens seen before", "repetition"),
        ("texts that end in a loop", "looping"),
    ):
        figures = [measured.get(key), measured.get(f"teacher_{key}")]
        if figures[0] is not None:
            table.add_row(name, *("" if f is None else f"{f['mean']:.3f} ± {f['sem']:.3f}" for f in figures))
    return table


def _with_error(measured: dict[str, Any], key: str) -> str:
    if measured[key] is None:
        return ""
    sem = measured.get(f"{key}_sem")
    return f"{measured[key]:.3f}" + ("" if sem is None else f" ± {sem:.3f}")


def task_table(scores: list[dict[str, Any]], teacher: list[dict[str, Any]]) -> Any:
    """A table of what was scored in tasks, a column for each length, a line for the model and one for the teacher."""
    from rich.table import Table

    lengths = list(dict.fromkeys(score["length"] for score in scores))
    table = Table(title="share of right answers ± one standard error, by tokens of a case")
    table.add_column("task")
    table.add_column("form")
    table.add_column("")
    for length in lengths:
        table.add_column("" if length is None else f"{length:,}", justify="right")
    for task, form in dict.fromkeys((score["task"], score["form"]) for score in scores):
        for who, measured in (("model", scores), ("teacher", teacher)):
            found = {s["length"]: s for s in measured if (s["task"], s["form"]) == (task, form)}
            cells = [_with_error({"mean": s["mean"], "mean_sem": s["sem"]}, "mean") for s in found.values()]
            if found:
                by_length = dict(zip(found, cells, strict=True))
                first = (task, form) if who == "model" else ("", "")
                table.add_row(*first, who, *(by_length.get(length, "") for length in lengths))
    return table

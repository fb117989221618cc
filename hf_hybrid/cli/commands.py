"""The command line. What takes seconds to import is imported inside the commands, so that --help is instant."""

import argparse
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__
from ..exporting.native import LAYOUTS, options_for
from .evaluate import (
    add_evaluate_options,
    answers_of,
    check_evaluate_options,
    evaluation_of,
    list_tasks,
    print_evaluation,
)
from .export import add_export_options, check_export_options, export_as_told
from .generate import add_chat_options, add_generate_options, check_options, prompts_of
from .score import add_score_options, check_score_options
from .text import GGUF_HELP, MIXER_OPTIONS_HELP, SEEDS, add_text_options, check_numbers, parse_mixer_options, text_of


# Seconds that the main process has to fail, too, and to say why.
_HEAD_START = 10.0

_EXAMPLES = """\
examples:
  hf-hybrid demo --output demo_output
  hf-hybrid init Qwen/Qwen3-0.6B --data-files 'texts/*.txt' --output my_recipe.yaml
  hf-hybrid run demo --output my_run
  hf-hybrid run my_recipe.yaml --output my_run        (again after a kill: it goes on)
  hf-hybrid score embedded --method verified --k 2 --output scores
  hf-hybrid score --recipe my_recipe.yaml --output my_run
  hf-hybrid convert Qwen/Qwen3-0.6B --full-attention-layers 3,10,17,24 --output hybrid
  hf-hybrid convert SmolLM2-135M-Instruct.Q4_1.gguf --full-attention-layers 3,10,17,24 --output hybrid
  hf-hybrid push my_run me/my-hybrid --private
  hf-hybrid export my_run --to gguf --output my_gguf     (--list says what it fits)
  hf-hybrid evaluate my_run/model --teacher Qwen/Qwen3-0.6B --data-files 'texts/*.txt'
  hf-hybrid evaluate my_run/model --tasks ruler --lengths 1024,4096 --cases 50
  hf-hybrid generate my_run/model 'Once upon a time' --teacher Qwen/Qwen3-0.6B
  hf-hybrid chat my_run/model --teacher Qwen/Qwen3-0.6B
  hf-hybrid doctor
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 for a user's error (one sentence on stderr), 130 for ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.command(options)
    except KeyboardInterrupt:
        print("hf-hybrid: interrupted; the same command goes on with a run.", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if options.debug or not (message := _sentence(error)):
            raise
        _let_the_main_process_speak_first()
        print(f"hf-hybrid: {message}", file=sys.stderr)
        return 2
    finally:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from hf_hybrid.trainers.processes import leave_group

            leave_group()
    return 0


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Prints a note of ours in one line, without the line of code that a warning of a library is shown with."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parents[1]):
        if _is_main_process():
            print(f"hf-hybrid: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


def _sentence(error: Exception) -> str | None:
    """What a user can do something about, in one line; None for what is a defect of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror[0].lower()}{error.strerror[1:]}; choose another place, or free this one."
    if isinstance(error, RuntimeError):
        if "PytorchStreamWriter" in text or "No space left" in text:
            return f"writing a checkpoint failed ({text}); free some space and run the same command again."
        return text if text.startswith("the main process failed") else None
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-hybrid",
        description="Turn a softmax-attention language model into a hybrid of softmax and linear attention.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-hybrid {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        sub.set_defaults(command=command)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    demo = add("demo", _demo, "make a hybrid of the built-in teacher, start to end, in minutes on a CPU")
    demo.add_argument("--output", default="demo_output", help="folder to write to (default: %(default)s)")
    demo.add_argument("--full", action="store_true", help="with two to four times the tokens")
    demo.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    init = add("init", _init, "write a commented recipe that fits a teacher and this machine, to start from")
    init.add_argument("teacher", metavar="TEACHER", help="Hub id or folder, GGUF file, or 'embedded'")
    init.add_argument("--output", default="recipe.yaml", help="file to write (default: %(default)s)")
    init.add_argument("--force", action="store_true", help="overwrite that file")
    init.add_argument("--mixer", default="gated_deltanet", help="in the place of softmax (default: %(default)s)")
    init.add_argument("--k", type=int, help="layers to keep (default: a quarter)")
    init.add_argument("--fraction", type=float, help="share of the layers to keep, instead of --k")
    init.add_argument("--tokens", type=int, help="tokens of the distillation; the other stages follow in proportion")
    init.add_argument("--revision", help="branch, tag or commit of a teacher on the Hub (default: its main branch)")
    init.add_argument("--gguf-file", metavar="NAME", help=GGUF_HELP.format("TEACHER"))
    add_text_options(init)
    run = add("run", _run, "run a recipe, or go on with it where it was stopped")
    run.add_argument("recipe", metavar="RECIPE", help="path of a YAML file, or the name of a shipped recipe")
    run.add_argument("--stop-after", metavar="STAGE", help="data, align, score, select, distill, finetune, ...")
    run.add_argument("--from", dest="start_from", metavar="STAGE", help="make STAGE and what follows again")
    run.add_argument("--plan", action="store_true", help="only say what would be made, in what time, memory and disk")
    score = add("score", _score, "score a model's layers, or run a recipe up to its scores; table, JSON and chart")
    score.add_argument(
        "teacher", metavar="TEACHER", nargs="?", help="Hub id or folder, GGUF file, or 'embedded'; or give --recipe"
    )
    score.add_argument("--recipe", help="path of a YAML file, or the name of a shipped recipe")
    add_score_options(score)
    score.add_argument("--layers", help="with --recipe: only these, such as 0-6, beside other jobs in the same run")
    for sub in (run, score):
        sub.add_argument("--output", required=True, help="folder of the run")
    convert = add("convert", _convert, "make a hybrid with the teacher's weights, without any training")
    convert.add_argument("teacher", metavar="TEACHER", help="Hub id or folder, GGUF file, or 'embedded'")
    convert.add_argument("--gguf-file", metavar="NAME", help=GGUF_HELP.format("TEACHER"))
    convert.add_argument("--revision", help="branch, tag or commit of a teacher on the Hub (default: its main branch)")
    convert.add_argument(
        "--full-attention-layers", required=True, help="layers that keep softmax: 1,3 or 0-2,9 or none"
    )
    convert.add_argument("--output", required=True, help="new folder for the model")
    convert.add_argument("--mixer", default="gated_deltanet", help="linear-attention mixer (default: %(default)s)")
    convert.add_argument("--mixer-options", metavar="YAML", help=MIXER_OPTIONS_HELP)
    convert.add_argument("--export-to", choices=tuple(LAYOUTS), help="use mixer options that fit this layout")
    convert.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: %(default)s)")
    evaluate = add("evaluate", _evaluate, "measure held-out KL, perplexity, recall, cache size and tasks of a model")
    add_evaluate_options(evaluate)
    generate = add("generate", _generate, "go on with a text, the teacher beside the model, and say how fast")
    add_generate_options(generate)
    chat = add("chat", _chat, "talk to a model, and to its teacher beside it")
    add_chat_options(chat)
    export = add("export", _export, "write a hybrid as a model that transformers and servers have themselves")
    add_export_options(export)
    push = add("push", _push, "upload the model of a run, its code, tokenizer and card to the Hub, in one commit")
    push.add_argument("folder", metavar="FOLDER", help="a finished run, or a folder with a model and its tokenizer")
    push.add_argument("repo_id", metavar="REPO_ID", help="name on the Hub, owner/name; made if need be")
    push.add_argument("--private", action="store_true", help="make the repository a private one")
    push.add_argument("--revision", help="branch to push to, made if need be (default: the main one)")
    push.add_argument("--commit-message", help="message of the commit")
    push.add_argument("--base-model", metavar="ID", help="the teacher's name on the Hub, if it came from a folder")
    push.add_argument("--dry-run", action="store_true", help="list the files and their sizes, and send nothing")
    doctor = add("doctor", _doctor, "say what is slow, missing or wrong on this machine, and what to install or set")
    env = add("env", _env, "show versions, devices, and which kernels would run on them and why")
    for sub in (init, run, score, convert, evaluate, generate, chat):
        sub.add_argument("--trust-remote-code", action="store_true", help="let the teacher run code of its own")
    for sub in (demo, run, score, evaluate, generate, export, push, doctor, env):
        sub.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else there")
    return parser


def _is_main_process() -> bool:
    """Whether this process talks to the user, also before torch is there to be asked."""
    return os.environ.get("RANK", "0") == "0"


def _let_the_main_process_speak_first() -> None:
    """
    Waits a little in the other processes before they tell of an error, which mostly is the main one's, too.

    A launcher ends all processes when the first has failed. Without the wait that may be one that said nothing.
    """
    if not _is_main_process():
        time.sleep(_HEAD_START)


def _quiet() -> None:
    """No warnings of libraries about what is meant to be so, and one GPU for each process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "WORLD_SIZE" not in os.environ:  # without a launcher, the Trainer would take all GPUs for one process
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    # The library would ask a service to convert the pickles of a teacher, which are refused here.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # peft imports bitsandbytes where it is installed, which misses a kernel of its own for CPUs; nothing here uses it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1))


def _demo(options: argparse.Namespace) -> None:
    check_numbers(options, seed=SEEDS)
    from ..places import check_place

    check_place(options.output)
    _quiet()
    from rich.console import Console

    from ..demo import MEANING, comparison_table, describe_demo, run_demo
    from ..run.progress import StageBars

    print(describe_demo(options.full), file=sys.stderr)
    with StageBars() as bars:
        report = run_demo(options.output, options.seed, progress=bars.show, full=options.full)
    if options.json:
        _print_json(report)
        return
    Console().print(comparison_table(report))
    print(MEANING)
    print(f"Reloaded without hf_hybrid, the logits differ by {report['reload']['max_abs_logit_diff']:.1e}. It writes:")
    print(report["reload"]["text"])
    print(f"Saved in {options.output}: run/model, report.json, scores.png.")
    print("Next, a model of your own, by its name on the Hub or its folder, and text to train on:")
    print("  hf-hybrid init YOUR_MODEL --data-files 'texts/*.txt' --output recipe.yaml")
    print("  hf-hybrid run recipe.yaml --output my_run --plan")


def _init(options: argparse.Namespace) -> None:
    output = Path(options.output)
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"--output {output} is no place for a file; give the path of a recipe to write.")
    if output.exists() and not options.force:
        raise ValueError(f"{output} exists; choose another --output, or pass --force to overwrite it.")
    check_numbers(options, k=(0, math.inf), fraction=(0, 1), tokens=(1, math.inf))
    from ..teacher.names import check_found

    if options.teacher != "embedded":
        check_found(options.teacher, options.gguf_file)
    text = text_of(options)
    if options.data_files:
        from ..places import find_files

        find_files(options.data_files)
    _quiet()
    from hf_hybrid.trainers.durable import write_text

    from ..run.starter import starter_recipe

    recipe = starter_recipe(
        options.teacher,
        text,
        k=options.k,
        fraction=options.fraction,
        tokens=options.tokens,
        revision=options.revision,
        gguf_file=options.gguf_file,
        trust_remote_code=options.trust_remote_code,
        mixer=options.mixer,
    )
    write_text(output, recipe)
    print(f"Wrote {output}. Read it, change what its first lines name, and see what it takes:")
    print(f"  hf-hybrid run {output} --output my_run --plan")


def _run(options: argparse.Namespace) -> None:
    from ..places import check_recipe, find_recipe

    path = find_recipe(options.recipe)
    check_recipe(path, options.output)
    _quiet()
    from ..run.recipe import Recipe

    recipe = Recipe.load(path)
    if options.plan:
        _plan(recipe, options)
        return
    result = _run_recipe(recipe, options, options.stop_after, options.start_from)
    if not _is_main_process():
        return
    if options.json:
        _print_json(result.report or {"selected": result.selected, "stages": result.stages})
        return
    if result.already_finished:
        print(f"{options.output} is finished; nothing was done. The model is in {result.folder / 'model'}.")
    if result.report is None:
        given = "--stop-after and --from" if options.start_from else "--stop-after"
        print(f"Stopped after {options.stop_after}. Run the same command without {given} to go on.")
        return
    print(f"Softmax attention is kept in layers {result.selected} of {result.report['num_layers']}.")
    print_evaluation(result.report["evaluation"])
    if not result.already_finished:
        print(f"The model is in {result.folder / 'model'}, the numbers are in {result.folder / 'report.json'}.")


def _plan(recipe: Any, options: argparse.Namespace) -> None:
    if options.stop_after or options.start_from:
        raise ValueError(
            "--plan is about all that is left to do in a run; leave out --stop-after and --from. What it costs to "
            "make stages again, a new --output tells."
        )
    from rich.console import Console

    from ..run.plan import plan_recipe

    recipe.trust_remote_code |= options.trust_remote_code
    plan = plan_recipe(recipe, options.output)
    if options.json:
        _print_json(plan.to_dict())
        return
    Console().print(plan.table())
    for note in plan.notes:
        print(f"{note[0].upper()}{note[1:]}.")


def _score(options: argparse.Namespace) -> None:
    check_score_options(options)
    _quiet()
    from .score import draw_scores, recipe_of

    recipe = recipe_of(options)
    if options.layers is not None:
        _score_part(recipe, options)
        return
    if recipe.score is None:
        raise ValueError(f"recipe {options.recipe} has no score stage; add one.")
    result = _run_recipe(recipe, options, "score", options.start_from)
    if not _is_main_process():
        return
    layers, saved = draw_scores(result, recipe)
    if options.json:
        _print_json({**result.scores.to_dict(), "selected": layers})
        return
    print(result.scores)
    print(f"Softmax attention would be kept in layers {layers}.")
    print(f"Saved: {', '.join(map(str, saved))}.")


def _score_part(recipe: Any, options: argparse.Namespace) -> None:
    if not options.recipe:
        raise ValueError("--layers needs --recipe: the jobs share a run, whose alignment is made before.")
    layers = parse_layers(options.layers, "--layers")
    from ..run.progress import StageBars
    from ..run.runner import score_part

    recipe.trust_remote_code |= options.trust_remote_code
    with StageBars() as bars:
        scores = score_part(recipe, options.output, layers, progress=bars.show)
    if not _is_main_process():
        return
    if options.json:
        _print_json(scores.to_dict())
        return
    print(scores)
    print(f"Kept in {Path(options.output) / 'scores'}; hf-hybrid run and score take them from there.")


def _run_recipe(
    recipe: Any, options: argparse.Namespace, stop_after: str | None, start_from: str | None = None
) -> Any:
    from ..run.progress import StageBars
    from ..run.runner import run_recipe

    recipe.trust_remote_code |= options.trust_remote_code
    with StageBars() as bars:
        return run_recipe(recipe, options.output, stop_after=stop_after, start_from=start_from, progress=bars.show)


def _convert(options: argparse.Namespace) -> None:
    folder = Path(options.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder} exists and is not an empty folder; choose a new one.")
    given = options.full_attention_layers
    layers = [] if given.strip().lower() in ("", "none") else parse_layers(given, "--full-attention-layers")
    from ..places import check_place
    from ..teacher.names import check_found

    check_found(options.teacher, options.gguf_file)
    check_place(folder, options.teacher)
    _quiet()
    from ..card import save_model
    from ..conversion import convert
    from ..exporting.export import check_fits
    from ..run.folder import publish
    from ..teacher.loading import load_pair

    print(f"Loading {options.teacher}.", file=sys.stderr)
    teacher, tokenizer = load_pair(
        options.teacher,
        trust_remote_code=options.trust_remote_code,
        dtype=options.dtype,
        revision=options.revision,
        gguf_file=options.gguf_file,
    )
    mixer_options = parse_mixer_options(options.mixer_options)
    if options.export_to is not None:
        mixer_options = options_for(options.export_to, options.mixer, mixer_options, "--export-to")
    student = convert(teacher, layers, mixer=options.mixer, mixer_options=mixer_options)
    if options.export_to is not None:
        check_fits(student.config, options.export_to)
    student.config.teacher_name_or_path = options.teacher
    print(f"Saving the hybrid in {folder}.", file=sys.stderr)
    with publish(folder) as partial:
        note = ""
        if student.linear_attention_layers:
            new = ": the new tensors of its linear layers are random" if student.conversion_report.created else ""
            note = f"Not trained{new}. Align and distil it before use."
        save_model(student, tokenizer, partial, note=note)
    print(student.conversion_report)
    print(f"Saved in {folder}. {note}".rstrip())


def parse_layers(text: str, option: str) -> list[int]:
    """The layers that `text`, the value of `option`, names, such as `0-6` or `0,3,8-11`."""
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip(), re.ASCII)
        first, last = (0, -1) if found is None else (int(found[1]), int(found[2] or found[1]))
        if last < first:
            raise ValueError(f"{option} {text!r} is no list of layers; write indices and ranges such as 0-6,9.")
        layers.extend(range(first, last + 1))
    return layers


def _evaluate(options: argparse.Namespace) -> None:
    if options.tasks == "list":
        list_tasks(options.json)
        return
    check_evaluate_options(options)
    _quiet()
    from ..run.progress import StageBars

    with StageBars() as bars:
        evaluation = evaluation_of(options, bars.show)
    result = evaluation.to_dict()
    if options.output is not None:
        evaluation.save(options.output)
        answers_of(options.output).unlink(missing_ok=True)
    if options.json:
        _print_json(result)
    else:
        print_evaluation(result)


def _generate(options: argparse.Namespace) -> None:
    check_options(options)
    prompts = prompts_of(options)
    _quiet()
    from .generate import generate, print_generated

    results = generate(options, prompts)
    if options.json:
        _print_json({"model": options.model, "teacher": options.teacher, "texts": results})
    else:
        print_generated(results)


def _chat(options: argparse.Namespace) -> None:
    check_options(options)
    _quiet()
    from .generate import chat

    chat(options)


def _export(options: argparse.Namespace) -> None:
    check_export_options(options)
    _quiet()
    export_as_told(options)


def _push(options: argparse.Namespace) -> None:
    if not Path(options.folder).is_dir():
        raise ValueError(f"{options.folder} is no folder; give that of a finished run or of a model.")
    _quiet()
    from ..hub import push

    if not options.dry_run:
        print(f"Uploading {options.folder} to {options.repo_id}.", file=sys.stderr)
    result = push(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        commit_message=options.commit_message,
        base_model=options.base_model,
        dry_run=options.dry_run,
    )
    if options.json:
        _print_json(result.to_dict())
        return
    for name, size in result.files.items():
        print(f"{size:>15,}  {name}")
    if result.left_out:
        print(f"Left out, being no part of a model: {', '.join(result.left_out)}.")
    if result.removed:
        print(f"Removed from an earlier push: {', '.join(result.removed)}.")
    total = f"{len(result.files)} files, {sum(result.files.values()):,} bytes"
    if result.url is None:
        print(f"{total}. Nothing was sent.")
    else:
        print(f"Pushed {total} as commit {result.commit}: {result.url}")


def _doctor(options: argparse.Namespace) -> None:
    _quiet()
    from ..environment import diagnose

    found = diagnose()
    if options.json:
        _print_json(found)
        return
    for finding in found["findings"]:
        print(f"{finding['status']:9}{finding['what']}")
        if finding["advice"]:
            print(f"{'':9}-> {finding['advice']}")


def _env(options: argparse.Namespace) -> None:
    from ..environment import describe_environment

    found = describe_environment()
    if options.json:
        _print_json(found)
        return
    print(found["platform"])
    for name, version in found["versions"].items():
        print(f"{name:13} {version or 'not installed'}")
    for device in found["devices"]:
        print(f"{device['device']:13} {device['name']}: kernel {device['kernel']} ({device['why']})")

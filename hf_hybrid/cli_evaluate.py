"""The command `evaluate`: its options, the measurement, and its table."""

import argparse
import math
import sys
from typing import Any

from .cli_text import GGUF_HELP, TEXT_FIELDS, add_text_options, check_numbers, text_of


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model is measured, beside which teacher, and on what."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id, or GGUF file")
    parser.add_argument("--revision", help="branch, tag or commit of a MODEL on the Hub (default: its main branch)")
    parser.add_argument("--gguf-file", metavar="NAME", help=GGUF_HELP.format("MODEL"))
    parser.add_argument("--teacher", help="Hub id or folder, GGUF file, or 'embedded'; for KL and a comparison")
    parser.add_argument("--teacher-revision", help="branch, tag or commit of a teacher on the Hub (default: likewise)")
    parser.add_argument("--teacher-gguf-file", metavar="NAME", help=GGUF_HELP.format("the teacher"))
    add_text_options(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="rows at once (default: %(default)s)")


def evaluation_of(options: argparse.Namespace) -> Any:
    """The [`Evaluation`] that the options ask for."""
    text = text_of(options)
    if text and not (options.dataset or options.data_files):
        option = next(name for name in TEXT_FIELDS if getattr(options, name) is not None).replace("_", "-")
        raise ValueError(f"--{option} was given without a text to measure on; add --data-files or --dataset.")
    for name in ("teacher_revision", "teacher_gguf_file"):
        if getattr(options, name) is not None and options.teacher is None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(options, name)!r} needs --teacher, the model it is one of.")
    check_numbers(options, batch_size=(1, math.inf))
    import torch

    from .data import DataConfig, first_rows
    from .environment import describe_kernels
    from .evaluation import evaluate_model
    from .loading import load_model, load_pair, load_tokenizer

    remote = options.trust_remote_code
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    named: dict[str, Any] = {"revision": options.revision, "gguf_file": options.gguf_file}
    model = load_model(options.model, trust_remote_code=remote, **named).to(device)
    if model.config.model_type == "hf_hybrid":
        print(describe_kernels(device, model.config.kernel), file=sys.stderr)
    tokenizer = load_tokenizer(options.model, trust_remote_code=remote, **named)
    teacher = None
    if options.teacher is not None:
        named = {"revision": options.teacher_revision, "gguf_file": options.teacher_gguf_file}
        teacher = load_pair(options.teacher, trust_remote_code=remote, **named)[0].to(device)
    rows = None
    if text:
        config = DataConfig(**text)
        check_positions(model, config.block_size)
        rows = first_rows(config, tokenizer, config.held_out_rows)
    return evaluate_model(model, teacher, tokenizer, rows, batch_size=options.batch_size)


def check_positions(model: Any, block_size: int) -> None:
    """Raises a `ValueError` where rows are longer than the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and block_size > positions:
        raise ValueError(f"--block-size {block_size} is more than the {positions} positions of the model; pass less.")


def print_evaluation(evaluation: dict[str, Any]) -> None:
    """Prints an evaluation as a table, the teacher's figures beside the model's."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("measured", "model", "teacher"):
        table.add_column(column, justify="left" if column == "measured" else "right")
    if evaluation["kl"] is not None:
        table.add_row("held-out KL (nats per token)", f"{evaluation['kl']:.4f} ± {evaluation['kl_sem']:.4f}", "0")
    for name, key, form in (
        (f"perplexity, {evaluation['tokens']:,} tokens", "perplexity", ".3f"),
        (f"recall, {evaluation['recall_length']} tokens", "recall", ".3f"),
        (f"cache bytes, {evaluation['cache_context']:,} tokens", "cache_bytes", ","),
    ):
        ours, theirs = evaluation[key], evaluation[f"teacher_{key}"]
        if ours is not None:
            table.add_row(name, format(ours, form), "" if theirs is None else format(theirs, form))
    Console().print(table)

"""The command `export`: its options, and what it prints."""

import argparse
import json

from ..exporting.native import FILE_TYPES, LAYOUTS


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model goes where, and as what."""
    parser.add_argument("model", metavar="MODEL", help="a hybrid's folder or Hub id, or a finished run")
    parser.add_argument(
        "--to", choices=tuple(LAYOUTS), default="qwen3_5", help="layout to write (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="DIR", help="new folder for it")
    parser.add_argument(
        "--list", action="store_true", help="only say which layouts the model fits, and who serves them"
    )
    parser.add_argument("--type", choices=FILE_TYPES, help="of the weights in a GGUF file (default: f16)")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder or Hub id of it (default: that beside the model)")
    parser.add_argument("--revision", help="branch, tag or commit of a MODEL on the Hub (default: its main branch)")


def check_export_options(options: argparse.Namespace) -> None:
    """Raises a `ValueError` where the options do not hold together, before anything is imported that takes time."""
    if options.list == (options.output is not None):
        raise ValueError("give --output DIR to export, or --list to hear what the model fits, and not both.")
    if options.type is not None and options.to != "gguf":
        raise ValueError("--type is that of a GGUF file; add --to gguf, or leave it out.")
    from ..places import check_place
    from ..teacher.names import check_name

    check_name(options.model)
    if options.output is not None:
        check_place(options.output, options.model)


def export_as_told(options: argparse.Namespace) -> None:
    """Exports, or lists, and prints what came of it."""
    from ..exporting.export import export, layouts_of_model
    from ..teacher.loading import load_tokenizer

    if options.list:
        fits = layouts_of_model(options.model, options.revision)
        print(json.dumps([fit.to_dict() for fit in fits], indent=1) if options.json else "\n".join(map(str, fits)))
        return
    report = export(
        options.model,
        to=options.to,
        output=options.output,
        tokenizer=None if options.tokenizer is None else load_tokenizer(options.tokenizer),
        file_type=options.type or "f16",
        revision=options.revision,
    )
    print(json.dumps(report.to_dict(), indent=1) if options.json else report)

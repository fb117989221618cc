"""The options that name a text, of the commands that measure on one, and words that several commands share."""

import argparse
import glob
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


GGUF_HELP = "the GGUF file of {}, in a folder that holds several or on the Hub"
MIXER_OPTIONS_HELP = "its options, such as '{window: 128, sinks: 4}'"


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which text a model is measured on; what is left out is as in [`DataConfig`]."""
    parser.add_argument("--data-files", nargs="+", help="text files or patterns; a .jsonl file has a text column")
    parser.add_argument("--dataset", help="dataset id, instead of --data-files")
    parser.add_argument("--subset", help="subset of the dataset")
    parser.add_argument("--split", help="split of the dataset (default: train)")
    parser.add_argument("--dataset-revision", help="branch, tag or commit of the dataset (default: its main branch)")
    parser.add_argument("--text-column", help="column with the text (default: text)")
    parser.add_argument("--block-size", type=int, help="tokens of a row (default: 512; to score embedded, 256)")
    parser.add_argument("--rows", type=int, help="rows to measure on (default: 64)")


def named_files(given: Sequence[str], option: str) -> dict[str, list[str]]:
    """
    Files by the names of their texts, of `prose=a.txt b.txt code='src/*.py'`: a name holds until the next one. A path
    that has a = in it is one where there is such a file. Without names, all files are one text, named "".
    """
    found: dict[str, list[str]] = {}
    name = ""
    for entry in given:
        named = re.fullmatch(r"([A-Za-z][\w-]*)=(.+)", entry)
        if named is not None and not glob.glob(str(Path(entry).expanduser())):
            name, entry = named[1], named[2]
            if name in found:
                raise ValueError(f"{option}: the text {name} is named twice; put its files behind one name.")
        found.setdefault(name, []).append(entry)
    if "" in found and len(found) > 1:
        raise ValueError(f"{option}: {found[''][0]} comes before the first name; give every text a name, or none.")
    return found


def check_numbers(options: argparse.Namespace, **bounds: tuple[float, float]) -> None:
    """Raises a `ValueError` that names the option where a number lies outside its bounds, ends included."""
    for name, (low, high) in bounds.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            wrong = "too small; pass at least" if value < low else "out of range; pass a number of at least"
            most = "" if high == math.inf else f" and at most {high}"
            raise ValueError(f"--{name.replace('_', '-')} {value} is {wrong} {low}{most}.")


SEEDS = (0, 2**32 - 1)
TEXT_FIELDS = {
    "data_files": "text_files",
    "dataset": "dataset",
    "subset": "subset",
    "split": "split",
    "dataset_revision": "revision",
    "text_column": "text_column",
    "block_size": "block_size",
    "rows": "held_out_rows",
}


def text_of(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a [`DataConfig`] that the options give."""
    check_numbers(options, block_size=(2, math.inf), rows=(1, math.inf))
    if options.dataset and options.data_files:
        raise ValueError("--dataset and --data-files were both given; give one.")
    for name in ("subset", "split", "dataset_revision"):
        if getattr(options, name) is not None and not options.dataset:
            raise ValueError(f"--{name.replace('_', '-')} needs --dataset, of which it names a part.")
    return {field: getattr(options, name) for name, field in TEXT_FIELDS.items() if getattr(options, name) is not None}


def parse_mixer_options(text: str | None) -> dict[str, Any]:
    """The options in the value of --mixer-options, which is YAML as in a recipe."""
    import yaml

    try:
        found = {} if text is None else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--mixer-options {text!r} is no YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"--mixer-options {text!r} is no mapping; write it as in a recipe: '{{window: 128}}'.")
    return found

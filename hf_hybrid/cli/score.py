"""The command `score`: its options, the recipe they make, and its charts."""

import argparse
import math
from pathlib import Path
from typing import Any

from .text import (
    GGUF_HELP,
    MIXER_OPTIONS_HELP,
    SEEDS,
    TEXT_FIELDS,
    add_text_options,
    check_numbers,
    parse_mixer_options,
    text_of,
)


def add_score_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says how a model given by name is scored; a recipe says it itself."""
    parser.add_argument("--revision", help="branch, tag or commit of a teacher on the Hub (default: its main branch)")
    parser.add_argument("--gguf-file", metavar="NAME", help=GGUF_HELP.format("TEACHER"))
    parser.add_argument("--mixer", help="what the other layers will have (default: gated_deltanet)")
    parser.add_argument("--mixer-options", metavar="YAML", help=MIXER_OPTIONS_HELP)
    parser.add_argument("--method", help="how: ga-s2 (default), verified, zero-shot, ...: docs/scoring.md lists them")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method")
    parser.add_argument("--k", type=int, help="layers to keep (default: a quarter)")
    parser.add_argument("--fraction", type=float, help="share of the layers to keep, instead of --k")
    parser.add_argument("--cache-bytes", type=int, help="as many as keep a sequence's cache in this, instead of --k")
    parser.add_argument("--context", type=int, help="with --cache-bytes: tokens of that sequence")
    parser.add_argument("--tokens-per-layer", type=int, help="tokens of a training run of the method")
    parser.add_argument("--align-tokens", type=int, help="tokens of the alignment, where the method needs one")
    add_text_options(parser)
    parser.add_argument("--seed", type=int, help="seed of everything random (default: 0)")
    again = "make STAGE (data, align, score) and what follows again, such as scores by another method"
    parser.add_argument("--from", dest="start_from", metavar="STAGE", help=again)


_SELECT = ("k", "fraction", "cache_bytes", "context")
_OTHERS = (
    "revision",
    "gguf_file",
    "mixer",
    "mixer_options",
    "method",
    *_SELECT,
    "tokens_per_layer",
    "align_tokens",
    "seed",
)


def check_score_options(options: argparse.Namespace) -> None:
    """
    Raises a `ValueError` where the options do not hold together, or a path that they name cannot be what it is given
    for, before anything is imported that takes time.
    """
    from ..places import check_place, check_recipe, find_files, find_recipe
    from ..teacher.names import check_found

    given = [name for name in (*_OTHERS, *TEXT_FIELDS) if getattr(options, name) is not None]
    given += ["option"] if options.option else []
    if (options.teacher is None) == (options.recipe is None):
        raise ValueError("score needs a TEACHER or a --recipe, one of the two.")
    if options.start_from is not None and options.layers is not None:
        raise ValueError("--from makes a stage again for all layers; leave out --layers.")
    if options.recipe is not None:
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is set in the recipe; change it there.")
        check_recipe(find_recipe(options.recipe), options.output)
        return
    check_numbers(options, k=(0, math.inf), fraction=(0, 1), seed=SEEDS)
    text_of(options)
    parse_mixer_options(options.mixer_options)
    if options.teacher != "embedded":
        check_found(options.teacher, options.gguf_file)
    check_place(options.output, options.teacher)
    if options.data_files:
        find_files(options.data_files)


def recipe_of(options: argparse.Namespace) -> Any:
    """The recipe that the options name or make."""
    from hf_hybrid.trainers.scoring.methods import method_of

    from ..places import find_recipe
    from ..run.recipe import Recipe
    from ..run.score import scoring_recipe

    if options.recipe is not None:
        return Recipe.load(find_recipe(options.recipe))
    method = options.method or "ga-s2"
    method_of(method, "--method")
    return scoring_recipe(
        options.teacher,
        method,
        text_of(options),
        {name: getattr(options, name) for name in _SELECT if getattr(options, name) is not None},
        tokens_per_layer=options.tokens_per_layer,
        align_tokens=options.align_tokens,
        options=_method_options(options.option),
        seed=options.seed or 0,
        revision=options.revision,
        gguf_file=options.gguf_file,
        mixer=options.mixer or "gated_deltanet",
        mixer_options=parse_mixer_options(options.mixer_options),
    )


def _method_options(given: list[str]) -> dict[str, Any]:
    import yaml

    from ..run.schema import read_numbers

    parsed = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option {text!r} is no NAME=VALUE; write, for example, --option rounds=4.")
        if name in parsed:
            raise ValueError(f"--option {name} was given twice; give it once.")
        try:
            parsed[name] = read_numbers(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ValueError(f"--option {text!r}: {' '.join(str(error).split())}.") from error
    return parsed


def draw_scores(result: Any, recipe: Any) -> tuple[list[int], list[Path]]:
    """Draws the scores of a run; returns the layers that follow from them, and the files."""
    from ..run.plots import plot_curves, plot_scores
    from ..run.score import layers_of

    scores = result.scores
    layers = layers_of(recipe, scores, result.folder)
    saved = [result.folder / "scores.json", result.folder / "scores.png"]
    plot_scores(scores, layers, saved[1])
    if any(score.curve for score in scores.scores):
        saved.append(result.folder / "curves.png")
        plot_curves(scores, saved[2])
    return layers, saved

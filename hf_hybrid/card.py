"""Model cards that hold what was measured and nothing else, and saving of finished models."""

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import yaml
from huggingface_hub import EvalResult, ModelCard

from hf_hybrid.modeling import HybridForCausalLM
from hf_hybrid.modeling import model_card as plain

from . import __version__


if TYPE_CHECKING:
    from hf_hybrid.trainers import LayerScores

    from .data.config import DataConfig, SourceConfig
    from .evaluation import Evaluation
    from .run.recipe import Recipe

    Text = TypeVar("Text", DataConfig, SourceConfig)

PLOT = "scores.png"
# Where a card is to be read before the model has a name on the Hub.
HERE = "."


@dataclass
class Provenance:
    """
    How a model was made, as far as it is known. What is left out here is left out of the card.

    Args:
        evaluation ([`Evaluation`], *optional*): what was measured.
        scores ([`LayerScores`], *optional*): how the softmax layers were chosen.
        recipe ([`Recipe`], *optional*): what it was trained on.
        tokens (`dict[str, int]`): tokens trained on, by stage.
        rows (`dict`): training rows `found` and `needed`, and what ended the text early, as in `report.json`.
        version (`str`, *optional*): of hf_hybrid, then.
        note (`str`): a paragraph that comes first.
    """

    evaluation: "Evaluation | None" = None
    scores: "LayerScores | None" = None
    recipe: "Recipe | None" = None
    tokens: dict[str, int] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    version: str | None = __version__
    note: str = ""


def save_model(model: HybridForCausalLM, tokenizer: Any, folder: str | os.PathLike, **made: Any) -> None:
    """Saves model, code, generation config, tokenizer and card into `folder`; `made` is what [`Provenance`] takes."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, model.config, model.num_parameters(), Provenance(**made))


def write_card(
    folder: str | os.PathLike,
    config: Any,
    parameters: int,
    made: Provenance,
    *,
    repo_id: str = HERE,
    base_model: str | None = None,
) -> Path:
    """
    Writes `folder/README.md` and, where layers were scored, the plot of the scores beside it.

    Args:
        folder (`str`): where the model is saved.
        config ([`HybridConfig`]): the hybrid's.
        parameters (`int`): how many it has.
        made ([`Provenance`]): how it was made.
        repo_id (`str`): its name on the Hub.
        base_model (`str`, *optional*): the teacher's name on the Hub, where it was loaded from elsewhere.

    Returns:
        `Path` of the card.
    """
    path = Path(folder) / "README.md"
    path.write_text(card_text(config, parameters, made, repo_id=repo_id, base_model=base_model), "utf-8")
    if made.scores is not None:
        from .run.plots import plot_scores

        plot_scores(made.scores, config.full_attention_layers, path.with_name(PLOT))
    return path


def card_text(
    config: Any, parameters: int, made: Provenance, *, repo_id: str = HERE, base_model: str | None = None
) -> str:
    """Returns what [`write_card`] writes to `README.md`."""
    base, revision = (base_model, None) if base_model else plain.base_model_of(config, repo_id)
    licence = _licence(base or _teacher_folder(config, made.recipe), revision)
    data = plain.metadata(config, base, licence)
    public = [one.dataset for one in _sources(made.recipe) if _looks_public(one.dataset)]
    if public:
        data.datasets = list(dict.fromkeys(public))
    data.eval_results = _results(made) or None
    data.model_name = repo_id.split("/")[-1] if repo_id != HERE else _unnamed(config, base)
    sections = [
        f"---\n{data.to_yaml()}\n---\n{plain.GENERATED}",
        plain.introduction(config, _teacher_name(config, base, made.recipe), parameters),
        made.note,
        plain.usage(repo_id),
        _choice(config, made),
        _numbers(made.evaluation),
        _training(config, made),
        plain.limits(config, base, licence),
        plain.citation(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def placed(card: str, repo_id: str) -> str:
    """Returns a card of ours as that of the repository `repo_id`: in its example, and beside its results."""
    card = card.replace(f'path = "{HERE}"', f'path = "{repo_id}"')
    named = ModelCard(card)
    if named.data.get("eval_results") is None:
        return card
    named.data["model_name"] = repo_id.split("/")[-1]
    return str(named)


def named_base(card: str, base_model: str) -> str:
    """Returns a card of ours with `base_model` in it, and that model's licence."""
    licence = _licence(base_model, None)
    named = ModelCard(card.replace(plain.terms({}), plain.terms(licence)))
    for key, value in {"base_model": base_model, "base_model_relation": plain.RELATION, **licence}.items():
        named.data[key] = value
    return str(named)


def _teacher_folder(config: Any, recipe: "Recipe | None") -> str | None:
    """Where a teacher that is not on the Hub keeps its card, on this machine."""
    name = config.teacher_name_or_path
    if name == "embedded" or (recipe is not None and recipe.teacher == "embedded"):
        return str(Path(__file__).parent / "embedded_teacher")
    # A config that was saved has the folder's name only, and a folder of that name may be another.
    name = recipe.teacher if recipe is not None else name
    return name if name and Path(name).is_dir() else None


def _licence(name: str | None, revision: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    try:
        return plain.licence_of(name, revision)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"the licence of {name} cannot be read from its README.md ({' '.join(str(error).split())}); correct the "
            "YAML at its top."
        ) from error


def _teacher_name(config: Any, base: str | None, recipe: "Recipe | None") -> str:
    name = base or config.teacher_name_or_path
    if name == "embedded" or (recipe is not None and recipe.teacher == "embedded"):
        return "the small teacher that ships with hf_hybrid"
    return _public(name) if name else "a softmax-attention model"


def _unnamed(config: Any, base: str | None) -> str:
    """What a hybrid is called that has no name on the Hub yet: not as its teacher, whose figures these are not."""
    teacher = base or config.teacher_name_or_path
    return f"{_public(teacher).split('/')[-1]}-hybrid" if teacher else "hybrid"


def _looks_public(name: str | None) -> TypeGuard[str]:
    """Whether `name` has the form of an id on the Hub, and is no path here."""
    return name is not None and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None and not Path(name).exists()


def _public(name: str) -> str:
    """An id as it is, of a path only the last part: where somebody keeps files is nobody else's business."""
    return name if _looks_public(name) else Path(name).name


def _choice(config: Any, made: Provenance) -> str:
    lines = ["## Layers", "", plain.kept_layers(config)]
    if made.recipe is not None and made.recipe.select.layers is not None:
        lines.append("They were listed by hand.")
    elif made.recipe is not None:
        lines.append(f"They were chosen by `{made.recipe.select.selector}`.")
    return "\n".join(lines) + ("" if made.scores is None else _scores(config, made.scores))


def _scores(config: Any, scores: "LayerScores") -> str:
    kept = set(config.full_attention_layers)
    better = "higher" if scores.higher_is_better else "lower"
    text = f" Scores ({scores.method}): {scores.measure}, in {scores.unit}; {better} is worth more."
    if not math.isnan(scores.baseline):
        text += (
            f" The held-out KL of the aligned all-linear student, before any distillation, is {scores.baseline:.4f}."
        )
    if scores.order:
        text += f" Layers were chosen together, as sets, in the order {scores.order}; single values need not agree."
    rows = [
        f"| {s.layer} | {s} | {_plain(s.sem, '.4f')} | {'yes' if s.layer in kept else ''} |"
        for s in sorted(scores.scores, key=lambda score: score.layer)
    ]
    lines = [
        f"![{scores.measure}, by layer, the softmax layers marked]({PLOT})",
        "",
        f"| layer | {scores.measure} ({scores.unit}) | s.e. | softmax |",
        "|---|---|---|---|",
        *rows,
    ]
    return text + "\n\n" + "\n".join(lines)


def _numbers(evaluation: "Evaluation | None") -> str:
    if evaluation is None:
        return ""
    e = evaluation
    context = f"bytes of cache per sequence of {e.cache_context:,} tokens"
    more = f"bytes of cache per further token at {e.cache_context:,} tokens"
    rows = [
        ("held-out KL(teacher, hybrid), nats per token", _noisy(e.kl, e.kl_sem), "0"),
        (
            "held-out perplexity",
            _noisy(e.perplexity, e.perplexity_sem, ".3f"),
            _noisy(e.teacher_perplexity, e.teacher_perplexity_sem, ".3f"),
        ),
        *_texts(e),
        (
            f"associative recall, {e.recall_length} tokens",
            _noisy(e.recall, share_sem(e.recall, e.recall_answers)),
            _noisy(e.teacher_recall, share_sem(e.teacher_recall, e.recall_answers)),
        ),
        (context, _plain(e.cache_bytes, ","), _plain(e.teacher_cache_bytes, ",")),
        (more, _plain(e.cache_bytes_per_token, ","), _plain(e.teacher_cache_bytes_per_token, ",")),
    ]
    found = [f"| {name} | {ours} | {theirs} |" for name, ours, theirs in rows if ours]
    if not found:
        return ""
    on = [f"{e.tokens:,} held-out tokens"] if e.kl is not None or e.perplexity is not None else []
    on += [f"{e.recall_answers:,} answers of recall"] if e.recall is not None and e.recall_answers else []
    note = "Measured in the run that made this model" + (f", on {' and '.join(on)}" if on else "")
    note += " (± one standard error: of KL and perplexity over rows, of recall as of independent answers)."
    lines = ["## Measured", "", note, "", "| | hybrid | teacher |", "|---|---|---|", *found]
    return "\n".join(lines + _tasks(e) + _generation(e))


def _texts(e: "Evaluation") -> list[tuple[str, str, str]]:
    """KL and perplexity of each text by itself."""
    rows = []
    for text in e.texts:
        rows.append((f"held-out KL of {text.name}", _noisy(text.kl, text.kl_sem), "0"))
        ours = _noisy(text.perplexity, text.perplexity_sem, ".3f")
        theirs = _noisy(text.teacher_perplexity, text.teacher_perplexity_sem, ".3f")
        rows.append((f"held-out perplexity of {text.name}", ours, theirs))
    return rows


def _tasks(e: "Evaluation") -> list[str]:
    """Tables of what was scored in tasks, a line for each task, form and length."""
    if not e.tasks:
        return []
    teacher = {(s.task, s.form, s.length): s for s in e.teacher_tasks}
    rows = []
    for score in e.tasks:
        theirs = teacher.get((score.task, score.form, score.length))
        length = "" if score.length is None else f"{score.length:,}"
        shown = [_noisy(s.mean, s.sem, ".3f") if s is not None else "" for s in (score, theirs)]
        rows.append(f"| {score.task} | {score.form} | {length} | {score.count:,} | {shown[0]} | {shown[1]} |")
    note = (
        "Tasks of lm-evaluation-harness. Those after RULER (arXiv 2404.06654) are an offline subset in hf_hybrid's "
        "own words; their figures are not RULER's. `likelihood` tells whether greedy decoding would give the answers, "
        "`generation` whether they are in the text that the model writes."
    )
    head = ["| task | form | tokens | cases | hybrid | teacher |", "|---|---|---|---|---|---|"]
    return ["", note, "", *head, *rows]


def _generation(e: "Evaluation") -> list[str]:
    g = e.generation
    if g is None:
        return []
    rows = [
        (name, *("" if f is None else _noisy(f.mean, f.sem, ".3f") for f in figures))
        for name, *figures in (
            ("tokens that are the teacher's at the same place", g.agreement, None),
            ("tokens until the first that is not", g.common_prefix, None),
            ("runs of four tokens seen before", g.repetition, g.teacher_repetition),
            ("texts that end in a loop", g.looping, g.teacher_looping),
        )
    ]
    note = f"Greedy text behind {g.prompts:,} prompts, at most {g.new_tokens:,} tokens each:"
    shown = [f"| {name} | {ours} | {theirs} |" for name, ours, theirs in rows if ours]
    return ["", note, "", "| | hybrid | teacher |", "|---|---|---|", *shown]


def share_sem(share: float | None, count: int) -> float | None:
    """The standard error of a share of `count` independent answers, which is never 0 (Agresti and Coull, 1998)."""
    if share is None or not count:
        return None
    # With two right and two wrong answers added, so that a share of 0 or 1 is not without any doubt.
    p = (share * count + 2) / (count + 4)
    return (p * (1 - p) / (count + 4)) ** 0.5


def _noisy(value: float | None, sem: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form) + ("" if sem is None else f" ± {sem:{form}}")


def _plain(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def _results(made: Provenance) -> list[EvalResult]:
    """The measurements as the Hub's evaluation results, on the run's held-out rows and on the recall task."""
    e, recipe = made.evaluation, made.recipe
    if e is None:
        return []
    dataset = recipe.data.dataset if recipe is not None and recipe.data.dataset else None
    on_hub = _looks_public(dataset)
    text: dict[str, Any] = {
        "dataset_type": dataset if on_hub else "text",
        "dataset_name": f"held-out rows of {dataset if on_hub else 'the text of the run'}",
    }
    task: dict[str, Any] = {
        "dataset_type": "synthetic",
        "dataset_name": f"associative recall, {e.recall_length} tokens",
    }
    rows = [
        (e.kl, "kl_divergence", "KL(teacher, hybrid), nats per token", text),
        (e.perplexity, "perplexity", "perplexity", text),
        (e.recall, "accuracy", "share of right answers", task),
    ]
    return [
        EvalResult(
            task_type="text-generation", metric_type=kind, metric_name=name, metric_value=float(f"{value:.4g}"), **of
        )
        for value, kind, name, of in rows
        if value is not None
    ]


def _sources(recipe: "Recipe | None") -> list["SourceConfig"]:
    return [] if recipe is None or recipe.data.source else recipe.data.all_sources()


def _without_folders(text: "Text") -> "Text":
    """A part of a recipe's data with the last parts of paths alone."""
    files = [Path(name).name for name in text.text_files]
    return dataclasses.replace(text, text_files=files, dataset=text.dataset and _public(text.dataset))


def _rows(data: "DataConfig", rows: dict[str, Any]) -> str:
    """A paragraph on a text that was too short for a stage to see each row once; nothing where it was not."""
    if not rows or rows["found"] >= rows["needed"]:
        return ""
    said = f"The text made {rows['found']:,} of the {rows['needed']:,} training rows that a stage takes"
    if end := rows.get("text_end"):
        source = data.sources[end["source"]]
        named = source.dataset or ", ".join(source.text_files)
        said += f"; {named}, {100 * end['share']:.3g}% of it, was the first to end"
    return f"\n\n{said}. Rows were used again."


def _training(config: Any, made: Provenance) -> str:
    """What it was trained on: the source of text, tokens by stage, and the recipe without this machine's folders."""
    recipe = made.recipe
    if recipe is None:
        return ""
    names = {
        "align": "alignment",
        "score": "layer scores",
        "distill": "distillation",
        "finetune": "next-token training",
    }
    rows = [f"- {text}: {made.tokens[name]:,} tokens" for name, text in names.items() if name in made.tokens]
    sources = [one.dataset if _looks_public(one.dataset) else "local text files" for one in _sources(recipe)]
    source = " and ".join(dict.fromkeys(sources)) or "the built-in demo data"
    data = dataclasses.replace(
        _without_folders(recipe.data), sources=[_without_folders(one) for one in recipe.data.sources]
    )
    training, execution = (
        {
            name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
            for name, value in given.items()
            if name != "hub_token"
        }
        for given in (recipe.training, recipe.execution)
    )
    public = dataclasses.replace(
        recipe, data=data, teacher=_public(recipe.teacher), training=training, execution=execution
    )
    shown = yaml.safe_dump(public.to_dict(), sort_keys=False)
    versions = f"Made with hf_hybrid{' ' + made.version if made.version else ''} and this recipe"
    if config.teacher_revision:
        versions += f", from the teacher's commit {config.teacher_revision}"
    return (
        f"## Training\n\nOn {source}:\n\n"
        + "\n".join(rows)
        + f"{_rows(data, made.rows)}\n\n<details><summary>{versions}</summary>\n\n"
        f"```yaml\n{shown}```\n\n</details>"
    )

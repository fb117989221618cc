"""Model cards that hold what was measured and nothing else, and saving of finished models."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from hf_hybrid.modeling import HybridForCausalLM


if TYPE_CHECKING:
    from hf_hybrid.trainers import LayerScores

    from .evaluation import Evaluation
    from .recipe import Recipe

_PAPERS = (
    ("2512.20569", "layer selection by distilled KL (GA-S2), the pipeline"),
    ("2505.03005", "RADLADS: alignment and distillation into linear attention"),
    ("2412.06464", "Gated DeltaNet"),
)


def save_model(model: HybridForCausalLM, tokenizer: Any, folder: str | os.PathLike, **card: Any) -> None:
    """Saves model, code, generation config, tokenizer and card ([`write_card`]) into `folder`."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, model, **card)


def write_card(
    folder: str | os.PathLike,
    model: HybridForCausalLM,
    *,
    evaluation: "Evaluation | None" = None,
    scores: "LayerScores | None" = None,
    recipe: "Recipe | None" = None,
    note: str = "",
) -> Path:
    """
    Writes `folder/README.md` and returns its path.

    Args:
        folder (`str`): where the model is saved.
        model ([`HybridForCausalLM`]): the hybrid.
        evaluation ([`Evaluation`], *optional*): its numbers go into the card; what was not measured does not.
        scores ([`LayerScores`], *optional*): how the softmax layers were chosen.
        recipe ([`Recipe`], *optional*): what it was trained on.
        note (`str`, *optional*): a paragraph that comes first.
    """
    path = Path(folder) / "README.md"
    sections = [
        f"---\n{_metadata(model, recipe).to_yaml()}\n---",
        _introduction(model, recipe),
        note,
        _loading(),
        _choice(model, scores, recipe),
        _numbers(evaluation),
        _training(scores, recipe),
        _limits(),
        "## Papers\n\n"
        + "\n".join(f"- [arXiv {number}](https://arxiv.org/abs/{number}): {what}" for number, what in _PAPERS),
    ]
    path.write_text("\n\n".join(section for section in sections if section) + "\n", "utf-8")
    return path


def _metadata(model: HybridForCausalLM, recipe: "Recipe | None") -> ModelCardData:
    teacher = model.config.teacher_name_or_path or ""
    data: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "hf-hybrid",
            "linear-attention",
            "hybrid-attention",
            *(name.replace("_", "-") for name in _mixers(model)),
        ],
    }
    # A folder on the author's disk is nobody else's base model.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", teacher) and not Path(teacher).exists():
        data |= {"base_model": teacher, "base_model_relation": "finetune"}
    if recipe is not None and recipe.data.dataset and not Path(recipe.data.dataset).exists():
        data["datasets"] = [recipe.data.dataset]
    return ModelCardData(**data)


def _mixers(model: HybridForCausalLM) -> list[str]:
    """Names of the mixers in use; of the one in the config where no layer is linear."""
    mixers = model.config.layer_mixers
    names = {mixers[i] for i in model.linear_attention_layers or range(len(mixers))}
    return sorted(name for name in names if name is not None)


def _teacher_name(model: HybridForCausalLM, recipe: "Recipe | None") -> str:
    if recipe is not None and recipe.teacher == "embedded":
        return "the small teacher that ships with hf_hybrid"
    name = model.config.teacher_name_or_path
    return f"`{Path(name).name if Path(name).exists() else name}`" if name else "a softmax-attention model"


def _introduction(model: HybridForCausalLM, recipe: "Recipe | None") -> str:
    kept, total = model.full_attention_layers, model.config.num_hidden_layers
    parameters = sum(parameter.numel() for parameter in model.parameters())
    mixers = ", ".join(f"`{name}`" for name in _mixers(model))
    return (
        f"# Hybrid of {_teacher_name(model, recipe).strip('`')}\n\n"
        f"A hybrid of softmax and linear attention, made from {_teacher_name(model, recipe)} with hf_hybrid: "
        f"{len(kept)} of {total} layers keep the teacher's softmax attention, the other {total - len(kept)} have "
        f"linear attention ({mixers}), whose state does not grow with the context. "
        f"{parameters:,} parameters."
    )


def _loading() -> str:
    return (
        "## Use\n\nNeeds torch and transformers only; the code lies beside the weights, hence `trust_remote_code`.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'path = "."  # this folder, or its id on the Hub\n'
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(path)\n"
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))\n```"
    )


def _choice(model: HybridForCausalLM, scores: "LayerScores | None", recipe: "Recipe | None") -> str:
    lines = ["## Layers", "", f"Softmax attention in layers {model.full_attention_layers} (counted from 0)."]
    if recipe is not None and recipe.select.layers is not None:
        lines.append("They were listed by hand.")
    elif recipe is not None:
        lines.append(f"They were chosen by `{recipe.select.selector}`.")
    if scores is not None:
        kept = set(model.full_attention_layers)
        lines += [
            f"Scores ({scores.method}): held-out KL with that one layer restored to softmax and "
            f"{scores.scores[0].tokens:,} tokens of distillation; without either it is {scores.baseline:.4f}.",
            "",
            "| layer | KL, nats per token | s.e. | keeps softmax |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {s.layer} | {s.kl:.4f} | {s.sem:.4f} | {'yes' if s.layer in kept else ''} |" for s in scores.scores
        ]
    return "\n".join(lines)


def _numbers(evaluation: "Evaluation | None") -> str:
    if evaluation is None:
        return ""
    rows = []
    if evaluation.kl is not None:
        rows.append(
            f"| held-out KL(teacher, hybrid), nats per token | {evaluation.kl:.4f} ± {evaluation.kl_sem:.4f} | 0 |"
        )
    for name, ours, theirs, form in (
        ("held-out perplexity", evaluation.perplexity, evaluation.teacher_perplexity, ".3f"),
        (
            f"associative recall, {evaluation.recall_length} tokens",
            evaluation.recall,
            evaluation.teacher_recall,
            ".3f",
        ),
        (
            f"bytes of cache per sequence of {evaluation.cache_context:,} tokens",
            evaluation.cache_bytes,
            evaluation.teacher_cache_bytes,
            ",",
        ),
    ):
        if ours is not None:
            rows.append(f"| {name} | {ours:{form}} | {'' if theirs is None else format(theirs, form)} |")
    note = (
        f"Measured in the run that made this model, on {evaluation.tokens:,} held-out tokens (± one standard error)."
    )
    return "\n".join(["## Measured", "", note, "", "| | hybrid | teacher |", "|---|---|---|", *rows])


def _training(scores: "LayerScores | None", recipe: "Recipe | None") -> str:
    if recipe is None:
        return ""
    rows = [f"- alignment: {recipe.align.tokens:,} tokens", f"- distillation: {recipe.distill.tokens:,} tokens"]
    if scores is not None:
        rows.insert(1, f"- layer scores: {scores.tokens:,} tokens")
    if recipe.finetune is not None:
        rows.append(f"- next-token training: {recipe.finetune.tokens:,} tokens")
    source = recipe.data.dataset or ("local text files" if recipe.data.text_files else "the built-in demo data")
    return f"## Training\n\nOn {source}:\n\n" + "\n".join(rows)


def _limits() -> str:
    return (
        "## Limits\n\nThe model inherits its teacher's limits and licence. Linear layers remember a fixed amount, so "
        "exact recall from long contexts is what suffers first. Assisted decoding is not possible, since a recurrent "
        "state cannot be rolled back, and packed rows cannot be continued from a cache."
    )

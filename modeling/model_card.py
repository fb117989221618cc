"""The part of a model card that a hybrid's config decides. What a run measured is added by `hf_hybrid.card`.

It does not travel: a model that a checkpoint's own code loaded is pushed with the library's card.
"""

import re
from typing import Any

from transformers.utils.hub import ModelCard, ModelCardData, cached_file


# A card with this line is ours, and is written anew with each push; one without it is its author's, and is kept.
GENERATED = "<!-- Written by hf_hybrid, and anew with each push of the model. Remove this line to keep your edits. -->"
# A sentence of the card that `PreTrainedModel.push_to_hub` makes where the repository has none.
_LIBRARY_TEMPLATE = "This model card has been automatically generated"
# The Hub knows adapter, merge, quantized and finetune. A hybrid has weights of its own, trained from the base model's.
RELATION = "finetune"
_MIXER_PAPERS = {
    "gated_deltanet": "2412.06464",
    "gated_linear_attention": "2312.06635",
    "kimi_delta_attention": "2510.26692",
}
_CITATION = """\
@inproceedings{li2026distilling,
  title     = {Distilling to Hybrid Attention Models via {KL}-Guided Layer Selection},
  author    = {Li, Yanhong and Yang, Songlin and Tan, Shawn and Mishra, Mayank and Panda, Rameswar and Zhou, Jiawei
               and Kim, Yoon},
  booktitle = {International Conference on Learning Representations},
  year      = {2026},
  url       = {https://arxiv.org/abs/2512.20569}
}

@misc{goldstein2025radlads,
  title         = {{RADLADS}: Rapid Attention Distillation to Linear Attention Decoders at Scale},
  author        = {Goldstein, Daniel and Alcaide, Eric and Lu, Janna and Cheah, Eugene},
  year          = {2025},
  eprint        = {2505.03005},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2505.03005}
}"""


def plain_card(model: Any, repo_id: str, tags: list[str] | None = None) -> str:
    """
    Returns the card of a hybrid of which nothing was measured.

    Args:
        model ([`HybridForCausalLM`]): the hybrid.
        repo_id (`str`): where it will be.
        tags (`list[str]`, *optional*): more tags than ours.
    """
    base, revision = base_model_of(model.config, repo_id)
    licence = licence_of(base, revision) if base else {}
    sections = [
        f"---\n{metadata(model.config, base, licence, tags).to_yaml()}\n---\n{GENERATED}",
        introduction(model.config, base, model.num_parameters()),
        usage(repo_id),
        f"## Layers\n\n{kept_layers(model.config)}",
        "Nothing was measured of the model as it is here.",
        limits(model.config, base, licence),
        citation(),
    ]
    return "\n\n".join(sections) + "\n"


def replace_library_card(model: Any, folder: str, repo_id: str) -> None:
    """Writes `folder/README.md` unless its author wrote it; the library has just put one there."""
    path = f"{folder}/README.md"
    card = ModelCard.load(path)
    if GENERATED in card.content or _LIBRARY_TEMPLATE in card.content:
        ModelCard(plain_card(model, repo_id, card.data.tags)).save(path)


def base_model_of(config: Any, repo_id: str | None = None) -> tuple[str | None, str | None]:
    """
    The id, and the commit where it is known, of the model on the Hub that this one was made from; else None for both.

    That is the hybrid that was loaded from the Hub, unless it is `repo_id` itself, or else the teacher.
    """
    file = (config.text_config.__dict__.get("gguf_origin") or {}).get("file", "config.json")
    of_teacher = (config.teacher_name_or_path, config.teacher_revision, file)
    for name, commit, wanted in ((config._name_or_path, None, "config.json"), of_teacher):
        if name and name != repo_id and _is_on_hub(name, wanted):
            return name, commit
    return None, None


def licence_of(name: str, revision: str | None = None) -> dict[str, Any]:
    """`license`, `license_name` and `license_link` of a model's card, as far as given; on the Hub or in a folder."""
    path = _file_of(name, "README.md", revision)
    if path is None:
        return {}
    data = ModelCard.load(path, ignore_metadata_errors=True).data
    found = {key: data.get(key) for key in ("license", "license_name", "license_link") if data.get(key)}
    link = found.get("license_link")
    # A link to a file beside that card would lead nowhere from another.
    if isinstance(link, str) and "://" not in link and _cache_name(name) in path:
        found["license_link"] = f"https://huggingface.co/{name}/blob/{revision or 'main'}/{link}"
    return found


def _is_on_hub(name: str, file: str) -> bool:
    """Whether `name` is a model on the Hub: its `file` then lies in the cache. A folder may have the same name."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return False
    path = _file_of(name, file)
    return path is not None and _cache_name(name) in path


def _cache_name(name: str) -> str:
    return f"models--{name.replace('/', '--')}"


def _file_of(name: str, filename: str, revision: str | None = None) -> str | None:
    try:
        return cached_file(
            name,
            filename,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # there is no such model, or none that this user may see
        return None


def metadata(config: Any, base: str | None, licence: dict[str, Any], tags: list[str] | None = None) -> ModelCardData:
    """What the Hub reads."""
    kinds = ["hybrid-attention"] if _windows_only(config) else ["linear-attention", "hybrid-attention"]
    own = ["hf-hybrid", *kinds, *(name.replace("_", "-") for name in mixers(config))]
    data: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*own, *(tag for tag in tags or [] if tag not in own)],
    }
    if base:
        data |= {"base_model": base, "base_model_relation": RELATION}
    return ModelCardData(**data, **licence)


def mixers(config: Any) -> list[str]:
    """Names of the mixers in use; of those in the config where no layer is linear."""
    kept = set(config.full_attention_layers)
    used = {name for i, name in enumerate(config.layer_mixers) if i not in kept and name}
    return sorted(used or {name for name in config.layer_mixers if name})


def _windows_only(config: Any) -> bool:
    """Whether nothing but windows is in the place of softmax, so that there is no recurrent state."""
    return mixers(config) == ["sliding_window"]


def introduction(config: Any, teacher: str | None, parameters: int) -> str:
    """The title, and a paragraph that says what the model is."""
    kept, total = len(config.full_attention_layers), config.num_hidden_layers
    names = ", ".join(f"`{name}`" for name in mixers(config))
    source = teacher or "a softmax-attention model"
    if _windows_only(config):
        return (
            f"# Hybrid of {source}\n\nA causal language model made by hf_hybrid from {source}: {kept} of {total} "
            "layers have softmax attention over everything before, the other "
            f"{total - kept} over a window of tokens ({names}), so that what they remember does not grow with the "
            f"context. {parameters:,} parameters." + _file(config)
        )
    return (
        f"# Hybrid of {source}\n\nA causal language model with softmax and linear attention, made by hf_hybrid "
        f"from {source}: {kept} of {total} layers have softmax attention, the other {total - kept} have linear "
        f"attention ({names}), whose state does not grow with the context. {parameters:,} parameters." + _file(config)
    )


def _file(config: Any) -> str:
    """A paragraph about the GGUF file of the teacher, where it came from one."""
    origin = config.text_config.__dict__.get("gguf_origin")
    if origin is None:
        return ""
    return (
        f"\n\nThe teacher's weights came from the GGUF file `{origin['file']}` ({origin['quantisation']}; sha256 "
        f"`{origin['sha256']}`) and were dequantised; what quantising had rounded away is in neither model."
    )


def usage(repo_id: str) -> str:
    """How to load it."""
    return (
        "## Use\n\nNeeds torch and transformers only; the code lies beside the weights, hence `trust_remote_code`. "
        "Read it, and pin the `revision` that you have read.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'path = "{repo_id}"\n'
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)\n"
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))\n```"
    )


def kept_layers(config: Any) -> str:
    """Which layers have softmax attention, and what the others have."""
    papers = {name: _MIXER_PAPERS.get(name) for name in mixers(config)}
    names = [
        f"`{name}`" + (f" ([arXiv {paper}](https://arxiv.org/abs/{paper}))" if paper else "")
        for name, paper in papers.items()
    ]
    kept = config.full_attention_layers
    if len(kept) == config.num_hidden_layers:
        return "Softmax attention in all layers."
    return f"Softmax attention in layers {kept} (counted from 0), in the others {', '.join(names)}."


def limits(config: Any, base: str | None, licence: dict[str, Any]) -> str:
    """What holds for every hybrid, and its licence."""
    forgets, state = "Linear layers remember a fixed amount", "a recurrent state"
    if _windows_only(config):
        forgets, state = "Layers with a window see nothing before it", "what has left a window"
    return (
        f"## Limits and licence\n\nThe model inherits the limits of {base or 'its teacher'}. {forgets}, so exact "
        f"recall from long contexts is what suffers first. Assisted decoding is not possible, since {state} cannot be "
        "rolled back, and packed rows cannot be continued from a cache.\n\n" + terms(licence)
    )


def terms(licence: dict[str, Any]) -> str:
    """A sentence about the licence, which is what the base model's card says, if it says something."""
    name = licence.get("license_name") or licence.get("license")
    if not name:
        return "No licence was found in the base model's card; its terms hold for this model too."
    where = f" ({licence['license_link']})" if "license_link" in licence else ""
    return f"Licence: {name}{where}, as its base model's card says."


def citation() -> str:
    """The papers of layer selection and of the distillation pipeline."""
    return f"## Citation\n\n```bibtex\n{_CITATION}\n```"

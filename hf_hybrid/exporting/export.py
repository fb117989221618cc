"""Export of a hybrid to a layout that other programs serve, with the proof that it is the same model."""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from hf_hybrid.adapters import merged
from hf_hybrid.modeling import HybridConfig, HybridForCausalLM
from hf_hybrid.places import check_place
from hf_hybrid.run.folder import ARTEFACTS, publish
from hf_hybrid.selection import uniform_layers
from hf_hybrid.serving.vllm_plugin import obstacles as vllm_obstacles
from hf_hybrid.teacher.loading import check_plain, load_model, load_tokenizer
from hf_hybrid.teacher.names import check_found
from hf_hybrid.trainers.modes import evaluating

from . import llama_cpp, qwen3_5, windows
from .llama_cpp_engine import equal_tokens, llama_cpp_version, run_apart
from .native import FILE_TYPES, LAYOUTS, VLLM_PLUGIN, check_layout


# Two fp32 forms of one model differ by rounding. Logits may differ by this share of their standard deviation: the
# smallest slip of a layout that was tried (a norm off by the rounding of bf16) makes ten times as much.
_TOLERANCE = 2e-3
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 2, 48, 48
# Where llama.cpp's log-probabilities are compared: beside the ends of its chunks.
_PREFIXES = (1, 5, 32, 63, 64, 65, 96)


@dataclass
class Fit:
    """
    Whether a hybrid fits a layout.

    Args:
        layout (`str`): its name.
        obstacles (`list[str]`): what stands in the way, in words; empty where it fits.
        engines (`list[str]`): what serves the layout, and what does not serve this hybrid in it, in words.
    """

    layout: str
    obstacles: list[str]
    engines: list[str]

    def __str__(self) -> str:
        if self.obstacles:
            return f"{self.layout}: no\n" + "\n".join(f"  {reason}" for reason in self.obstacles)
        about = LAYOUTS.get(self.layout, "the hybrid as it was saved, nothing is exported")
        return f"{self.layout}: fits ({about})\n" + "\n".join(f"  {line}" for line in self.engines)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return {"layout": self.layout, "obstacles": self.obstacles, "engines": self.engines}


@dataclass
class ExportReport:
    """
    What was exported, and how far it is from the hybrid, both in fp32 on the same rows.

    Args:
        layout (`str`): its name.
        folder (`str`): where it is.
        largest_difference (`float`): of the logits of the two models.
        logit_std (`float`): the standard deviation of the hybrid's logits, to compare with.
        tokens (`int`): over how many tokens.
        greedy_equal, greedy_tokens (`int`): greedy tokens that both wrote after the same prompts, and how many.
        notes (`list[str]`): what else was checked, and what was not.
    """

    layout: str
    folder: str
    largest_difference: float
    logit_std: float
    tokens: int
    greedy_equal: int
    greedy_tokens: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"exported to {self.folder} ({LAYOUTS[self.layout]})",
            f"  logits over {self.tokens} tokens differ by at most {self.largest_difference:.2e} in fp32 (their "
            f"standard deviation is {self.logit_std:.3g}); {self.greedy_equal} of {self.greedy_tokens} greedy tokens "
            "are equal",
            *(f"  {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return dict(vars(self))


def layouts_of(config: HybridConfig) -> list[Fit]:
    """Which layouts a hybrid with this config fits, what stands in the way of the others, and who serves each."""
    reasons = qwen3_5.obstacles(config)
    of_file = reasons or llama_cpp.obstacles(config.text_config)
    of_windows, of_plugin = windows.obstacles(config), vllm_obstacles(config)
    return [
        Fit("qwen3_5", reasons, [] if reasons else _engines(config)),
        Fit(
            "gguf",
            of_file,
            [] if of_file else ["llama.cpp since 2026-09, and what is built on it: any list of layers"],
        ),
        Fit("windows", of_windows, [] if of_windows else windows.engines(config.text_config)),
        Fit(
            VLLM_PLUGIN,
            of_plugin,
            [] if of_plugin else ["vLLM where this package is installed too: any list of layers"],
        ),
    ]


def check_fits(config: HybridConfig, to: str) -> None:
    """Raises a `ValueError` that says why, where a hybrid with this config does not fit a layout."""
    reasons = {fit.layout: fit.obstacles for fit in layouts_of(config)}[to]
    if reasons:
        raise ValueError(f"the model does not fit {to}: {'; '.join(reasons)}.")


def _engines(config: HybridConfig) -> list[str]:
    every = qwen3_5.interval(config.text_config.layer_types)
    kept, count = config.full_attention_layers, config.text_config.num_hidden_layers
    lines = ["transformers, vLLM: any list of layers"]
    if every is not None:
        lines.append(f"SGLang, MLX: yes, for every {every}-th layer keeps softmax (they read nothing else)")
    else:
        near = count // len(kept)
        periodic = list(range(near - 1, count, near))
        how = ""
        if uniform_layers(count, len(periodic), "last") == periodic:
            how = f", which `select: {{selector: uniform-last, k: {len(periodic)}}}` chooses"
        lines.append(
            f"SGLang, MLX: no. They read no list of layers, only that every n-th keeps softmax, and {kept} is not so; "
            f"with n = {near} it would be {periodic}{how}"
        )
    lines.append("llama.cpp: as gguf")
    return lines


def layouts_of_model(name: str | os.PathLike, revision: str | None = None) -> list[Fit]:
    """[`layouts_of`] the hybrid, or the run, of that name, from its config alone."""
    folder = _folder_of(name)
    check_found(folder)
    config: Any = AutoConfig.from_pretrained(folder, revision=revision)
    if config.model_type != HybridConfig.model_type:
        raise ValueError(
            f"{name} is a {config.model_type} model, no hybrid; transformers and servers have it as it is."
        )
    return layouts_of(config)


def export(
    model: HybridForCausalLM | PeftModel | str | os.PathLike,
    *,
    to: str = "qwen3_5",
    output: str | os.PathLike,
    tokenizer: Any = None,
    file_type: str = "f16",
    revision: str | None = None,
) -> ExportReport:
    """
    Writes a hybrid as a model that transformers, or llama.cpp, has itself. It is the same model, or nothing is
    written: both run on the same rows before the folder has its name.

    Args:
        model ([`HybridForCausalLM`], `str` or `os.PathLike`): the hybrid, or its folder, a finished run's folder, or
            its name on the Hub. An adapter is merged into a copy.
        to (`str`): `"qwen3_5"` or `"gguf"` for Gated DeltaNet, `"windows"` for sliding windows.
        output (`str` or `os.PathLike`): the new folder.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): by default that beside the model. It goes along, with its
            chat template.
        file_type (`str`): of a GGUF file: `"f32"`, `"f16"`, `"bf16"`, `"q8_0"` or `"q4_0"`. Weights in `"qwen3_5"`
            and `"windows"` have the model's own dtype.
        revision (`str`, *optional*): branch, tag or commit of a model on the Hub.

    Returns:
        [`ExportReport`]: how far the two are from each other.
    """
    check_layout(to)
    if to == "gguf" and file_type not in FILE_TYPES:
        raise ValueError(f"file_type={file_type!r} is unknown; choose one of {list(FILE_TYPES)}.")
    folder = Path(output)
    check_place(folder, str(model) if isinstance(model, str | os.PathLike) else None)
    if folder.exists():
        raise ValueError(f"{folder} exists; choose a new folder for the exported model.")
    hybrid, tokenizer = _prepared(model, tokenizer, revision)
    check_fits(hybrid.config, to)
    if to == "gguf" and tokenizer is None:
        raise ValueError("a GGUF file holds the tokenizer, and there is none beside the model; pass tokenizer=.")
    with publish(folder) as partial:
        if to == "windows":
            native = windows.native_model(hybrid)
            # Rows that are longer than the window, so that it shows.
            before = native.config.sliding_window
            return _write_native(partial, folder, hybrid, native, to, tokenizer, before)
        config, tensors = qwen3_5.native_config(hybrid.config), qwen3_5.native_tensors(hybrid)
        if to == "gguf":
            return _write_gguf(partial, folder, hybrid, config, tensors, tokenizer, file_type)
        return _write_native(partial, folder, hybrid, qwen3_5.native_model(config, tensors), to, tokenizer)


def _prepared(model: Any, tokenizer: Any, revision: str | None) -> tuple[HybridForCausalLM, Any]:
    """The hybrid with plain weights, in eval mode, and its tokenizer, which may be None."""
    if isinstance(model, str | os.PathLike):
        name = _folder_of(model)
        if tokenizer is None:
            tokenizer = load_tokenizer(name, revision=revision)
        model = load_model(name, revision=revision)
    elif revision is not None:
        raise ValueError(f"revision={revision!r} belongs to a model given by name; this one is loaded already.")
    if isinstance(model, PeftModel):
        model, _ = merged(copy.deepcopy(model))
    if not isinstance(model, HybridForCausalLM):
        raise ValueError(
            f"the model is a {type(model).__name__}, no hybrid; transformers and servers have it as it is."
        )
    check_plain(model)
    return model, tokenizer


def _folder_of(name: str | os.PathLike) -> str | os.PathLike:
    """`name`, or the folder of the model where it is that of a run."""
    run = Path(name)
    if not (run / "recipe.yaml").is_file():
        return name
    model = run / ARTEFACTS["model"]
    if not model.is_dir():
        raise ValueError(f"the run in {run} has no finished model yet; go on with it, or give the folder of a model.")
    return model


def _write_native(
    partial: Path, folder: Path, hybrid: Any, native: Any, layout: str, tokenizer: Any, before: int = 0
) -> ExportReport:
    if hybrid.generation_config is not None:
        native.generation_config = copy.deepcopy(hybrid.generation_config)
    native.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    loaded: Any = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32, use_safetensors=True)
    if type(loaded) is not type(native):
        raise ValueError(f"transformers loads a {type(loaded).__name__} of what was written; nothing is published.")
    report, _ = _compared(hybrid, loaded.to(hybrid.device).eval(), layout, folder, before)
    _check(report)
    if tokenizer is None:
        report.notes.append("without a tokenizer: none was beside the model, and none was passed")
    (partial / "README.md").write_text(_card(hybrid.config, report), "utf-8")
    return report


def _write_gguf(
    partial: Path,
    folder: Path,
    hybrid: Any,
    config: Any,
    tensors: dict[str, torch.Tensor],
    tokenizer: Any,
    file_type: str,
) -> ExportReport:
    file = partial / f"{folder.name}-{file_type}.gguf"
    llama_cpp.write_gguf(file, config, tensors, tokenizer, name=folder.name, file_type=file_type)
    rounded = llama_cpp.read_back(file)
    llama_cpp.check_rounding(tensors, rounded, file_type)
    native = qwen3_5.native_model(config, rounded).to(hybrid.device).eval()
    report, written = _compared(hybrid, native, "gguf", folder)
    report.notes.append(f"of the weights in the file ({file_type}), computed by transformers")
    # What the other types round away is not the layout's.
    if file_type == "f32":
        _check(report)
    release = llama_cpp_version()
    if release is None:
        report.notes.append("not run in llama.cpp: pip install xllamacpp to have that checked, too")
    else:
        report.notes.append(_run_in_llama_cpp(file, native, written, tokenizer, release, exact=file_type == "f32"))
    return report


def _check(report: ExportReport) -> None:
    """Raises a `ValueError` where the two models are not the same but for rounding."""
    if not report.largest_difference <= _TOLERANCE * report.logit_std:
        raise ValueError(
            f"the exported model is another: its logits differ from the hybrid's by {report.largest_difference:.2e}, "
            f"and their standard deviation is {report.logit_std:.2e}; nothing is published. Please report it."
        )


def _in_fp32(model: Any) -> Any:
    """
    The hybrid as it is loaded in fp32: one that was cast in memory has rotary angles in half precision, which are in
    no checkpoint.
    """
    if model.dtype == torch.float32:
        return model
    with torch.device(model.device):
        wide: Any = HybridForCausalLM._from_config(copy.deepcopy(model.config), dtype=torch.float32)
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    wide.tie_weights()
    return wide.eval()


def _rows(model: Any, before: int) -> torch.Tensor:
    """
    Prompts of tokens from all over the vocabulary, each with what `model` writes after it, `[2, before + 96]` or as
    long as it has positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or before + _PROMPT_TOKENS + _NEW_TOKENS
    if positions < _PROMPT_TOKENS + _NEW_TOKENS:
        raise ValueError(
            f"the model has {positions} positions, and the comparison takes {_PROMPT_TOKENS + _NEW_TOKENS} tokens."
        )
    generator = torch.Generator().manual_seed(0)
    length = min(before + _PROMPT_TOKENS, positions - _NEW_TOKENS)
    prompts = torch.randint(model.config.vocab_size, (_PROMPTS, length), generator=generator)
    return _written(model, prompts.to(model.device))


def _written(model: Any, prompts: torch.Tensor) -> torch.Tensor:
    """`prompts` with the greedy tokens after them, none of which ends the text."""
    settings = GenerationConfig(
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        do_sample=False,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id if model.config.pad_token_id is not None else 0,
    )
    mask = torch.ones_like(prompts)
    return model.generate(prompts, attention_mask=mask, generation_config=settings)


@torch.no_grad()
def _compared(
    hybrid: Any, native: Any, layout: str, folder: Path, before: int = 0
) -> tuple[ExportReport, torch.Tensor]:
    """
    How far the two models are from each other at the last 96 tokens of each row, and prompts with what `native` writes
    after them.
    """
    ours, kernel = _in_fp32(hybrid), hybrid.config.kernel
    try:
        ours.config.kernel = "torch"  # other kernels multiply fp32 in fewer bits
        with evaluating(ours, native):
            rows = _rows(ours, before)
            last = _PROMPT_TOKENS + _NEW_TOKENS
            wanted = ours(rows, use_cache=False, logits_to_keep=last).logits.float()
            found = native(rows, use_cache=False, logits_to_keep=last).logits.float()
            written = _written(native, rows[:, :-_NEW_TOKENS])
    finally:
        ours.config.kernel = kernel
    report = ExportReport(
        layout=layout,
        folder=str(folder),
        largest_difference=(found - wanted).abs().max().item(),
        logit_std=wanted.std().item(),
        tokens=wanted.shape[0] * wanted.shape[1],
        greedy_equal=int((written == rows)[:, -_NEW_TOKENS:].sum()),
        greedy_tokens=_PROMPTS * _NEW_TOKENS,
    )
    return report, written


@torch.no_grad()
def _run_in_llama_cpp(
    file: Path, native: Any, rows: torch.Tensor, tokenizer: Any, release: str, *, exact: bool
) -> str:
    """
    Runs the file in llama.cpp on `rows`, which `native`, with the same weights, wrote; `exact` refuses what is not
    near.
    """
    wanted = native(rows[:1], use_cache=False).logits[0].float().log_softmax(-1)
    told, greedy = run_apart(
        file,
        [rows[0, :length].tolist() for length in _PREFIXES],
        count=min(100, native.config.vocab_size),
        prompt=rows[0, :_PROMPT_TOKENS].tolist(),
        new_tokens=_NEW_TOKENS,
    )
    largest = max(
        abs(value - wanted[length - 1, token].item())
        for length, found in zip(_PREFIXES, told, strict=True)
        for token, value in found.items()
    )
    equal, of = equal_tokens(greedy, rows[0, _PROMPT_TOKENS:].tolist(), tokenizer)
    # llama.cpp computes products with f16 and blocks in fewer bits than torch does.
    if exact and not largest <= _TOLERANCE * wanted.std().item():
        raise ValueError(
            f"llama.cpp ({release}) gives other log-probabilities, by {largest:.2e}; nothing is published. Please "
            "report it."
        )
    text = (
        f"in llama.cpp ({release}): log-probabilities differ by at most {largest:.2e} at {len(_PREFIXES)} lengths of "
        f"a prompt, {equal} of the {of} greedy tokens that it tells of are equal"
    )
    if equal == len(greedy) < of:  # a model that was not trained yet may write bytes that are no character
        text += "; it falls silent after those, for what is written then is no text"
    return text


def _card(config: HybridConfig, report: ExportReport) -> str:
    """A short README: what the model is, how it loads, and what was compared."""
    teacher = config.to_dict()["teacher_name_or_path"]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [hybrid, linear-attention]"]
    if teacher is not None and "/" in teacher:
        lines.append(f"base_model: {teacher}")
    lines += ["---", ""]
    kind = "in the layout of Qwen3.5" if report.layout == "qwen3_5" else "with windows"
    others = "Gated DeltaNet" if report.layout == "qwen3_5" else "softmax over a window of tokens"
    lines += [
        f"# A hybrid of {teacher or 'a softmax model'} {kind}",
        "",
        f"Softmax attention in layers {config.full_attention_layers} of {config.text_config.num_hidden_layers}, "
        f"{others} in the others; made and exported with hf_hybrid. It needs no remote code:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        "```",
        "",
        f"Exported and hybrid, both in fp32: logits over {report.tokens} tokens differ by at most "
        f"{report.largest_difference:.1e} (their standard deviation is {report.logit_std:.3g}), "
        f"{report.greedy_equal} of {report.greedy_tokens} greedy tokens are equal.",
        "",
    ]
    return "\n".join(lines)


def import_native(model: Any, *, revision: str | None = None, dtype: Any = "auto") -> HybridForCausalLM:
    """
    Returns the hybrid that an exported model is: what [`export`] wrote as `"qwen3_5"` or `"windows"`, or such a model
    of another origin that is one. It may be trained, scored and exported again.

    Args:
        model ([`PreTrainedModel`], `str` or `os.PathLike`): the model, or its folder or name on the Hub.
        revision (`str`, *optional*): branch, tag or commit of a model on the Hub.
        dtype (`torch.dtype` or `str`): of the weights of a model given by name.
    """
    if isinstance(model, str | os.PathLike):
        model = load_model(model, dtype=dtype, revision=revision)
    if model.config.model_type == "qwen3_5_text":
        return qwen3_5.hybrid_of(model)
    if model.config.model_type in windows.MODEL_TYPES and "sliding_attention" in model.config.layer_types:
        return windows.hybrid_of(model)
    raise ValueError(f"the model is a {type(model).__name__}; give one that was exported as qwen3_5 or windows.")

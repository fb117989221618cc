"""LoRA on a hybrid: targets that reach softmax and linear attention alike, and what an adapter does reach."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from hf_hybrid.modeling import HybridConfig
from hf_hybrid.modeling.modeling_hybrid import decoder_layers

from .teacher.probe import PROBE_TOKENS, probe, sound_logits


# Where a LoraConfig has no targets PEFT takes them from here, by model type: a pattern, whoever the teacher was.
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[HybridConfig.model_type] = (
    r".*\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj|query_key_value|q_gate_proj|q_a_proj|q_b_proj"
    r"|kv_a_proj_with_mqa|kv_b_proj|o_proj|out_proj|dense)"
)

MIXER_TRAINING = ("lora", "gates", "full")


@dataclass(frozen=True)
class AdapterCoverage:
    """
    Which decoder layers' attention an adapter trains a part of.

    Args:
        softmax (`dict[int, bool]`): for each layer that keeps softmax attention, whether the adapter reaches it.
        linear (`dict[int, bool]`): the same for each layer with linear attention.
    """

    softmax: dict[int, bool]
    linear: dict[int, bool]

    @property
    def missed(self) -> list[int]:
        """Indices of the layers whose attention the adapter leaves as it is, ascending."""
        return sorted(i for kind in (self.softmax, self.linear) for i, reached in kind.items() if not reached)

    def __str__(self) -> str:
        total = len(self.softmax) + len(self.linear)
        line = (
            f"the adapter reaches the attention of {total - len(self.missed)} of {total} layers: "
            f"softmax {_reached(self.softmax)}, linear {_reached(self.linear)}"
        )
        return f"{line}; it misses {self.missed}" if self.missed else line


def lora_config(model: Any, *, mixers: str = "lora", **kwargs: Any) -> LoraConfig:
    """
    Returns a `peft.LoraConfig` whose targets are the attention projections of every layer, softmax and linear, for any
    trainer that takes a `peft_config` and for `peft.get_peft_model`.

    A hybrid's projections have its teacher's names (`q_proj`, `qkv_proj`, `q_a_proj`, ...), so the targets are read
    off the model. A `LoraConfig` without targets reaches the same projections, by a pattern of the usual names.

    Args:
        model ([`HybridForCausalLM`]): the hybrid, from `hf_hybrid` or loaded with `trust_remote_code`.
        mixers (`str`, defaults to `"lora"`): what is trained of the linear layers' mixers.

            - `"lora"`: adapters on the projections that mixers share with softmax attention.
            - `"gates"`: these, and in full what only mixers have: gates, write strengths, decay projections, norms and
              convolutions. PEFT trains and stores modules in full, so raw decay parameters (`A_log`, `dt_bias`,
              `gk_bias`) are not among them.
            - `"full"`: the mixers in full, raw decay parameters included; adapters in the softmax layers only.
        **kwargs: arguments of `peft.LoraConfig`: `r`, `lora_alpha`, `use_rslora`, `use_dora`, `target_modules`, ...
            With other `target_modules`, a warning names the layers whose attention they miss.
    """
    if mixers not in MIXER_TRAINING:
        raise ValueError(f"mixers={mixers!r} is unknown; choose one of {MIXER_TRAINING}.")
    kwargs.setdefault("task_type", "CAUSAL_LM")
    saved = list(kwargs.pop("modules_to_save", None) or [])
    linear = model.linear_attention_layers
    if mixers == "gates":
        saved += mixer_modules(model)
    elif mixers == "full":
        saved += [f"layers.{i}.self_attn" for i in linear]
    _check_trainable(model, saved, mixers)
    if kwargs.get("target_modules") is None:
        kwargs["target_modules"] = lora_targets(model)
    config = LoraConfig(modules_to_save=saved or None, **kwargs)
    _warn(_coverage(model, lambda name, module: _is_trained(config, name, module)))
    return config


def lora_targets(model: Any) -> list[str]:
    """Returns the names of the attention's linear modules that softmax and linear layers share, as PEFT's targets."""
    names = set()
    for i, layer in enumerate(decoder_layers(model)):
        own = set(layer.self_attn.adopted) if i in model.linear_attention_layers else None
        for name, module in layer.self_attn.named_modules():
            if isinstance(module, nn.Linear) and (own is None or name.split(".")[0] in own):
                names.add(f"self_attn.{name}")
    return sorted(names)


def mixer_modules(model: Any) -> list[str]:
    """Returns the names of the modules that only linear attention has, as PEFT's `modules_to_save`."""
    names = set()
    for i in model.linear_attention_layers:
        mixer = decoder_layers(model)[i].self_attn
        names |= {f"self_attn.{name}" for name, _ in mixer.named_children() if name not in mixer.adopted}
    return sorted(names)


def adapter_coverage(model: Any) -> AdapterCoverage:
    """
    Returns which layers' attention the adapter on `model` reaches; a warning names those it misses. Printed, it is one
    line: `the adapter reaches the attention of 6 of 6 layers: softmax [2, 3], linear [0, 1, 4, 5]`.

    Args:
        model (`peft.PeftModel`): a hybrid with an adapter, such as a trainer's `model`.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"model is a {type(model).__name__} without an adapter; pass peft.get_peft_model(...).")
    coverage = _coverage(model.get_base_model(), lambda _, module: _has_adapter(module))
    _warn(coverage)
    return coverage


def merged(model: PeftModel) -> tuple[PreTrainedModel, str]:
    """
    Returns the model under the adapter `model`, whose weights become those with the adapter, and a note that says by
    how much its logits changed: a merged weight is rounded to the dtype of the model's.
    """
    kind = model.active_peft_config.peft_type
    before, precision = sound_logits(model)
    try:
        whole = model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError) as error:  # soft prompts, mixtures of adapters
        raise ValueError(
            f"the teacher's adapter of type {getattr(kind, 'value', kind)} cannot be merged into weights ({error}); "
            "give a teacher without one."
        ) from error
    difference = (probe(whole, precision) - before).abs().max().item()
    return (
        whole,
        f"its adapter was merged into its weights: its logits on {PROBE_TOKENS} tokens differ by {difference:.1e}",
    )


def _coverage(model: Any, reaches: Any) -> AdapterCoverage:
    kinds: tuple[dict[int, bool], dict[int, bool]] = ({}, {})
    for i, parts in enumerate(_attention_modules(model)):
        is_linear = i in model.linear_attention_layers
        kinds[is_linear][i] = any(reaches(name, module) for name, module in parts)
    return AdapterCoverage(*kinds)


def _attention_modules(model: Any) -> Iterator[list[tuple[str, nn.Module]]]:
    """For each layer, its attention and all that is in it, with their names in the model."""
    names = {module: name for name, module in model.named_modules()}
    for layer in decoder_layers(model):
        yield [(names[module], module) for module in layer.self_attn.modules()]


def _check_trainable(model: Any, saved: list[str], mixers: str) -> None:
    """Raises a `ValueError` where a module that is to be trained in full is quantised."""
    for name, module in model.named_modules():
        whole = any(name == wanted or name.endswith(f".{wanted}") for wanted in saved)
        if whole and not all(parameter.is_floating_point() for parameter in module.parameters()):
            raise ValueError(
                f"mixers={mixers!r} trains {name} in full, but it is quantised; use mixers='lora', or leave it out of "
                "the quantisation (BitsAndBytesConfig(llm_int8_skip_modules=[...]))."
            )


def _is_trained(config: LoraConfig, name: str, module: nn.Module) -> bool:
    """Whether PEFT would put LoRA on a module, or train it in full."""
    if any(name == saved or name.endswith(f".{saved}") for saved in config.modules_to_save or []):
        return True
    if config.target_modules == "all-linear":
        return isinstance(module, nn.Linear)
    if isinstance(config.target_modules, str):  # a pattern may match containers too
        return bool(check_target_module_exists(config, name)) and not list(module.children())
    return bool(check_target_module_exists(config, name))


def _has_adapter(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _reached(layers: dict[int, bool]) -> list[int]:
    return [i for i, reached in layers.items() if reached]


def _warn(coverage: AdapterCoverage) -> None:
    if coverage.missed:
        warnings.warn(
            f"{coverage}. Their attention stays as it is; hf_hybrid.lora_targets(model) names projections that all "
            "layers have.",
            UserWarning,
            stacklevel=3,
        )

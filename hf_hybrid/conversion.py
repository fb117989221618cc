"""From a softmax teacher to a hybrid that starts with all of the teacher's weights."""

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

import hf_hybrid.adapters  # noqa: F401  tells PEFT the default targets of hybrids
from hf_hybrid.modeling import HybridConfig, HybridForCausalLM
from hf_hybrid.modeling.modeling_hybrid import decoder_layers, teacher_class

from .loading import load_teacher


@dataclass
class ConversionReport:
    """What a conversion did with every tensor, by its name in the state dict, with its number of parameters."""

    teacher: str
    full_attention_layers: list[int]
    linear_attention_layers: list[int]
    copied: dict[str, int] = field(default_factory=dict)
    created: dict[str, int] = field(default_factory=dict)
    not_carried: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.teacher}: softmax attention kept in layers {self.full_attention_layers}, linear in "
            f"{self.linear_attention_layers}",
            f"  copied from the teacher: {len(self.copied)} tensors, {sum(self.copied.values()):,} parameters",
            f"  new: {len(self.created)} tensors, {sum(self.created.values()):,} parameters" + _suffixes(self.created),
            f"  not carried over: {len(self.not_carried)} tensors" + _suffixes(self.not_carried),
        ]
        return "\n".join(lines)


def _suffixes(names: Iterable[str]) -> str:
    """The distinct endings of per-layer names, e.g. ` (self_attn.A_log, self_attn.g_proj.weight)`."""
    endings = sorted({name.split(".self_attn.", 1)[1] if ".self_attn." in name else name for name in names})
    return f" ({', '.join(endings)})" if endings else ""


def convert(
    teacher: PreTrainedModel | str | os.PathLike,
    full_attention_layers: Iterable[int],
    *,
    mixer: str | Sequence[str | None] = "gated_deltanet",
    mixer_options: dict[str, Any] | None = None,
    kernel: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    model_class: type[HybridForCausalLM] = HybridForCausalLM,
) -> HybridForCausalLM:
    """
    Returns a hybrid with all of the teacher's weights, in the teacher's dtype and on its device.

    The new tensors of linear layers (gates, decay, norm) are drawn from torch's global generator; call
    `transformers.set_seed` before for the same ones again. The teacher is not changed.

    Args:
        teacher (`PreTrainedModel`, `str` or `os.PathLike`):
            The softmax model, or a Hub id or folder to load it from.
        full_attention_layers (`Iterable[int]`):
            Layers that keep softmax attention. `[]` makes all of them linear; `range(L)` keeps the teacher.
        mixer (`str` or `list[str]`, *optional*, defaults to `"gated_deltanet"`):
            The linear-attention mixer of the other layers, or a list with one name per layer of the model (None for
            a layer that keeps softmax): `"gated_deltanet"`, `"gated_linear_attention"`, `"kimi_delta_attention"` or
            `"sliding_window"`.
        mixer_options (`dict`, *optional*):
            Options of the mixers, see [`LinearAttentionOptions`]; options of one mixer alone go under its name.
        kernel (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"torch"` or `"fla"`, see [`HybridConfig`].
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether a teacher given by name may run code of its own.
        revision (`str`, *optional*):
            Branch, tag or commit of a teacher given by its name on the Hub; by default its main branch.
        model_class (`type`, *optional*, defaults to [`HybridForCausalLM`]):
            A subclass, where `mixer` is one of its own `mixers`; `examples/custom_mixer.py` makes one.

    Returns:
        [`HybridForCausalLM`]: the hybrid; its `conversion_report` ([`ConversionReport`]) says what was copied, what is
        new and what could not be carried over.

    Example:

    ```python
    >>> import hf_hybrid as hh
    >>> student = hh.convert(hh.embedded_teacher(), full_attention_layers=[1, 3])
    >>> print(student.conversion_report)

    ```
    """
    if not isinstance(teacher, PreTrainedModel):
        teacher = load_teacher(teacher, trust_remote_code=trust_remote_code, revision=revision)
    elif revision is not None:
        raise ValueError(f"revision={revision!r} belongs to a teacher given by name; this one is loaded already.")
    check_teacher(teacher)
    config = HybridConfig.from_teacher(
        teacher.config,
        full_attention_layers,
        mixer=mixer if isinstance(mixer, str) else list(mixer),
        mixer_options=mixer_options,
        kernel=kernel,
    )
    with torch.device(teacher.device):
        student = model_class._from_config(config, dtype=teacher.dtype)
    student.conversion_report = _copy_weights(teacher, student)
    if teacher.generation_config is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def check_teacher(teacher: PreTrainedModel) -> None:
    """Raises a `ValueError` that says why `teacher` cannot be converted, where it cannot."""
    if teacher.config.model_type == HybridConfig.model_type:
        raise ValueError(
            "the teacher is a hybrid already; give the softmax model that it was made from, or change which layers "
            "keep softmax with set_full_attention_layers()."
        )
    if teacher.config.get_text_config() is not teacher.config:
        raise ValueError(
            f"{type(teacher).__name__} is a composite model ({type(teacher.config).__name__}); pass its language "
            "model, a causal decoder of its own."
        )
    expected = teacher_class(teacher.config)
    if type(teacher) is not expected:
        raise ValueError(
            f"the teacher is a {type(teacher).__name__}, but {type(teacher.config).__name__} belongs to "
            f"{expected.__name__}; load it with AutoModelForCausalLM."
        )
    decoder_layers(teacher)


@torch.no_grad()
def _copy_weights(teacher: PreTrainedModel, student: HybridForCausalLM) -> ConversionReport:
    source, target = teacher.state_dict(), student.state_dict()
    copied = [name for name in source if name in target]
    mismatched = [name for name in copied if source[name].shape != target[name].shape]
    if mismatched:
        raise ValueError(
            f"{mismatched[0]} has shape {tuple(source[mismatched[0]].shape)} in the teacher and "
            f"{tuple(target[mismatched[0]].shape)} in the hybrid; the teacher's weights do not fit its own config."
        )
    for name in copied:
        target[name].copy_(source[name])
    student.tie_weights()
    return ConversionReport(
        teacher=teacher.config._name_or_path or type(teacher).__name__,
        full_attention_layers=student.full_attention_layers,
        linear_attention_layers=student.linear_attention_layers,
        copied=_sizes(source, copied),
        created=_sizes(target, [name for name in target if name not in source]),
        not_carried=_sizes(source, [name for name in source if name not in target]),
    )


def _sizes(tensors: dict[str, torch.Tensor], names: Iterable[str]) -> dict[str, int]:
    """Parameters of each of `names`; a tensor that is tied to one before it counts 0."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for name in names:
        address = tensors[name].data_ptr()
        sizes[name] = 0 if address in seen else tensors[name].numel()
        seen.add(address)
    return sizes

"""From a softmax teacher to a hybrid that starts with all of the teacher's weights, and the proof that it does."""

import contextlib
import copy
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from hf_hybrid.modeling import HybridConfig, HybridForCausalLM
from hf_hybrid.modeling.adopted_attention import QK_NORMS, with_bias
from hf_hybrid.modeling.modeling_hybrid import decoder_layers, teacher_class

from .adapters import merged
from .exporting.native import mixer_options_of
from .teacher.gguf_file import gguf_note, gguf_origin
from .teacher.loading import check_plain, check_weights, prepared_teacher
from .teacher.probe import PROBE_TOKENS, probe, sound_logits


# A teacher that does not repeat itself (atomic additions on a GPU) may differ from its copy by this many times what
# it differs from itself.
_TIMES_ITS_OWN_NOISE = 10
# Why a tensor of the teacher's attention has no place in a linear layer, by the first part of its name.
_WHY_NOT_CARRIED = {
    "sinks": "a share of the softmax",
    "indexer": "picks the tokens of a sparse softmax",
    **dict.fromkeys(QK_NORMS, "left out, as mixer_options['qk_norm'] says"),
}
_WHY_NO_BIAS = "its bias is left out, as mixer_options['projection_bias'] says"


@dataclass
class ConversionReport:
    """
    What a conversion did with every tensor, by its name in the state dict, with its number of parameters.

    Args:
        teacher (`str`): its name.
        full_attention_layers, linear_attention_layers (`list[int]`): the layers of each kind.
        copied (`dict[str, int]`): tensors that are the teacher's, bit for bit and in its dtype.
        created (`dict[str, int]`): tensors of the mixers that the teacher does not have.
        not_carried (`dict[str, int]`): tensors of layers that are linear which have a meaning for softmax alone, or
            which the mixer's options leave out.
        logit_difference (`float`): the largest difference between the teacher's logits and the hybrid's with softmax
            attention in every layer, on a few tokens. It is 0, but for teachers that do not repeat themselves.
        notes (`list[str]`): what was done to the teacher before, such as that its adapter was merged.
    """

    teacher: str
    full_attention_layers: list[int]
    linear_attention_layers: list[int]
    copied: dict[str, int] = field(default_factory=dict)
    created: dict[str, int] = field(default_factory=dict)
    not_carried: dict[str, int] = field(default_factory=dict)
    logit_difference: float | None = None
    notes: list[str] = field(default_factory=list)

    def follow(self, student: HybridForCausalLM) -> None:
        """Brings the report up to date with `student`, some of whose layers changed their kind."""
        tensors, teachers = student.state_dict(), self.copied | self.not_carried
        self.full_attention_layers = student.full_attention_layers
        self.linear_attention_layers = student.linear_attention_layers
        self.copied = {name: size for name, size in teachers.items() if name in tensors}
        self.not_carried = {name: size for name, size in teachers.items() if name not in tensors}
        self.created = _sizes(tensors, [name for name in tensors if name not in teachers])

    def __str__(self) -> str:
        lines = [
            f"{self.teacher}: softmax attention kept in layers {self.full_attention_layers}, linear in "
            f"{self.linear_attention_layers}",
            *(f"  {note}" for note in self.notes),
            f"  copied from the teacher: {len(self.copied)} tensors, {sum(self.copied.values()):,} parameters",
            f"  new: {len(self.created)} tensors, {sum(self.created.values()):,} parameters" + _suffixes(self.created),
            f"  not carried over: {len(self.not_carried)} tensors" + _suffixes(self.not_carried),
            *(
                f"    {part}: {_WHY_NOT_CARRIED.get(part, _WHY_NO_BIAS)}"
                for part in sorted({_place(name)[1] for name in self.not_carried})
            ),
        ]
        if self.logit_difference is not None:
            lines.append(
                f"  with softmax attention in every layer, its logits on {PROBE_TOKENS} tokens differ from the "
                f"teacher's by {self.logit_difference:.3g}"
            )
        return "\n".join(lines)


def _place(name: str) -> tuple[str, str]:
    """The attention that a tensor belongs to and what of it, e.g. `("model.layers.0.self_attn", "q_proj")`."""
    layer, attention, rest = name.partition(".self_attn.")
    return layer + attention.rstrip("."), rest.split(".")[0]


def _suffixes(names: Iterable[str]) -> str:
    """The distinct endings of per-layer names, e.g. ` (self_attn.A_log, self_attn.g_proj.weight)`."""
    endings = sorted({name.split(".self_attn.", 1)[1] if ".self_attn." in name else name for name in names})
    return f" ({', '.join(endings)})" if endings else ""


def convert(
    teacher: PreTrainedModel | PeftModel | str | os.PathLike,
    full_attention_layers: Iterable[int],
    *,
    mixer: str | Sequence[str | None] = "gated_deltanet",
    mixer_options: dict[str, Any] | str | None = None,
    kernel: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    gguf_file: str | None = None,
    model_class: type[HybridForCausalLM] = HybridForCausalLM,
) -> HybridForCausalLM:
    """
    Returns a hybrid with all of the teacher's weights, each in the teacher's dtype and on its device.

    It is proved before it is returned: every tensor that is copied equals its source, and with the teacher's softmax
    around them in every layer the hybrid gives the teacher's logits. A `ValueError` says where it does not.

    The new tensors of linear layers (gates, decay, norm) are drawn from torch's global generator; call
    `transformers.set_seed` before for the same ones again. The teacher is not changed.

    Args:
        teacher (`PreTrainedModel`, `peft.PeftModel`, `str` or `os.PathLike`):
            The softmax model, or a Hub id, folder or GGUF file to load it from. An adapter is merged into a copy of
            its weights; quantised weights are dequantised where the teacher is given by name. The report says so.
        full_attention_layers (`Iterable[int]`):
            Layers that keep softmax attention. `[]` makes all of them linear; `range(L)` keeps the teacher.
        mixer (`str` or `list[str]`, *optional*, defaults to `"gated_deltanet"`):
            The linear-attention mixer of the other layers, or a list with one name per layer of the model (None for
            a layer that keeps softmax): `"gated_deltanet"`, `"gated_linear_attention"`, `"kimi_delta_attention"` or
            `"sliding_window"`.
        mixer_options (`dict` or `str`, *optional*):
            Options of the mixers, see [`LinearAttentionOptions`]; options of one mixer alone go under its name. Or
            `"native"`: those with which `"gated_deltanet"` is a layer that transformers and servers have themselves,
            so that a hybrid of a family that fits can be exported.
        kernel (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"torch"` or `"fla"`, see [`HybridConfig`].
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether a teacher given by name may run code of its own.
        revision (`str`, *optional*):
            Branch, tag or commit of a teacher given by its name on the Hub; by default its main branch.
        gguf_file (`str`, *optional*):
            The GGUF file of a teacher given by a folder that holds several, or by its name on the Hub.
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
    notes: list[str] = []
    if not isinstance(mixer, str | Sequence):
        raise ValueError(f"mixer={mixer!r} is no name; pass one, or a list with one per layer.")
    if not isinstance(teacher, PreTrainedModel | PeftModel):
        teacher, notes = prepared_teacher(
            teacher, trust_remote_code=trust_remote_code, revision=revision, gguf_file=gguf_file
        )
    else:
        for name, value in (("revision", revision), ("gguf_file", gguf_file)):
            if value is not None:
                raise ValueError(f"{name}={value!r} belongs to a teacher given by name; this one is loaded already.")
        if (origin := gguf_origin(teacher.config)) is not None:
            notes.append(gguf_note(origin))
    if isinstance(teacher, PeftModel):
        check_weights(teacher)
        teacher, note = merged(copy.deepcopy(teacher))
        notes.append(note)
    check_teacher(teacher)
    check_plain(teacher)
    config = HybridConfig.from_teacher(
        teacher.config,
        full_attention_layers,
        mixer=mixer if isinstance(mixer, str) else list(mixer),
        mixer_options=mixer_options_of(mixer_options, mixer),
        kernel=kernel,
    )
    attention = decoder_layers(teacher)[0].self_attn
    dtype = next(parameter.dtype for child in attention.children() for parameter in child.parameters())
    with torch.device(teacher.device):
        student = model_class._from_config(config, dtype=dtype)
    student.conversion_report = _copy_weights(teacher, student)
    student.conversion_report.notes += notes
    student.conversion_report.logit_difference = logit_difference(teacher, student)
    other = _other_buffers(teacher, student)
    if other:
        student.conversion_report.notes.append(
            f"not the teacher's: {', '.join(other)}, which are in no checkpoint; they are as the config has them"
        )
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
    report = ConversionReport(
        teacher=teacher.config._name_or_path or type(teacher).__name__,
        full_attention_layers=student.full_attention_layers,
        linear_attention_layers=student.linear_attention_layers,
        created=_sizes(target, [name for name in target if name not in source]),
        not_carried=_sizes(source, [name for name in source if name not in target]),
    )
    _check_accounts(report, student)
    copied = [name for name in source if name in target]
    for name in copied:
        if source[name].shape != target[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(source[name].shape)} in the teacher and {tuple(target[name].shape)} in the "
                "hybrid; the teacher's weights do not fit its own config."
            )
        _give(student, name, source[name])
    student.tie_weights()
    target = student.state_dict()
    for name in copied:
        if target[name].dtype != source[name].dtype or not torch.equal(target[name], source[name].to(target[name])):
            reason = "it holds NaN" if source[name].isnan().any() else "it is tied or changed on its way"
            raise ValueError(f"{name} cannot be copied from the teacher: {reason}; load the teacher afresh.")
    report.copied = _sizes(source, copied)
    return report


def _give(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> None:
    """Makes the tensor `name` of the model a copy of `tensor`, in its dtype: models keep a few tensors in another."""
    module, _, leaf = name.rpartition(".")
    own: torch.Tensor = getattr(model.get_submodule(module), leaf)
    if own.shape == tensor.shape and own.dtype == tensor.dtype:
        own.copy_(tensor)
    else:
        own.data = tensor.to(own.device, copy=True)


def _check_accounts(report: ConversionReport, student: HybridForCausalLM) -> None:
    """Raises a `ValueError` where a new tensor is no mixer's, or one is left out that belongs to more than softmax."""
    layers, names = decoder_layers(student), {module: name for name, module in student.named_modules()}
    mixers = {names[layers[i].self_attn]: layers[i].self_attn for i in student.linear_attention_layers}
    for name in report.created:
        owner, part = _place(name)
        if owner not in mixers or part in mixers[owner].adopted:
            raise ValueError(
                f"{name} is in the hybrid, but not in the teacher, and belongs to no mixer, so it would stay random; "
                "the teacher's weights do not fit its own config."
            )
    for name in report.not_carried:
        owner, _ = _place(name)
        if owner not in mixers or name.removeprefix(f"{owner}.") not in mixers[owner].left_out:
            raise ValueError(
                f"{name} is in the teacher and has no place in the hybrid; the teacher's weights do not fit its own "
                "config."
            )


@torch.no_grad()
def logit_difference(teacher: PreTrainedModel, student: HybridForCausalLM) -> float:
    """
    Returns the largest difference between the logits of `teacher` and those of `student` with the teacher's softmax
    attention in every layer, around the student's own tensors.

    Raises a `ValueError` where it is not 0, or, for a teacher whose logits differ from call to call, not of that size.
    """
    wanted, precision = sound_logits(teacher)
    with _softmax_everywhere(student, teacher):
        difference = (probe(student, precision) - wanted).abs().max().item()
    if difference == 0:
        return difference
    noise = (probe(teacher, precision) - wanted).abs().max().item()
    if not difference <= _TIMES_ITS_OWN_NOISE * noise:
        raise ValueError(
            f"the copy is not the teacher: with softmax in every layer its logits differ by {difference:.1e} (the "
            f"teacher's from call to call by {noise:.1e}). Something of the teacher is in none of its tensors, as a "
            "replaced kernel, a hook or a patched module is; load it afresh with AutoModelForCausalLM."
        )
    return difference


@contextlib.contextmanager
def _softmax_everywhere(student: HybridForCausalLM, teacher: PreTrainedModel) -> Iterator[None]:
    """
    Puts the teacher's attention into the linear layers of `student`, around the mixers' tensors, and gives it the
    teacher's buffers where they are in no checkpoint.
    """
    layers, text_config = decoder_layers(student), student.config.text_config
    mixers = {i: layers[i].self_attn for i in student.linear_attention_layers}
    kinds = text_config.layer_types
    buffers = {name: student.get_buffer(name) for name in _other_buffers(teacher, student)}
    values = {name: buffer.data for name, buffer in buffers.items()}
    for i, attention in enumerate(layer.self_attn for layer in decoder_layers(teacher)):
        if i in mixers:
            layers[i].self_attn = _around(attention, mixers[i])
    for name, buffer in buffers.items():
        buffer.data = teacher.get_buffer(name).to(buffer.device)
    text_config.layer_types = list(student.config.softmax_layer_types)
    try:
        yield
    finally:
        for i, mixer in mixers.items():
            layers[i].self_attn = mixer
        for name, buffer in buffers.items():
            buffer.data = values[name]
        text_config.layer_types = kinds


def _other_buffers(teacher: PreTrainedModel, student: HybridForCausalLM) -> list[str]:
    """
    Names of the buffers that no checkpoint has and that differ: `teacher.to(torch.bfloat16)` rounds its rotary angles,
    and those of the hybrid, like those of any model that is loaded, are not rounded.
    """
    stored, theirs = student.state_dict().keys(), dict(teacher.named_buffers())
    return [
        name
        for name, own in student.named_buffers()
        if name in theirs
        and name not in stored
        and (own.dtype != theirs[name].dtype or not torch.equal(own, theirs[name].to(own.device)))
    ]


def _around(attention: torch.nn.Module, mixer: Any) -> torch.nn.Module:
    """The teacher's `attention` with what `mixer` has of its parameters and modules in the place of its own."""
    shell: Any = copy.copy(attention)
    for kind in ("_parameters", "_buffers", "_modules"):
        own = getattr(mixer, kind)
        # A module for softmax alone is replaced by an empty one of another class.
        shell.__dict__[kind] = {
            name: own[name] if type(own.get(name)) is type(value) else value
            for name, value in getattr(attention, kind).items()
        }
    modules: Any = attention._modules
    for name, theirs in modules.items():
        if f"{name}.bias" in mixer.left_out:
            shell._modules[name] = with_bias(shell._modules[name], theirs.bias)
    # Someone else's: hooks that record, a forward that moves tensors between devices.
    shell.__dict__ |= {"_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    shell.__dict__.pop("forward", None)
    return shell


def _sizes(tensors: dict[str, torch.Tensor], names: Iterable[str]) -> dict[str, int]:
    """Parameters of each of `names`; a tensor that is tied to one before it counts 0."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for name in names:
        address = tensors[name].data_ptr()
        sizes[name] = 0 if address in seen else tensors[name].numel()
        seen.add(address)
    return sizes

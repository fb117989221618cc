"""Softmax attention for a layer that was linear: is a model the hybrid's teacher, and a copy of its attention."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .adopted_attention import AdoptedAttention


# Settings that decide nothing in a layer: what the model is called, its vocabulary, how it is run, and how long a row
# it was made for, which its rotary embedding knows and not its attention.
_OTHERWISE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "layer_types",
        "max_position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "vocab_size",
    }
)


def check_is_teacher(teacher: Any, config: Any, expected: type) -> None:
    """
    Raises a `ValueError` where `teacher` cannot be the model that a hybrid was made from.

    Args:
        teacher: the model that is given for it.
        config (`HybridConfig`): the hybrid's.
        expected (`type`): the class of the hybrid's teacher.
    """
    pass_it = "pass the softmax model that the hybrid was made from"
    found: Any = type(teacher)
    if not isinstance(teacher, PreTrainedModel):
        raise ValueError(f"the teacher is a {found.__name__}, no model of transformers; {pass_it}, without adapters.")
    if teacher.config.model_type == config.model_type:
        raise ValueError(f"the teacher is a hybrid itself; {pass_it}.")
    if not isinstance(teacher, expected):
        raise ValueError(f"the teacher is a {found.__name__}, the hybrid's is a {expected.__name__}; {pass_it}.")
    if teacher.config.to_dict().get("quantization_config") or getattr(teacher, "is_quantized", False):
        raise ValueError(f"the teacher is quantised, and its weights are no softmax layer's; {pass_it}, dequantised.")
    own, theirs = _settings(config.text_config), _settings(teacher.config)
    kinds = config.softmax_layer_types, getattr(teacher.config, "layer_types", None) or config.softmax_layer_types
    if list(kinds[0]) != list(kinds[1]):
        own["layer_types"], theirs["layer_types"] = kinds
    different = [name for name in sorted(own.keys() | theirs.keys()) if own.get(name) != theirs.get(name)]
    if different:
        named = ", ".join(f"{name} ({theirs.get(name)}, the hybrid's {own.get(name)})" for name in different[:4])
        raise ValueError(f"the teacher's config differs from the hybrid's in {named}; {pass_it}.")


def _settings(config: Any) -> dict[str, Any]:
    """What of a config decides a layer, whether it was read from a file or made here."""
    settings = _plain(config.to_dict())
    return {key: value for key, value in settings.items() if key not in _OTHERWISE and value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def check_fits(attention: nn.Module, mixer: nn.Module, layer: int) -> None:
    """Raises a `ValueError` where the teacher's `attention` is not what `mixer` took its tensors from."""
    if not isinstance(mixer, AdoptedAttention):
        raise ValueError(
            f"the mixer of layer {layer} is inside a {type(mixer).__name__}; merge or unload the adapter before the "
            "layer becomes softmax."
        )
    found, own = attention.state_dict(keep_vars=True), mixer.state_dict(keep_vars=True)
    on_disk = sorted(name for name, tensor in found.items() if tensor.is_meta)
    if on_disk:
        raise ValueError(
            f"{on_disk[0]} of the teacher's layer {layer} is not in memory (offloaded to the CPU or a disk); "
            "load the teacher whole."
        )
    if type(attention) is not mixer.teacher_class:
        raise ValueError(
            f"the teacher's attention in layer {layer} is a {type(attention).__name__}, the hybrid's was a "
            f"{mixer.teacher_class.__name__}; pass the softmax model that the hybrid was made from."
        )
    theirs = {name: x for name, x in found.items() if name not in mixer.left_out}
    adopted = {name: x for name, x in own.items() if name.partition(".")[0] in mixer.adopted}
    shapes = [{name: tuple(x.shape) for name, x in tensors.items()} for tensors in (theirs, adopted)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            raise ValueError(
                f"{name} of layer {layer} has shape {shapes[0].get(name)} in the teacher and {shapes[1].get(name)} in "
                "the hybrid; pass the softmax model that it was made from, without adapters."
            )
    narrow = sorted(name for name, x in theirs.items() if not x.is_floating_point() and own[name].is_floating_point())
    if narrow:
        raise ValueError(
            f"{narrow[0]} of the teacher's layer {layer} is {theirs[narrow[0]].dtype}: its weights are quantised; "
            "pass the softmax model that the hybrid was made from, dequantised."
        )


def copied_attention(attention: nn.Module, like: torch.Tensor) -> nn.Module:
    """
    A copy of the teacher's `attention` with weights of its own, on the device and in the dtype of `like`, but for
    tensors that the teacher keeps in another dtype than its projections. Hooks on the teacher stay with the teacher.
    """
    usual = next(parameter for child in attention.children() for parameter in child.parameters()).dtype
    twin = _bare_copy(attention)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data = tensor.data.to(like.device, like.dtype if tensor.dtype == usual else tensor.dtype)
    return twin.requires_grad_(True)


def _bare_copy(module: nn.Module) -> nn.Module:
    twin = module.__class__.__new__(module.__class__)
    nn.Module.__init__(twin)
    fresh = set(vars(twin)) - {"training", "_non_persistent_buffers_set"}
    for name, value in vars(module).items():
        # A config is shared and replaced by the caller; what wraps the forward of a module belongs to that module.
        if name not in fresh and name not in ("forward", "_hf_hook", "_old_forward"):
            twin.__dict__[name] = value if name == "config" else copy.deepcopy(value)
    for name, parameter in module._parameters.items():
        own = None if parameter is None else nn.Parameter(parameter.detach().clone(), parameter.is_floating_point())
        twin.register_parameter(name, own)
    for name, buffer in module._buffers.items():
        twin._buffers[name] = None if buffer is None else buffer.detach().clone()
    for name, child in module._modules.items():
        twin.add_module(name, None if child is None else _bare_copy(child))
    return twin

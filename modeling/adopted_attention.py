"""A teacher's attention without its softmax: projections, norms, positions, gates and output stay the teacher's code.

Attention in the library makes one call in its middle, `attention_interface(module, q, k, v, ...)`. Here that call goes
to the mixer, so what comes before it (fused or latent projections, q/k norms of any placement, biases, rotary
embeddings of any kind, layers without positions) and after it (gates, sub-norms, the output projection) is right for
each family without a line about any of them.

Shapes: B batch, T tokens, H query heads, G key/value heads of the teacher, D key and V value width of a head.
"""

import copy
import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from .configuration_hybrid import ATTENTION, attention_view
from .library import CACHE_NAMES, take_cache


_OUTPUTS = ("o_proj", "out_proj", "dense")
_INPUTS = ("q_proj", "q_a_proj", "qkv_proj", "query_key_value", "q_gate_proj")
_GATES = ("gate_proj", "g_proj", "q_gate_proj")
# What belongs to the softmax alone: it is not carried over, and conversion reports it.
_SOFTMAX_PARAMETERS = ("sinks",)
_SOFTMAX_MODULES = ("indexer",)
SOFTMAX_ALONE = (*_SOFTMAX_PARAMETERS, *_SOFTMAX_MODULES)
# The norms of queries and keys, by their names in the library's families.
QK_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
_REFUSED = {
    "lambda_q1": "subtracts two softmaxes (differential attention), which one recurrence does not replace",
    "dt_proj": "learns a mask over its values, which a recurrence has no use for",
    "is_kv_shared_layer": "reads the keys and values of an earlier layer",
    "store_full_length_kv": "keeps its keys and values for later layers, which would miss them",
}


# What [`positional_names`] found, which compiled steps read: of a `functools.cache` they would trace the function.
_POSITIONAL_NAMES: dict[Any, list[str]] = {}


@dataclass
class AttentionCall:
    """One call of a mixer: what its [`AdoptedAttention.attend`] needs beside q, k and v."""

    hidden_states: torch.Tensor
    cache: Cache | None = None
    padding_mask: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    captured: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    capture: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    done: bool = False


def _to_mixer(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    attention_call: AttentionCall | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What the teacher's code calls in the place of softmax: q `[B, H, T, D]` to the output `[B, T, H, V]`."""
    if attention_call is None or attention_call.done:
        raise RuntimeError(
            f"{module.teacher_class.__name__} calls its attention without the arguments it was given, or more than "
            "once; keep its layers in full_attention_layers."
        )
    attention_call.done = True
    return module.replace_softmax(query, key, value, attention_call, kwargs), None


# The library's own way to run another attention; nothing but a mixer's view of its config names it.
AttentionInterface.register(ATTENTION, _to_mixer)


class NoIndexer(nn.Module):
    """In the place of a module that picks tokens for a sparse softmax: picks none."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        return None


class AdoptedAttention(nn.Module):
    """
    The teacher's attention module with its parameters, names and code, but [`attend`] in the place of its softmax.

    Calling the class gives an instance of a class that also inherits the teacher's attention class.

    Args:
        attention (`nn.Module`): the teacher's `self_attn` of this layer. Its modules and parameters are taken over.
        layer_idx (`int`): the layer's index.
    """

    mixer_class: Any = None
    teacher_class: Any = None
    hidden_size: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    value_dim: int
    fused_gate: bool
    adopted: tuple[str, ...]
    # Tensors of the teacher's attention that have no place here, by their names in its state dict.
    left_out: frozenset[str]

    def __new__(cls, attention: nn.Module | None = None, *args: Any, **kwargs: Any) -> "AdoptedAttention":
        # Copying calls this on a class that is already specialised, without a module.
        if attention is None or cls.teacher_class is not None:
            return super().__new__(cls)
        own: Any = cls
        teacher: Any = type(attention)
        return super().__new__(_specialise(own, teacher))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied as what its class is made of, which has no name of its own to be found by."""
        state: Any = super().__reduce_ex__(2)
        return (_new, (self.mixer_class, self.teacher_class), *state[2:])

    def __init__(self, attention: Any, layer_idx: int) -> None:
        nn.Module.__init__(self)  # not the teacher's, which would build its modules a second time
        self._refuse(attention, layer_idx)
        for key, value in vars(attention).items():
            if key[0] != "_" and key != "forward":  # its settings; not the hooks that someone put on it
                self.__dict__[key] = value
        for name in ("_parameters", "_buffers", "_modules"):
            self.__dict__[name] = dict(getattr(attention, name))
        self.layer_idx = layer_idx
        self.config = attention_view(attention.config)
        self._read_layout(layer_idx)
        self.left_out = frozenset(name for name in attention.state_dict() if name.split(".")[0] in SOFTMAX_ALONE)
        for name in _SOFTMAX_PARAMETERS:
            if self._parameters.pop(name, None) is not None:
                setattr(self, name, torch.empty(0))  # the teacher's code still hands it on
        for name in _SOFTMAX_MODULES:
            if name in self._modules:
                self._modules[name] = NoIndexer()
        self.adopted = (*self._parameters, *self._modules)

    @staticmethod
    def _refuse(attention: Any, layer_idx: int) -> None:
        """Raises a `ValueError` where the module cannot do without its softmax, or does not hand it over."""
        kind = f"{type(attention).__name__} of layer {layer_idx}"
        forward = inspect.unwrap(type(attention).forward)
        present = (name for name in _REFUSED if getattr(attention, name, None) is not None)
        reasons = [_REFUSED[name] for name in present if getattr(attention, name) is not False]
        if "get_interface" not in forward.__code__.co_names:
            reasons.append("computes its softmax itself, not through transformers' AttentionInterface")
        elif not forward.__code__.co_flags & inspect.CO_VARKEYWORDS:
            reasons.append("takes no further keyword arguments, so padding and packing cannot reach a mixer")
        if "cache_offset" in inspect.signature(forward).parameters:  # Dory, Inkling 2 Loop
            reasons.append("runs several times a token and caches each pass apart, where a recurrence has one state")
        if reasons:
            raise ValueError(
                f"{kind} cannot become linear attention: it {'; it '.join(reasons)}. Keep the layer in "
                "full_attention_layers."
            )

    def _read_layout(self, layer_idx: int) -> None:
        """Reads the heads off the teacher's modules: names differ between families, the widths do not lie."""
        own: Any = self
        modules = {name: module for name, module in own._modules.items() if hasattr(module, "weight")}
        inputs = next((modules[name] for name in _INPUTS if name in modules), None)
        output = next((modules[name] for name in _OUTPUTS if name in modules), None)
        kind = f"{self.teacher_class.__name__} of layer {layer_idx}"
        if inputs is None or output is None:
            raise ValueError(
                f"{kind} cannot become linear attention: it has children {list(own._modules)}; the mixers know an "
                f"input projection {_INPUTS} and an output {_OUTPUTS}. Keep the layer in full_attention_layers."
            )
        self.hidden_size = inputs.in_features
        self.head_dim = int(getattr(own, "qk_head_dim", None) or own.head_dim)
        count = int(getattr(own, "num_heads", None) or own.config.num_attention_heads)
        # Some families project a gate beside each head's query: twice the width that comes out of attention.
        self.fused_gate = "q_proj" in modules and own.q_proj.out_features == 2 * count * self.head_dim
        self.fused_gate = self.fused_gate and output.in_features == count * self.head_dim
        if "q_proj" in modules and not self.fused_gate:
            self.num_heads = own.q_proj.out_features // self.head_dim
        else:
            self.num_heads = count
        if "k_proj" in modules:
            self.num_kv_heads = own.k_proj.out_features // self.head_dim
        elif "kv_b_proj" in modules:  # keys and values come out of a latent, already for each head
            self.num_kv_heads = self.num_heads
        else:
            self.num_kv_heads = self.num_heads // int(getattr(own, "num_key_value_groups", 1))
        self.value_dim = output.in_features // self.num_heads
        if self.num_heads * self.value_dim != output.in_features or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{kind} has {self.num_heads} heads of width {self.head_dim}, {self.num_kv_heads} for keys, and an "
                f"output projection of {output.in_features} inputs, which is no grouping of heads. Keep the layer in "
                "full_attention_layers."
            )

    def leave_out(self, *, qk_norm: bool, bias: bool) -> None:
        """
        Drops the norms of q and k, and the biases of the projections, from this module and not from the one that it
        was made of. [`left_out`] names what went.
        """
        own: Any = self
        gone: set[str] = set()
        for name, module in list(own._modules.items()):
            if qk_norm and name in QK_NORMS and module is not None:
                gone |= {f"{name}.{tensor}" for tensor in module.state_dict()}
                own._modules[name] = nn.Identity()
            elif bias and isinstance(module, nn.Linear) and module.bias is not None:
                gone.add(f"{name}.bias")
                own._modules[name] = with_bias(module, None)
        self.left_out |= gone

    @property
    def has_output_gate(self) -> bool:
        """Whether the teacher gates its attention's output, which goes on here as it did there."""
        return self.fused_gate or any(name in self.adopted for name in _GATES)

    def check_heads(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raises where the teacher's q, k, v `[B, H or G, T, D or V]` are not of the widths that were read off."""
        found = (*query.shape[1::2], *key.shape[1::2], *value.shape[1::2], key.shape[2])
        tokens = query.shape[2]
        expected = (self.num_heads, self.head_dim, self.num_kv_heads, self.head_dim, self.num_kv_heads, self.value_dim)
        if found != (*expected, tokens):
            raise RuntimeError(
                f"{self.teacher_class.__name__} gives q {tuple(query.shape)}, k {tuple(key.shape)} and v "
                f"{tuple(value.shape)}; expected heads and widths {expected} over {tokens} tokens. Keep its layers in "
                "full_attention_layers."
            )

    def replace_softmax(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        settings: dict[str, Any],
    ) -> torch.Tensor:
        """From q, k, v as the library hands them to its softmax, `[B, H or G, T, D or V]`, to `[B, T, H, V]`."""
        self.check_heads(query, key, value)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if call.capture:
            call.settings = settings
            call.captured = query, *expand_groups(key, value, query.shape[2])
            return value.new_zeros(*query.shape[:3], value.shape[-1])
        return self.attend(query, key, value, call).contiguous()

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """From the teacher's q `[B, T, H, D]`, k `[B, T, G, D]` and v `[B, T, G, V]` to the output `[B, T, H, V]`."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        padding_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Args:
            hidden_states: `[B, T, hidden]`.
            padding_mask: `[B, T]`, 1 for tokens and 0 for padding; None when nothing is padding.
            seq_idx: `[B, T]`, the document each token of a packed row belongs to; None when rows are not packed.
            args, kwargs: what else the teacher's attention takes, among it the library's cache, which the teacher's
                code does not get to see.

        Returns:
            What the teacher's attention returns: the output `[B, T, hidden]` first, None for the attention weights.
        """
        kwargs = dict(zip(positional_names(self.teacher_class)[1:], args, strict=False)) | kwargs
        row = kwargs.get("attention_mask")
        if isinstance(row, dict):  # see `hand_over`
            kwargs["attention_mask"] = row["attention_mask"]
            padding_mask = row.get("padding_mask") if padding_mask is None else padding_mask
            seq_idx = row.get("seq_idx") if seq_idx is None else seq_idx
        if hidden_states.dtype == torch.float32 and torch.is_autocast_enabled(hidden_states.device.type):
            # Once: autocast would do it for each of the projections, and once more for each in the backward pass.
            hidden_states = hidden_states.to(torch.get_autocast_dtype(hidden_states.device.type))
        if padding_mask is not None:
            padding_mask = padding_mask.to(hidden_states.dtype)
        call = AttentionCall(hidden_states, take_cache(kwargs), padding_mask, seq_idx)
        return self._teacher_forward(call, **kwargs)

    def project(
        self, hidden_states: torch.Tensor, position_embeddings: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The teacher's q, k `[B, T, H, D]` and v `[B, T, H, V]`: projected, normed, rotated, expanded to all heads.
        Softmax attention over them, followed by the teacher's output projection, is the teacher's attention.
        """
        if position_embeddings is not None:
            kwargs["position_embeddings"] = position_embeddings
        return self.capture(hidden_states, **kwargs)[0]

    def capture(
        self, hidden_states: torch.Tensor, **kwargs: Any
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, Any]]:
        """What [`project`] returns, and what else the teacher's code gives its softmax by name (`scaling`, ...)."""
        call = AttentionCall(hidden_states, capture=True)
        self._teacher_forward(call, **kwargs)
        if call.captured is None:
            raise RuntimeError(f"{self.teacher_class.__name__} did not call its attention; it cannot be linear.")
        return call.captured, call.settings

    def _teacher_forward(self, call: AttentionCall, **kwargs: Any) -> Any:
        names = positional_names(self.teacher_class)
        kwargs |= {name: None for name in CACHE_NAMES if name in names}  # keys and values are not cached
        if "attention_mask" in names:
            kwargs.setdefault("attention_mask", None)
        output = self.teacher_class.forward(self, call.hidden_states, attention_call=call, **kwargs)
        if not call.done:
            raise RuntimeError(
                f"{self.teacher_class.__name__} did not go through transformers' AttentionInterface; keep its layers "
                "in full_attention_layers."
            )
        return output


def with_bias(projection: nn.Module, bias: nn.Parameter | None) -> nn.Module:
    """`projection` with its own weight, shared, and another bias or none."""
    twin = copy.copy(projection)
    twin.__dict__["_parameters"] = projection._parameters | {"bias": bias}
    return twin


def expand_groups(key: torch.Tensor, value: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v `[B, T, G, .]` for all H heads, as activations: repeating a projection's rows would scramble heads."""
    groups = num_heads // key.shape[2]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)


def hand_over(layer: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """
    Runs before a decoder layer's forward. `padding_mask` and `seq_idx` go on to the layer's mixer in the place of the
    attention mask, together with it: every layer hands that to its attention, but not every one further keywords. They
    are arguments of the call and nothing else, so that calls in other threads do not meet them, and a layer that is
    computed again in the backward pass gets them again.
    """
    row = {name: kwargs[name] for name in ("padding_mask", "seq_idx") if name in kwargs}
    if not row:
        return args, kwargs
    kwargs = {name: value for name, value in kwargs.items() if name not in row}
    # An adapter that trains the whole mixer wraps it.
    if any(isinstance(module, AdoptedAttention) for module in layer.self_attn.modules()):
        layer_class: Any = type(layer)
        place = positional_names(layer_class).index("attention_mask")
        if place < len(args):
            args = (*args[:place], row | {"attention_mask": args[place]}, *args[place + 1 :])
        else:
            kwargs["attention_mask"] = row | {"attention_mask": kwargs.get("attention_mask")}
    return args, kwargs


def takes_keywords(module: Any) -> bool:
    """Whether the module's forward takes keyword arguments that it does not name."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def positional_names(module_class: Any) -> list[str]:
    """Names of the arguments of a module's forward, in order."""
    if module_class not in _POSITIONAL_NAMES:
        names = [name for name in inspect.signature(module_class.forward).parameters if name != "self"]
        _POSITIONAL_NAMES[module_class] = names
    return _POSITIONAL_NAMES[module_class]


@functools.cache
def _specialise(cls: Any, teacher: Any) -> Any:
    positional_names(teacher)  # looked up by now where a step is compiled
    namespace = {"__module__": cls.__module__, "__doc__": cls.__doc__, "mixer_class": cls, "teacher_class": teacher}
    return type(cls.__name__, (cls, teacher), namespace)


def _new(cls: Any, teacher: Any) -> Any:
    """A mixer of class `cls` without any state, for a teacher's attention class."""
    specialised = _specialise(cls, teacher)
    return specialised.__new__(specialised)

"""Configuration of a hybrid: the teacher's own config, nested, and which layers became linear attention."""

import copy
import functools
import re
from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs


LINEAR_ATTENTION = "linear_attention"

# Written to the hybrid's config by trainers and users, but read by the backbone and the caches from the nested config.
_MIRRORED = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "layer_types",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
        "output_router_logits",
        "_attn_implementation_internal",
        "_experts_implementation_internal",
    }
)
# Read from either config, so kept in both.
_SET_ON_BOTH = frozenset({"output_attentions", "output_hidden_states"})
_AUTO_CLASSES = {
    "AutoModel": "modeling_hybrid.HybridModel",
    "AutoModelForCausalLM": "modeling_hybrid.HybridForCausalLM",
}
_NOT_INHERITED = frozenset({"text_config", "per_layer_config", "auto_map"})


class HybridConfig(PreTrainedConfig):
    """
    Configuration of a [`HybridForCausalLM`].

    Args:
        text_config (`PreTrainedConfig` or `dict`):
            The teacher's config. Its `layer_types` are the hybrid's: `"linear_attention"` for a converted layer, the
            teacher's own type (`"full_attention"`, `"sliding_attention"`, ...) for a layer that keeps softmax.
        softmax_layer_types (`list[str]`, *optional*):
            What each layer is when it keeps softmax attention; defaults to the teacher's own types, which for the
            layers that are linear already are those that a config of the teacher's class has by itself.
        mixer (`str` or `list[str]`, *optional*, defaults to `"gated_deltanet"`):
            Name of the linear-attention mixer, or one name per layer (None for a layer that keeps softmax).
        mixer_options (`dict`, *optional*):
            Options of the mixers, see [`LinearAttentionOptions`]; those left out keep their defaults. An option holds
            for all mixers, unless it stands in a dict under the name of one:
            `{"rope": False, "gated_deltanet": {"short_convolution": 4}}`.
        kernel (`str`, *optional*, defaults to `"auto"`):
            `"auto"` runs fla's kernels on CUDA tensors where fla can be used and our torch forms everywhere else;
            `"torch"` and `"fla"` force one (a forced `"fla"` raises the reason when it cannot run). It may be set at
            any time and is not saved.
        teacher_name_or_path (`str`, *optional*):
            Where the teacher came from; for the reader and the model card only, never loaded. What is saved of a path
            is its last part.
        teacher_revision (`str`, *optional*):
            The teacher's commit on the Hub; None for a teacher that did not come from there.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> teacher_config = LlamaConfig(num_hidden_layers=4)
    >>> HybridConfig.from_teacher(teacher_config, full_attention_layers=[2]).layer_types
    ['linear_attention', 'linear_attention', 'full_attention', 'linear_attention']

    ```
    """

    model_type = "hf_hybrid"
    sub_configs = {"text_config": AutoConfig}
    base_model_tp_plan = None

    text_config: Any = None
    softmax_layer_types: list[str] = field(default_factory=list)
    mixer: str | list[str | None] = "gated_deltanet"
    mixer_options: dict[str, Any] | None = None
    kernel: str = "auto"
    teacher_name_or_path: str | None = None
    teacher_revision: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama", **(self.text_config or {})})
        # The library would set its default on the nested config, which may have an implementation already.
        for name in ("attn_implementation", "experts_implementation"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.text_config, f"_{name}")
        super().__post_init__(**kwargs)
        if not self.softmax_layer_types:
            self.softmax_layer_types = _softmax_layer_types(self.text_config)
        if LINEAR_ATTENTION in self.softmax_layer_types:
            raise ValueError(
                f"softmax_layer_types={self.softmax_layer_types} names a linear layer; the teacher must be a softmax "
                "model. Pass the teacher's own layer types."
            )
        if any(kind.startswith("hybrid") for kind in self.softmax_layer_types):
            raise ValueError(
                f"{type(self.text_config).__name__} has layers of type {sorted(set(self.softmax_layer_types))} that "
                "keep a recurrent state beside their softmax; only softmax attention can be converted."
            )
        if self.text_config.__dict__.get("layer_types") is None:
            self.text_config.layer_types = list(self.softmax_layer_types)
        self.mixer_options = dict(self.mixer_options or {})
        if not isinstance(self.mixer, str) and len(self.mixer) != self.text_config.num_hidden_layers:
            raise ValueError(
                f"mixer lists {len(self.mixer)} names, but the model has {self.text_config.num_hidden_layers} decoder "
                "layers; pass one name, or one per layer (None for a layer that keeps softmax)."
            )
        check_kernel(self.kernel)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the library's, but refuses the config of another model, whose settings would be lost without a word."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"this is the config of a {model_type!r} model, not of a hybrid; convert the model with "
                "hf_hybrid.convert, or pass config=HybridConfig.from_teacher(its config, full_attention_layers)."
            )
        # Earlier releases stored it.
        stored = {key: value for key, value in config_dict.items() if key != "kernel"}
        return super().from_dict(stored, **kwargs)

    @classmethod
    def from_teacher(
        cls, teacher_config: PreTrainedConfig, full_attention_layers: Any, **kwargs: Any
    ) -> "HybridConfig":
        """Returns the config of a hybrid of `teacher_config` that keeps softmax in `full_attention_layers`."""
        text_config = copy.deepcopy(teacher_config)
        text_config._name_or_path = ""  # else trainers that rebuild a reference model from it would load the teacher
        softmax_layer_types = get_layer_types_and_kwargs(text_config)[0]
        config = cls(text_config=text_config, softmax_layer_types=softmax_layer_types, **kwargs)
        config.full_attention_layers = full_attention_layers
        config.teacher_name_or_path = kwargs.get("teacher_name_or_path") or teacher_config._name_or_path or None
        config.teacher_revision = kwargs.get("teacher_revision") or text_config.__dict__.pop("_commit_hash", None)
        return config

    def to_dict(self) -> dict[str, Any]:
        """
        As the library's, with a teacher's folder by its name, for the path is nobody else's business; without the
        kernel, which is a choice of whoever runs the model; and with both of the classes that the Auto classes load.
        """
        name = self.teacher_name_or_path
        stored = super().to_dict() | {"teacher_name_or_path": None if name is None else _without_path(str(name))}
        auto_map = stored.get("auto_map") or {}
        # The library names the class that is saved. A subclass from another file has mixers that `HybridModel` lacks.
        if any(auto_map.get(auto) == own for auto, own in _AUTO_CLASSES.items()):
            stored["auto_map"] = auto_map | _AUTO_CLASSES
        return {key: value for key, value in stored.items() if key != "kernel"}

    @property
    def full_attention_layers(self) -> list[int]:
        """Indices of the layers that keep softmax attention, ascending."""
        return [i for i, kind in enumerate(self.text_config.layer_types) if kind != LINEAR_ATTENTION]

    @full_attention_layers.setter
    def full_attention_layers(self, layers: Any) -> None:
        keep = check_layers(layers, self.text_config.num_hidden_layers)
        self.text_config.layer_types = [
            kind if i in keep else LINEAR_ATTENTION for i, kind in enumerate(self.softmax_layer_types)
        ]

    @property
    def linear_attention_layers(self) -> list[int]:
        """Indices of the layers with linear attention, ascending."""
        return [i for i, kind in enumerate(self.text_config.layer_types) if kind == LINEAR_ATTENTION]

    @property
    def layer_mixers(self) -> list[str | None]:
        """The name of each layer's mixer, whether or not the layer is linear now."""
        if isinstance(self.mixer, str):
            return [self.mixer] * self.text_config.num_hidden_layers
        return list(self.mixer)

    def options_of(self, mixer: str | None) -> dict[str, Any]:
        """The options that hold for the mixer of that name."""
        options = self.mixer_options or {}
        common = {key: value for key, value in options.items() if not isinstance(value, dict)}
        return common | (options.get(mixer) or {} if mixer else {})

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "kernel":
            check_kernel(value)
        nested = isinstance(self.__dict__.get("text_config"), PreTrainedConfig)
        of_the_teacher = nested and (key in _MIRRORED or self._is_a_setting_of_the_teacher(key))
        if of_the_teacher or (nested and key in _SET_ON_BOTH):
            setattr(self.text_config, key, value)
        if not of_the_teacher:
            super().__setattr__(key, value)

    def __getattr__(self, key: str) -> Any:
        text_config = self.__dict__.get("text_config")
        private = key.startswith("_") and key not in _MIRRORED
        if private or self._is_not_inherited(key) or not isinstance(text_config, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {key!r}")
        return getattr(text_config, key)

    def _is_not_inherited(self, key: str) -> bool:
        # While it builds a config, the library processes the rotary settings that it finds: those of the nested config
        # would be processed twice.
        return key in _NOT_INHERITED or (key == "rope_parameters" and "_post_init_done" not in self.__dict__)

    def _is_a_setting_of_the_teacher(self, key: str) -> bool:
        """Whether the teacher's class declares `key` and this one does not: only the backbone would read it."""
        teacher: Any = type(self.text_config)
        own, theirs = type(self).__dataclass_fields__, teacher.__dataclass_fields__
        return key not in own and (key in theirs or key in teacher.attribute_map) and not self._is_not_inherited(key)


def _without_path(name: str) -> str:
    """`name` where it has the form of an id on the Hub, otherwise its last part."""
    is_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)
    return name if is_id else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _softmax_layer_types(text_config: PreTrainedConfig) -> list[str]:
    """The type of each layer with softmax attention, whether or not `text_config.layer_types` has it linear."""
    kinds = get_layer_types_and_kwargs(text_config)[0]
    if LINEAR_ATTENTION not in kinds:
        return kinds
    settings = {name: value for name, value in text_config.to_dict().items() if name != "layer_types"}
    own = get_layer_types_and_kwargs(type(text_config).from_dict(settings))[0]
    return [own[i] if kind == LINEAR_ATTENTION else kind for i, kind in enumerate(kinds)]


def check_kernel(kernel: Any) -> None:
    """Raises a `ValueError` where `kernel` is none of those that there are."""
    if kernel not in ("auto", "torch", "fla"):
        raise ValueError(f"kernel={kernel!r} is unknown; choose 'auto', 'torch' or 'fla'.")


def check_layers(layers: Any, num_layers: int) -> list[int]:
    """Returns `layers` sorted as plain integers, or raises a `ValueError` that says what is wrong with them."""
    try:
        layers = list(layers)  # a generator can be read once
        given = [int(layer) for layer in layers]
        exact = all(int(layer) == layer and not isinstance(layer, bool) for layer in layers)
    except (TypeError, ValueError):
        exact, given = False, []
    if not exact:
        raise ValueError(
            f"full_attention_layers={layers!r} is not a list of layer indices; pass integers, e.g. [2, 5]."
        )
    outside = [layer for layer in given if not 0 <= layer < num_layers]
    if outside:
        raise ValueError(
            f"full_attention_layers={outside} names a layer outside 0..{num_layers - 1}; the model has {num_layers} "
            "decoder layers. Pass indices in that range."
        )
    if len(set(given)) != len(given):
        raise ValueError(f"full_attention_layers={given} names a layer twice; pass each index once.")
    return sorted(given)


class _BackboneView:
    """
    What the teacher's backbone sees as its config: the nested config itself, but with the teacher's own layer types.

    The backbone looks up masks and rotary embeddings by layer type and knows no `"linear_attention"`; caches and masks
    for generation are built from the nested config, which does. The view shares the nested config's `__dict__`, so
    whatever is set on one (attention implementation, `use_cache`, vocabulary size) is set on both.
    """

    __slots__ = ("_hybrid",)

    _hybrid: HybridConfig

    @property
    def layer_types(self) -> list[str]:
        return self._hybrid.softmax_layer_types

    @layer_types.setter
    def layer_types(self, value: list[str]) -> None:
        raise AttributeError("the backbone's layer_types are the teacher's; set layer_types on the hybrid's config")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves the hybrid's config: a backbone that is saved alone has linear layers all the same."""
        self._hybrid.save_pretrained(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> PreTrainedConfig:
        return backbone_view(copy.deepcopy(self._hybrid, memo))

    def __reduce__(self) -> tuple:
        return backbone_view, (self._hybrid,)


@functools.cache
def _view_class(config_class: Any) -> Any:
    # Without the plan for attention: tensor parallelism shards q_proj, k_proj, ... by name, and would cut mixers'
    # heads. Every rank computes attention whole; the rest of the teacher's plan goes on from its output as before.
    plan = config_class.base_model_tp_plan
    if plan is not None:
        plan = {name: style for name, style in plan.items() if "self_attn" not in name.split(".")}
    namespace = {"__module__": __name__, "base_model_tp_plan": plan}
    return type(config_class.__name__, (_BackboneView, config_class), namespace)


def backbone_view(config: HybridConfig) -> PreTrainedConfig:
    """Returns a live view of `config.text_config` whose `layer_types` are `config.softmax_layer_types`."""
    config_class: Any = type(config.text_config)
    view = object.__new__(_view_class(config_class))
    object.__setattr__(view, "__dict__", config.text_config.__dict__)
    object.__setattr__(view, "_hybrid", config)
    return view


# What the library is asked for in the place of softmax. Its table of names is one for the process, in which there may
# be several copies of this module: that of the package, and those that came with checkpoints of other releases. Each
# has a name of its own there, for as long as it is loaded.
ATTENTION = f"hf_hybrid_linear_{id(_BackboneView)}"


@functools.cache
def _attention_view_class(config_class: Any) -> Any:
    def deepcopy(view: Any, memo: dict) -> Any:
        return attention_view(copy.deepcopy(view._viewed, memo))

    namespace = {
        "__module__": __name__,
        "__slots__": ("_viewed",),
        "__deepcopy__": deepcopy,
        "__reduce__": lambda view: (attention_view, (view._viewed,)),
        "_attn_implementation": property(lambda view: ATTENTION),
    }
    return type(config_class.__name__, (config_class,), namespace)


def attention_view(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns a live view of `config`, for one attention module, whose attention implementation is a mixer."""
    config_class: Any = type(config)
    view = object.__new__(_attention_view_class(config_class))
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "_viewed", config)
    if isinstance(config, _BackboneView):
        object.__setattr__(view, "_hybrid", config._hybrid)
    return view

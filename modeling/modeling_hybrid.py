"""A hybrid of softmax and linear attention, built around the teacher's own transformers class.

`HybridForCausalLM(config)` is the teacher's `...ForCausalLM` with `layers[i].self_attn` replaced where
`config.layer_types[i] == "linear_attention"`; `HybridModel(config)` is the same without the head. Everything else
(embeddings, norms, MLPs or experts, soft-capping, scaling, tied heads, parameter names) is the teacher's code. Nothing
here knows a model family by name.

The way of a call, from the outside in, and where each step stands:

    model(ids)                      the teacher's `...ForCausalLM.forward`, in a class made by `_specialise`, below
    _prepare_backbone_inputs        below, before the backbone: padding mask, documents of packed rows, the cache
    backbone, layer                 the teacher's own `...Model` and decoder layers
    hand_over                       adopted_attention.py, before each layer: gives its attention what was prepared
    AdoptedAttention.forward        adopted_attention.py: runs the teacher's attention code, whose softmax is replaced
    _to_mixer                       adopted_attention.py: what that code calls in the softmax's place
    LinearAttention.attend          linear_attention.py: convolution, state from the cache, norm and gate
    GatedDeltaNet.mix               gated_deltanet.py, or another mixer's file: decay, write strength
    gated_delta_rule                kernels.py: fla's kernel or the torch form in ops_*.py
"""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from .adopted_attention import AdoptedAttention, hand_over, positional_names, takes_keywords
from .configuration_hybrid import LINEAR_ATTENTION, HybridConfig, backbone_view, check_layers
from .gated_deltanet import GatedDeltaNet
from .gated_linear_attention import GatedLinearAttention
from .kimi_delta_attention import KimiDeltaAttention
from .library import cache_argument, take_cache
from .mixer import Mixer
from .packing import document_positions, packed_documents, padding_mask_of, positions_that_part
from .restoring import check_fits, check_is_teacher, copied_attention
from .sliding_window_attention import SlidingWindowAttention
from .state_cache import check_cache, count_tokens_in


MIXERS: dict[str, type[Mixer]] = {
    "gated_deltanet": GatedDeltaNet,
    "gated_linear_attention": GatedLinearAttention,
    "kimi_delta_attention": KimiDeltaAttention,
    "sliding_window": SlidingWindowAttention,
}


class HybridPreTrainedModel(PreTrainedModel):
    """
    What a hybrid is with or without its head: the teacher's layers, some of them with linear attention.

    Calling a subclass gives an instance of a class that also inherits the teacher's own, see [`of_the_teacher`].
    """

    config: HybridConfig
    # Names of mixers in a config. A subclass adds its own: `mixers = MIXERS | {"mine": Mine}`.
    mixers: ClassVar[dict[str, type[Mixer]]] = MIXERS
    # What the conversion did with each tensor, for a model that was converted here and not loaded.
    conversion_report: Any = None
    # A recurrent state cannot be rolled back: the library then refuses assisted decoding. An instance is asked.
    _is_stateful = True
    # For whoever asks the class before there is a teacher; an instance has its teacher's own, see `_specialise`.
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # the chunked recurrences, by which a prompt runs, are left out of graphs

    def __new__(cls, config: HybridConfig | None = None, *args: Any, **kwargs: Any) -> Self:
        # Copying and unpickling call this on a class that is already specialised, without a config.
        if config is None or issubclass(cls, _Specialised):
            return super().__new__(cls)
        own: Any = cls
        return super().__new__(_specialise(own, *own.of_the_teacher(config.text_config)))

    @classmethod
    def of_the_teacher(cls, text_config: Any) -> tuple[Any, Any]:
        """The library's class that a hybrid of such a teacher inherits, and the one whose forward it has."""
        raise NotImplementedError

    def _become_hybrid(self, config: HybridConfig) -> None:
        """Makes a hybrid of the teacher's modules, which are there; called at the end of the constructor."""
        self.config = config
        self.name_or_path = config.name_or_path  # adapters record it as their base model
        backbone, layers = decoder(self), decoder_layers(self)
        for i in self.linear_attention_layers:
            layers[i].self_attn = self._mixer(i, layers[i].self_attn)
        for module in (backbone, *layers):
            if not takes_keywords(module):
                raise ValueError(
                    f"{type(module).__name__} takes no further keyword arguments, so padding and packing cannot reach "
                    "linear attention; this model cannot be converted."
                )
            positional_names(type(module))  # looked up by now where a step is compiled
        backbone.register_forward_pre_hook(_prepare_backbone_inputs, with_kwargs=True)
        for layer in layers:
            layer.register_forward_pre_hook(hand_over, with_kwargs=True)
        self._keep_in_fp32_modules_strict = self._kept_in_fp32()
        self.post_init()

    @property
    def linear_attention_layers(self) -> list[int]:
        """Indices of the layers with linear attention, ascending."""
        return self.config.linear_attention_layers

    @property
    def full_attention_layers(self) -> list[int]:
        """Indices of the layers that keep softmax attention, ascending."""
        return self.config.full_attention_layers

    def set_full_attention_layers(self, layers: Iterable[int], teacher: PreTrainedModel | None = None) -> None:
        """
        Changes, in place, which layers keep softmax attention.

        A layer that becomes softmax gets the teacher's attention, weights included. A layer that becomes linear takes
        over the projections it has now, and new tensors are initialised. The other layers are left as they are.

        Args:
            layers (`Iterable[int]`): indices of the layers to keep softmax.
            teacher (`PreTrainedModel`, *optional*): needed where a linear layer becomes softmax: the model that the
                hybrid was made from.
        """
        check_layers_are_as_configured(decoder(self))
        own = decoder_layers(self)
        keep = check_layers(layers, len(own))
        now = set(self.full_attention_layers)
        restored, linearised = sorted(set(keep) - now), sorted(now - set(keep))
        if restored and teacher is None:
            raise ValueError(f"layers {restored} are linear now; pass teacher= to restore their softmax attention.")
        if restored:
            check_is_teacher(teacher, self.config, teacher_class(self.config.text_config))
            sources = decoder_layers(cast(PreTrainedModel, teacher))
            for i in restored:
                check_fits(sources[i].self_attn, own[i].self_attn, i)
        for i in restored:
            attention: Any = copied_attention(sources[i].self_attn, like=_projection(own[i].self_attn))
            attention.config = decoder(self).config
            own[i].self_attn = attention.train(self.training)
        for i in linearised:
            projection = _projection(own[i].self_attn)
            with torch.device(projection.device):
                mixer = self._mixer(i, own[i].self_attn)
            self._init_new_modules(mixer)
            own[i].self_attn = _cast(mixer, projection.dtype).train(self.training)
        self.config.full_attention_layers = keep
        self._keep_in_fp32_modules_strict = self._kept_in_fp32()
        if self.conversion_report is not None:
            self.conversion_report.follow(self)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's; what a config says that was changed beside the model could not be loaded again."""
        check_layers_are_as_configured(decoder(self))
        return super().state_dict(*args, **kwargs)

    def _kept_in_fp32(self) -> set[str]:
        """Names of what is never loaded in half precision: the teacher's, and the decay parameters of the mixers."""
        layers, names = decoder_layers(self), set(type(self)._keep_in_fp32_modules_strict or ())
        return names.union(*(layers[i].self_attn.decay_parameters for i in self.linear_attention_layers))

    def _mixer(self, i: int, attention: nn.Module) -> Mixer:
        name = self.config.layer_mixers[i]
        if name is None:
            known = sorted(self.mixers)
            raise ValueError(f"mixer names none for layer {i}, which is to be linear; name one of {known}.")
        return self.mixers[name](attention, self.config, i)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        # The library initialises by the teacher's rules, which know neither raw parameters nor identity convolutions.
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Mixer):
                    module.init_weights()

    @torch.no_grad()
    def _init_new_modules(self, mixer: Mixer) -> None:
        for name, child in mixer.named_children():
            if name not in mixer.adopted:
                for module in child.modules():
                    self._initialize_weights(module)
        mixer.init_weights()


class HybridModel(HybridPreTrainedModel):
    """
    A hybrid without its head: hidden states instead of logits. The backbone is the module that it is in the teacher's
    `...ForCausalLM`, under the same name, so both load each other's checkpoints.

    Args:
        config (`HybridConfig`): as for [`HybridForCausalLM`].
    """

    def __init__(self, config: HybridConfig) -> None:
        check_mixers(config, self.mixers)
        super().__init__(backbone_view(config))
        backbone = backbone_class(config.text_config)(backbone_view(config))
        setattr(self, self.base_model_prefix, backbone)
        self._become_hybrid(config)

    @classmethod
    def of_the_teacher(cls, text_config: Any) -> tuple[Any, Any]:
        """What the teacher's `...Model` and `...ForCausalLM` have in common: names and rules, but no modules."""
        backbone = backbone_class(text_config)
        common = next(base for base in teacher_class(text_config).__mro__ if base in backbone.__mro__)
        return common, backbone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's forward; see the library's docs of the teacher's `...Model`."""
        return self.base_model(*args, **kwargs)


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """
    A causal language model in which some layers keep the teacher's softmax attention and the rest are linear.

    Calling the class gives an instance of a class that also inherits the teacher's own `...ForCausalLM`.

    Args:
        config (`HybridConfig`): which layers are linear, which mixer, and the teacher's config.
    """

    # Called with a folder and a repository's name before that folder is pushed. The package writes its card; the code
    # in a checkpoint leaves the library's.
    write_card: ClassVar[Callable[..., None] | None] = None
    _tokenizer_to_push: Any = None

    def __init__(self, config: HybridConfig) -> None:
        check_mixers(config, self.mixers)
        super().__init__(backbone_view(config))
        self._become_hybrid(config)

    @classmethod
    def of_the_teacher(cls, text_config: Any) -> tuple[Any, Any]:
        return teacher_class(text_config), teacher_class(text_config)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """The teacher's forward, which takes its place in an instance; see the library's docs of the teacher."""
        raise NotImplementedError  # only its signature is ever used

    def _prepare_cache_for_generation(  # type: ignore[override]
        self: Any, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        base: Any = super()
        base._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = take_cache(dict(model_kwargs))
        if isinstance(cache, Cache):
            count_tokens_in(cache)

    def _prefill(  # type: ignore[override]
        self: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        """
        The library's, which compiles a prompt that is read in parts, too. Here each part would be many graphs, for the
        chunked recurrences are in none, and the first would make the states in the memory of a CUDA graph.
        """
        if self.linear_attention_layers:
            generation_config = copy.copy(generation_config)
            generation_config.disable_compile = True
        base: Any = super()
        return base._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refused where a layer is linear: the library pages keys and values, and has no pages for states."""
        if self.linear_attention_layers:
            raise ValueError(
                f"continuous batching cannot hold the recurrent states of layers {self.linear_attention_layers}; use "
                "generate(). In TRL, leave use_transformers_continuous_batching off."
            )
        base: Any = super()
        return base.init_continuous_batching(*args, **kwargs)

    def push_to_hub(  # type: ignore[override]
        self: Any, repo_id: str, *, tokenizer: Any = None, **kwargs: Any
    ) -> Any:
        """
        Pushes weights, code and a model card to the Hub, in one commit.

        The card says what the config says and holds no measurements; `hf-hybrid push` adds those of a run. A card that
        somebody wrote is kept.

        Args:
            repo_id (`str`): name of the repository, with its owner.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): pushed in the same commit.
            kwargs: see [`~transformers.PreTrainedModel.push_to_hub`].
        """
        self._tokenizer_to_push = tokenizer
        try:
            base: Any = super()
            return base.push_to_hub(repo_id, **kwargs)
        finally:
            self._tokenizer_to_push = None

    def _upload_modified_files(  # type: ignore[override]
        self: Any, working_dir: Any, repo_id: str, files_timestamps: Any, **kwargs: Any
    ) -> Any:
        # The library's two ways to push meet here, with its own card in the folder already.
        if self._tokenizer_to_push is not None:
            self._tokenizer_to_push.save_pretrained(working_dir)
        if self.write_card is not None:
            self.write_card(str(working_dir), repo_id)
        base: Any = super()
        return base._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self: Any,
        input_ids: torch.Tensor,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """
        The library's, but that a model without softmax layers gets no mask that grows from step to step, by which a
        compiled step would be compiled again: no past token is looked at.
        """
        base: Any = super()
        inputs: dict[str, Any] = base.prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        is_step = isinstance(ids, torch.Tensor) and ids.shape[1] == 1
        if is_step and isinstance(mask, torch.Tensor) and mask.ndim == 2 and not self.full_attention_layers:
            inputs["attention_mask"] = mask[:, -1:].clone()
        return inputs

    @staticmethod
    def create_masks_for_generate(
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """
        Leaves the 2-D mask to the backbone: only it knows whether it wants one mask or one for each layer type. For a
        step with a static cache it is as wide as the cache, or a compiled step would be compiled for every new width.
        """
        cache = take_cache(kwargs)
        if attention_mask is None or inputs_embeds is None or inputs_embeds.shape[1] != 1 or cache is None:
            return attention_mask
        unused = cache.get_max_length() - attention_mask.shape[1]
        if unused <= 0:
            return attention_mask
        # Linear layers look at the last column. Softmax layers look at none that is to come, whatever it says.
        return torch.cat([attention_mask, attention_mask[:, -1:].expand(-1, unused)], dim=1)


# What the classes say of themselves in general and an instance in particular.
_OF_THE_TEACHER = (
    "base_model_prefix",
    "supports_gradient_checkpointing",
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_attention_backend",
    # Told from the source of a class's module, which for a hybrid is this file.
    "_can_set_attn_implementation",
    "_can_set_experts_implementation",
)


class _Specialised:
    """Marks the classes that [`HybridPreTrainedModel`] makes of a subclass and a teacher's class."""

    _made_of: ClassVar[tuple[Any, Any, Any]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied as what its class is made of, which has no name of its own to be found by."""
        state: Any = super().__reduce_ex__(2)
        return (_new, self._made_of, *state[2:])


def check_mixers(config: HybridConfig, mixers: dict[str, type[Mixer]] = MIXERS) -> None:
    """Raises a `ValueError` where `config` names a mixer that is not in `mixers`, or options that its mixers lack."""
    names = {name for name in config.layer_mixers if name is not None}
    for name in sorted(names, key=str):
        if name not in mixers:
            raise ValueError(
                f"mixer={name!r} is unknown; choose one of {sorted(mixers)}, or use the subclass of HybridForCausalLM "
                "that has it among its mixers."
            )
        mixers[name].options_class.from_dict(config.options_of(name), name)
    for name, options in (config.mixer_options or {}).items():
        if isinstance(options, dict) and name not in names:
            raise ValueError(f"mixer_options has options for {name!r}, but the model's mixers are {sorted(names)}.")


def teacher_class(text_config: Any) -> Any:
    """The library's `...ForCausalLM` for the teacher's config."""
    mapping: Any = AutoModelForCausalLM._model_mapping
    if type(text_config) not in mapping:
        raise ValueError(
            f"text_config is a {type(text_config).__name__}, for which transformers has no causal language model; "
            "pass the config of a decoder such as Llama, Qwen or Mistral."
        )
    return mapping[type(text_config)]


def backbone_class(text_config: Any) -> Any:
    """The library's `...Model` for the teacher's config: what its `...ForCausalLM` has below the head."""
    mapping: Any = AutoModel._model_mapping
    if type(text_config) not in mapping:
        raise ValueError(
            f"transformers has no model without a head for a {type(text_config).__name__}; load the checkpoint with "
            "AutoModelForCausalLM and take its base_model."
        )
    return mapping[type(text_config)]


def _call_of(backbone: Any) -> Any:
    """[`HybridModel.forward`] with the signature of the backbone's, which tells callers what they may pass."""

    @functools.wraps(backbone.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    return forward


@functools.cache
def _specialise(cls: Any, teacher: Any, called: Any) -> Any:
    # The name and module are what save_pretrained writes into config.json and where it finds the code to copy.
    namespace = {"__module__": cls.__module__, "__doc__": cls.__doc__, "config_class": cls.config_class}
    namespace |= {name: getattr(teacher, name) for name in _OF_THE_TEACHER}
    namespace["forward"] = called.forward if called is teacher else _call_of(called)
    # A copy that keeps every softmax layer does what its teacher does: assisted decoding too.
    namespace["_is_stateful"] = property(lambda model: bool(model.linear_attention_layers))
    return type(cls.__name__, (cls, teacher, _Specialised), namespace | {"_made_of": (cls, teacher, called)})


def _new(cls: Any, teacher: Any, called: Any) -> Any:
    """A hybrid of class `cls` without any state, for a teacher's class."""
    specialised = _specialise(cls, teacher, called)
    return specialised.__new__(specialised)


def decoder(model: PreTrainedModel) -> Any:
    """The module of `model` that holds its decoder layers and calls them one by one."""
    count = getattr(model.config, "num_hidden_layers", None)
    for module in (model.base_model, *model.base_model.modules()):
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) == count and hasattr(layers[0], "self_attn"):
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of {count or 'its'} decoder layers with a self_attn and cannot be "
        f"converted; its base model has children {[name for name, _ in model.base_model.named_children()]}."
    )


def decoder_layers(model: PreTrainedModel) -> Sequence[Any]:
    """The decoder layers of `model`, each of which must have a `self_attn`."""
    layers = decoder(model).layers
    for i, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None)
        if not isinstance(attention, nn.Module) or isinstance(attention, nn.ModuleList):
            raise ValueError(
                f"{type(model).__name__} has no single self_attn in decoder layer {i} and cannot be converted; the "
                f"layer has children {[name for name, _ in layer.named_children()]}."
            )
    return cast(Sequence[Any], layers)


def check_layers_are_as_configured(backbone: Any) -> None:
    """Raises a `ValueError` where the config says of a layer of `backbone` that it is linear or not, and it is not."""
    kinds = backbone.config._hybrid.text_config.layer_types
    for i, layer in enumerate(backbone.layers):
        expected = kinds[i] == LINEAR_ATTENTION
        if isinstance(layer.self_attn, AdoptedAttention) == expected:
            continue
        # An adapter that trains the whole mixer wraps it.
        if any(isinstance(module, AdoptedAttention) for module in layer.self_attn.modules()) != expected:
            raise ValueError(
                f"the config says that layer {i} has {kinds[i]}, but it has {type(layer.self_attn).__name__}: "
                "changing the config does not change the model. Use set_full_attention_layers(layers, teacher)."
            )


def _projection(attention: nn.Module) -> torch.Tensor:
    """A weight of `attention` that has the model's dtype, which decay parameters may not have."""
    return next(parameter for child in attention.children() for parameter in child.parameters())


def _cast(mixer: Mixer, dtype: torch.dtype) -> Mixer:
    """`mixer` in `dtype`, except for the decay parameters, which are never in half precision."""
    kept = {name: getattr(mixer, name).data for name in mixer.decay_parameters}
    mixer.to(dtype)
    for name, data in kept.items():
        getattr(mixer, name).data = data.to(torch.promote_types(dtype, torch.float32))
    return mixer


# What flash attention takes for the boundaries of documents, rather than their positions.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def _prepare_backbone_inputs(backbone: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """
    Runs before the backbone's forward, whoever calls it, and hands the mixers what they need beside the teacher's own
    arguments: `padding_mask` and, for packed rows, `seq_idx`. Makes the cache, which the backbone would make for
    softmax layers only.
    """
    backbone_class: Any = type(backbone)
    kwargs = dict(zip(positional_names(backbone_class), args, strict=False)) | kwargs
    inputs = kwargs.get("inputs_embeds")
    if inputs is None:
        inputs = kwargs.get("input_ids")
    if inputs is None:
        return (), kwargs  # the backbone raises its own error
    config = backbone.config._hybrid.text_config
    check_layers_are_as_configured(backbone)
    linear = backbone.config._hybrid.linear_attention_layers
    if not linear:
        return (), kwargs  # a copy of the teacher: its backbone knows what to do, with packed rows and caches too
    cache_name = cache_argument(backbone_class)
    mask, cache = kwargs.get("attention_mask"), take_cache(kwargs)
    kwargs[cache_name] = cache
    padding_mask = padding_mask_of(config, inputs, mask, cache)
    cu_seq_lens, seq_idx = kwargs.get("cu_seq_lens_q"), kwargs.pop("seq_idx", None)
    position_ids = kwargs.get("position_ids")
    if cu_seq_lens is not None or seq_idx is not None:
        position_ids = document_positions(inputs, position_ids, cu_seq_lens, seq_idx, padding_mask)
        kwargs["position_ids"] = position_ids
    seq_idx = packed_documents(position_ids, padding_mask, cached=cache is not None)
    if seq_idx is not None:
        # The library looks for packed rows only where there is neither a mask nor a cache; rows that are packed
        # are never continued, and a mask of ones says nothing.
        kwargs |= {"attention_mask": None, cache_name: None, "use_cache": False}
        kwargs["seq_idx"] = seq_idx.expand(inputs.shape[0], -1)
        if padding_mask is not None:
            kwargs["padding_mask"] = padding_mask
            kwargs["position_ids"] = positions_that_part(cast(torch.Tensor, position_ids), padding_mask)
            for name in _BOUNDARIES:  # they count the padding in
                kwargs.pop(name, None)
        return (), kwargs
    use_cache = config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
    if use_cache and cache is None:
        if backbone.training and getattr(backbone, "gradient_checkpointing", False):
            kwargs["use_cache"] = False  # or a backbone that would have one without gradients makes it itself
        else:
            kwargs[cache_name] = cache = DynamicCache(config=config)
    if isinstance(cache, Cache):
        check_cache(cache, linear)
        count_tokens_in(cache)
    if padding_mask is not None:
        kwargs["padding_mask"] = padding_mask
    return (), kwargs

"""Stage 1: each linear layer learns its teacher layer's attention output, on the teacher's own hidden states."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import DistributedType
from torch.utils.checkpoint import checkpoint

from hf_hybrid.modeling.adopted_attention import positional_names
from hf_hybrid.modeling.library import take_cache
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.modeling.packing import packed_documents, without_mask

from .distillation import final_hidden_states
from .hybrid_trainer import mixer_parameters
from .losses import alignment_loss, sum_in_parts
from .precision import Precision
from .sharding import uses_fsdp2
from .teacher_trainer import TeacherTrainer, TeacherTrainingArguments, call_through


@dataclass
class AlignmentConfig(TeacherTrainingArguments):
    """
    Arguments of [`AlignmentTrainer`].

    Differs from its parent in the settings of arXiv 2505.03005, step 1: `learning_rate=1e-3` and
    `lr_scheduler_type="cosine"`. The paper trains on 100M tokens in rows of 512.

    Args:
        layerwise_backward (`bool`):
            Whether a layer's gradients are computed as soon as its loss is there, so that the activations of one mixer
            are held and not of all: about a quarter of the memory. Losses and gradients are the same. With FSDP2 and
            fp16 it is refused.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the mixers."})
    layerwise_backward: bool = field(
        default=False, metadata={"help": "Whether the backward pass follows each layer, not all of them."}
    )
    lr_scheduler_type: Any = field(default="cosine", metadata={"help": "Schedule of the learning rate."})


class AlignmentTrainer(TeacherTrainer):
    """
    Trains the linear mixers only, teacher-forced: every mixer sees the hidden states that its layer has in the teacher
    and learns that layer's attention output. All layers are learned in one pass, independently of one another.

    The loss is the mean over linear layers of [`~hf_hybrid.trainers.losses.alignment_loss`].
    """

    args: AlignmentConfig
    compiles_softmax = False  # each step puts hooks on the teacher's, which would be compiled anew
    _tag_names = ["hf-hybrid", "alignment"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.accelerator.unwrap_model(self.model).linear_attention_layers:
            raise ValueError(
                "the student keeps softmax attention in every layer, so there is nothing to align; convert it with "
                "fewer full_attention_layers, e.g. []."
            )
        if self.args.layerwise_backward and (uses_fsdp2(self.accelerator) or self.args.fp16):
            # FSDP2 takes gradients that are asked for within a forward pass for the backward pass, and those of fp16
            # would not be scaled up before they are rounded.
            what = "fp16" if self.args.fp16 else "FSDP2"
            raise ValueError(
                f"layerwise_backward is on, and does not go with {what}; switch it off, or use bf16 and DDP."
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        teacher = self.accelerator.unwrap_model(self.teacher)
        with _only_mixers_trainable(self.model), _one_backbone(self.model, teacher, self.accelerator):
            return super().train(*args, **kwargs)

    def student_loss(self, student: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self.args.layerwise_backward and torch.is_grad_enabled():
            return self._layer_by_layer(student, inputs)
        losses = self.layer_losses(student, inputs)
        return torch.stack(list(losses.values())).mean()

    def _layer_by_layer(self, student: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """The same mean, each layer's gradients computed with its loss."""
        teacher = self.accelerator.unwrap_model(self.teacher)
        trained = [parameter for parameter in mixer_parameters(student) if parameter.requires_grad]
        count = len(student.linear_attention_layers)

        def parts() -> Iterator[torch.Tensor]:
            for _, wanted, output, mask in mixer_outputs(student, teacher, inputs, self.precision):
                yield alignment_loss(wanted, output, mask) / count

        return sum_in_parts(parts, trained)

    def layer_losses(self, student: Any, inputs: dict[str, Any]) -> dict[int, torch.Tensor]:
        """The alignment loss of each linear layer, by its index."""
        teacher = self.accelerator.unwrap_model(self.teacher)
        outputs = mixer_outputs(student, teacher, inputs, self.precision)
        return {i: alignment_loss(wanted, output, mask) for i, wanted, output, mask in outputs}


def mixer_outputs(
    student: Any, teacher: Any, inputs: dict[str, Any], precision: Precision
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """
    Yields, for each linear layer of `student`, its index, the output of the teacher's attention there, that of its
    mixer on the same hidden states, both `[B, T, H]`, and the padding mask `[B, T]` or None.

    Without autocast a mixer gets what its layer gets in the teacher in the dtype of its own weights.
    """
    layers = decoder_layers(student)
    for i, given, wanted, padding_mask, seq_idx in teacher_attention(student, teacher, inputs, precision):
        attention = layers[i].self_attn
        if precision.autocast is None:
            given = in_dtype_of(attention, given)
        mixer = partial(attention, **given, padding_mask=padding_mask, seq_idx=seq_idx)
        with precision.running(wanted.device):
            if student.is_gradient_checkpointing and torch.is_grad_enabled():
                output = checkpoint(mixer, use_reentrant=False)[0]
            else:
                output = mixer()[0]
        yield i, wanted, output, padding_mask


def in_dtype_of(mixer: torch.nn.Module, given: Any) -> Any:
    """
    What an attention module is given, with hidden states and rotary embeddings in the dtype of the mixer's
    projections; what has no such dtype as it is.
    """
    if isinstance(given, dict):
        return {name: in_dtype_of(mixer, value) for name, value in given.items()}
    if isinstance(given, tuple):
        return tuple(in_dtype_of(mixer, part) for part in given)
    if not isinstance(given, torch.Tensor) or not given.is_floating_point():
        return given
    weights = (module.weight for module in mixer.modules() if isinstance(module, torch.nn.Linear))
    return given.to(next((weight.dtype for weight in weights if weight.is_floating_point()), given.dtype))


def teacher_attention(
    student: Any, teacher: Any, inputs: dict[str, Any], precision: Precision
) -> Iterator[tuple[int, dict[str, Any], torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
    """
    Yields, for each linear layer of `student`, its index, what the teacher's attention there is given, by argument
    name, and returns `[B, T, H]`, and what its mixer needs to know of the row: the padding mask `[B, T]` and the
    document of each token `[B, T]`, or None.
    """
    padding_mask = inputs.get("attention_mask")
    if padding_mask is not None and bool(padding_mask.all()):
        padding_mask = None
    seq_idx = packed_documents(inputs.get("position_ids"), padding_mask)
    seen = _attention_of(teacher, student.linear_attention_layers, without_mask(inputs), precision)
    for i in list(seen):
        given, wanted = seen.pop(i)  # not held here any longer than whoever is asking holds it
        yield i, given, wanted, padding_mask, seq_idx


@torch.no_grad()
def _attention_of(
    teacher: Any, layers: list[int], inputs: dict[str, Any], precision: Precision
) -> dict[int, tuple[dict[str, Any], torch.Tensor]]:
    """What each of the teacher's `layers` gave to its attention, by argument name, and got back."""
    modules = decoder_layers(teacher)
    seen: dict[int, tuple[dict[str, Any], torch.Tensor]] = {}

    def record(i: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            kind: Any = type(module)
            given = dict(zip(positional_names(kind), args, strict=False)) | kwargs
            take_cache(given)
            seen[i] = (given, output[0])

        return hook

    handles = [modules[i].self_attn.register_forward_hook(record(i), with_kwargs=True) for i in layers]
    try:
        call_through(teacher, teacher, final_hidden_states, teacher, inputs, precision)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextlib.contextmanager
def _one_backbone(student: Any, teacher: Any, accelerator: Any) -> Iterator[None]:
    """
    Lets the student's frozen parameters be the teacher's tensors where they are equal: only the teacher's layers run,
    so the student's own copy of them would lie in memory unused. On leaving, the student has its own again.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        yield  # they hold a part of each parameter, in their own storage
        return
    theirs = dict(teacher.named_parameters())
    shared: list[tuple[torch.nn.Parameter, torch.dtype]] = []
    for name, parameter in student.named_parameters():
        same = theirs.get(name)
        if parameter.requires_grad or same is None or same.shape != parameter.shape or same.device != parameter.device:
            continue
        if torch.equal(same.to(parameter.dtype), parameter):
            shared.append((parameter, parameter.dtype))
            parameter.data = same.data
    try:
        yield
    finally:
        for parameter, dtype in shared:
            parameter.data = parameter.data.to(dtype, copy=True)


@contextlib.contextmanager
def _only_mixers_trainable(student: Any) -> Iterator[None]:
    """Freezes everything but the mixers, so that DDP waits for no gradient that never comes; undone on leaving."""
    mixers = {id(parameter) for parameter in mixer_parameters(student)}
    frozen = {name for name, p in student.named_parameters() if p.requires_grad and id(p) not in mixers}

    def train(wanted: bool) -> None:
        for name, parameter in student.named_parameters():  # by name: FSDP2 puts others in their place
            if name in frozen:
                parameter.requires_grad_(wanted)

    train(False)
    try:
        yield
    finally:
        train(True)

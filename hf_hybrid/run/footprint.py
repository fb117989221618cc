"""What training takes of a device, from a teacher's shapes alone: parameters, and bytes by docs/memory.md's model."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_hybrid.modeling import HybridConfig, HybridForCausalLM
from hf_hybrid.trainers.hybrid_trainer import mixer_parameters

from .recipe import Recipe


# Floats of activations that one token leaves in one layer, in units of the widths that they have: what the norms,
# the residuals and the projections keep. Set so that docs/memory.md's measurements come out to a tenth.
_OF_HIDDEN, _OF_MLP, _OF_HEADS = 10, 4, 8
# Logits of both models, their gradients and what the loss makes of them, six times 64 MiB; or all at once, if less.
_LOGITS = 64 * 2**20
_COPIES_OF_LOGITS = 6
# The same of a mixer that is aligned, in units of its heads' width, and what the alignment takes beside.
_OF_MIXER = 6
_OF_ALIGNMENT = 128 * 2**20


@dataclass(frozen=True)
class Footprint:
    """
    The sizes of a teacher and of its all-linear student.

    Args:
        layers, hidden, mlp, heads, vocabulary (`int`): the teacher's; `heads` is all query heads' width together.
        positions (`int`, *optional*): the longest row that the teacher takes; None where its config says none.
        teacher_parameters, student_parameters, mixer_parameters (`int`): numbers in each; tied ones count once.
        teacher_bytes (`int`): of one number of the teacher, in the dtype that a recipe loads it in.
    """

    layers: int
    hidden: int
    mlp: int
    heads: int
    vocabulary: int
    positions: int | None
    teacher_parameters: int
    student_parameters: int
    mixer_parameters: int
    teacher_bytes: int

    def stage_bytes(self, name: str, rows: int, block: int, *, half: bool, checkpointing: bool) -> int:
        """
        Bytes on the device at the peak of a step of a training stage.

        Args:
            name (`str`): align, score, distill or finetune.
            rows, block (`int`): rows at once and their length, in tokens.
            half (`bool`): autocast to 2 bytes; weights, gradients and AdamW's two moments stay in fp32.
            checkpointing (`bool`): layers are computed again in the backward pass.
        """
        number, tokens = 2 if half else 4, rows * block
        width = _OF_HIDDEN * self.hidden + _OF_MLP * self.mlp + _OF_HEADS * self.heads
        teacher = 0 if name == "finetune" else self.teacher_bytes * self.teacher_parameters
        if name == "align":  # the student's frozen weights are the teacher's; each mixer is trained by itself
            trained, layers = self.mixer_parameters, 1 if checkpointing else self.layers
            rest = tokens * number * (width + layers * _OF_MIXER * self.heads) + _OF_ALIGNMENT
        else:
            trained, layers = self.student_parameters, 1 if checkpointing else self.layers
            rest = tokens * number * (layers * width + self.layers * self.hidden)
            rest += _COPIES_OF_LOGITS * min(_LOGITS, 4 * tokens * self.vocabulary)
        if half:  # autocast's copies of the weights
            rest += 2 * trained
        return teacher + 16 * trained + rest


def footprint(teacher: PreTrainedModel, dtype: torch.dtype, recipe: Recipe | None = None) -> Footprint:
    """The [`Footprint`] of `teacher`, which may be empty; `dtype` is what it is loaded in. Raises as [`convert`]."""
    mixer = {} if recipe is None else {"mixer": recipe.mixer, "mixer_options": recipe.mixer_options}
    with torch.device("meta"):
        student = HybridForCausalLM._from_config(HybridConfig.from_teacher(teacher.config, [], **mixer))
    config = teacher.config
    heads = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return Footprint(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        mlp=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=heads,
        vocabulary=config.vocab_size,
        positions=getattr(config, "max_position_embeddings", None),
        teacher_parameters=_count(teacher.parameters()),
        student_parameters=_count(student.parameters()),
        mixer_parameters=_count(mixer_parameters(student)),
        teacher_bytes=dtype.itemsize,
    )


def _count(parameters: Any) -> int:
    return sum({id(parameter): parameter.numel() for parameter in parameters}.values())


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a device: the GPU's, or all of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

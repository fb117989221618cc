"""What alignment and distillation share: a frozen teacher beside the student, and losses from within its forward."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .hybrid_trainer import HybridTrainer, HybridTrainingArguments
from .precision import restoring_forward, unprepared_afterwards
from .sharding import is_sharded, shard_teacher, uses_fsdp2


@dataclass
class TeacherTrainingArguments(HybridTrainingArguments):
    """
    Arguments of the trainers with a teacher: [`HybridTrainingArguments`] with the teacher's placement.

    Args:
        shard_teacher (`bool`):
            Under FSDP2, whether the teacher is sharded like the student, in place, or whole on each device.
    """

    shard_teacher: bool = field(default=False, metadata={"help": "Whether FSDP2 shards the teacher too."})


class TeacherTrainer(HybridTrainer):
    """
    [`HybridTrainer`] with a frozen teacher. Base of [`AlignmentTrainer`] and [`DistillationTrainer`].

    The teacher is shared, in eval mode and without gradients; it is no part of the model, so it is never saved and
    never in the optimizer. A step's loss is the mean over the step's tokens, however micro-batches and processes share
    them.

    Args:
        model ([`HybridForCausalLM`]): the student, changed in place.
        teacher (`PreTrainedModel`): the softmax model it came from.
        args ([`TeacherTrainingArguments`]): training arguments.
        **kwargs: all other arguments of [`~transformers.Trainer`]; datasets have a column `input_ids` and optionally
            `attention_mask` (0 for padding, which does not count in the loss) and `position_ids` (which restart at
            each document of a packed row).
    """

    args: TeacherTrainingArguments
    takes_adapters = False
    loss_is_scaled_for_ga = False  # the Trainer divides by the number of micro-batches, see `compute_loss`

    def __init__(
        self, model: nn.Module, teacher: PreTrainedModel | None, args: TeacherTrainingArguments, **kwargs: Any
    ) -> None:
        check_pair(model, teacher, adapters=self.takes_adapters)
        super().__init__(model=model, args=args, **kwargs)
        if isinstance(model, PeftModel) and (self.is_deepspeed_enabled or uses_fsdp2(self.accelerator)):
            raise ValueError(
                "the student has an adapter, and FSDP2 and DeepSpeed shard only whole hybrids here; use DDP, or train "
                "without the adapter."
            )
        if teacher is None:  # a subclass that knows what the teacher says allows that
            self.teacher = None
            return
        if not is_sharded(teacher):  # else an earlier trainer did both, and its parts cannot be called one by one
            self.check_teacher(teacher)
        with unprepared_afterwards(teacher):
            self.teacher = self._placed(teacher.eval())

    def check_teacher(self, teacher: PreTrainedModel) -> None:
        """Raises a `ValueError` where the teacher is nothing that this trainer can learn from."""

    def _placed(self, teacher: PreTrainedModel) -> Any:
        """The teacher where it is used, without ever becoming part of the student's engine."""
        if not (self.is_deepspeed_enabled or uses_fsdp2(self.accelerator)):
            return self.accelerator.prepare_model(teacher, evaluation_mode=True)
        if self.args.shard_teacher and self.is_deepspeed_enabled:
            raise ValueError("shard_teacher is on, but DeepSpeed shards no teacher here; use FSDP2, or switch it off.")
        if self.args.shard_teacher:
            return shard_teacher(teacher, self.accelerator)
        return teacher.to(self.accelerator.device)

    def models_that_run(self) -> list[Any]:
        teacher = [] if self.teacher is None else [self.accelerator.unwrap_model(self.teacher)]
        return [*super().models_that_run(), *teacher]

    def batch_of(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What of a batch goes into [`student_loss`]."""
        return model_inputs(inputs)

    def student_loss(self, student: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of one batch; a scalar."""
        raise NotImplementedError

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one step, and how many tokens that are not padding they have, of all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        tokens = torch.stack([counted_tokens(batch) for batch in batches]).sum().to(device)
        return batches, self.accelerator.reduce(tokens) if self.args.average_tokens_across_devices else tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        student = self.accelerator.unwrap_model(model)
        batch = self.batch_of(inputs)
        with self.precision.running(self.accelerator.device):
            loss = call_through(model, student, self.student_loss, student, batch)
        if num_items_in_batch is not None:
            # A mean over the tokens of a micro-batch becomes its part of the mean over those of a step. Where all
            # micro-batches have the same number of tokens, this is 1 exactly.
            averaged = self.args.average_tokens_across_devices
            parts = self.current_gradient_accumulation_steps * (self.accelerator.num_processes if averaged else 1)
            loss = loss * (counted_tokens(batch) * parts / torch.as_tensor(num_items_in_batch).clamp(min=1))
        return (loss, None) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None


def call_through(wrapper: nn.Module, module: nn.Module, method: Callable[..., Any], *args: Any) -> Any:
    """
    Returns `method(*args)`, called from within `wrapper`'s forward: DDP and FSDP prepare parameters and gradients
    there, and only for what is called inside. `module` is what they wrap, or itself what FSDP2 sharded.
    """
    if wrapper is module and not is_sharded(module):
        return method(*args)
    restore = restoring_forward(module)

    def redirected(*inner: Any) -> Any:
        restore()  # the method may itself call the real forward
        return method(*inner)

    module.__dict__["forward"] = redirected
    try:
        return wrapper(*args)
    finally:
        restore()


def model_inputs(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What of a batch goes into a model; labels and bookkeeping columns do not."""
    if "input_ids" not in inputs:
        raise ValueError(f"the batch has columns {sorted(inputs)}; it needs input_ids. Tokenise the dataset first.")
    return {key: inputs[key] for key in ("input_ids", "attention_mask", "position_ids") if inputs.get(key) is not None}


def counted_tokens(inputs: dict[str, Any]) -> torch.Tensor:
    """How many tokens of a batch are not padding; a scalar."""
    inputs = model_inputs(inputs)
    mask = inputs.get("attention_mask")
    ids = inputs["input_ids"]
    return torch.tensor(ids.numel(), device=ids.device) if mask is None else (mask != 0).sum()


def check_pair(student: Any, teacher: PreTrainedModel | None, *, adapters: bool = False) -> None:
    """
    Raises a `ValueError` where `student` is no hybrid or `teacher`, if there is one, not the model it came from, and,
    unless `adapters`, where it has an adapter of PEFT.
    """
    if isinstance(student, PeftModel):
        if not adapters:
            raise ValueError(
                "the student has an adapter, and alignment and scores are of the mixers themselves; pass "
                "model.get_base_model() from before the adapter was added, or merge it with model.merge_and_unload()."
            )
        if student.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"the student has {student.active_peft_config.peft_type.value}, which adds tokens that the teacher "
                "does not see; use an adapter of weights, such as hf_hybrid.lora_config(model)."
            )
    if getattr(student.config, "model_type", None) != "hf_hybrid":
        raise ValueError(
            f"model is a {type(student).__name__}, not a hybrid; make one with hf_hybrid.convert(teacher)."
        )
    if teacher is None:
        return
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    for name in ("vocab_size", "num_hidden_layers", "hidden_size"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"the student has {name}={getattr(ours, name)}, the teacher {getattr(theirs, name)}; pass the teacher "
                "that the student was converted from."
            )

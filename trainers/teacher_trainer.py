"""What alignment and distillation share: a frozen teacher beside the student, two learning rates, held-out loss."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..modeling.modeling_hybrid import decoder_layers


@dataclass
class TeacherTrainingArguments(TrainingArguments):
    """
    Arguments of the trainers with a teacher: all of [`~transformers.TrainingArguments`], with other defaults.

    Args:
        mixer_learning_rate (`float`, *optional*):
            Learning rate of the linear-attention mixers; `learning_rate` is that of all other parameters. Both follow
            the same schedule. None gives the mixers `learning_rate`.

    Differs from the parent in: `adam_beta2=0.95`, `weight_decay=0.0` (RADLADS, arXiv 2505.03005, table 2),
    `report_to="none"`, `average_tokens_across_devices=False`, `remove_unused_columns=False`,
    `dataloader_pin_memory` (on only where there is a GPU).
    """

    mixer_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the linear-attention mixers; by default learning_rate."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of matrices; never of decay or norms."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Where to report metrics."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: batches are built here."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Whether batches go through pinned memory."}
    )
    average_tokens_across_devices: bool = field(
        default=False, metadata={"help": "Kept off: the losses are means over a batch's tokens."}
    )


class TeacherTrainer(Trainer):
    """
    [`~transformers.Trainer`] with a frozen teacher. Base of [`AlignmentTrainer`] and [`DistillationTrainer`].

    The teacher is shared, in eval mode and without gradients; it is no part of the model, so it is never saved and
    never in the optimizer.

    Args:
        model ([`HybridForCausalLM`]): the student, changed in place.
        teacher (`PreTrainedModel`): the softmax model it came from.
        args ([`TeacherTrainingArguments`]): training arguments.
        **kwargs: all other arguments of [`~transformers.Trainer`]; datasets have a column `input_ids` and optionally
            `attention_mask` (0 for padding, which does not count in the loss) and `position_ids` (which restart at
            each document of a packed row).
    """

    args: TeacherTrainingArguments
    loss_is_scaled_for_ga = False  # a mean over the tokens of a micro-batch

    def __init__(self, model: nn.Module, teacher: PreTrainedModel, args: TeacherTrainingArguments, **kwargs: Any):
        check_pair(model, teacher)
        super().__init__(model=model, args=args, **kwargs)
        teacher.eval()
        self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def student_loss(self, student: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of one batch; a scalar."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        student = self.accelerator.unwrap_model(model)
        batch = model_inputs(inputs)
        with self.accelerator.autocast():
            loss = call_through(model, student, self.student_loss, student, batch)
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

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        rate = self.args.mixer_learning_rate
        if fresh and rate is not None:
            mixers = {id(parameter) for parameter in mixer_parameters(self.accelerator.unwrap_model(self.model))}
            for group in list(optimizer.param_groups):
                moved = [parameter for parameter in group["params"] if id(parameter) in mixers]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in mixers]
                if moved:
                    settings = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
                    optimizer.add_param_group({**settings, "params": moved, "lr": rate})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Shrinking a vector of a mixer (decay rates, step sizes, norms) pulls its memory to some other length.
        names = dict(model.named_parameters())
        return [
            name
            for name in super().get_decay_parameter_names(model)
            if not (".self_attn." in name and names[name].ndim < 2)
        ]


def call_through(wrapper: nn.Module, module: nn.Module, method: Callable[..., Any], *args: Any) -> Any:
    """
    Returns `method(*args)`, called from within `wrapper`'s forward: DDP and FSDP prepare parameters and gradients
    there, and only for what is called inside. `module` is what they wrap.
    """
    if wrapper is module:
        return method(*args)
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

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


def mixer_parameters(student: Any) -> list[nn.Parameter]:
    """All parameters of the student's linear-attention layers' mixers."""
    layers = decoder_layers(student)
    return [p for i in student.linear_attention_layers for p in layers[i].self_attn.parameters()]


def check_pair(student: Any, teacher: PreTrainedModel) -> None:
    """Raises a `ValueError` where `student` is no hybrid or `teacher` not the model it came from."""
    if getattr(student.config, "model_type", None) != "hf_hybrid":
        raise ValueError(
            f"model is a {type(student).__name__}, not a hybrid; make one with hf_hybrid.convert(teacher)."
        )
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    for name in ("vocab_size", "num_hidden_layers", "hidden_size"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"the student has {name}={getattr(ours, name)}, the teacher {getattr(theirs, name)}; pass the teacher "
                "that the student was converted from."
            )

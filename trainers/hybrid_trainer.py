"""What training a hybrid needs of a Trainer: own learning rate of mixers, and sharding that spares decay rates."""

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from hf_hybrid.modeling.modeling_hybrid import decoder_layers

from .precision import Precision, check_trainable, unprepared_afterwards
from .regions import compiled_regions
from .sharding import check_whole_rows, check_zero_stage, keep_class_name, set_precision, shard_mixers, uses_fsdp2


@dataclass
class HybridTrainingArguments(TrainingArguments):
    """
    Arguments of [`HybridTrainer`]: all of [`~transformers.TrainingArguments`], with other defaults.

    Args:
        mixer_learning_rate (`float`, *optional*):
            Learning rate of the linear-attention mixers, or of all that `learning_rate_groups` names; `learning_rate`
            is that of all other parameters. Both follow the same schedule. None gives all `learning_rate`.
        learning_rate_groups (`str`):
            What `mixer_learning_rate` is for. `"mixers"`: those alone. `"attention"`: in every decoder layer the
            attention, a mixer or the softmax that is kept, and the norm before it, as in the code of arXiv 2512.20569,
            whose rule is any parameter with "attn" in its name.
        final_learning_rate (`float`, *optional*):
            Where both rates end: they stay as they are, after the warm-up, until the share `decay_window[0]` of all
            steps, fall along a cosine until `decay_window[1]`, and stay at `final_learning_rate`. In place of
            `lr_scheduler_type`. None leaves that in charge.
        decay_window (`list[float]`):
            By default that of RADLADS (arXiv 2505.03005, table 2, step 2a); `[0, 1]` is a cosine over all steps.

    `torch_compile`, with `torch_compile_backend` and `torch_compile_mode`, compiles the parts of the student's layers,
    and of the teacher's, not whole models: see `trainers/regions.py`. It leaves TF32 as it is.

    Differs from the parent in: `adam_beta2=0.95`, `weight_decay=0.0` (RADLADS, arXiv 2505.03005, table 2),
    `report_to="none"`, `remove_unused_columns=False`, `dataloader_pin_memory` (on only where there is a GPU).
    """

    mixer_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the linear-attention mixers; by default learning_rate."}
    )
    learning_rate_groups: Literal["mixers", "attention"] = field(
        default="mixers",
        metadata={"help": "What mixer_learning_rate is for: the mixers, or all attention with the norm before it."},
    )
    final_learning_rate: float | None = field(
        default=None, metadata={"help": "Where both learning rates end; None leaves lr_scheduler_type in charge."}
    )
    decay_window: list[float] = field(
        default_factory=lambda: [0.833, 0.875],
        metadata={"help": "Shares of all steps between which the rates fall to final_learning_rate."},
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of matrices; never of decay or norms."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Where to report metrics."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: batches are built here."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Whether batches go through pinned memory."}
    )

    def __post_init__(self) -> None:
        # The library would compile the whole model, whose forward is not what runs, and turn TF32 on for all.
        compiled = self.torch_compile, self.torch_compile_backend, self.torch_compile_mode
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        super().__post_init__()
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = compiled
        self.torch_compile = any(compiled)
        window = self.decay_window
        if self.learning_rate_groups not in ("mixers", "attention"):
            raise ValueError(
                f"learning_rate_groups={self.learning_rate_groups!r} is unknown; choose 'mixers' or 'attention'."
            )
        if len(window) != 2 or not 0 <= window[0] <= window[1] <= 1:
            raise ValueError(f"decay_window={window} is no part of the steps; pass two ascending shares from 0 to 1.")


class HybridTrainer(Trainer):
    """
    [`~transformers.Trainer`] for a hybrid: two learning rates, no weight decay of what decays a state, and FSDP2 with
    decay parameters in fp32. Plain next-token training where the rows have `labels`.
    """

    args: HybridTrainingArguments
    compiles_softmax = True  # with `torch_compile`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_zero_stage(self.accelerator)
        check_whole_rows(self.accelerator)
        self.precision = Precision.of(self.args)
        sharded = uses_fsdp2(self.accelerator)
        if self.args.torch_compile and (sharded or self.is_deepspeed_enabled):
            raise ValueError(
                "torch_compile is on, and FSDP2 or DeepSpeed shards the student, whose parts are then not compiled "
                "here; switch it off, or use DDP."
            )
        # Under mixed precision FSDP2 and DeepSpeed make fp32 weights of their own to train.
        if self.accelerator.mixed_precision == "no" or not (sharded or self.is_deepspeed_enabled):
            check_trainable(cast(nn.Module, self.model))
        if sharded:
            set_precision(self.accelerator)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with unprepared_afterwards(cast(nn.Module, self.model)), self._regions():
            return super().train(*args, **kwargs)

    def models_that_run(self) -> list[Any]:
        """The models that run in training, below whatever wraps them."""
        return [hybrid_of(self.accelerator.unwrap_model(self.model))]

    def _regions(self) -> AbstractContextManager[None]:
        if not self.args.torch_compile:
            return contextlib.nullcontext()
        return compiled_regions(
            *self.models_that_run(),
            backend=self.args.torch_compile_backend or "inductor",
            mode=self.args.torch_compile_mode,
            softmax=self.compiles_softmax,
        )

    def create_accelerator_and_postprocess(self) -> None:
        backend, self.args.torch_compile_backend = self.args.torch_compile_backend, None
        super().create_accelerator_and_postprocess()  # which would compile the model as a whole
        self.args.torch_compile_backend = backend

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        # The library leaves this to the forward that accelerate puts on the model, which is gone after training.
        return self.precision.running(self.accelerator.device)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """
        As the parent's, but for an epoch's end: where `dataloader_drop_last` is on, rows that do not fill an optimizer
        step are left out, as those that do not fill a batch are. Otherwise other micro-batches of one batch size would
        give steps other rows, from the second epoch on.
        """
        found = super().set_initial_training_values(args, dataloader)
        epochs, updates, examples, samples, batch_size, micro_batches, max_steps = cast(tuple[int, ...], found)
        accumulation = args.gradient_accumulation_steps
        rest = micro_batches % accumulation
        if not (args.dataloader_drop_last and args.max_steps > 0 and rest and micro_batches > accumulation):
            return found
        updates = micro_batches // accumulation
        return -(-max_steps // updates), updates, examples, samples, batch_size, micro_batches - rest, max_steps

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        student = self.accelerator.unwrap_model(self.model)
        rate = self.args.mixer_learning_rate
        if fresh and rate is not None:
            of = mixer_parameters if self.args.learning_rate_groups == "mixers" else attention_parameters
            mixers = {id(parameter) for parameter in of(student)}
            for group in list(optimizer.param_groups):
                moved = [parameter for parameter in group["params"] if id(parameter) in mixers]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in mixers]
                if moved:
                    settings = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
                    optimizer.add_param_group({**settings, "params": moved, "lr": rate})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        names = {id(parameter): name for name, parameter in student.named_parameters()}
        self._names_of_groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Shrinking a vector of a mixer (decay rates, step sizes, norms) pulls its memory to some other length.
        names = dict(model.named_parameters())
        return [
            name
            for name in super().get_decay_parameter_names(model)
            if not (".self_attn." in name and names[name].ndim < 2)
        ]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if uses_fsdp2(self.accelerator):
            shard_mixers(self.model, self.accelerator)  # before the optimizer is made of their parameters
        return super()._prepare_for_training(*args, **kwargs)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if uses_fsdp2(self.accelerator):
            shard_mixers(model, self.accelerator)
        return super()._wrap_model(model, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if uses_fsdp2(self.accelerator):
            self._name_parameters()
        final = self.args.final_learning_rate
        if final is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer
        warmup = self.args.get_warmup_steps(num_training_steps)
        rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        shares: list[Callable[[int], float]] = [
            partial(
                share_of_rate,
                total=num_training_steps,
                warmup=warmup,
                window=self.args.decay_window,
                end=final / rate if rate else 1.0,
            )
            for rate in rates
        ]
        self.lr_scheduler = LambdaLR(optimizer, shares)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _name_parameters(self) -> None:
        # accelerate finds the optimizer's sharded parameters by the addresses of the shards, which are all 0 where a
        # process has no part of a parameter: there are fewer decay rates in a layer than processes in a large run.
        model, optimizer = cast(nn.Module, self.model), cast(torch.optim.Optimizer, self.optimizer)
        parameters = dict(model.named_parameters())
        for group, names in zip(optimizer.param_groups, self._names_of_groups, strict=True):
            group["params"] = [parameters[name] for name in names]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the whole model, gathered where it is sharded; all processes must call this."""
        if not uses_fsdp2(self.accelerator) or _internal_call:  # a checkpoint on the way keeps its shards
            super().save_model(output_dir, _internal_call)
            return
        state_dict = self.whole_state_dict()
        if self.args.should_save:
            self._save(output_dir, state_dict)

    def whole_state_dict(self) -> dict[str, torch.Tensor] | None:
        """
        The student's tensors on the CPU of the main process, gathered where they are sharded; None where the student
        itself has them. All processes must call this.
        """
        if not (uses_fsdp2(self.accelerator) or self.is_deepspeed_enabled):
            return None
        state_dict = self.accelerator.get_state_dict(self.model_wrapped)
        tied = self.accelerator.unwrap_model(self.model).all_tied_weights_keys
        # Gathered for itself, a tied tensor is a copy, which would be saved beside its source.
        return {name: tensor for name, tensor in (state_dict or {}).items() if name not in tied}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        keep_class_name(self.accelerator.unwrap_model(self.model))
        super()._save(output_dir, state_dict)


def share_of_rate(step: int, *, total: int, warmup: int, window: Sequence[float], end: float) -> float:
    """The share of the learning rate at `step` of `total`: see `decay_window` of [`HybridTrainingArguments`]."""
    if step < warmup:
        return step / warmup
    first, last = (share * total for share in window)
    if step < first or last == first == total:
        return 1.0
    done = 1.0 if step >= last else (step - first) / (last - first)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done))


def hybrid_of(model: Any) -> Any:
    """The hybrid below an adapter of PEFT, which runs with it; a model without one as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def mixer_parameters(student: Any) -> list[nn.Parameter]:
    """All parameters of the student's linear-attention layers' mixers."""
    student = hybrid_of(student)
    layers = decoder_layers(student)
    return [p for i in student.linear_attention_layers for p in layers[i].self_attn.parameters()]


def attention_parameters(student: Any) -> list[nn.Parameter]:
    """All parameters of the attention of every decoder layer, and of the norm before it, where there is one."""
    parts = [
        part
        for layer in decoder_layers(hybrid_of(student))
        for name, part in layer.named_children()
        if part is layer.self_attn or name == "input_layernorm"  # the library's one name for it
    ]
    return [parameter for part in parts for parameter in part.parameters()]

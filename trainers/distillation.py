"""Stage 2: the hybrid learns the teacher's output distribution."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch

from hf_hybrid.modeling.packing import without_mask

from .document_attention import as_one_row, attends_by_documents, by_documents
from .hybrid_trainer import hybrid_of
from .losses import (
    LogitFunction,
    check_logit_function,
    chunked_kl_per_token,
    chunked_kl_sum,
    chunked_topk_kl_per_token,
    logit_function,
    masked_mean,
)
from .precision import Precision
from .sharding import is_sharded, uses_fsdp2
from .teacher_states import TeacherStates
from .teacher_topk import ROW, NumberedRows, TeacherTopK
from .teacher_trainer import TeacherTrainer, TeacherTrainingArguments, call_through


_Result = TypeVar("_Result")


@dataclass
class DistillationConfig(TeacherTrainingArguments):
    """
    Arguments of [`DistillationTrainer`].

    Differs from its parent in the settings of arXiv 2512.20569's released code, stage 2: `learning_rate=7e-6`,
    `mixer_learning_rate=1e-4` and `lr_scheduler_type="constant"`. The paper trains on 600M tokens in rows of 4096.

    Args:
        chunk_tokens (`int`, *optional*):
            Tokens whose logits are held at once; by default as many as keep them within 64 MiB per model in fp32, on
            CUDA more, see [`~hf_hybrid.trainers.losses.tokens_per_chunk`].
        teacher_topk (`str`, *optional*):
            Folder of [`~hf_hybrid.write_teacher_topk`] for `train_dataset`, from which the teacher's distributions
            come in place of a forward pass. The loss is then that of `k + 1` outcomes, a lower bound of the KL: see
            [`~hf_hybrid.trainers.losses.topk_kl_per_token`].
        document_attention (`bool`):
            While it trains, let the softmax layers of teacher and student attend to each document of packed rows by
            itself, in the place of a mask over the whole row: on CUDA under 16 bits by flash attention. Rows must have
            no padding, and the models neither windows shorter than a document nor capped logits.
        teacher_states_bytes (`int`):
            Host memory of each machine for the teacher's final hidden states, in scores that distil once for each
            layer, always on the same batches: what fits is computed once and not for each layer. 0 for none.
    """

    learning_rate: float = field(default=7e-6, metadata={"help": "Learning rate of all parameters but the mixers'."})
    mixer_learning_rate: float | None = field(default=1e-4, metadata={"help": "Learning rate of the mixers."})
    lr_scheduler_type: Any = field(default="constant", metadata={"help": "Schedule of the learning rates."})
    chunk_tokens: int | None = field(default=None, metadata={"help": "Tokens whose logits are held at once."})
    teacher_topk: str | None = field(
        default=None, metadata={"help": "Folder of write_teacher_topk, read in place of running the teacher."}
    )
    document_attention: bool = field(
        default=False, metadata={"help": "Whether softmax attends document by document, not under a mask."}
    )
    teacher_states_bytes: int = field(
        default=2**34, metadata={"help": "Host memory for the teacher's states of batches that scores train on again."}
    )


class DistillationTrainer(TeacherTrainer):
    """
    Trains all of the student on `KL(teacher || student)` at temperature 1, the mean over all tokens that are not
    padding, in nats per token. The teacher's entropy is part of it: a student equal to its teacher scores 0.

    The student may have an adapter of PEFT, as by [`~hf_hybrid.lora_config`], which is then what trains and is saved.

    With `args.teacher_topk` the teacher may be None, unless there is an `eval_dataset`, which is measured with it.
    """

    args: DistillationConfig
    takes_adapters = True
    # What the teacher gave for batches of earlier trainings; whoever trains several times on the same sets it.
    states: TeacherStates | None = None
    _tag_names = ["hf-hybrid", "distillation"]

    def __init__(self, model: Any, teacher: Any, args: DistillationConfig, **kwargs: Any) -> None:
        self.topk = None if args.teacher_topk is None else TeacherTopK(args.teacher_topk)
        if self.topk is not None:
            rows = kwargs.get("train_dataset")
            self.topk.check(rows, model.config.get_text_config().vocab_size)
            kwargs["train_dataset"] = NumberedRows(rows, self.topk)
        if teacher is None and (self.topk is None or kwargs.get("eval_dataset") is not None):
            missing = "args.teacher_topk" if self.topk is None else "it, for the eval_dataset is measured with it"
            raise ValueError(f"teacher is None; pass {missing}.")
        super().__init__(model=model, teacher=teacher, args=args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if not self.args.document_attention:
            return super().train(*args, **kwargs)
        if uses_fsdp2(self.accelerator) or self.is_deepspeed_enabled:
            raise ValueError("document_attention is on, and was not tried with FSDP2 and DeepSpeed; switch it off.")
        with by_documents(*self.models_that_run()):
            return super().train(*args, **kwargs)

    def check_teacher(self, teacher: Any) -> None:
        check_logit_function(teacher, self.precision)

    def batch_of(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        batch = super().batch_of(inputs)
        return batch if ROW not in inputs else {**batch, ROW: inputs[ROW]}

    def student_loss(self, student: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        student = hybrid_of(student)
        if ROW in inputs:
            return self._topk_loss(student, inputs)
        teacher = self.accelerator.unwrap_model(self.teacher)
        compute = partial(teacher_states, teacher, inputs, self.precision)
        reference = compute() if self.states is None else self.states.of(inputs, compute)
        return mean_kl_of_batch(student, teacher, inputs, self.precision, self.args.chunk_tokens, reference)

    def _topk_loss(self, student: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        topk = cast(TeacherTopK, self.topk)
        batch = {name: column for name, column in inputs.items() if name != ROW}
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
        logprobs, ids, tail = topk.of_rows(inputs[ROW].tolist(), mask.sum(1).tolist())
        hidden = final_hidden_states(student, batch, self.precision)[mask]
        device = hidden.device
        theirs = logprobs.to(device), ids.to(device), tail.to(device)

        def kl_of(hidden: torch.Tensor, logits: LogitFunction) -> torch.Tensor:
            kl = chunked_topk_kl_per_token(theirs, hidden, logits, topk.vocab_size, self.args.chunk_tokens)
            return masked_mean(kl)

        return through_head(student, self.precision, kl_of, hidden)


def kl_of_batch(
    student: Any,
    teacher: Any,
    inputs: dict[str, torch.Tensor],
    precision: Precision,
    chunk_tokens: int | None = None,
    reference: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `KL(teacher || student)` of every token of a batch, `[B, T]`, in nats. `reference` is what
    [`final_hidden_states`] gave for the teacher, where that is known already.

    Called from within the student's forward where that is sharded, see [`call_through`].
    """
    kl_of = partial(chunked_kl_per_token, vocab_size=student.config.vocab_size, chunk_tokens=chunk_tokens)
    return _of_both(kl_of, student, teacher, inputs, precision, reference).view(inputs["input_ids"].shape)


def mean_kl_of_batch(
    student: Any,
    teacher: Any,
    inputs: dict[str, torch.Tensor],
    precision: Precision,
    chunk_tokens: int | None = None,
    reference: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean of [`kl_of_batch`] over tokens that are not padding, for training: see [`chunked_kl_sum`]."""
    counted = (inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])) != 0).flatten().float()
    weights = counted / counted.sum().clamp(min=1)

    def kl_of(
        theirs: torch.Tensor, ours: torch.Tensor, of_teacher: LogitFunction, of_student: LogitFunction
    ) -> torch.Tensor:
        head = list(student.get_output_embeddings().parameters())  # whole while the head is called
        vocabulary = student.config.vocab_size
        return chunked_kl_sum(theirs, ours, of_teacher, of_student, weights, head, vocabulary, chunk_tokens)

    return _of_both(kl_of, student, teacher, inputs, precision, reference)


def through_head(
    model: Any, precision: Precision, function: Callable[[torch.Tensor, LogitFunction], _Result], hidden: torch.Tensor
) -> _Result:
    """
    `function(hidden, logits)` with the [`logit_function`] of `model`, which it may call as often as it wants. Where
    FSDP2 has sharded the head, that is one call of the head, around all of them: it gathers the head before a call and
    frees it behind the first backward pass of one (before torch 2.13 for good, so that the next chunk found it gone).

    Called from within the model's forward where that is sharded, see [`call_through`].
    """
    head = model.get_output_embeddings()
    logits = logit_function(model, precision, head.forward if is_sharded(head) else head)
    result: _Result = call_through(head, head, lambda hidden: function(hidden, logits), hidden)
    return result


def _of_both(
    function: Callable[..., torch.Tensor],
    student: Any,
    teacher: Any,
    inputs: dict[str, torch.Tensor],
    precision: Precision,
    reference: torch.Tensor | None,
) -> torch.Tensor:
    """
    `function` of the final hidden states of teacher, or `reference` `[B, T, H]`, and student, `[B T, H]` each, and of
    the [`logit_function`] of each.
    """
    with precision.running(inputs["input_ids"].device):
        theirs = teacher_states(teacher, inputs, precision) if reference is None else reference
        ours = final_hidden_states(student, inputs, precision).flatten(0, 1)
        of_teacher = logit_function(teacher, precision)

        def of_student(ours: torch.Tensor, logits: LogitFunction) -> torch.Tensor:
            return function(theirs.flatten(0, 1), ours, of_teacher, logits)

        return through_head(student, precision, of_student, ours)


@torch.no_grad()
def teacher_states(teacher: Any, inputs: dict[str, torch.Tensor], precision: Precision) -> torch.Tensor:
    """[`final_hidden_states`] of a teacher that may be sharded, without gradients."""
    states: torch.Tensor = call_through(teacher, teacher, final_hidden_states, teacher, inputs, precision)
    return states


def final_hidden_states(model: Any, inputs: dict[str, torch.Tensor], precision: Precision) -> torch.Tensor:
    """What goes into the head of `model`, `[B, T, H]`."""
    ids, row = inputs["input_ids"], without_mask(inputs)
    if attends_by_documents(model):
        row = as_one_row(row)
    with precision.running(ids.device):
        return model.base_model(**row, use_cache=False).last_hidden_state.view(*ids.shape, -1)

"""What the multi-process tests start in each process: stages of tiny teachers, with their losses on record."""

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import DistributedType, PartialState
from teachers import tiny_teacher, tokens
from transformers import set_seed

import hf_hybrid as hh
from hf_hybrid.trainers import HybridTrainer
from hf_hybrid.trainers.processes import exit_process, is_main_process, num_processes, on_main, process_index
from hf_hybrid.trainers.sharding import is_sharded


# Each way that a layer's parameters can differ in dtype, both places of the teacher, a tied head and none, padding,
# and all mixers that have a recurrence.
CASES: dict[str, dict[str, Any]] = {
    "tied head, padded rows": {"family": "qwen2", "padded": True},
    "bf16 teacher, sharded, two mixers": {
        "family": "qwen3",
        "dtype": "bfloat16",
        "shard_teacher": True,
        "mixer": ["kimi_delta_attention", "gated_linear_attention"] * 2,
    },
    "autocast, tied, sharded teacher": {"family": "qwen2", "dtype": "bfloat16", "bf16": True, "shard_teacher": True},
}
STAGES = (hh.AlignmentConfig, hh.AlignmentTrainer), (hh.DistillationConfig, hh.DistillationTrainer)


def rows(count: int, seed: int = 0, padded: bool = False) -> datasets.Dataset:
    columns = {"input_ids": tokens(count, 24, seed).tolist()}
    if padded:
        columns["attention_mask"] = [[int(i <= 7 * row % 24) for i in range(24)] for row in range(count)]
    return datasets.Dataset.from_dict(columns)


def train(
    folder: Path,
    family: str,
    dtype: str = "float32",
    mixer: Any = "gated_deltanet",
    padded: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """
    Aligns, then distils, and saves the student of each stage. Returns each stage's losses step by step, those after
    going on from a checkpoint, held-out KL, scores, and what was sharded.
    """
    teacher = tiny_teacher(family, getattr(torch, dtype))
    set_seed(0)
    student = hh.convert(teacher, [], mixer=mixer).float()
    found: dict[str, Any] = {}
    settings = {"per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", 1)), "max_steps": 4}
    settings |= {"logging_steps": 1, "use_cpu": True, "learning_rate": 1e-3, "mixer_learning_rate": 3e-3}
    # With a tiny epsilon, Adam makes whole steps of what is only rounding in a gradient of nearly zero.
    settings |= {"save_steps": 2, "disable_tqdm": True, "adam_epsilon": 1e-3}
    for kind, trainer_class in STAGES:
        name = trainer_class.__name__
        start = {key: tensor.clone() for key, tensor in student.state_dict().items()}
        layers = student.full_attention_layers
        for resume in (None, str(folder / name / "checkpoint-2")):
            if resume:
                if is_sharded(teacher):
                    teacher = tiny_teacher(family, getattr(torch, dtype))
                set_seed(1)  # other new tensors, which the checkpoint overrules
                student = hh.convert(tiny_teacher(family, getattr(torch, dtype)), layers, mixer=mixer).float()
                assert start.keys() == student.state_dict().keys()
            chunks = {"chunk_tokens": 13} if kind is hh.DistillationConfig else {}  # several, the last a short one
            arguments = kind(str(folder / name), **{**settings, **chunks, **changes})
            data = rows(24, padded=padded)
            trainer = trainer_class(model=student, teacher=teacher, args=arguments, train_dataset=data)
            calls: list[bool] = []
            counter = student.get_output_embeddings().register_forward_pre_hook(
                lambda *_, calls=calls: calls.append(True)  # type: ignore[misc]
            )
            trainer.train(resume_from_checkpoint=resume)
            counter.remove()
            found[f"{name} resumed, head calls" if resume else f"{name} head calls"] = len(calls)
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            found[f"{name} resumed" if resume else name] = losses
        found[f"{name} sharded"] = [is_sharded(model) for model in (trainer.model, trainer.teacher)]
        found[f"{name} kl"] = hh.held_out_kl(trainer.model, trainer.teacher, rows(5, 1), batch_size=2).per_sequence
        trainer.save_model(str(folder / f"{name}_model"))
        on_main(lambda: None)
        student = hh.HybridForCausalLM.from_pretrained(folder / f"{name}_model")
        if is_sharded(teacher):
            teacher = tiny_teacher(family, getattr(torch, dtype))
        if name == "AlignmentTrainer":
            student.set_full_attention_layers([1], teacher)
    return found | {"processes": num_processes()}


def let_accelerate_shard_on_the_cpu() -> None:
    """FSDP2 itself runs on the CPU with gloo; accelerate turns it on only where the processes say they have a GPU."""
    set_device = PartialState.set_device

    def set_device_and_claim_a_gpu(self: Any) -> None:
        set_device(self)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.set_device = set_device_and_claim_a_gpu


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Writes the token ids of every batch that this process trains on to `folder`, one file a stage and process."""
    step = HybridTrainer.training_step

    def training_step(self: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        folder.mkdir(exist_ok=True)
        kind = Path(self.args.output_dir).name
        with open(folder / f"{kind}-{process_index()}.jsonl", "a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in inputs["input_ids"].tolist())
        return step(self, model, inputs, *rest)

    HybridTrainer.training_step = training_step
    try:
        yield
    finally:
        HybridTrainer.training_step = step


def main(folder: Path, recipe: Path | None) -> None:
    """All cases, or a recipe from start to end, in `folder`; the main process writes `result.json` last."""
    if recipe is not None:
        from hf_hybrid.cli import main as run

        with recorded(folder.with_name("rows")):
            code = run(["run", str(recipe), "--output", str(folder)])
        exit_process(code)
    results = {name: train(folder / str(i), **case) for i, (name, case) in enumerate(CASES.items())}
    if is_main_process():
        (folder / "result.json").write_text(json.dumps(results))
    exit_process(0)


if __name__ == "__main__":
    gc.freeze()  # as in conftest.py
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_accelerate_shard_on_the_cpu()
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)

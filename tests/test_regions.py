"""`torch_compile` compiles what runs, in student and teacher, and changes nothing but the time."""

import copy

import pytest
import torch
from datasets import Dataset
from teachers import tiny_teacher, tokens
from torch._dynamo.testing import CompileCounterWithBackend

import hf_hybrid as hh
from hf_hybrid.trainers.regions import compiled_regions, regions


ROWS = Dataset.from_dict({"input_ids": tokens(8, 24).tolist()})


def trained(kind, student, teacher, folder, **changes):
    """Weights and losses of three steps, with activation checkpointing."""
    config = {hh.AlignmentTrainer: hh.AlignmentConfig, hh.DistillationTrainer: hh.DistillationConfig}[kind]
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
    args = config(str(folder), use_cpu=True, gradient_checkpointing=True, disable_tqdm=True, **settings, **changes)
    student = copy.deepcopy(student)
    trainer = kind(model=student, teacher=teacher, args=args, train_dataset=ROWS)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, student.state_dict()


@pytest.mark.parametrize("kind", [hh.AlignmentTrainer, hh.DistillationTrainer])
def test_training_with_compiled_regions(tmp_path, kind):
    teacher = tiny_teacher("qwen2")
    student = hh.convert(teacher, [] if kind is hh.AlignmentTrainer else [1])
    torch._dynamo.reset()
    expected = trained(kind, student, teacher, tmp_path)
    counter = CompileCounterWithBackend("aot_eager")
    backend = f"counted_{kind.__name__}"
    torch._dynamo.register_backend(counter, name=backend)
    found = trained(kind, student, teacher, tmp_path, torch_compile=True, torch_compile_backend=backend)
    # Norm and MLP of the teacher, and what comes before and after a mixer's own part. In distillation, norm and MLP
    # of the student, softmax attention of both, and the KL, too.
    assert counter.frame_count == (4 if kind is hh.AlignmentTrainer else 9)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-6)
    for model in (teacher, student):
        assert all(module._compiled_call_impl is None for module in regions(model))
        assert all("replace_softmax" not in module.__dict__ for module in model.modules())


@pytest.mark.slow
def test_inductor_computes_what_runs_without_it():
    teacher = tiny_teacher("qwen2")
    ids = tokens(2, 24)
    expected = teacher(ids).logits
    with compiled_regions(teacher):
        torch.testing.assert_close(teacher(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_sharded_students_are_not_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_hybrid.trainers.hybrid_trainer.uses_fsdp2", lambda accelerator: True)
    teacher = tiny_teacher("qwen2")
    args = hh.DistillationConfig(str(tmp_path), use_cpu=True, torch_compile=True)
    with pytest.raises(ValueError, match="torch_compile is on, and FSDP2 or DeepSpeed shards the student"):
        hh.DistillationTrainer(model=hh.convert(teacher, [1]), teacher=teacher, args=args, train_dataset=ROWS)

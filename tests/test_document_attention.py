"""Packed rows attended to document by document: the teacher's and the student's outputs, losses and gradients."""

import copy

import datasets
import pytest
import torch
from teachers import FAMILIES, tiny_teacher, tokens

import hf_hybrid as hh
from hf_hybrid.trainers.distillation import final_hidden_states
from hf_hybrid.trainers.document_attention import by_documents
from hf_hybrid.trainers.precision import AS_LOADED


POSITIONS = torch.stack(
    [torch.cat([torch.arange(5), torch.arange(12), torch.arange(7)]), torch.cat([torch.arange(20), torch.arange(4)])]
)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mistral"])
def test_hidden_states_and_gradients(family, packed):
    teacher = tiny_teacher(family, torch.float64)
    student = hh.convert(teacher, [1, 3]).requires_grad_(True)
    batch = {"input_ids": tokens(2, 24)} | ({"position_ids": POSITIONS} if packed else {})
    for model in (teacher.requires_grad_(True), student):
        found = []
        for by in (False, True):
            model.zero_grad()
            if by:
                with by_documents(model):
                    hidden = final_hidden_states(model, batch, AS_LOADED)
            else:
                hidden = final_hidden_states(model, batch, AS_LOADED)
            hidden.square().sum().backward()
            found.append({name: p.grad.clone() for name, p in model.base_model.named_parameters()} | {"": hidden})
        for name, expected in found[0].items():
            torch.testing.assert_close(found[1][name], expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
        assert model.config._attn_implementation == "sdpa"


def test_distillation(tmp_path):
    teacher = tiny_teacher("qwen2")
    student, losses = hh.convert(teacher, [1]), []
    rows = datasets.Dataset.from_dict({"input_ids": tokens(4, 24).tolist(), "position_ids": POSITIONS.tolist() * 2})
    for by in (False, True):
        settings = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
        args = hh.DistillationConfig(
            str(tmp_path),
            use_cpu=True,
            document_attention=by,
            disable_tqdm=True,
            gradient_checkpointing=True,
            **settings,
        )
        trainer = hh.DistillationTrainer(model=copy.deepcopy(student), teacher=teacher, args=args, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 3


def test_what_it_does_not_know_is_refused():
    windowed = tiny_teacher("mistral")
    batch = {"input_ids": tokens(2, 24), "position_ids": POSITIONS}
    with (
        by_documents(windowed),
        pytest.raises(ValueError, match="attends with sliding_window, which"),
    ):
        final_hidden_states(windowed, batch, AS_LOADED)
    teacher = tiny_teacher("qwen2")
    padded = {"input_ids": tokens(2, 24), "attention_mask": (torch.arange(24) < 20).long().expand(2, -1)}
    with by_documents(teacher), pytest.raises(ValueError, match="takes rows without padding"):
        final_hidden_states(teacher, padded, AS_LOADED)
    with by_documents(teacher), pytest.raises(ValueError, match="a mask, or no offsets of documents"):
        teacher(tokens(2, 24))

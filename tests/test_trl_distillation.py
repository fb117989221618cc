"""TRL's trainers with a teacher on a hybrid: DistillationTrainer and GKDTrainer, the softmax model as the teacher."""

import pytest
import torch
from finetuning import CHATS, chats, hybrid, losses, plain_training, prompts, settings, tokenizer
from peft import get_peft_model
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

import hf_hybrid as hh


def divergence(student, teacher, beta: float) -> torch.Tensor:
    """
    The generalised Jensen-Shannon divergence of each token (arXiv 2306.13649, eq. 1) of logits `[T, vocabulary]`, in
    nats, as a loop over its definition: `beta=0` is KL(teacher || student), `beta=1` KL(student || teacher).
    """
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def of_completions(student, teacher, rows: list[tuple[list[int], list[int]]], beta: float) -> torch.Tensor:
    """The mean divergence over the completions' tokens, each row on its own."""
    parts = []
    for prompt, completion in rows:
        row = torch.tensor([prompt + completion])
        with torch.no_grad():
            reference = teacher(row).logits[0, len(prompt) - 1 : -1]
        parts.append(divergence(student(row, use_cache=False).logits[0, len(prompt) - 1 : -1], reference, beta))
    return torch.cat(parts).mean()


class Recording(DistillationTrainer):
    """Keeps the rows that each loss was computed on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.rows = [
            (ids[mask.bool()].tolist(), new[kept.bool()].tolist())
            for ids, mask, new, kept in zip(
                inputs["prompt_ids"],
                inputs["prompt_mask"],
                inputs["completion_ids"],
                inputs["completion_mask"],
                strict=True,
            )
        ]
        return super().compute_loss(model, inputs, *args, **kwargs)


def distill(student, tmp_path, **changes):
    trainer = Recording(
        model=student,
        teacher_model=hh.embedded_teacher(),
        args=DistillationConfig(**settings(tmp_path, 4, **{"max_steps": 1, "max_completion_length": 8, **changes})),
        train_dataset=prompts(),
        processing_class=tokenizer(),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_distillation_on_the_students_own_text(tmp_path, beta):
    student, start = hybrid(), hybrid()
    trainer = distill(student, tmp_path, beta=beta)
    assert len({len(prompt) for prompt, _ in trainer.rows}) > 1  # so that there was padding
    loss = of_completions(start, hh.embedded_teacher(), trainer.rows, beta)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in start.parameters() if p.grad is not None]).norm()
    assert losses(trainer)[0] == pytest.approx(loss.item(), abs=1e-4)
    assert losses(trainer, "grad_norm")[0] == pytest.approx(norm.item(), rel=1e-3)


def test_distillation_of_a_hybrid_that_is_the_teacher_is_zero(tmp_path):
    trainer = distill(hybrid(range(6)), tmp_path)
    assert losses(trainer)[0] == pytest.approx(0.0, abs=1e-6)


def test_distillation_learns(tmp_path):
    trainer = distill(hybrid(), tmp_path, max_steps=8, beta=0.0)
    assert sum(losses(trainer)[-2:]) < sum(losses(trainer)[:2])


def test_distillation_into_an_adapter(tmp_path):
    student = hybrid()
    adapted = get_peft_model(student, hh.lora_config(student, r=4))
    trainer = distill(adapted, tmp_path)
    loss = of_completions(hybrid(), hh.embedded_teacher(), trainer.rows, 1.0)
    assert losses(trainer)[0] == pytest.approx(loss.item(), abs=1e-4)
    moved = [(p != 0).any() for name, p in trainer.model.named_parameters() if ".lora_B." in name]
    assert len(moved) == 24 and all(moved)


def gkd(student, tmp_path, **changes):
    trainer = GKDTrainer(
        model=student,
        teacher_model=hh.embedded_teacher(),
        args=GKDConfig(**settings(tmp_path, len(CHATS), **{"max_length": 256, "max_new_tokens": 8, **changes})),
        train_dataset=chats(),
        processing_class=tokenizer(),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_gkd_losses_are_those_of_a_plain_loop(tmp_path, beta):
    """On the dataset's own answers (`lmbda=0`), which start after the last question."""
    own, teacher, model, rows = tokenizer(), hh.embedded_teacher(), hybrid(), []
    for row in chats():
        prompt = own.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
        whole = own(own.apply_chat_template(row["messages"], tokenize=False))["input_ids"]
        prompt_ids = own(prompt)["input_ids"]
        assert whole[: len(prompt_ids)] == prompt_ids
        rows.append((prompt_ids, whole[len(prompt_ids) :]))
    plain = plain_training(model, lambda own: of_completions(own, teacher, rows, beta))
    trainer = gkd(model, tmp_path, lmbda=0.0, beta=beta)
    assert losses(trainer) == pytest.approx(plain, abs=1e-3)
    assert plain[-1] < plain[0]


def test_gkd_on_the_students_own_text_runs(tmp_path):
    trainer = gkd(hybrid(), tmp_path, lmbda=1.0)
    assert len(losses(trainer)) == 3 and all(0 < loss < 10 for loss in losses(trainer))

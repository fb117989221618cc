"""The losses, against loops in float64."""

import math

import pytest
import torch
from teachers import tiny_teacher, tokens

import hf_hybrid as hh
from hf_hybrid.trainers.distillation import kl_of_batch
from hf_hybrid.trainers.losses import (
    alignment_loss,
    check_logit_function,
    chunked_kl_per_token,
    kl_per_token,
    logit_function,
    masked_mean,
)


def kl_by_hand(teacher_logits, student_logits):
    """Plain Python, one token."""
    p, q = ([math.exp(x) for x in row.double().log_softmax(-1).tolist()] for row in (teacher_logits, student_logits))
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


class TestKL:
    def test_against_a_loop(self):
        teacher, student = torch.randn(7, 50).double() * 3, torch.randn(7, 50).double() * 3
        got = kl_per_token(teacher, student)
        for i in range(7):
            assert got[i].item() == pytest.approx(kl_by_hand(teacher[i], student[i]), abs=1e-12)

    def test_an_unchanged_model_scores_zero(self):
        logits = torch.randn(5, 50) * 10
        assert (kl_per_token(logits, logits) == 0).all()

    def test_half_precision_is_raised(self):
        teacher, student = torch.randn(5, 50), torch.randn(5, 50)
        got = kl_per_token(teacher.bfloat16(), student.bfloat16())
        torch.testing.assert_close(got, kl_per_token(teacher.bfloat16().float(), student.bfloat16().float()))

    def test_other_vocabulary(self):
        with pytest.raises(ValueError, match="share one vocabulary"):
            kl_per_token(torch.randn(5, 50), torch.randn(5, 51))

    @pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 12, 13, None])
    def test_chunks_change_neither_value_nor_gradient(self, chunk_tokens):
        head_t, head_s = torch.randn(30, 16).double(), torch.randn(30, 8).double().requires_grad_()
        hidden_t, hidden_s = torch.randn(12, 16).double(), torch.randn(12, 8).double().requires_grad_()
        weight = torch.randn(12).double()
        whole = kl_per_token(hidden_t @ head_t.T, hidden_s @ head_s.T)
        wanted = torch.autograd.grad((whole * weight).sum(), (hidden_s, head_s))
        pieces = chunked_kl_per_token(
            hidden_t, hidden_s, lambda h: h @ head_t.T, lambda h: h @ head_s.T, 30, chunk_tokens=chunk_tokens
        )
        torch.testing.assert_close(pieces, whole)
        for got, want in zip(torch.autograd.grad((pieces * weight).sum(), (hidden_s, head_s)), wanted, strict=True):
            torch.testing.assert_close(got, want)

    def test_never_holds_more_than_a_chunk_of_logits(self):
        seen = []

        def logits(hidden):
            seen.append(len(hidden))
            return hidden @ torch.ones(8, 30)

        hidden = torch.randn(100, 8, requires_grad=True)
        chunked_kl_per_token(hidden.detach(), hidden, logits, logits, 30, chunk_tokens=16).sum().backward()
        assert max(seen) == 16


class TestModels:
    @pytest.mark.parametrize("family", ["llama", "qwen2"])
    def test_of_a_batch_equals_the_models_own_logits(self, family):
        teacher, ids = tiny_teacher(family), tokens(2, 20)
        student = hh.convert(teacher, [1])
        got = kl_of_batch(student, teacher, {"input_ids": ids}, chunk_tokens=7)
        torch.testing.assert_close(got, kl_per_token(teacher(ids).logits, student(ids).logits), atol=1e-5, rtol=1e-4)

    def test_a_softmax_only_copy_scores_exactly_zero(self):
        teacher = tiny_teacher("qwen3")
        kl = kl_of_batch(hh.convert(teacher, range(4)), teacher, {"input_ids": tokens(2, 20)})
        assert (kl == 0).all()

    def test_padding_is_kept_out(self):
        teacher = tiny_teacher("qwen3")
        student, ids = hh.convert(teacher, [1]), tokens(1, 20)
        mask = torch.ones_like(ids)
        mask[:, 12:] = 0
        kl = kl_of_batch(student, teacher, {"input_ids": ids, "attention_mask": mask})
        alone = kl_of_batch(student, teacher, {"input_ids": ids[:, :12]})
        torch.testing.assert_close(masked_mean(kl, mask), alone.mean(), rtol=1e-4, atol=1e-6)

    def test_soft_capping_and_scaling(self):
        from transformers import CohereConfig, Gemma2Config, GraniteConfig

        sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
        for config in (
            Gemma2Config(**sizes, final_logit_softcapping=3.0),
            CohereConfig(**{k: v for k, v in sizes.items() if k != "head_dim"}, logit_scale=0.25),
            GraniteConfig(**{k: v for k, v in sizes.items() if k != "head_dim"}, logits_scaling=5.0),
        ):
            from transformers import AutoModelForCausalLM

            teacher = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                teacher.get_output_embeddings().weight.normal_()
            check_logit_function(teacher)
            hidden = teacher.base_model(tokens(1, 9) % 50).last_hidden_state
            torch.testing.assert_close(logit_function(teacher)(hidden), teacher(tokens(1, 9) % 50).logits)

    def test_a_head_that_does_more_is_refused(self):
        teacher = tiny_teacher("llama")
        teacher.config.logits_scaling = 3.0  # which Llama's forward ignores
        with pytest.raises(ValueError, match="does more to its logits"):
            check_logit_function(teacher)


class TestAlignment:
    def test_against_a_loop(self):
        teacher, student = torch.randn(2, 5, 8).double(), torch.randn(2, 5, 8).double()
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
        total = 0.0
        for b in range(2):
            for t in range(5):
                if mask[b, t]:
                    total += math.sqrt(
                        sum((x - y) ** 2 for x, y in zip(teacher[b, t], student[b, t], strict=True)) / 8
                    )
        assert alignment_loss(teacher, student, mask).item() == pytest.approx(total / 7, abs=1e-12)

    def test_equal_outputs_score_zero(self):
        output = torch.randn(2, 5, 8)
        assert alignment_loss(output, output).item() == 0

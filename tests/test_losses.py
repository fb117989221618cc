"""The losses, against loops in float64."""

import math

import pytest
import torch
from teachers import tiny_teacher, tokens

import hf_hybrid as hh
from hf_hybrid.trainers.distillation import kl_of_batch
from hf_hybrid.trainers.losses import (
    KL_OF_CHUNK,
    alignment_loss,
    check_logit_function,
    chunked_kl_per_token,
    chunked_kl_sum,
    kl_per_token,
    logit_function,
    masked_mean,
    topk_kl_per_token,
    topk_of_logits,
    wide_chunk,
)
from hf_hybrid.trainers.precision import AS_LOADED


def kl_by_hand(teacher_logits, student_logits):
    """Plain Python, one token; what the teacher never says does not count, and what the student cannot is infinite."""
    p, q = ([math.exp(x) for x in row.double().log_softmax(-1).tolist()] for row in (teacher_logits, student_logits))
    return sum(a * (math.log(a) - (math.log(b) if b else -math.inf)) for a, b in zip(p, q, strict=True) if a)


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

    @pytest.mark.parametrize("chunk_tokens", [1, 4, 12, 13, None])
    @pytest.mark.parametrize("trained", ["both", "hidden", "head"])
    def test_gradients_made_in_the_forward_pass_are_those_of_the_backward_pass(self, chunk_tokens, trained):
        head_t, head_s = torch.randn(30, 16).double(), torch.randn(30, 8).double().requires_grad_(trained != "hidden")
        hidden_t, hidden_s = (
            torch.randn(12, 16).double(),
            torch.randn(12, 8).double().requires_grad_(trained != "head"),
        )
        weights = torch.rand(12).double() * (torch.arange(12) != 5)

        def capped(hidden):
            return 5 * torch.tanh(hidden @ head_s.T / 5)

        leaves = [leaf for leaf in (hidden_s, head_s) if leaf.requires_grad]
        whole = (kl_per_token(hidden_t @ head_t.T, capped(hidden_s)) * weights).sum()
        wanted = torch.autograd.grad(3 * whole, leaves)
        total = chunked_kl_sum(
            hidden_t, hidden_s, lambda h: h @ head_t.T, capped, weights, [head_s], 30, chunk_tokens=chunk_tokens
        )
        torch.testing.assert_close(total, whole)
        for got, want in zip(torch.autograd.grad(3 * total, leaves), wanted, strict=True):
            torch.testing.assert_close(got, want)

    def test_half_precision_logits_are_raised_before_anything_is_computed_of_them(self):
        teacher, student = (torch.randn(5, 300, generator=torch.Generator().manual_seed(i)) * 4 for i in (0, 1))
        weights = torch.rand(5)
        with torch.autocast("cpu", torch.bfloat16):
            total, slope = KL_OF_CHUNK(teacher.bfloat16(), student.bfloat16(), weights)
        leaf = student.bfloat16().double().requires_grad_()
        wanted = (kl_per_token(teacher.bfloat16().double(), leaf) * weights).sum()
        assert total.dtype == torch.float32 and total.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert slope.dtype == torch.bfloat16
        torch.testing.assert_close(slope.double(), torch.autograd.grad(wanted, leaf)[0], rtol=1e-2, atol=1e-6)

    def test_chunks_on_a_gpu_follow_its_free_memory(self):
        found = [wide_chunk(110, 152_000, free) for free in (0, 20 * 2**30, 200 * 2**30)]
        assert found[0] == 440 and found[2] == 1760 and 440 < found[1] < 1760
        assert 24 * found[1] * 152_000 <= 20 * 2**30 / 8

    def test_masked_vocabulary_in_the_forward_pass(self):
        """-inf in the teacher's logits, or in both, has no gradient and no nan."""
        head, hidden = torch.randn(9, 4).double().requires_grad_(), torch.randn(7, 4).double().requires_grad_()
        teacher = torch.randn(7, 9).double()
        teacher[:, :3] = -torch.inf
        mask = torch.zeros(9).double().index_fill(0, torch.tensor([0, 1]), -torch.inf)

        def masked(hidden):
            return hidden @ head.T + mask

        weights = torch.full((7,), 1 / 7).double()
        whole = (kl_per_token(teacher, masked(hidden)) * weights).sum()
        wanted = torch.autograd.grad(whole, (hidden, head))
        rows = torch.eye(7).double()
        total = chunked_kl_sum(
            rows, hidden, lambda h: teacher[h.argmax(-1)], masked, weights, [head], 9, chunk_tokens=3
        )
        torch.testing.assert_close(total, whole)
        for got, want in zip(torch.autograd.grad(total, (hidden, head)), wanted, strict=True):
            torch.testing.assert_close(got, want)

    def test_never_holds_more_than_a_chunk_of_logits(self):
        seen = []

        def logits(hidden):
            seen.append(len(hidden))
            return hidden @ torch.ones(8, 30)

        hidden = torch.randn(100, 8, requires_grad=True)
        chunked_kl_per_token(hidden.detach(), hidden, logits, logits, 30, chunk_tokens=16).sum().backward()
        assert max(seen) == 16


class TestMaskedVocabulary:
    """Logits of -inf: 0 and 1 in both models, 2 in the teacher alone, 3 in the student alone."""

    BOTH, TEACHER, STUDENT = [0, 1], [2], [3]

    def logits(self, student_too):
        teacher, student = torch.randn(7, 9).double() * 3, torch.randn(7, 9).double() * 3
        teacher[:, self.BOTH + self.TEACHER] = -torch.inf
        student[:, self.BOTH + (self.STUDENT if student_too else [])] = -torch.inf
        return teacher, student.requires_grad_()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("student_too", [False, True])
    def test_against_a_loop(self, dtype, student_too):
        teacher, student = (logits.to(dtype) for logits in self.logits(student_too))
        got = kl_per_token(teacher, student)
        for i in range(7):
            wanted = kl_by_hand(teacher[i], student[i])
            assert got[i].item() == pytest.approx(wanted, rel=1e-5) and math.isinf(wanted) == student_too

    @pytest.mark.parametrize("student_too", [False, True])
    def test_gradients_are_finite_and_those_of_the_tokens_that_are_there(self, student_too):
        teacher, student = self.logits(student_too)
        teacher.requires_grad_()
        found = torch.autograd.grad(kl_per_token(teacher, student).sum(), (teacher, student))
        assert found[1].isfinite().all() and found[1][:, self.BOTH].eq(0).all()
        if not student_too:
            there = [i for i in range(9) if i not in self.BOTH]
            rest = [i for i in there if i not in self.TEACHER]
            # The same without the columns that are -inf in both; the teacher's third, which it never says, is its own.
            own = kl_per_token(teacher[:, rest], student[:, rest]).sum()
            mass = student[:, there].logsumexp(-1) - student[:, rest].logsumexp(-1)
            wanted = torch.autograd.grad(own + mass.sum(), (teacher, student))
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("k", [2, 6, 7, 9])
    @pytest.mark.parametrize("student_too", [False, True])
    def test_the_teachers_top_k(self, k, student_too):
        """With k above the 6 tokens that the teacher says, its top has -inf in it, and nothing is left."""
        teacher, student = self.logits(student_too)
        logprobs, ids, tail = topk_of_logits(teacher, k)
        kl = topk_kl_per_token(logprobs, ids, tail, student)
        p, q = teacher.softmax(-1), student.softmax(-1)
        for i in range(7):
            kept = ids[i].tolist()
            others = [j for j in range(9) if j not in kept]
            outcomes = [(p[i, j].item(), q[i, j].item()) for j in kept] + [
                (p[i, others].sum().item(), q[i, others].sum().item())
            ]
            wanted = sum(a * (math.log(a) - (math.log(b) if b else -math.inf)) for a, b in outcomes if a)
            assert kl[i].item() == pytest.approx(wanted, abs=1e-12)
        assert torch.autograd.grad(kl.sum(), student)[0].isfinite().all()

    def test_of_models(self):
        """A head whose bias masks the padding of the vocabulary, in the teacher and in what is made of it."""
        teacher, ids = tiny_teacher("llama"), tokens(2, 20)
        bias = torch.zeros(teacher.config.vocab_size)
        bias[-5:] = -torch.inf
        teacher.lm_head.bias = torch.nn.Parameter(bias)
        check_logit_function(teacher, AS_LOADED)
        assert teacher(ids % 90).logits[..., -5:].isneginf().all()
        student = hh.convert(tiny_teacher("llama"), [1])
        student.lm_head.bias = torch.nn.Parameter(bias.clone())
        kl = kl_of_batch(student, teacher, {"input_ids": ids % 90}, AS_LOADED, chunk_tokens=7)
        assert kl.isfinite().all() and (kl > 0).all()


class TestModels:
    @pytest.mark.parametrize("family", ["llama", "qwen2"])
    def test_of_a_batch_equals_the_models_own_logits(self, family):
        teacher, ids = tiny_teacher(family), tokens(2, 20)
        student = hh.convert(teacher, [1])
        got = kl_of_batch(student, teacher, {"input_ids": ids}, AS_LOADED, chunk_tokens=7)
        torch.testing.assert_close(got, kl_per_token(teacher(ids).logits, student(ids).logits), atol=1e-5, rtol=1e-4)

    def test_a_softmax_only_copy_scores_exactly_zero(self):
        teacher = tiny_teacher("qwen3")
        kl = kl_of_batch(hh.convert(teacher, range(4)), teacher, {"input_ids": tokens(2, 20)}, AS_LOADED)
        assert (kl == 0).all()

    def test_padding_is_kept_out(self):
        teacher = tiny_teacher("qwen3")
        student, ids = hh.convert(teacher, [1]), tokens(1, 20)
        mask = torch.ones_like(ids)
        mask[:, 12:] = 0
        kl = kl_of_batch(student, teacher, {"input_ids": ids, "attention_mask": mask}, AS_LOADED)
        alone = kl_of_batch(student, teacher, {"input_ids": ids[:, :12]}, AS_LOADED)
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
            check_logit_function(teacher, AS_LOADED)
            hidden = teacher.base_model(tokens(1, 9) % 50).last_hidden_state
            torch.testing.assert_close(logit_function(teacher, AS_LOADED)(hidden), teacher(tokens(1, 9) % 50).logits)

    def test_a_head_that_does_more_is_refused(self):
        teacher = tiny_teacher("llama")
        teacher.config.logits_scaling = 3.0  # which Llama's forward ignores
        with pytest.raises(ValueError, match="does more to its logits"):
            check_logit_function(teacher, AS_LOADED)


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

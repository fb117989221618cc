"""Weight transfer, against the teacher's own numbers: a linear layer's q, k, v and output are those of the teacher."""

import pytest
import torch
from teachers import CONFIGS, tiny_teacher, tokens

import hf_hybrid as hh


def attention_calls(teacher, ids):
    """Per layer, what the teacher's attention was given and what it returned."""
    calls = {}

    def record(i):
        return lambda module, args, kwargs, output: calls.__setitem__(i, (kwargs, output[0]))

    for i, layer in enumerate(teacher.base_model.layers):
        layer.self_attn.register_forward_hook(record(i), with_kwargs=True)
    teacher(ids)
    return calls


def softmax_attention(query, key, value, scale):
    """Causal softmax attention over `[B, T, H, D]`, written out."""
    scores = torch.einsum("bthd,bshd->bhts", query, key) * scale
    causal = torch.ones(scores.shape[-2:]).tril().bool()
    weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, value)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("family", CONFIGS)
class TestPaths:
    def test_projections_give_the_teachers_attention(self, family):
        """Softmax over the mixer's q, k, v is the teacher's output: biases, norms, positions, grouping, all of it."""
        teacher = tiny_teacher(family)
        student = hh.convert(teacher, [])
        for i, (given, wanted) in attention_calls(teacher, tokens(2, 15)).items():
            mixer = student.base_model.layers[i].self_attn
            query, key, value = mixer.project(given["hidden_states"], given["position_embeddings"])
            heads = softmax_attention(query, key, value, teacher.base_model.layers[i].self_attn.scaling)
            got = mixer.o_proj(heads.flatten(-2))
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())

    def test_scrambled_rows_would_show(self, family):
        """The same check fails for the row-wise repetition that other converters ship, wherever heads are grouped."""
        teacher = tiny_teacher(family)
        student = hh.convert(teacher, [])
        given, wanted = attention_calls(teacher, tokens(2, 15))[0]
        mixer = student.base_model.layers[0].self_attn
        groups = mixer.num_heads // mixer.num_kv_heads
        query, key, value = mixer.project(given["hidden_states"], given["position_embeddings"])
        rows = value[:, :, ::groups].flatten(-2).repeat_interleave(groups, dim=-1).view_as(value)
        got = mixer.o_proj(softmax_attention(query, key, rows, mixer.head_dim**-0.5).flatten(-2))
        error = (got - wanted).abs().max() / wanted.abs().max()
        assert error > 0.1 if groups > 1 else error < 1e-4

    def test_linear_layer_computes_what_its_docstring_says(self, family):
        """Forward of the mixer against the equations, token by token, from its own parameters."""
        torch.manual_seed(3)
        teacher = tiny_teacher(family, torch.float64)
        student = hh.convert(teacher, [])
        given, _ = attention_calls(teacher, tokens(2, 70 if family != "mistral" else 15))[0]
        mixer, x = student.base_model.layers[0].self_attn, given["hidden_states"]
        query, key, value = mixer.project(x, given["position_embeddings"])
        query, key = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (query, key))
        decay = torch.exp(-mixer.A_log.exp() * torch.nn.functional.softplus(mixer.a_proj(x) + mixer.dt_bias))
        beta = torch.sigmoid(mixer.b_proj(x))
        state, outputs = torch.zeros(2, mixer.num_heads, mixer.head_dim, mixer.value_dim, dtype=x.dtype), []
        for t in range(x.shape[1]):
            state = state * decay[:, t, :, None, None]
            wrong = value[:, t] - torch.einsum("bhdv,bhd->bhv", state, key[:, t])
            state = state + torch.einsum("bhd,bhv->bhdv", key[:, t], beta[:, t, :, None] * wrong)
            outputs.append(torch.einsum("bhdv,bhd->bhv", state, query[:, t]) * mixer.head_dim**-0.5)
        heads = torch.stack(outputs, 1)
        heads = heads / (heads.square().mean(-1, keepdim=True) + mixer.o_norm.eps).sqrt() * mixer.o_norm.weight
        wanted = mixer.o_proj(heads.flatten(-2) * torch.nn.functional.silu(mixer.g_proj(x)))
        got, _ = mixer(x, position_embeddings=given["position_embeddings"])
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


class TestReport:
    def test_every_tensor_is_accounted_for(self):
        teacher = tiny_teacher("qwen2")
        student = hh.convert(teacher, [1])
        report = student.conversion_report
        assert set(report.copied) | set(report.not_carried) == set(teacher.state_dict())
        assert set(report.copied) | set(report.created) == set(student.state_dict())
        assert {name.split(".self_attn.")[1] for name in report.created} == {
            "A_log",
            "dt_bias",
            "a_proj.weight",
            "b_proj.weight",
            "g_proj.weight",
            "o_norm.weight",
        }
        for name in report.copied:
            assert torch.equal(student.state_dict()[name], teacher.state_dict()[name]), name

    @pytest.mark.parametrize("family", ["qwen2", "qwen3"])
    def test_counts_every_parameter_once(self, family):
        teacher = tiny_teacher(family)  # qwen2's head is tied
        student = hh.convert(teacher, [1])
        report = student.conversion_report
        assert sum(report.copied.values()) == teacher.num_parameters()
        assert sum((report.copied | report.created).values()) == student.num_parameters()

    def test_reads_well(self):
        text = str(hh.convert(tiny_teacher("qwen3"), [1]).conversion_report)
        assert "softmax attention kept in layers [1], linear in [0, 2, 3]" in text
        assert "A_log" in text and "not carried over: 0 tensors" in text

    def test_the_teacher_is_left_alone(self):
        teacher, ids = tiny_teacher("qwen3"), tokens(1, 9)
        before, config = teacher(ids).logits, teacher.config.to_dict()
        student = hh.convert(teacher, [1])
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.zero_()
        assert torch.equal(teacher(ids).logits, before)
        assert teacher.config.to_dict() == config

    def test_name_of_the_teacher_is_kept_but_not_as_a_path(self):
        teacher = tiny_teacher("qwen3")
        teacher.config._name_or_path = "someone/teacher"
        student = hh.convert(teacher, [1])
        assert student.config.teacher_name_or_path == "someone/teacher"
        assert student.config._name_or_path == student.name_or_path == ""

    @pytest.mark.parametrize(
        ("name", "saved"),
        [
            ("/home/me/teachers/mine", "mine"),
            ("/home/me/teachers/mine/", "mine"),
            ("../mine", "mine"),
            ("~/mine", "mine"),
            ("a/longer/path", "path"),
            ("C:\\teachers\\mine", "mine"),
            ("someone/Teacher-1.5B", "someone/Teacher-1.5B"),
            ("gpt2", "gpt2"),
            (None, None),
        ],
    )
    def test_a_path_is_saved_as_its_last_part(self, name, saved, tmp_path):
        config = hh.HybridConfig.from_teacher(tiny_teacher("qwen3").config, [1], teacher_name_or_path=name)
        assert config.teacher_name_or_path == name
        config.save_pretrained(tmp_path)
        assert hh.HybridConfig.from_pretrained(tmp_path).teacher_name_or_path == saved

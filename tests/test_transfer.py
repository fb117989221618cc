"""Weight transfer, against the teacher's own numbers: a linear layer's q, k, v and output are those of the teacher."""

import pytest
import torch
from teachers import CONFIGS, tiny_teacher, tokens

import hf_hybrid as hh
from benchmarks.families.models import tiny_model
from hf_hybrid import conversion
from hf_hybrid.modeling.modeling_hybrid import HybridForCausalLM
from hf_hybrid.teacher.loading import load_teacher


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


class TestProof:
    """A conversion shows that what it calls the teacher's is the teacher's, or fails."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_difference_is_measured(self, dtype):
        report = hh.convert(tiny_teacher("qwen2", dtype), [1]).conversion_report
        assert report.logit_difference == 0
        assert "its logits on 16 tokens differ from the teacher's by 0" in str(report)

    def test_it_reaches_every_tensor_of_the_teacher(self):
        """After the proof, a change of any one tensor of the hybrid that came from the teacher shows in it."""
        teacher = tiny_teacher("qwen3")
        student = hh.convert(teacher, [1])
        own = student.state_dict()
        for name in student.conversion_report.copied:
            before = own[name].clone()
            own[name].mul_(1.5)
            with pytest.raises(ValueError, match="the copy is not the teacher: .* differ by"):
                conversion.logit_difference(teacher, student)
            own[name].copy_(before)
        assert conversion.logit_difference(teacher, student) == 0

    def test_student_and_teacher_are_left_as_they_were(self):
        teacher = tiny_teacher("mistral").train()
        seen = []
        teacher.base_model.layers[0].self_attn.register_forward_hook(lambda *args: seen.append(args))
        student = hh.convert(teacher, [1], mixer=["sliding_window", None, "kimi_delta_attention", "gated_deltanet"])
        assert teacher.training and len(seen) == 1  # the teacher's own pass
        assert student.config.layer_types == ["linear_attention", "sliding_attention", *["linear_attention"] * 2]
        assert all(layer.self_attn.__class__.__name__ != "MistralAttention" for layer in student.base_model.layers[2:])
        assert student(tokens(1, 9)).logits.isfinite().all()

    def test_a_teacher_that_is_more_than_its_tensors_is_refused(self):
        teacher = tiny_teacher("qwen3")
        teacher.base_model.layers[2].mlp.register_forward_hook(lambda module, args, output: output * 1.01)
        with pytest.raises(ValueError, match="the copy is not the teacher: .*hook or a patched module"):
            hh.convert(teacher, [1])

    def test_a_teacher_that_does_not_repeat_itself_may_differ_as_much(self):
        teacher, size = tiny_teacher("qwen3"), 1e-3

        def noise(module, args, output):
            return output + size * torch.randn_like(output)

        teacher.lm_head.register_forward_hook(noise)
        assert 0 < hh.convert(teacher, [1]).conversion_report.logit_difference < 1e-2
        teacher.lm_head.weight.data.copy_(teacher.lm_head.weight)
        teacher.base_model.norm.register_forward_hook(lambda module, args, output: output * 1.1)
        with pytest.raises(ValueError, match="the copy is not the teacher"):
            hh.convert(teacher, [1])

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_teacher_that_is_not_finite_is_refused(self, value):
        teacher = tiny_teacher("qwen3")
        teacher.base_model.layers[0].mlp.up_proj.weight.data[3] = value
        with pytest.raises(ValueError, match="layers.0.mlp.up_proj.weight cannot .*NaN|logits are not finite"):
            hh.convert(teacher, [1])

    def test_a_teacher_that_does_not_run_is_refused(self):
        teacher = tiny_model("qwen3_moe")
        for layer in teacher.base_model.layers:
            layer.mlp.gate.top_k = 9
        with pytest.raises(ValueError, match="the teacher does not run on 16 tokens .*; check its config"):
            hh.convert(teacher, [1])

    def test_a_tensor_that_is_no_mixers_is_named(self):
        """A student that has more than teacher and mixers would keep it at random."""

        class More(HybridForCausalLM):
            def __init__(self, config):
                super().__init__(config)
                self.extra = torch.nn.Linear(2, 2)

        with pytest.raises(
            ValueError, match="extra.weight is in the hybrid, but not in the teacher, and belongs to no"
        ):
            hh.convert(tiny_teacher("qwen3"), [1], model_class=More)

    def test_a_tensor_without_a_place_is_named(self):
        teacher = tiny_teacher("qwen3")
        teacher.base_model.layers[0].mlp.register_buffer("scale", torch.ones(1))
        with pytest.raises(ValueError, match="layers.0.mlp.scale is in the teacher and has no place in the hybrid"):
            hh.convert(teacher, [1])


class TestDtypes:
    """Each tensor keeps the dtype that it has in the teacher."""

    @pytest.mark.parametrize(
        ("model_type", "dtype", "kept"),
        [
            ("hy_v3", torch.bfloat16, "e_score_correction_bias"),
            ("hy_v4", torch.bfloat16, "lm_head.weight"),  # which the class alone says, not its base model
            ("deepseek_v3", torch.bfloat16, "e_score_correction_bias"),
            ("gpt_oss", torch.float16, "input_layernorm.weight"),
            ("afmoe", torch.float16, "post_mlp_layernorm.weight"),
        ],
    )
    def test_what_the_teacher_keeps_in_fp32(self, model_type, dtype, kept, tmp_path):
        tiny_model(model_type).save_pretrained(tmp_path / "teacher")
        teacher = load_teacher(tmp_path / "teacher", dtype=dtype)
        student = hh.convert(teacher, [1])
        student.save_pretrained(tmp_path / "student")
        loaded = HybridForCausalLM.from_pretrained(tmp_path / "student", dtype="auto")
        wanted = {name: tensor.dtype for name, tensor in teacher.state_dict().items()}
        for model in (student, loaded):
            own = {name: tensor.dtype for name, tensor in model.state_dict().items()}
            assert {name: kind for name, kind in own.items() if name in wanted} == {
                name: kind for name, kind in wanted.items() if name in own
            }
            assert {own[name] for name in own if name.endswith(kept)} == {torch.float32}
            assert own["model.layers.0.self_attn.o_proj.weight"] == dtype
        assert conversion.logit_difference(teacher, loaded) == 0

    def test_a_head_in_fp32_on_a_teacher_in_bf16(self, tmp_path):
        tiny_teacher("qwen3").save_pretrained(tmp_path)
        teacher = load_teacher(tmp_path, dtype=torch.bfloat16)
        teacher.lm_head.float()
        teacher.lm_head.weight.data += 1e-6
        student = hh.convert(teacher, range(4))
        assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
        assert student.lm_head.weight.dtype == torch.float32
        ids = tokens(1, 9)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(student(ids).logits, teacher(ids).logits)

    def test_rotary_angles_of_a_teacher_that_was_cast(self):
        """`teacher.to(bfloat16)` rounds buffers that are in no checkpoint; the hybrid's are as after loading it."""
        teacher = tiny_teacher("qwen3", torch.bfloat16)
        assert teacher.base_model.rotary_emb.inv_freq.dtype == torch.bfloat16
        student = hh.convert(teacher, [1])
        assert student.conversion_report.logit_difference == 0
        assert student.base_model.rotary_emb.inv_freq.dtype == torch.float32
        assert "not the teacher's: model.rotary_emb.inv_freq" in str(student.conversion_report)
        assert not hh.convert(tiny_teacher("qwen3"), [1]).conversion_report.notes

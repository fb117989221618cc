"""Families of teachers whose attention differs in kind; `make families` does the same for every type there is."""

import pytest
import torch

import hf_hybrid as hh
from benchmarks.families import checks as family_checks
from benchmarks.families.models import tiny_model
from hf_hybrid.modeling.adopted_attention import AdoptedAttention
from hf_hybrid.modeling.library import CACHE_NAMES


# One of each kind: plain; soft-capped; rotary by layer type with q/k norm; fused projection; q/k norm over all heads
# and norms after attention; experts; latent projections; parallel blocks without positions in some layers; learned
# positions in a decoder below the base model; layers that give their attention no keyword arguments; an output gate.
FAST = [
    "llama",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "qwen3_moe",
    "deepseek_v3",
    "cohere2",
    "opt",
    "stablelm",
    "afmoe",
]


@pytest.mark.parametrize("model_type", FAST)
def test_every_check_passes(model_type):
    result = family_checks.check_type(model_type)
    assert result["refused"] is None
    assert {name: reason for name, reason in result["checks"].items() if reason not in ("pass", "n/a")} == {}
    assert [name for name, outcome in result["checks"].items() if outcome == "n/a"] == (
        ["transfer"] if model_type == "gemma2" else []
    )


@pytest.mark.parametrize(
    ("lost", "check"),
    [
        ("padding_mask", family_checks.left_padding),
        ("seq_idx", family_checks.packed),
        ("cache", family_checks.cached),
    ],
)
def test_a_mixer_that_is_not_told_shows(lost, check, monkeypatch):
    """The checks fail where what the mixers need gets lost on its way, as it does in layers that hand nothing on."""
    forward = AdoptedAttention.forward
    nothing = dict.fromkeys(CACHE_NAMES if lost == "cache" else (lost,))

    def forgetful(self, hidden_states, *args, **kwargs):
        if isinstance(row := kwargs["attention_mask"], dict):
            kwargs["attention_mask"] = {**row, lost: None}
        return forward(self, hidden_states, *args, **{**kwargs, **nothing})

    subject = family_checks.Subject("llama")
    check(subject)
    monkeypatch.setattr(AdoptedAttention, "forward", forgetful)
    with pytest.raises(AssertionError, match="differs by"):
        check(subject)


class TestWhatIsLeftOut:
    def test_sinks_are_reported(self):
        report = hh.convert(tiny_model("gpt_oss"), [1]).conversion_report
        assert set(report.not_carried) == {f"model.layers.{i}.self_attn.sinks" for i in (0, 2, 3)}
        assert "not carried over: 3 tensors (sinks)" in str(report)

    def test_the_indexer_of_sparse_attention_is_reported(self):
        report = hh.convert(tiny_model("deepseek_v32"), [1]).conversion_report
        assert {name.split(".self_attn.")[1].split(".")[0] for name in report.not_carried} == {"indexer"}

    def test_a_gate_of_the_teacher_stays_the_only_one(self):
        student = hh.convert(tiny_model("afmoe"), [1])
        mixer = student.base_model.layers[0].self_attn
        assert isinstance(mixer.gate_proj, torch.nn.Linear) and not hasattr(mixer, "g_proj")

    @pytest.mark.parametrize(
        ("model_type", "reason"),
        [
            ("diffllama", "subtracts two softmaxes"),
            ("doge", "learns a mask over its values"),
            ("xglm", "computes its softmax itself"),
            ("longcat_flash", "no list of 8 decoder layers"),
            ("gpt2", "no list of 12 decoder layers"),
            ("inkling_text", "recurrent state beside their softmax"),
            ("dory", "caches each pass apart"),
        ],
    )
    def test_refused_with_the_reason(self, model_type, reason):
        assert reason in family_checks.check_type(model_type)["refused"]


class TestPositions:
    def test_layers_without_positions_get_none(self):
        """SmolLM3 rotates three layers of four; a mixer in the fourth must not rotate either."""
        teacher = tiny_model("smollm3")
        student, x = hh.convert(teacher, []), torch.randn(1, 6, 64)
        angles = [teacher.base_model.rotary_emb(x, torch.arange(start, start + 6)[None]) for start in (0, 5)]
        for i, layer in enumerate(student.base_model.layers):
            first, second = (layer.self_attn.project(x, angle)[1] for angle in angles)
            assert torch.equal(first, second) == (not teacher.config.no_rope_layers[i])

    @pytest.mark.parametrize("model_type", ["llama", "deepseek_v2", "phi"])
    def test_rotation_can_be_left_out(self, model_type):
        """With `rope` off no angle matters: rotations of pairs of arrays, of complex numbers, of part of a head."""
        teacher, x = tiny_model(model_type), torch.randn(1, 6, 64)
        places = [torch.tensor([[0, 1, 2, 3, 4, 5]]), torch.tensor([[0, 2, 3, 7, 8, 20]])]
        for rope in (True, False):
            student = hh.convert(teacher, [], mixer_options={"rope": rope})
            mixer = student.base_model.layers[0].self_attn
            angles = (teacher.base_model.rotary_emb(x, place) for place in places)
            with torch.no_grad():
                one, other = (mixer(x, position_embeddings=angle)[0] for angle in angles)
            assert torch.equal(one, other) != rope

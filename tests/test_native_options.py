"""The mixer options of layers that other programs have themselves: what they compute, drop, report and give back."""

import re

import pytest
import torch
from teachers import tiny_teacher, tokens
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

import hf_hybrid as hh
from hf_hybrid.exporting.native import NATIVE_OPTIONS
from hf_hybrid.modeling.modeling_hybrid import decoder_layers


DROPPED = {
    "qwen2": {"q_proj.bias", "k_proj.bias", "v_proj.bias"},
    "qwen3": {"q_norm.weight", "k_norm.weight"},
    "llama_mqa": {"q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"},
    "llama": set(),
}


def native(family="qwen3", layers=(1,), dtype=torch.float32):
    """A hybrid with the preset, whose convolutions are no longer the identity, and its teacher."""
    torch.manual_seed(0)
    teacher = tiny_teacher(family, dtype)
    student = hh.convert(teacher, list(layers), mixer_options="native")
    with torch.no_grad():
        for i in student.linear_attention_layers:
            mixer = decoder_layers(student)[i].self_attn
            mixer.conv.weight.add_(torch.randn_like(mixer.conv.weight) * 0.3)
            mixer.o_norm.weight.add_(torch.randn_like(mixer.o_norm.weight) * 0.2)
            for projection in (mixer.a_proj, mixer.b_proj, mixer.g_proj):
                projection.weight.normal_(0, 0.15)
    return student, teacher


@pytest.mark.parametrize("family", ["llama_mha", "qwen3"])
def test_the_layer_is_the_librarys_own(family):
    student, _ = native(family)
    mixer = decoder_layers(student)[0].self_attn
    heads, groups, width = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    config = Qwen3_5TextConfig(
        hidden_size=64,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=width,
        linear_value_head_dim=width,
        linear_conv_kernel_dim=4,
    )
    layer = Qwen3_5GatedDeltaNet(config, 0)

    def per_head(rows):
        return rows.unflatten(0, (groups, width)).repeat_interleave(heads // groups, 0).flatten(0, 1)

    taps = mixer.conv.weight.split([heads * width, groups * width, groups * width])
    layer.load_state_dict(
        {
            "in_proj_qkv.weight": torch.cat(
                [mixer.q_proj.weight, per_head(mixer.k_proj.weight), per_head(mixer.v_proj.weight)]
            ),
            "conv1d.weight": torch.cat([taps[0], per_head(taps[1]), per_head(taps[2])]),
            "in_proj_z.weight": mixer.g_proj.weight,
            "in_proj_a.weight": mixer.a_proj.weight,
            "in_proj_b.weight": mixer.b_proj.weight,
            "A_log": mixer.A_log,
            "dt_bias": mixer.dt_bias,
            "norm.weight": mixer.o_norm.weight,
            "out_proj.weight": mixer.o_proj.weight,
        }
    )
    x = torch.randn(2, 70, 64)
    positions = student.base_model.rotary_emb(x, torch.arange(70)[None])
    with torch.no_grad():
        wanted, (got, _) = layer(x), mixer(x, position_embeddings=positions)
    # Two fp32 forms of one recurrence; without the options it is 0.1 and more.
    assert ((got - wanted).norm() / wanted.norm()).item() < 6e-7


@pytest.mark.parametrize("family", DROPPED)
def test_what_is_dropped_is_reported_and_comes_back(family):
    student, teacher = native(family)
    report = student.conversion_report
    dropped = {name for name in report.not_carried if ".layers.0." in name}
    assert {name.split(".self_attn.")[1] for name in dropped} == DROPPED[family]
    assert not any(".layers.1." in name for name in report.not_carried)
    assert set(report.copied) | set(report.not_carried) == set(teacher.state_dict())
    assert report.logit_difference == 0
    for name in dropped:
        reason = "projection_bias" if name.endswith("bias") else "qk_norm"
        assert re.search(rf"{name.split('.')[-2]}: .*mixer_options\['{reason}'\]", str(report)), str(report)
    # The teacher still has them, and a layer that becomes softmax again, too.
    assert dropped <= set(teacher.state_dict())
    student.set_full_attention_layers(range(4), teacher)
    assert torch.equal(student(tokens(1, 20)).logits, teacher(tokens(1, 20)).logits)
    student.set_full_attention_layers([1])
    assert {name for name in student.conversion_report.not_carried if ".layers.0." in name} == dropped


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_decoding_padding_and_storage(family, tmp_path):
    student, _ = native(family, dtype=torch.float64)
    ids = tokens(2, 30)
    with torch.no_grad():
        full = student(ids, use_cache=False).logits
        first = student(ids[:, :17], use_cache=True)
        rest = student(ids[:, 17:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(torch.cat([first.logits, rest], 1), full, rtol=1e-4, atol=1e-5)
        padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
        mask = (torch.arange(35) >= 5).long().expand(2, -1)
        left = student(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        torch.testing.assert_close(left[:, 5:], full, rtol=1e-4, atol=1e-5)
    student.save_pretrained(tmp_path)
    back = hh.HybridForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert back.config.mixer_options == NATIVE_OPTIONS
    assert torch.equal(back(ids).logits, student(ids).logits)


def test_a_preset_is_known_and_fits_the_mixer():
    with pytest.raises(ValueError, match=r"mixer_options='natif' is no preset; pass one of \['native'\]"):
        hh.convert(tiny_teacher(), [], mixer_options="natif")
    with pytest.raises(ValueError, match=r"there is none for \['kimi_delta_attention'\]"):
        hh.convert(tiny_teacher(), [], mixer="kimi_delta_attention", mixer_options="native")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_before_silu_the_convolution_starts_where_silu_is_straight(family):
    """A layer begins as what it is without SiLU, so that it can begin from what the teacher's softmax does."""
    teacher = tiny_teacher(family)
    torch.manual_seed(0)
    bent = decoder_layers(hh.convert(teacher, [], mixer_options="native"))[0].self_attn
    torch.manual_seed(0)
    options = NATIVE_OPTIONS | {"silu_qk": False, "silu_v": False}
    straight = decoder_layers(hh.convert(teacher, [], mixer_options=options))[0].self_attn
    assert straight.conv.weight[..., -1].eq(1).all() and bent.conv.weight[..., :-1].eq(0).all()
    x = torch.randn(2, 40, 64)
    positions = teacher.base_model.rotary_emb(x, torch.arange(40)[None])
    with torch.no_grad():
        wanted, near = (mixer(x, position_embeddings=positions)[0] for mixer in (straight, bent))
        bent.conv.weight.mul_(10)
        far = bent(x, position_embeddings=positions)[0]
    near, far = (((got - wanted).norm() / wanted.norm()).item() for got in (near, far))
    assert near < 0.3 and far > 3 * near, (near, far)

"""Export to transformers' own Qwen3.5: the same model without remote code, refused where it would not be; and back."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from teachers import tiny_teacher, tokens
from test_native_options import native
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM

import hf_hybrid as hh
from hf_hybrid.cli import main
from hf_hybrid.exporting import export as exporting
from hf_hybrid.exporting.native import NATIVE_OPTIONS
from hf_hybrid.exporting.qwen3_5 import interval, native_tensors
from hf_hybrid.run.pipeline import check_recipe
from hf_hybrid.run.recipe import Recipe


RECIPE = {
    "teacher": "embedded",
    "data": {"source": "embedded-demo", "block_size": 64, "held_out_rows": 2, "report_rows": 2},
    "align": {"tokens": 128},
    "select": {"selector": "uniform", "k": 2},
    "distill": {"tokens": 128},
}


def changed(hybrid, **options):
    """A hybrid of the same teacher with other mixer options."""
    return hh.convert(tiny_teacher("qwen3"), hybrid.full_attention_layers, mixer_options=NATIVE_OPTIONS | options)


@pytest.mark.parametrize(
    ("layers", "dtype"), [((0,), torch.float32), ((1, 3), torch.bfloat16), ((0, 1, 2, 3), torch.float32)]
)
def test_transformers_loads_the_same_model_as_its_own(layers, dtype, tmp_path):
    hybrid, _ = native(layers=layers, dtype=dtype)
    report = hh.export(hybrid, output=tmp_path / "out", tokenizer=hh.embedded_tokenizer())
    assert report.largest_difference < 5e-5 and report.greedy_equal == report.greedy_tokens == 96
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForCausalLM"] and "auto_map" not in config
    assert config["mamba_ssm_dtype"] == "float32" and config["rope_parameters"]["partial_rotary_factor"] == 1.0
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert not list((tmp_path / "out").glob("*.py"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.float32 and stored["model.embed_tokens.weight"].dtype == dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model) is Qwen3_5ForCausalLM
    hybrid, ids = hybrid.float(), tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, hybrid(ids).logits, rtol=0, atol=5e-5)
        first = model(ids[:, :30], use_cache=True)
        rest = model(ids[:, 30:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, hybrid(ids).logits[:, 30:], rtol=0, atol=5e-5)


def test_a_model_that_was_cast_in_memory(tmp_path):
    """Its rotary angles are in bf16, and what is saved of it has none."""
    report = hh.export(native(layers=(1, 3))[0].to(torch.bfloat16), output=tmp_path / "out")
    assert report.largest_difference < 5e-5


@pytest.mark.parametrize("taps", [0, 2, 6])
def test_any_convolution_fits(taps, tmp_path):
    hybrid = changed(native()[0], short_convolution=taps)
    with torch.no_grad():
        for i in hybrid.linear_attention_layers if taps else ():
            hybrid.model.layers[i].self_attn.conv.weight.normal_(0, 0.5)
    assert hh.export(hybrid, output=tmp_path / "out").largest_difference < 5e-5
    assert hh.import_native(tmp_path / "out").config.mixer_options["short_convolution"] == max(taps, 4)


@pytest.mark.parametrize("heads", [1, 4])
def test_grouped_heads_and_a_tied_head(heads, tmp_path):
    teacher = tiny_teacher("qwen3", num_key_value_heads=heads, tie_word_embeddings=True)
    hybrid = hh.convert(teacher, [2], mixer_options="native")
    assert hh.export(hybrid, output=tmp_path / "out").largest_difference < 5e-5
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_an_exported_model_is_a_hybrid_again(tmp_path):
    hybrid, teacher = native(layers=(1, 3))
    hybrid.config.teacher_name_or_path = "someone/teacher"
    hh.export(hybrid, output=tmp_path / "out")
    back, ids = hh.import_native(tmp_path / "out"), tokens(2, 40)
    assert back.full_attention_layers == [1, 3] and back.config.teacher_name_or_path == "someone/teacher"
    assert back.state_dict().keys() == hybrid.state_dict().keys()
    torch.testing.assert_close(back(ids).logits, hybrid(ids).logits, rtol=0, atol=1e-5)
    back.set_full_attention_layers([1, 2, 3], teacher)
    assert hh.export(back, output=tmp_path / "again").largest_difference < 5e-5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "softmax layer 1 has learned to gate"),
        ("model.layers.0.linear_attn.in_proj_qkv.weight", "heads of linear layer 0 that shared keys and values"),
    ],
)
def test_what_was_trained_in_the_layout_may_be_no_hybrid(name, message, tmp_path):
    hh.export(native()[0], output=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.get_parameter(name).add_(torch.randn_like(model.get_parameter(name)) * 1e-3)
    with pytest.raises(ValueError, match=message):
        hh.import_native(model)


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: native("llama")[0], "softmax layers are those of llama"),
            (
                lambda: hh.convert(tiny_teacher("qwen3"), [1]),
                r"mixer_options\['rope'\] is True.*\['qk_norm'\] is True",
            ),
            (lambda: changed(native()[0], silu_v=False), r"\['silu_v'\] is False, and a native layer has True"),
            (lambda: changed(native()[0], output_gate="sigmoid"), r"\['output_gate'\] is 'sigmoid'"),
            (lambda: native(layers=())[0], "no layer keeps softmax"),
            (
                lambda: hh.convert(tiny_teacher("qwen3"), [1], mixer="sliding_window"),
                "is in no layout",
            ),
            (
                lambda: hh.convert(tiny_teacher("qwen3", attention_bias=True), [1], mixer_options="native"),
                "attention has biases",
            ),
            (
                lambda: hh.convert(
                    tiny_teacher("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=2),
                    [3],
                    mixer_options="native",
                ),
                "layers of type sliding_attention",
            ),
            (lambda: tiny_teacher("qwen3"), "no hybrid"),
        ],
    )
    def test_in_words(self, make, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            hh.export(make(), output=tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_another_model_is_never_published(self, tmp_path, monkeypatch):
        def slipped(model):
            found = native_tensors(model)
            found["model.layers.0.input_layernorm.weight"] = found["model.layers.0.input_layernorm.weight"].bfloat16()
            return found

        monkeypatch.setattr(exporting.qwen3_5, "native_tensors", slipped)
        with pytest.raises(ValueError, match="the exported model is another"):
            hh.export(native()[0], output=tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_is_there(self, tmp_path):
        with pytest.raises(ValueError, match="exists; choose a new folder"):
            hh.export(native()[0], output=tmp_path)

    def test_names(self, tmp_path):
        with pytest.raises(ValueError, match=r"to='mlx' is no layout; choose one of \['qwen3_5', 'gguf', 'windows'\]"):
            hh.export(native()[0], to="mlx", output=tmp_path / "out")
        with pytest.raises(ValueError, match="file_type='q9' is unknown"):
            hh.export(native()[0], to="gguf", file_type="q9", output=tmp_path / "out")
        with pytest.raises(ValueError, match="there is none beside the model"):
            hh.export(native()[0], to="gguf", output=tmp_path / "out")


class TestList:
    @pytest.mark.parametrize(
        ("kept", "every"), [([1, 3], 2), ([3], 4), ([2], 3), ([0, 1, 2, 3], 1), ([0, 2], None), ([1, 2], None)]
    )
    def test_every_nth(self, kept, every):
        assert interval(["full_attention" if i in kept else "linear_attention" for i in range(4)]) == every

    def test_who_serves_what(self):
        periodic, other = (hh.layouts_of(native(layers=layers)[0].config) for layers in ((1, 3), (0, 2)))
        fits = {fit.layout for fit in (*periodic, *other) if not fit.obstacles}
        assert fits == {"qwen3_5", "gguf", "vllm plugin"}
        assert "SGLang, MLX: yes, for every 2-th layer keeps softmax" in str(periodic[0])
        said = str(other[0])
        assert "SGLang, MLX: no" in said and "[0, 2] is not so; with n = 2 it would be [1, 3]" in said
        assert "which `select: {selector: uniform-last, k: 2}` chooses" in said

    def test_what_stands_in_the_way(self):
        of_llama, of_scaled = (
            hh.layouts_of(config)
            for config in (
                native("llama")[0].config,
                hh.convert(
                    tiny_teacher("qwen3", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
                    [1],
                    mixer_options="native",
                ).config,
            )
        )
        assert ["those of llama" in str(fit) for fit in of_llama] == [True, True, False, False]
        assert str(of_llama[3]).startswith("vllm plugin: fits (the hybrid as it was saved, nothing is exported)")
        assert not of_scaled[0].obstacles and "rotary embedding is of type 'linear'" in str(of_scaled[1])


class TestCommand:
    def test_convert_export_and_list(self, tmp_path, capsys):
        model, out = str(tmp_path / "model"), str(tmp_path / "out")
        options = ["--full-attention-layers", "2,3", "--export-to", "qwen3_5"]
        assert main(["convert", "embedded", *options, "--output", model]) == 0
        assert main(["export", model, "--list"]) == 0
        assert "gguf: fits" in capsys.readouterr().out
        assert main(["export", model, "--output", out, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["largest_difference"] < 1e-4 and report["greedy_equal"] == 96
        assert (tmp_path / "out" / "tokenizer.json").is_file()
        assert "base_model" not in (tmp_path / "out" / "README.md").read_text()

    def test_a_hybrid_with_default_mixers(self, tmp_path, capsys):
        model = str(tmp_path / "model")
        assert main(["convert", "embedded", "--full-attention-layers", "2,3", "--output", model]) == 0
        assert main(["export", model, "--output", str(tmp_path / "out")]) == 2
        assert "the model does not fit qwen3_5: mixer_options['rope'] is True" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "give --output DIR to export, or --list"),
            (["--list", "--output", "x"], "and not both"),
            (["--output", "x", "--type", "f16"], "--type is that of a GGUF file"),
        ],
    )
    def test_options(self, options, message, capsys):
        assert main(["export", "nowhere", *options]) == 2
        assert message in capsys.readouterr().err


class TestRecipe:
    def test_options_fit_from_the_start(self):
        recipe = Recipe.from_dict(RECIPE | {"export_to": "qwen3_5"})
        assert recipe.mixer_options == NATIVE_OPTIONS
        # Read again from a run's folder it is the same, and of the same identity as with the options written out.
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert recipe.fingerprint() == Recipe.from_dict(RECIPE | {"mixer_options": NATIVE_OPTIONS}).fingerprint()
        longer = RECIPE | {"export_to": "gguf", "mixer_options": {"gated_deltanet": {"short_convolution": 6}}}
        assert Recipe.from_dict(longer).mixer_options["short_convolution"] == 6
        check_recipe(recipe, None, hh.embedded_teacher())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"export_to": "mlx"}, "export_to='mlx' is no layout"),
            ({"mixer": "kimi_delta_attention"}, "mixer 'kimi_delta_attention' cannot be exported"),
            ({"mixer_options": {"rope": True}}, r"mixer_options.rope=True cannot be exported .*needs False"),
            ({"mixer_options": {"gated_deltanet": {"output_gate": None}}}, r"mixer_options.output_gate=None"),
            ({"select": {"selector": "uniform", "k": 0}}, "keeps no layer"),
        ],
    )
    def test_what_would_not_fit(self, changes, message):
        with pytest.raises(ValueError, match=message):
            Recipe.from_dict(RECIPE | {"export_to": "qwen3_5"} | changes)

    def test_a_family_that_cannot_go_out(self, tmp_path):
        recipe = Recipe.from_dict(RECIPE | {"export_to": "qwen3_5"})
        with pytest.raises(ValueError, match=re.escape("(export_to: qwen3_5): its softmax layers are those of llama")):
            check_recipe(recipe, tmp_path, tiny_teacher("llama"))

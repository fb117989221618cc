"""Export of windows to transformers' own models: the same model without remote code, refused where it would not be."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from teachers import tiny_teacher, tokens
from test_export import RECIPE
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    CwmForCausalLM,
    Gemma2Config,
    GenerationConfig,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

import hf_hybrid as hh
from hf_hybrid.cli import main
from hf_hybrid.exporting import windows
from hf_hybrid.modeling import HybridConfig
from hf_hybrid.run.pipeline import check_recipe
from hf_hybrid.run.recipe import Recipe


WINDOW = 17


def windowed(family="qwen3", layers=(1, 3), dtype=torch.float32, options=None, **changes):
    teacher = tiny_teacher(family, dtype, **changes)
    options = {"window": WINDOW} if options is None else options
    return hh.convert(teacher, list(layers), mixer="sliding_window", mixer_options=options)


@pytest.mark.parametrize(
    ("family", "changes", "kind"),
    [
        ("llama", {}, CwmForCausalLM),
        ("llama", {"mlp_bias": True, "tie_word_embeddings": True, "head_dim": 24}, CwmForCausalLM),
        ("mistral", {"sliding_window": None}, CwmForCausalLM),
        ("qwen2", {}, Qwen2ForCausalLM),
        ("llama", {"bos_token_id": None, "eos_token_id": None}, CwmForCausalLM),
        ("qwen3", {"attention_bias": True}, Qwen3ForCausalLM),
    ],
)
def test_transformers_loads_the_same_model_as_its_own(family, changes, kind, tmp_path):
    hybrid = windowed(family, **changes)
    report = hh.export(hybrid, to="windows", output=tmp_path / "out", tokenizer=hh.embedded_tokenizer())
    assert report.largest_difference < 5e-5 and report.greedy_equal == report.greedy_tokens == 96
    assert not list((tmp_path / "out").glob("*.py"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [kind.__name__] and "auto_map" not in config
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is kind
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert set(stored) == set(hybrid.state_dict()) - (
        {"lm_head.weight"} if hybrid.config.tie_word_embeddings else set()
    )
    ids = tokens(2, 3 * WINDOW + 1)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # a shorter row, padded on the left
    with torch.no_grad():
        found, wanted = (one(ids, attention_mask=mask).logits for one in (model, hybrid))
        torch.testing.assert_close(found[mask > 0], wanted[mask > 0], rtol=0, atol=5e-5)
        first = model(ids[:, :30], attention_mask=mask[:, :30], use_cache=True)
        rest = model(ids[:, 30:], attention_mask=mask, past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, wanted[:, 30:], rtol=0, atol=5e-5)
        # What stands here would also hold of a teacher, were it not for the window.
        assert (windowed(family, options={"window": 99}, **changes)(ids).logits - wanted).abs().max() > 0.05


def test_what_the_library_does_for_its_own_models(tmp_path):
    """A static cache and continuous batching, which pages keys and values: a hybrid's own code has no place in it."""
    hybrid = windowed()
    hh.export(hybrid, to="windows", output=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 40, 60)]
    settings = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def written(one, **options):
        rows = [one.generate(torch.tensor([row]), generation_config=settings, **options)[0] for row in prompts]
        return [row[-30:].tolist() for row in rows]

    wanted = written(hybrid)
    assert written(model, cache_implementation="static") == wanted
    small = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)  # by itself it takes most of the memory
    batched = model.generate_batch(inputs=prompts, generation_config=settings, continuous_batching_config=small)
    assert [one.generated_tokens for one in batched.values()] == wanted


def test_the_weights_keep_their_dtype(tmp_path):
    hh.export(windowed(dtype=torch.bfloat16), to="windows", output=tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("llama", {"bos_token_id": None}), ("qwen2", {}), ("qwen3", {})]
)
def test_an_exported_model_is_a_hybrid_again(family, changes, tmp_path):
    hybrid = windowed(family, **changes)
    hybrid.config.teacher_name_or_path = "someone/teacher"
    hh.export(hybrid, to="windows", output=tmp_path / "out")
    assert "base_model: someone/teacher" in (tmp_path / "out" / "README.md").read_text()
    back, ids = hh.import_native(tmp_path / "out"), tokens(2, 60)
    assert back.full_attention_layers == [1, 3] and back.config.teacher_name_or_path == "someone/teacher"
    assert (back(ids).logits == hybrid(ids).logits).all()
    back.set_full_attention_layers([1, 2, 3], tiny_teacher(family, **changes))
    assert hh.export(back, to="windows", output=tmp_path / "again").largest_difference < 5e-5


def test_only_what_has_windows_is_a_hybrid():
    with pytest.raises(ValueError, match="exported as qwen3_5 or windows"):
        hh.import_native(tiny_teacher("qwen3"))


def test_another_window_is_never_published(tmp_path, monkeypatch):
    """The rows that are compared are longer than the window."""
    config_of = windows.native_config

    def wider(config):
        found = config_of(config)
        found.sliding_window += 1
        return found

    monkeypatch.setattr(windows, "native_config", wider)
    hybrid = windowed(options={"window": 200})
    with pytest.raises(ValueError, match="the exported model is another"):
        hh.export(hybrid, to="windows", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def gemma():
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16}
    return HybridConfig.from_teacher(Gemma2Config(**sizes), [1], mixer="gated_deltanet")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: windowed(options={"window": 17, "sinks": 4}).config, r"\['sinks'\] is 4, and layers of transformers"),
        (lambda: windowed("llama_mqa").config, "attention has biases"),
        (lambda: windowed("mistral").config, "have a window of 16 tokens themselves"),
        (
            lambda: windowed("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2).config,
            "have a window of 8 tokens themselves",
        ),
        (lambda: hh.convert(tiny_teacher(), [1]).config, "mixer 'gated_deltanet' has no place"),
        (gemma, "there is no model with windows for gemma2, only for llama, mistral, qwen2, qwen3"),
    ],
)
def test_what_stands_in_the_way(config, message):
    (fit,) = (fit for fit in hh.layouts_of(config()) if fit.layout == "windows")
    assert re.search(message, str(fit)) and str(fit).startswith("windows: no")


def test_who_serves_what():
    said = {family: str(hh.layouts_of(windowed(family).config)[2]) for family in ("llama", "qwen2", "qwen3")}
    assert all("windows: fits" in text and "transformers: any list of layers" in text for text in said.values())
    assert "vLLM: with --model-impl transformers" in said["qwen3"] and "vLLM: any list" in said["llama"]


def test_commands(tmp_path, capsys):
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    options = ["--full-attention-layers", "2,3", "--export-to", "windows", "--output", model]
    assert main(["convert", "embedded", *options]) == 2
    assert "only 'sliding_window' can" in capsys.readouterr().err
    assert main(["convert", "embedded", "--mixer", "sliding_window", *options]) == 0
    assert main(["export", model, "--list"]) == 0
    printed = capsys.readouterr().out
    assert "windows: fits" in printed and "qwen3_5: no" in printed
    assert main(["export", model, "--to", "windows", "--output", out, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["largest_difference"] < 1e-4 and report["greedy_equal"] == 96


def test_recipes(tmp_path):
    asked = RECIPE | {"export_to": "windows", "mixer": "sliding_window"}
    recipe = Recipe.from_dict(asked | {"mixer_options": {"window": 32}, "select": {"selector": "uniform", "k": 0}})
    assert recipe.mixer_options == {"window": 32}
    check_recipe(recipe, None, hh.embedded_teacher())
    with pytest.raises(ValueError, match=r"mixer_options.sinks=4 cannot be exported .*which needs 0"):
        Recipe.from_dict(asked | {"mixer_options": {"sinks": 4}})
    with pytest.raises(ValueError, match="mixer 'gated_deltanet' cannot be exported .*only 'sliding_window' can"):
        Recipe.from_dict(asked | {"mixer": "gated_deltanet"})
    with pytest.raises(ValueError, match=r"\(export_to: windows\): its softmax layers have a window of 16"):
        check_recipe(recipe, tmp_path, tiny_teacher("mistral"))

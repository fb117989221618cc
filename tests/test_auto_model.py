"""`AutoModel` gives a hybrid's backbone: the hidden states below the head, linear layers included."""

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from teachers import tiny_teacher, tokens
from test_standalone import BLOCK
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, pipeline
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

import hf_hybrid as hh
from hf_hybrid.modeling import HybridModel


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def hybrid(family="qwen3", layers=(1,), mixer="gated_deltanet"):
    torch.manual_seed(1)
    options = {"short_convolution": 4} if mixer == "gated_deltanet" else {}
    return hh.convert(tiny_teacher(family, torch.float64), layers, mixer=mixer, mixer_options=options).eval()


@pytest.fixture
def saved(tmp_path):
    """A hybrid, and the folder that it is saved in."""
    model = hybrid()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("layers", [(1, 3), (), (0, 1, 2, 3)], ids=["alternating", "all_linear", "all_softmax"])
def test_hidden_states_are_those_below_the_head(family, layers, tmp_path):
    model, ids = hybrid(family, layers), tokens(2, 20)
    model.save_pretrained(tmp_path)
    backbone, info = AutoModel.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert type(backbone) is not HybridModel and isinstance(backbone, HybridModel)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"}  # as for any model, and none where the head is tied
    wanted = model.base_model(ids).last_hidden_state
    assert torch.equal(backbone(ids).last_hidden_state, wanted)
    assert torch.equal(model.get_output_embeddings()(backbone(input_ids=ids)[0]), model(ids).logits)
    assert len(backbone(ids, output_hidden_states=True).hidden_states) == 5


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["gated_deltanet", "gated_linear_attention", "sliding_window"])
def test_padding_packing_and_the_cache_reach_the_mixers(mixer, tmp_path):
    model, ids = hybrid(mixer=mixer), tokens(2, 20)
    model.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    alone = backbone(ids[:1, 6:]).last_hidden_state
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = backbone(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    torch.testing.assert_close(padded[0, 6:], alone[0], **CLOSE)
    packed = backbone(ids[:1], position_ids=torch.tensor([[*range(6), *range(14)]])).last_hidden_state
    torch.testing.assert_close(packed[:, 6:], alone, **CLOSE)
    first = backbone(ids[:1, 6:15], use_cache=True)
    rest = backbone(ids[:1, 15:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first[0], rest[0]], 1), alone, **CLOSE)
    cache = DynamicCache(config=backbone.config)
    backbone(ids, past_key_values=cache)
    assert cache.get_seq_length() == 20


def test_saved_and_loaded_again(saved, tmp_path):
    model, folder = saved
    backbone, ids = AutoModel.from_pretrained(folder, dtype=torch.float64), tokens(2, 12)
    backbone.save_pretrained(tmp_path / "backbone")
    model.base_model.save_pretrained(tmp_path / "inner")
    config = json.loads((tmp_path / "backbone" / "config.json").read_text())
    assert config["architectures"] == ["HybridModel"]
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for name in ("backbone", "inner"):
        again, info = AutoModel.from_pretrained(tmp_path / name, dtype=torch.float64, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(again(ids)[0], backbone(ids)[0]), name
    whole, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "backbone", dtype=torch.float64, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert torch.equal(whole.base_model(ids)[0], backbone(ids)[0])


def test_without_the_package(saved, tmp_path):
    """Its own code runs where hf_hybrid cannot be imported, and what it saves there loads here."""
    model, _ = saved
    ids = tokens(2, 12)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    code = """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel
    ids = load_file("ids.safetensors")["ids"]
    for source, target in (("model", "second"), ("second", "third")):
        model = AutoModel.from_pretrained(source, trust_remote_code=True, dtype=torch.float64)
        first = model(ids[:, :7], use_cache=True)
        rest = model(ids[:, 7:], past_key_values=first.past_key_values)
        save_file({"states": torch.cat([first[0], rest[0]], 1).detach()}, f"{source}.safetensors")
        model.save_pretrained(target)
    """
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BLOCK + textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = model.base_model(ids).last_hidden_state
    for name in ("model", "second"):
        torch.testing.assert_close(load_file(tmp_path / f"{name}.safetensors")["states"], wanted, **CLOSE)
    back = AutoModel.from_pretrained(tmp_path / "third", dtype=torch.float64)
    assert torch.equal(back(ids)[0], wanted)


def test_arguments_are_those_of_the_teachers_backbone(saved):
    """Embedding models pass on what the signature names."""
    _, folder = saved
    backbone = AutoModel.from_pretrained(folder)
    names = inspect.signature(backbone.forward).parameters
    assert {"input_ids", "attention_mask", "position_ids", "inputs_embeds"} <= set(names)
    assert "labels" not in names


def test_two_teachers_of_one_family_keep_their_own_forward():
    """Classes are made once for each; the library's classes may have their base in common."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    config = Gemma3TextConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    backbone = HybridModel(hh.HybridConfig.from_teacher(config, [1])).eval()
    assert isinstance(backbone.base_model, Gemma3TextModel)
    assert torch.isfinite(backbone(tokens(1, 8)).last_hidden_state).all()


def test_gradients_and_checkpointing(saved):
    _, folder = saved
    backbone, ids = AutoModel.from_pretrained(folder, dtype=torch.float64).train(), tokens(2, 20)
    backbone(ids)[0].square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in backbone.named_parameters()}
    backbone.zero_grad()
    backbone.gradient_checkpointing_enable()
    backbone(ids)[0].square().mean().backward()
    for name, parameter in backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_pickled_and_copied(saved):
    _, folder = saved
    backbone, ids = AutoModel.from_pretrained(folder), tokens(1, 9)
    for twin in (pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone)):
        assert type(twin) is type(backbone) and torch.equal(twin(ids)[0], backbone(ids)[0])


def test_layers_are_restored_in_a_backbone(saved):
    _, folder = saved
    backbone, teacher, ids = AutoModel.from_pretrained(folder, dtype=torch.float64), tiny_teacher(), tokens(1, 9)
    teacher = teacher.to(torch.float64)
    backbone.set_full_attention_layers(range(4), teacher)
    assert torch.equal(backbone(ids)[0], teacher.base_model(ids)[0])


def test_a_pipeline_of_features(saved, tmp_path):
    model, folder = saved
    hh.embedded_tokenizer().save_pretrained(folder)
    features = pipeline("feature-extraction", model=str(folder), tokenizer=str(folder), dtype=torch.float64)
    ids = features.tokenizer("if x", return_tensors="pt").input_ids % 99
    assert isinstance(features.model, HybridModel)
    assert features.model(ids)[0].shape == (1, ids.shape[1], 64)


def test_a_config_without_a_backbone_of_its_own(monkeypatch):
    monkeypatch.setattr(AutoModel, "_model_mapping", {})
    with pytest.raises(ValueError, match="no model without a head for a Qwen3Config"):
        HybridModel(hh.HybridConfig.from_teacher(tiny_teacher().config, [1]))


def test_an_auto_map_of_the_teacher_is_not_the_hybrids(tmp_path):
    """A teacher whose config names code of its own: the hybrid's code is all that the hybrid's config names."""
    config = hh.HybridConfig.from_teacher(tiny_teacher().config, [1])
    config.text_config.auto_map = {"AutoModel": "theirs.Model", "AutoModelForCausalLM": "theirs.ForCausalLM"}
    assert not hasattr(config, "auto_map")
    HybridModel(config).save_pretrained(tmp_path)
    saved_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(saved_map.values()) == {
        "configuration_hybrid.HybridConfig",
        "modeling_hybrid.HybridModel",
        "modeling_hybrid.HybridForCausalLM",
    }

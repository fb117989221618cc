"""A checkpoint needs nothing of ours: it loads where only torch and transformers can be imported."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from teachers import tiny_teacher, tokens
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import hf_hybrid as hh


# Makes every package of ours and every optional one unimportable, wherever it is installed.
BLOCK = """
import sys
for name in ("hf_hybrid", "modeling", "trainers", "fla", "trl", "peft", "datasets", "accelerate"):
    sys.modules[name] = None
"""


def run(code, tmp_path, **environment):
    """Runs `code` in a fresh process, away from the checkout, with an empty cache of remote code."""
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + textwrap.dedent(code)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loads_generates_and_saves_again(tmp_path):
    """There and back, of two families in one process; and not without permission."""
    ids, expected = tokens(2, 12), {}
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    for family in ("qwen2", "qwen3"):
        model = hh.convert(tiny_teacher(family), [1], mixer_options={"short_convolution": 4})
        model.save_pretrained(tmp_path / family / "first")
        expected[family] = model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False)
    run(
        """
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForCausalLM
        ids = load_file("ids.safetensors")["ids"]
        for family in ("qwen2", "qwen3"):
            for source, target in (("first", "second"), ("second", "third")):
                model = AutoModelForCausalLM.from_pretrained(f"{family}/{source}", trust_remote_code=True)
                save_file(
                    {
                        "logits": model(ids).logits.detach(),
                        "text": model.generate(ids, max_new_tokens=6, do_sample=False).contiguous(),
                    },
                    f"{family}/{source}.safetensors",
                )
                model.save_pretrained(f"{family}/{target}")
        try:
            AutoModelForCausalLM.from_pretrained("qwen3/first", trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise SystemExit("loaded without permission")
        """,
        tmp_path,
    )
    for family, (logits, text) in expected.items():
        folder = tmp_path / family
        for name in ("first", "second"):
            got = load_file(folder / f"{name}.safetensors")
            assert (got["logits"] - logits).abs().max() == 0, name
            assert torch.equal(got["text"], text), name
        files = [sorted(p.name for p in (folder / name).glob("*.py")) for name in ("first", "second", "third")]
        assert files[0] == files[1] == files[2]
        back = AutoModelForCausalLM.from_pretrained(folder / "third")  # and here, with our own classes
        assert (back(ids).logits - logits).abs().max() == 0
        assert isinstance(back, hh.HybridForCausalLM)
        assert (hh.HybridForCausalLM.from_pretrained(folder / "third")(ids).logits - logits).abs().max() == 0


def test_checkpoint_is_flat_and_complete(tmp_path):
    hh.convert(tiny_teacher("qwen3"), [1]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_hybrid.HybridConfig",
        "AutoModel": "modeling_hybrid.HybridModel",
        "AutoModelForCausalLM": "modeling_hybrid.HybridForCausalLM",
    }
    assert config["architectures"] == ["HybridForCausalLM"]
    assert config["text_config"]["layer_types"] == ["linear_attention", "full_attention"] + ["linear_attention"] * 2
    names = {p.name for p in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "modeling_hybrid.py"} <= names
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_half_precision_round_trip(tmp_path):
    model, ids = hh.convert(tiny_teacher("qwen3", torch.bfloat16), [1]), tokens(1, 9)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert back.base_model.layers[0].self_attn.A_log.dtype == torch.float32
    assert torch.equal(back(ids).logits, model(ids).logits)


# What another release could do differently in the function that the library calls in the place of softmax.
OTHER = "return module.replace_softmax(query, key, value, attention_call, kwargs), None"


@pytest.mark.parametrize("name", [None, '"hf_hybrid_linear"'], ids=["its own name", "the name of releases before"])
def test_copies_of_the_code_in_one_process_do_not_change_each_other(tmp_path, name):
    """A checkpoint whose code is another release's is loaded beside ours: each runs its own."""
    model, ids = hh.convert(tiny_teacher(), [1]), tokens(2, 12)
    expected = model(ids).logits
    found = {}
    for factor in ("2", "-1"):
        folder = tmp_path / f"times{factor}"
        model.save_pretrained(folder)
        for file in (folder / "adopted_attention.py", folder / "configuration_hybrid.py"):
            code = file.read_text().replace(OTHER, OTHER.replace(", None", f" * {factor}, None"))
            if name is not None:
                code = code.replace('f"hf_hybrid_linear_{id(_BackboneView)}"', name)
            file.write_text(code)
        other = get_class_from_dynamic_module("modeling_hybrid.HybridForCausalLM", str(folder)).from_pretrained(folder)
        assert type(other).__module__ != type(model).__module__
        found[factor] = other, other(ids).logits
        assert (found[factor][1] - expected).abs().max() > 0.1
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(hh.HybridForCausalLM.from_pretrained(tmp_path / "times2")(ids).logits, expected)
    if name is None:
        assert torch.equal(found["2"][0](ids).logits, found["2"][1])

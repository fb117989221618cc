"""A checkpoint needs nothing of ours: it loads where only torch and transformers can be imported."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file
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


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_loads_generates_and_saves_again(tmp_path, family):
    model, ids = hh.convert(tiny_teacher(family), [1], mixer_options={"short_convolution": 4}), tokens(2, 12)
    model.save_pretrained(tmp_path / "first")
    logits, text = model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    run(
        """
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForCausalLM
        ids = load_file("ids.safetensors")["ids"]
        for source, target in (("first", "second"), ("second", "third")):
            model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
            save_file(
                {
                    "logits": model(ids).logits.detach(),
                    "text": model.generate(ids, max_new_tokens=6, do_sample=False).contiguous(),
                },
                f"{source}.safetensors",
            )
            model.save_pretrained(target)
        """,
        tmp_path,
    )
    from safetensors.torch import load_file

    for name in ("first", "second"):
        got = load_file(tmp_path / f"{name}.safetensors")
        assert (got["logits"] - logits).abs().max() == 0, name
        assert torch.equal(got["text"], text), name
    for name in ("second", "third"):
        assert sorted(p.name for p in (tmp_path / name).glob("*.py")) == sorted(
            p.name for p in (tmp_path / "first").glob("*.py")
        )
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "third")  # and here, with our own classes
    assert (back(ids).logits - logits).abs().max() == 0
    assert isinstance(back, hh.HybridForCausalLM)
    assert (hh.HybridForCausalLM.from_pretrained(tmp_path / "third")(ids).logits - logits).abs().max() == 0


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


def test_tensors_missing_from_a_checkpoint_are_initialised_not_garbage(tmp_path):
    """Loading a teacher's own checkpoint as a hybrid: its tensors load by name, the new ones get their usual start."""
    teacher = tiny_teacher("qwen3")
    teacher.save_pretrained(tmp_path)
    config = hh.HybridConfig.from_teacher(teacher.config, [1])
    model = hh.HybridForCausalLM.from_pretrained(tmp_path, config=config)
    mixer = model.base_model.layers[0].self_attn
    assert ((mixer.A_log >= 0) & (mixer.A_log <= 3)).all()
    assert (mixer.o_norm.weight == 1).all()
    assert torch.equal(mixer.q_proj.weight, teacher.base_model.layers[0].self_attn.q_proj.weight)
    assert torch.isfinite(model(tokens(1, 9)).logits).all()


def test_remote_code_needs_permission(tmp_path):
    hh.convert(tiny_teacher("qwen3"), [1]).save_pretrained(tmp_path / "model")
    run(
        """
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained("model", trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise SystemExit("loaded without permission")
        """,
        tmp_path,
    )


# What another release could do differently in the function that the library calls in the place of softmax.
OTHER = "return module.attend(query, key, value, attention_call).contiguous(), None"


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
            code = file.read_text().replace(OTHER, OTHER.replace(".contiguous()", f".contiguous() * {factor}"))
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

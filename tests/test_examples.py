"""Each example runs by the command in its docstring, with few steps, and what it saves is what it says."""

import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_standalone import run
from transformers import AutoModelForCausalLM

import hf_hybrid as hh


EXAMPLES = Path(__file__).parents[1] / "examples"
WITH_TESTS_OF_THEIR_OWN = {"train_teacher"}
LIBRARIES = {"retention"}  # imported by an example


def command(name: str) -> list[str]:
    """The arguments of the command in an example's docstring."""
    text = (EXAMPLES / f"{name}.py").read_text()
    (line,) = re.findall(rf"^    python examples/{name}\.py(.*)$", text.split('"""')[1], flags=re.MULTILINE)
    return shlex.split(line)


@pytest.fixture
def example(monkeypatch, tmp_path, capsys):
    """Runs an example in an empty folder, as its docstring says but for the options given here; returns its output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run_example(name: str, **options) -> str:
        arguments = command(name)
        for option, value in options.items():
            flag = f"--{option.replace('_', '-')}"
            if flag not in arguments:
                arguments += [flag, str(value)]
            elif value is None:
                del arguments[arguments.index(flag) : arguments.index(flag) + 2]
            else:
                arguments[arguments.index(flag) + 1] = str(value)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_every_example_is_run_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")} - WITH_TESTS_OF_THEIR_OWN - LIBRARIES
    source = Path(__file__).read_text()
    assert names and {name for name in names if f'"{name}"' not in source} == set()
    for name in names:
        assert command(name)


def test_convert_and_generate(example, tmp_path):
    out = example("convert_and_generate")
    assert "softmax attention kept in layers [2, 3], linear in [0, 1, 4, 5]" in out
    assert "--- teacher\ndef read(self, " in out and "the logits differ by 0.0" in out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").full_attention_layers == [2, 3]


@pytest.mark.parametrize("dataset", [None, "texts.jsonl"])
def test_sft_lora(example, tmp_path, dataset):
    (tmp_path / "texts.jsonl").write_text('{"text": "import os\\n"}\n{"text": "import sys\\n"}\n' * 4)
    out = example("sft_lora", model="embedded", dataset=dataset, max_steps=2, max_length=64, batch_size=2)
    assert "reaches the attention of 6 of 6 layers: softmax [2, 3], linear [0, 1, 4, 5]" in out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned" / "merged")
    base = hh.convert(hh.embedded_teacher(), [2, 3])
    adapter = PeftModel.from_pretrained(base, tmp_path / "tuned" / "adapter")
    # The mixers' new tensors are drawn at random, and no adapter holds them: compare what has an adapter.
    for name, parameter in adapter.merge_and_unload().named_parameters():
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"):
            assert (merged.get_parameter(name) - parameter).abs().max() < 1e-6, name


def test_sft_lora_of_a_saved_hybrid(example, tmp_path):
    hh.convert(hh.embedded_teacher(), [2, 3]).save_pretrained(tmp_path / "model")
    hh.embedded_tokenizer().save_pretrained(tmp_path / "model")
    out = example("sft_lora", model="model", dataset=None, max_steps=1, max_length=32, batch_size=1, mixers="full")
    assert "6 of 6 layers" in out


def test_dpo(example, tmp_path):
    out = example("dpo", model="embedded", dataset=None, max_steps=5)
    first, last = map(float, re.search(r"loss (\S+) \(log 2.*?\) -> (\S+);", out).groups())
    assert first == pytest.approx(0.6931, abs=1e-4) and last < first
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").full_attention_layers == [2, 3]


def test_push_to_hub(hub, tmp_path):
    """Against a Hub on loopback, in a process of its own: the client reads its endpoint when it is imported."""
    arguments = [argument.replace("my_run/model", "embedded") for argument in command("push_to_hub")]
    arguments = [argument.replace("NAME", "tester") for argument in arguments]
    script = str(EXAMPLES / "push_to_hub.py")
    said = hub.run(
        tmp_path,
        f"""
        import runpy, sys
        sys.argv = {[script, *arguments]}
        runpy.run_path({script!r}, run_name="__main__")
        """,
    )
    files = hub.repos["tester/hybrid"].trees[hub.repos["tester/hybrid"].branches["main"][-1]]
    assert re.search(r"Pushed \d+ files, \d+ bytes: http", said)
    assert {"README.md", "config.json", "model.safetensors", "modeling_hybrid.py", "tokenizer.json"} <= set(files)
    assert "\nimport " in said


def test_custom_mixer(example, tmp_path):
    out = example("custom_mixer", max_steps=4)
    before, after = map(float, re.search(r"KL in nats per token: (\S+) -> (\S+)", out).groups())
    assert after < before
    assert "['Retention', 'Retention', 'Qwen3Attention', 'Qwen3Attention', 'Retention', 'Retention']" in out
    from retention import RetentionHybrid

    model = RetentionHybrid.from_pretrained(tmp_path / "retention_hybrid")
    ids = torch.arange(1, 40)[None]
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    run(  # where neither hf_hybrid nor the example can be imported
        """
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForCausalLM
        ids = load_file("ids.safetensors")["ids"]
        model = AutoModelForCausalLM.from_pretrained("retention_hybrid", trust_remote_code=True)
        text = model.generate(ids, max_new_tokens=8, do_sample=False)
        save_file({"logits": model(ids).logits.detach(), "text": text.contiguous()}, "there.safetensors")
        """,
        tmp_path,
    )
    there = load_file(tmp_path / "there.safetensors")
    assert torch.equal(there["logits"], model(ids).logits)
    assert torch.equal(there["text"], model.generate(ids, max_new_tokens=8, do_sample=False))


@pytest.mark.slow
@pytest.mark.parametrize("imported", [False, True])
def test_custom_mixer_where_the_package_is_installed(monkeypatch, tmp_path, imported):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from retention import RetentionHybrid

    hh.convert(hh.embedded_teacher(), [2], mixer="retention", model_class=RetentionHybrid).save_pretrained(
        tmp_path / "model"
    )
    code = f"""
    {"import hf_hybrid.modeling" if imported else ""}
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
    print(type(model.base_model.layers[0].self_attn).__name__)
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    if imported:
        assert done.returncode == 1 and "use the subclass of HybridForCausalLM that has it" in done.stderr
    else:
        assert done.stdout.strip() == "Retention", done.stderr


def test_custom_mixer_decodes_pads_and_packs(monkeypatch):
    """The mixer of the example by itself: cached decoding, padding and packed documents equal the plain forward."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from retention import RetentionHybrid

    model = hh.convert(hh.embedded_teacher(), [2], mixer="retention", model_class=RetentionHybrid).eval()
    first, second = torch.arange(1, 20)[None], torch.arange(60, 90)[None]
    alone = [model(ids).logits for ids in (first, second)]
    cache = model(first[:, :12], use_cache=True).past_key_values
    steps = [model(first[:, i : i + 1], past_key_values=cache).logits for i in range(12, 19)]
    assert (torch.cat(steps, 1) - alone[0][:, 12:]).abs().max() < 1e-4
    positions = torch.cat((torch.arange(19), torch.arange(30)))[None]
    packed = model(torch.cat((first, second), 1), position_ids=positions).logits
    assert (packed - torch.cat(alone, 1)).abs().max() < 1e-4
    padded, mask = torch.nn.functional.pad(first, (5, 0), value=7), torch.ones(1, 24, dtype=torch.long)
    mask[:, :5] = 0
    got = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, 5:]
    assert (got - alone[0]).abs().max() < 1e-4


def test_a_mixer_that_the_class_does_not_have(monkeypatch):
    with pytest.raises(ValueError, match="mixer='retention' is unknown; choose one of .* or use the subclass"):
        hh.convert(hh.embedded_teacher(), [2], mixer="retention")

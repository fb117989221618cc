"""TRL on a hybrid that it loads itself: by path, with the code that travels, and from the command line."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from finetuning import TEXTS, hybrid, losses, nats, preferences, settings, texts, tokenizer
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import hf_hybrid as hh


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A hybrid with its tokenizer, as a colleague would find it on a disk or the Hub."""
    folder = tmp_path_factory.mktemp("hybrid")
    hybrid().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def cross_entropy() -> float:
    own, model = tokenizer(), hybrid()
    with torch.no_grad():
        rows = [own(text)["input_ids"] + [own.eos_token_id] for text in TEXTS]
        return torch.cat([nats(model, row) for row in rows]).mean().item()


def run(command: list[str], folder: Path) -> str:
    """Runs a command in `folder`, with an empty cache of remote code, and shows that the code was taken from there."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf_home"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert list(Path(folder, "hf_home", "modules").rglob("modeling_hybrid.py"))
    return done.stdout


def test_by_path_with_the_package(checkpoint, tmp_path):
    trainer = SFTTrainer(
        model=str(checkpoint),
        args=SFTConfig(**settings(tmp_path, len(TEXTS), packing=True, max_length=128)),
        train_dataset=texts(),
    )
    assert isinstance(trainer.model, hh.HybridForCausalLM)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(cross_entropy(), abs=1e-3)


def test_by_path_without_the_package(checkpoint, tmp_path):
    """SFT, then DPO from what it saved, with the reference model made by TRL from the same path."""
    texts().to_json(tmp_path / "texts.jsonl")
    preferences().to_json(tmp_path / "preferences.jsonl")
    Path(tmp_path, "settings.json").write_text(json.dumps(settings("out", len(TEXTS), trust_remote_code=True)))
    code = f"""
    import json
    import sys
    for name in ("hf_hybrid", "modeling", "trainers", "fla"):
        sys.modules[name] = None
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    def rows(name):
        return Dataset.from_list([json.loads(line) for line in open(name)])

    settings = json.load(open("settings.json"))
    args = SFTConfig(**settings, packing=True, max_length=128)
    sft = SFTTrainer(model={str(checkpoint)!r}, args=args, train_dataset=rows("texts.jsonl"))
    sft.train()
    sft.save_model("sft")
    dpo = DPOTrainer(model="sft", args=DPOConfig(**settings), train_dataset=rows("preferences.jsonl"))
    assert type(dpo.ref_model).__name__ == "HybridForCausalLM"
    dpo.train()
    dpo.save_model("dpo")
    first = [trainer.state.log_history[0]["loss"] for trainer in (sft, dpo)]
    print(json.dumps(first))
    """
    out = run([sys.executable, "-c", textwrap.dedent(code)], tmp_path)
    sft, dpo = json.loads(out.splitlines()[-1])
    assert sft == pytest.approx(cross_entropy(), abs=1e-3)
    assert dpo == pytest.approx(0.6931, abs=1e-3)
    for name in ("sft", "dpo"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.full_attention_layers == [2, 3]
        assert Path(tmp_path, name, "modeling_hybrid.py").exists()


def test_command_line(checkpoint, tmp_path):
    """`trl sft` with an adapter, which imports nothing of ours."""
    Path(tmp_path, "data").mkdir()
    texts().to_json(tmp_path / "data" / "train.jsonl")
    options = {
        "model_name_or_path": checkpoint,
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": len(TEXTS),
        "max_length": 128,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": "False",
        "dtype": "float32",
    }
    command = [str(Path(sys.executable).with_name("trl")), "sft", "--trust_remote_code", "--packing", "--use_cpu"]
    command += ["--use_peft", "--lora_target_modules", *hh.lora_targets(hybrid())]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    out = run(command, tmp_path)
    first = next(line for line in out.splitlines() if "'loss'" in line)
    assert float(ast.literal_eval(first)["loss"]) == pytest.approx(cross_entropy(), abs=1e-3)
    assert Path(tmp_path, "out", "adapter_config.json").exists()

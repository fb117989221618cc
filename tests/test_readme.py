"""What the README shows runs and is true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

import hf_hybrid as hh
from hf_hybrid.cli import main
from hf_hybrid.run.recipe import Recipe


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def run(code: str, folder: Path, **environment: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cache_with(repo_id: str, home: Path) -> None:
    """A cache of the Hub in `home` in which `repo_id` is a tiny model of that family, with as many layers."""
    commit = "0123456789abcdef" * 2 + "01234567"
    repo = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    tokenizer = hh.embedded_tokenizer()
    tokenizer.save_pretrained(repo / "snapshots" / commit)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(repo / "snapshots" / commit)


@pytest.mark.slow
def test_python_examples(tmp_path: Path) -> None:
    """As they stand, in fresh processes: the second loads what the first saved, under the name of a run's model."""
    first, second = blocks("python")
    cache_with("Qwen/Qwen3-0.6B", tmp_path / "home")
    (tmp_path / "texts").mkdir()
    for i, file in enumerate(sorted(Path(os.__file__).parent.glob("[a-d]*.py"))[:6]):
        (tmp_path / "texts" / f"{i}.txt").write_text(file.read_text("utf-8"), "utf-8")
    said = run(first, tmp_path, HF_HOME=str(tmp_path / "home"))
    assert "its logits on 16 tokens differ from the teacher's by 0\n" in said
    assert 0 < float(said.splitlines()[-1]) < 1
    (tmp_path / "my_run").mkdir()
    (tmp_path / "hybrid").rename(tmp_path / "my_run" / "model")
    run(second, tmp_path)


@pytest.mark.slow
def test_the_steps_from_python(tmp_path: Path) -> None:
    """With fewer of them: as they stand they take most of a minute, of which nothing new is seen."""
    code = blocks("python", (ROOT / "docs" / "python.md").read_text("utf-8"))[0]
    for more, less in (("max_steps=40", "max_steps=4"), ("tokens_per_layer=20_000", "tokens_per_layer=4_000")):
        assert more in code
        code = code.replace(more, less)
    said = run(code, tmp_path)
    assert re.search(r"^\[\d, \d\] ", said, flags=re.M), said
    assert "held-out KL with the layer restored to softmax" in said


def test_recipe_is_valid():
    (text,) = blocks("yaml")
    assert Recipe.from_dict(yaml.safe_load(text)).select.k == 7


def test_named_files_exist() -> None:
    for name in re.findall(r"`((?:recipes|benchmarks|docs|examples)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_commands_are_those_of_the_program(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    known = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.M))
    assert set(re.findall(r"hf-hybrid (\w+)", README)) <= known

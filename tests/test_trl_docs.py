"""docs/finetuning.md: its snippets run, one after the other, and its files exist."""

import re
import shlex
from pathlib import Path

import pytest
from finetuning import chats, hybrid, preferences, prompts, texts, tokenizer

import hf_hybrid as hh


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "finetuning.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


def test_snippets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hybrid().save_pretrained("my_run/model")
    tokenizer().save_pretrained("my_run/model")
    hh.embedded_teacher().save_pretrained("teacher")
    tokenizer().save_pretrained("teacher")
    for name, rows in (("texts", texts()), ("chats", chats()), ("preferences", preferences()), ("prompts", prompts())):
        rows.to_json(f"{name}.jsonl")
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "docs/finetuning.md", "exec"), names)
    (printed,) = re.findall(r"```\n(the adapter reaches.*?)\n```", PAGE)
    assert printed in capsys.readouterr().out
    decayed = names["Trainer"].get_decay_parameter_names
    trainer = object.__new__(names["Trainer"])
    assert [name for name in decayed(trainer, names["model"]) if name.endswith("A_log")] == []
    assert len(decayed(trainer, names["model"])) > 0


def test_command_line_options_exist():
    """`tests/test_trl_loading.py` runs `trl sft` with these options and more."""
    (line,) = blocks("bash")
    flags = [argument for argument in shlex.split(line) if argument.startswith("--")]
    source = (ROOT / "tests" / "test_trl_loading.py").read_text()
    assert [flag for flag in flags if f'"{flag}"' not in source and f'"{flag[2:]}"' not in source] == []


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:tests|docs|examples)/[\w./]+)`", PAGE))))
def test_named_files_exist(name):
    assert (ROOT / name).exists()

"""The Python of pages that have no test of their own runs as it stands, on small models."""

import re
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from runs import tiny_recipe

import hf_hybrid as hh


DOCS = Path(__file__).parents[1] / "docs"


def rows(count: int, seed: int) -> datasets.Dataset:
    ids = torch.randint(100, 500, (count, 32), generator=torch.Generator().manual_seed(seed))
    return datasets.Dataset.from_dict({"input_ids": ids.tolist()})


@pytest.fixture(scope="module")
def given() -> dict:
    """What the pages speak of without making it."""
    teacher = hh.embedded_teacher()
    student = hh.convert(teacher, [])
    names = {"hh": hh, "teacher": teacher, "student": student, "hybrid": student}
    names |= {"tokenizer": hh.embedded_tokenizer(), "rows": rows(8, 0), "train_dataset": rows(8, 0)}
    return names | {"eval_dataset": rows(2, 1), "held_out": rows(2, 1)}


@pytest.mark.parametrize("page", ["scoring", "evaluation", "scaling"])
def test_snippets(page, given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), flags=re.S)
    assert blocks
    names = dict(given)
    for block in blocks:
        exec(compile(block, f"docs/{page}.md", "exec"), names)
    if page == "scoring":
        assert "layer" in capsys.readouterr().out
        assert names["scores"].method == "first-rows" and len(names["scores"].scores) == 6


def test_serving(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "serving.md").read_text(), flags=re.S)
    student = hh.convert(hh.embedded_teacher(), [2, 3], mixer_options="native")
    names = {"student": student, "tokenizer": hh.embedded_tokenizer()}
    exec(compile(block, "docs/serving.md", "exec"), names)
    assert names["report"].greedy_equal == names["report"].greedy_tokens > 0
    assert names["hybrid"].full_attention_layers == [2, 3]


def test_a_run_from_python(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, block = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), flags=re.S)
    Path("recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(*sources)))
    exec(compile(block, "docs/python.md", "exec"), {"hh": hh})
    assert re.match(r"\[\d, \d\] 0\.\d+", capsys.readouterr().out)


def test_decoding_fast(given, monkeypatch):
    """Every line of it; compiled as far as our code is concerned, for torch's own compiler takes half a minute."""
    real, compiled = torch.compile, []

    def compile_without_kernels(function, **options):
        compiled.append(options)
        return real(function, backend="eager", fullgraph=options["fullgraph"])

    monkeypatch.setattr(torch, "compile", compile_without_kernels)
    names = given | {"hybrid": hh.convert(hh.embedded_teacher(), [2, 3])}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "generation.md").read_text(), flags=re.S):
        exec(compile(block, "docs/generation.md", "exec"), names)
    assert compiled == [{"mode": "reduce-overhead", "fullgraph": True}]
    prompt = names["prompt"].input_ids.shape[1]
    assert torch.equal(torch.cat(names["answer"], 1)[0, :20], names["tokens"][0, prompt : prompt + 20])

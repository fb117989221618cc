"""The Python of pages that have no test of their own runs as it stands, on small models."""

import ast
import dataclasses
import re
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from runs import tiny_recipe

import hf_hybrid as hh
from hf_hybrid.modeling.linear_attention import LinearAttentionOptions
from hf_hybrid.modeling.sliding_window_attention import SlidingWindowOptions


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


def test_mixers(given):
    """Its Python, its tables of options, and the bytes that it says a state takes."""
    page = (DOCS / "mixers.md").read_text()
    names = dict(given)
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(compile(block, "docs/mixers.md", "exec"), names)
    assert names["windows"].config.options_of("sliding_window") == {"window": 128, "sinks": 4}
    assert names["mixed"].config.layer_mixers[3] == "sliding_window" and names["mixed"].full_attention_layers == [2]
    recurrence, window = page.split("## Options")[1].split("| of `sliding_window`")
    for table, options in ((recurrence, LinearAttentionOptions), (window, SlidingWindowOptions)):
        found = {
            name for row in re.findall(r"^\| (`.*?) \|", table, flags=re.M) for name in re.findall(r"`(\w+)`", row)
        }
        assert found == {field.name for field in dataclasses.fields(options)}
        for row in re.findall(r"^\| (`.*?) \| `(.*?)`", table, flags=re.M):
            for name in re.findall(r"`(\w+)`", row[0]):
                assert getattr(options(), name) == ast.literal_eval(row[1])
    state, heads, groups, width = 147_456, 9, 3, 64
    assert 4 * heads * width * width == state and f"{state:,} bytes of state" in page
    assert f"as {state // (2 * (groups * 2 * width + 1))} tokens of a window" in page


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

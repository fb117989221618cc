"""The two worked examples of CONTRIBUTING.md work as printed, and ARCHITECTURE.md names what is there."""

import re
from pathlib import Path

import pytest
import torch
from scored import DEAD, kl_with, rows
from teachers import tiny_teacher, tokens

import hf_hybrid as hh


ROOT = Path(__file__).parents[1]
MIXER, METHOD = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.S)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_mixer(family: str) -> None:
    names = {"teacher": tiny_teacher(family, torch.float64)}
    exec(MIXER, names)
    student, ids = names["student"], tokens(2, 40)
    with torch.no_grad():
        whole = student(ids).logits
        out = student(ids[:, :25], use_cache=True)
        pieces = [out.logits]
        for start, stop in ((25, 26), (26, 40)):
            out = student(ids[:, start:stop], past_key_values=out.past_key_values, use_cache=True)
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
        padded = torch.cat([torch.zeros(2, 7, dtype=ids.dtype), ids], 1)
        mask = torch.cat([torch.zeros(2, 7, dtype=ids.dtype), torch.ones_like(ids)], 1)
        torch.testing.assert_close(student(padded, attention_mask=mask).logits[:, 7:], whole, rtol=1e-4, atol=1e-5)


def test_the_scoring_method(dead_layer: tuple, tmp_path: Path) -> None:
    teacher, student = dead_layer
    names = {"hh": hh, "teacher": teacher, "student": student, "held_out": rows(6, seed=9)}
    exec(METHOD, names)
    scores, method = names["scores"], names["BOTH_WAYS"]
    assert scores.ranking[-1] == DEAD and scores.scores[DEAD].value == pytest.approx(0.0, abs=1e-6)
    layers = range(teacher.config.num_hidden_layers)
    base = kl_with(student, teacher, [])
    for layer in layers:
        lost = kl_with(student, teacher, set(layers) - {layer})
        expected = 0.7 * (base - kl_with(student, teacher, [layer])) + 0.3 * lost
        assert scores.scores[layer].value == pytest.approx(expected, rel=1e-4, abs=1e-6)
    with pytest.raises(ValueError, match="option weight=2 .* pass a number from 0 to 1"):
        hh.score_layers(student, teacher, None, names["held_out"], method=method, options={"weight": 2})


def test_architecture_names_what_is_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    for name in re.findall(r"`((?:hf_hybrid|trainers|modeling|tests|benchmarks)/[\w/*.]*)`", text):
        assert list(ROOT.glob(name)), name
    for row in re.findall(r"^\| (`.*?) \|", text, re.M):
        folder = ""
        for name in re.findall(r"`([\w/*.]+)`", row):
            folder = str(Path(name).parent) if "/" in name else folder
            assert list((ROOT / folder).glob(Path(name).name)), f"{folder}/{name}"

"""Rows made as they are needed: the same rows as stored ones, and exactly the rest of them after any stop."""

import json
import signal
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from runs import LINES, PATIENCE, fork, run_and_die, save_teacher, save_texts, tiny_recipe, tiny_tokenizer
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from hf_hybrid.data import rows as data_module
from hf_hybrid.data import text as text_module
from hf_hybrid.data.config import DataConfig, SourceConfig
from hf_hybrid.data.rows import PackedRows, packed_rows
from hf_hybrid.data.stream import PackedStream
from hf_hybrid.data.text import open_text
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import run_recipe
from hf_hybrid.run.stages import Event


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """A source of each kind, with small pieces and batches so that positions fall everywhere."""
    monkeypatch.setattr(text_module, "_PIECE_CHARACTERS", 100)
    monkeypatch.setattr(data_module, "_TEXTS_AT_ONCE", 3)
    (tmp_path / "long.txt").write_text("".join(LINES[:60]).replace("#", "é\r\n#"), "utf-8")
    (tmp_path / "short.txt").write_text(LINES[70], "utf-8")
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n\n" for line in LINES[80:140]))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES[:90]))
    return {
        "files": {"text_files": [str(tmp_path / "*.txt"), str(tmp_path / "*.jsonl")]},
        "streamed dataset": {"dataset": str(tmp_path / "corpus")},
        "dataset": {"dataset": str(tmp_path / "corpus"), "streaming": False},
        "mixture": {
            "sources": [
                SourceConfig(weight=1, text_files=[str(tmp_path / "*.txt")]),
                SourceConfig(weight=2.5, text_files=[str(tmp_path / "*.jsonl")]),
                SourceConfig(weight=1, dataset=str(tmp_path / "corpus")),
            ]
        },
    }


def config_of(source: dict[str, Any], **changes: Any) -> DataConfig:
    return DataConfig(**{"block_size": 16, "held_out_rows": 3, "report_rows": 2, **source, **changes})


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["files", "streamed dataset", "dataset", "mixture"])
def test_rows_go_on_from_any_position(tokenizer: PreTrainedTokenizerFast, sources: dict, kind: str) -> None:
    config = config_of(sources[kind])
    whole = list(packed_rows(config, tokenizer))
    assert len(whole) > 50
    for stop in (0, 1, 2, 7, 31, len(whole) - 1, len(whole)):
        rows = PackedRows(config, tokenizer)
        list(islice(rows, min(stop + 4, len(whole))))  # read ahead, as a data loader does
        state = json.loads(json.dumps(rows.state(stop)))
        rest = list(PackedRows(config, tokenizer, state=state))
        assert len(rest) == len(whole) - stop
        assert all(same(a, b) for a, b in zip(rest, whole[stop:], strict=True))


def first_to_end(config: DataConfig) -> int | None:
    """Of several sources the one that is furthest behind its share where the text ends, for it had no more."""
    text = open_text(config, 0)
    list(text)
    behind = [count / weight for count, weight in zip(text.characters, text.weights, strict=True)]
    return behind.index(min(behind)) if config.sources else None


@pytest.mark.parametrize("kind", ["files", "mixture"])
def test_a_stream_is_the_rows_after_the_held_out_ones_over_and_over(
    tokenizer: PreTrainedTokenizerFast, sources: dict, kind: str
) -> None:
    config = config_of(sources[kind])
    ids = [row["input_ids"] for row in packed_rows(config, tokenizer)][5:]
    halves = np.concatenate(ids).reshape(-1, 8)
    ends: list[tuple[int, int | None]] = []
    stream = PackedStream(config, tokenizer, seed=0, block_size=8, labels=True, at_end=lambda *end: ends.append(end))
    count = 2 * len(halves) + 5
    read = iter(stream)
    given = list(islice(read, len(halves)))
    assert ends == []
    given += islice(read, count - len(halves))
    assert ends == [(len(halves), first_to_end(config))]  # once, though the text was read twice
    assert np.array_equal(np.stack([row["input_ids"] for row in given]), np.concatenate([halves] * 3)[:count])
    for row in given:
        starts = row["position_ids"] == 0
        assert starts[0] and np.array_equal(row["labels"], np.where(starts, -100, row["input_ids"]))
    for stop in (0, 1, 9, len(halves) - 1, len(halves), len(halves) + 1, 2 * len(halves) + 1):
        reader = PackedStream(config, tokenizer, seed=0, block_size=8, labels=True)
        read = iter(reader)
        for position in range(stop):
            next(read)
            reader.state(max(0, position - 3))  # training is some rows behind
        list(islice(read, 3))
        again = PackedStream(config, tokenizer, seed=0, block_size=8, labels=True)
        again.restore(json.loads(json.dumps(reader.state(stop))))
        assert all(same(a, b) for a, b in zip(islice(again, count - stop), given[stop:], strict=True))


def test_weights_are_shares_of_the_characters(sources: dict) -> None:
    config = config_of(sources["mixture"])
    text = open_text(config, 0)
    longest = max(len(line) for line in LINES)
    for number, _ in enumerate(text):
        if number > 20:
            shares = [count / weight for count, weight in zip(text.characters, text.weights, strict=True)]
            # Within a document of each other; a long file is one document, read piece by piece.
            if text.current is None and text.characters[0] == 0:
                assert max(shares) - min(shares) <= longest
    assert min(text.characters) > 0


def test_a_mixture_keeps_documents_whole(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name, lines in (("a", LINES[:40]), ("b", LINES[40:60])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    weighted = [SourceConfig(weight=w, text_files=[str(tmp_path / f"{n}.jsonl")]) for n, w in (("a", 2), ("b", 1))]
    config = config_of({"sources": weighted}, block_size=8)
    ids = np.concatenate([row["input_ids"] for row in packed_rows(config, tokenizer)])
    found = tokenizer.decode(ids).split("<eos>")[:-1]
    assert Counter(found) <= Counter(LINES[:60])
    counts = [sum(len(text) for text in found if text in part) for part in (LINES[:40], LINES[40:60])]
    assert abs(counts[0] - 2 * counts[1]) <= 2 * max(len(line) for line in LINES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": [{"weight": 1}]}, "neither dataset nor text_files"),
        ({"sources": [{"dataset": "a", "text_files": ["b"]}]}, "both dataset and text_files"),
        ({"sources": [{"dataset": "a", "weight": 0}]}, "weight=0"),
        ({"sources": [{"dataset": "a"}], "dataset": "b"}, "dataset and sources; give exactly one"),
        ({"source": "embedded-demo", "on_the_fly": True}, "on_the_fly reads text"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path) | {"data": {"block_size": 64, **changes}}
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(recipe)


def test_a_killed_run_goes_on_in_the_stream(tmp_path: Path) -> None:
    """Same losses, step by step, and same weights as a run that was never stopped; the text ends before the steps."""
    teacher, texts = save_teacher(tmp_path / "teacher"), save_texts(tmp_path / "texts")
    recipe = tiny_recipe(teacher, texts)
    recipe["data"] |= {"on_the_fly": True, "report_rows": 140}
    recipe["training"]["logging_steps"] = 1
    events: list[Event] = []
    whole = run_recipe(Recipe.from_dict(recipe), tmp_path / "whole", progress=events.append)
    said = {event.stage for event in events if event.kind == "note" and " are trained on: each is used " in event.text}
    assert said == {"distill"}  # the others take no more rows than there are
    for where, name in (("step", "align"), ("checkpoint", "align"), ("checkpoint", "distill"), ("step", "finetune")):
        process = fork(run_and_die, recipe, str(tmp_path / "run"), where, name)
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL, f"was not killed at {where} {name}"
    result = run_recipe(Recipe.from_dict(recipe), tmp_path / "run")
    for stage in ("aligned", "distilled", "finetuned"):
        states = [json.loads((r.folder / stage / "trainer_state.json").read_text()) for r in (whole, result)]
        losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states]
        assert losses[0] == losses[1] and len(losses[0]) == states[0]["max_steps"]
        expected, given = (load_file(r.folder / stage / "model.safetensors") for r in (whole, result))
        assert all(torch.equal(expected[name], given[name]) for name in expected), stage
    stored = datasets.load_from_disk(str(result.folder / "data" / "train" / "shard-00000"))
    assert len(stored) == 8  # what the scores need, no more

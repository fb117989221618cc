"""Whole documents are held out, and every document and row begins as the teacher's tokenizer begins a text."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import LINES, save_teacher, tiny_recipe, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hf_hybrid.data import rows as data_module
from hf_hybrid.data import text as text_module
from hf_hybrid.data.rows import (
    CutRows,
    DataConfig,
    Packing,
    build_rows,
    first_rows,
    load_rows,
    packed_rows,
    text_prefix,
)
from hf_hybrid.data.stream import PackedStream
from hf_hybrid.evaluation import recall_task
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import run_recipe
from hf_hybrid.run.stages import Event


BOS = 7


def tokenizer_with_bos(tokens: tuple[int, ...] = (BOS,)) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which now puts `tokens` before a text, as Llama's and Gemma's do one, and GLM's two."""
    tokenizer = tiny_tokenizer()
    names = [tokenizer.convert_ids_to_tokens(token) for token in tokens]
    single = " ".join([*(f"<{index}>" for index in range(len(names))), "$A"])
    special = [(f"<{index}>", token) for index, token in enumerate(tokens)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def numbered(folder: Path, count: int, lines: int = 12) -> list[str]:
    """Files of one document each; line `i` of document `n` is found in no other."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        text = "".join(f"def document_{number}_{line}(x):\n    return x * {line}\n" for line in range(lines))
        (folder / f"{number:02d}.txt").write_text(text)
    return [str(folder / "*.txt")]


def documents_in(rows: Any, tokenizer: Any) -> set[str]:
    text = tokenizer.decode([token for row in rows for token in row["input_ids"]])
    return {word.split("_")[1] for word in text.split() if word.startswith("document_") and word.count("_") > 1}


def jsonl_of(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    texts = ["".join(f"def document_{n}_{line}(x):\n  return x\n" for line in range(9)) for n in range(count)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [str(folder / "a.jsonl")]


@pytest.mark.parametrize("pieces", [2**18, 150])
@pytest.mark.parametrize("kind", ["files", "lines"])
@pytest.mark.parametrize("respect_documents", [True, False])
def test_no_document_is_in_two_sets(
    kind: str, pieces: int, respect_documents: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "_PIECE_CHARACTERS", pieces)
    monkeypatch.setattr(data_module, "_TEXTS_AT_ONCE", 3 if pieces < 1000 else 128)
    tokenizer = tiny_tokenizer()
    files = numbered(tmp_path / "texts", 12) if kind == "files" else jsonl_of(tmp_path / "texts", 30)
    values = {"block_size": 32, "held_out_rows": 5, "report_rows": 7, "respect_documents": respect_documents}
    config = DataConfig(text_files=files, **values)
    rows = build_rows(config, tokenizer, 10**6, 1, tmp_path / "rows")
    assert (len(rows["score"]), len(rows["report"])) == (5, 7) and len(rows["train"]) > 20
    assert rows.packing.documents_apart and load_rows(tmp_path / "rows").packing == rows.packing
    found = {name: documents_in(rows[name], tokenizer) for name in rows}
    assert all(found.values())
    assert not (found["score"] & found["report"] or (found["score"] | found["report"]) & found["train"])
    # And as a stream, whatever position it goes on from.
    stream = PackedStream(config, tokenizer, 1, 32, packing=rows.packing)
    count = 2 * len(rows["train"]) + 3
    given = list(islice(stream, count))
    assert documents_in(given, tokenizer) == found["train"]
    stored = [row["input_ids"] for row in rows["train"]] * 3
    assert [row["input_ids"].tolist() for row in given] == stored[:count]
    for stop in (0, 1, len(rows["train"]) - 1, len(rows["train"]) + 2):
        reader = PackedStream(config, tokenizer, 1, 32, packing=rows.packing)
        for position, _ in enumerate(islice(reader, stop + 4)):
            reader.state(max(0, position - 4))
        again = PackedStream(config, tokenizer, 1, 32, packing=rows.packing)
        again.restore(json.loads(json.dumps(reader.state(stop))))
        rest = [row["input_ids"].tolist() for row in islice(again, count - stop)]
        assert rest == stored[stop:count]


def test_too_few_documents_are_shared_out_by_rows_and_it_is_said(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "all.txt").write_text("".join(LINES))
    notes: list[str] = []

    def listen(event: Event) -> None:
        notes.append(event.text)

    recipe = Recipe.from_dict(tiny_recipe(teacher, tmp_path / "texts"))
    run_recipe(recipe, tmp_path / "run", stop_after="data", progress=listen)
    assert any("too few documents to hold whole ones out" in text for text in notes)
    rows = load_rows(tmp_path / "run" / "data")
    assert not rows.packing.documents_apart
    plain = [row["input_ids"].tolist() for row in packed_rows(recipe.data, tiny_tokenizer(), recipe.seed)]
    given = [row["input_ids"] for name in ("score", "report", "train") for row in rows[name]]
    assert given == plain[: len(given)]


def test_what_a_tokenizer_puts_before_a_text() -> None:
    assert text_prefix(tiny_tokenizer()) == []
    assert text_prefix(tokenizer_with_bos()) == [BOS]
    assert text_prefix(tokenizer_with_bos((5, 6))) == [5, 6]


def test_documents_and_rows_begin_with_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_with_bos()
    config = DataConfig(text_files=jsonl_of(tmp_path, 30), block_size=64, held_out_rows=2, report_rows=2)
    rows = build_rows(config, tokenizer, 10**6, 0, tmp_path / "rows")
    assert rows.packing == Packing([BOS], True)
    for name in rows:
        ids, positions = (np.asarray(rows[name][column]) for column in ("input_ids", "position_ids"))
        assert (ids[positions == 0] == BOS).all() and (ids == BOS).sum() == (positions == 0).sum()
    ends = np.asarray(rows["train"]["input_ids"]) == tokenizer.eos_token_id
    assert (np.asarray(rows["train"]["input_ids"])[:, 1:][ends[:, :-1]] == BOS).all() and ends.sum() > 10
    # Cut for a stage with shorter rows, and made on the fly: likewise.
    cut = CutRows(rows["train"], 16, rows.packing.prefix)[0:9]
    assert (cut["input_ids"][:, 0] == BOS).all() and (cut["position_ids"][:, 0] == 0).all()
    stream = PackedStream(config, tokenizer, 0, 16, packing=rows.packing)
    assert np.array_equal(np.stack([row["input_ids"] for row in islice(stream, 9)]), cut["input_ids"])
    # What rows are measured on without a run.
    assert all(row["input_ids"][0] == BOS for row in first_rows(config, tokenizer, 5))


def test_documents_that_run_into_each_other_have_it_once_a_row(tmp_path: Path) -> None:
    values = {"block_size": 64, "held_out_rows": 2, "report_rows": 2, "respect_documents": False}
    config = DataConfig(text_files=jsonl_of(tmp_path, 30), **values)
    ids = np.asarray(build_rows(config, tokenizer_with_bos(), 50, 0, tmp_path / "rows")["train"]["input_ids"])
    assert (ids[:, 0] == BOS).all() and (ids[:, 1:] != BOS).all()


def test_the_recall_task_begins_with_it() -> None:
    from teachers import tiny_teacher

    config = tiny_teacher(vocab_size=300).config
    plain, with_bos = (recall_task(config, tokenizer, 4, 32) for tokenizer in (tiny_tokenizer(), tokenizer_with_bos()))
    assert plain is not None and with_bos is not None and plain.length == with_bos.length == 32
    assert torch.equal(with_bos.tokens[:, 1:], plain.tokens) and (with_bos.tokens[:, 0] == BOS).all()
    assert torch.equal(with_bos.answers[:, 1:], plain.answers) and not with_bos.answers[:, 0].any()


def test_a_run_of_before_keeps_its_rows(tmp_path: Path) -> None:
    """Rows without `packing.json` had no prefix and shared documents; what is made on the fly goes on so."""
    tokenizer = tokenizer_with_bos()
    config = DataConfig(text_files=numbered(tmp_path / "texts", 12), block_size=32, held_out_rows=5, report_rows=7)
    packing = Packing.load(tmp_path)
    assert packing == Packing([], False)
    plain = [row["input_ids"].tolist() for row in packed_rows(config, tiny_tokenizer())]
    stream = PackedStream(config, tokenizer, 0, 32, packing=packing)
    assert [row["input_ids"].tolist() for row in islice(stream, 20)] == plain[12:32]

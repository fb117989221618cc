"""Text becomes packed rows: which tokens, in which sets, with which positions; and bad text is refused."""

import copy
import json
import re
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from runs import LINES, save_texts, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from hf_hybrid.data import rows as data_module
from hf_hybrid.data import text as text_module
from hf_hybrid.data import tokenise as tokenise_module
from hf_hybrid.data.config import DataConfig, SourceConfig
from hf_hybrid.data.rows import CutRows, PackedRows, build_rows, first_rows, load_rows, packed_rows
from hf_hybrid.data.tokenise import Tokeniser
from hf_hybrid.modeling.modeling_hybrid import packed_documents


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def jsonl(path: Path, documents: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: document, "id": 1}) + "\n" for document in documents))
    return path


def config_of(*paths: Any, **changes: Any) -> DataConfig:
    values = {"block_size": 16, "held_out_rows": 3, "report_rows": 2}
    return DataConfig(text_files=[str(path) for path in paths], **(values | changes))


def test_rows_are_the_documents_one_after_the_other(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    documents = LINES[:40]
    rows = list(packed_rows(config_of(jsonl(tmp_path / "a.jsonl", documents)), tokenizer))
    expected: list[int] = []
    positions: list[int] = []
    for document in documents:
        ids = [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
        expected += ids
        positions += range(len(ids))
    count = len(expected) // 16
    assert len(rows) == count
    np.testing.assert_array_equal(np.stack([row["input_ids"] for row in rows]).ravel(), expected[: 16 * count])
    given = np.stack([row["position_ids"] for row in rows])
    assert (given[:, 0] == 0).all()
    # Equal to positions in the document, but for the document that goes on from the row before.
    wanted = np.asarray(positions[: 16 * count]).reshape(count, 16)
    continued = np.cumsum(wanted == 0, axis=1) == 0
    np.testing.assert_array_equal(given[~continued], wanted[~continued])
    np.testing.assert_array_equal(given[continued], np.broadcast_to(np.arange(16), given.shape)[continued])


def test_without_respect_for_documents_there_are_no_positions(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = config_of(jsonl(tmp_path / "a.jsonl", LINES[:40]), respect_documents=False)
    assert {tuple(row) for row in packed_rows(config, tokenizer)} == {("input_ids",)}


def test_a_long_file_is_one_document_whatever_the_pieces(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("".join(LINES[:50]))
    whole = list(packed_rows(config_of(tmp_path / "a.txt"), tokenizer))
    monkeypatch.setattr(text_module, "_PIECE_CHARACTERS", 100)
    monkeypatch.setattr(data_module, "_TEXTS_AT_ONCE", 3)
    pieces = list(packed_rows(config_of(tmp_path / "a.txt"), tokenizer))
    assert len(whole) == len(pieces)
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"])
        np.testing.assert_array_equal(one["position_ids"], np.arange(16))
        np.testing.assert_array_equal(other["position_ids"], np.arange(16))


def test_sets_are_disjoint_and_in_order(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "_SHARD_TOKENS", 64)  # four rows
    config = config_of(save_texts(tmp_path / "texts") / "*")
    rows = list(islice(packed_rows(config, tokenizer, 1, data_module.Packing([], True)), 15))
    built = build_rows(config, tokenizer, 10, 1, tmp_path / "rows", vocab_size=300)
    assert {name: len(rows) for name, rows in built.items()} == {"score": 3, "report": 2, "train": 10}
    assert len(list((tmp_path / "rows" / "train").iterdir())) == 3
    again = load_rows(tmp_path / "rows")
    given = [row["input_ids"] for name in ("score", "report", "train") for row in again[name]]
    np.testing.assert_array_equal(given, [row["input_ids"] for row in rows])


def test_only_as_much_is_read_as_is_needed(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def endless() -> Any:
        while True:
            read.append(1)
            yield {"text": LINES[len(read) % 7]}

    monkeypatch.setattr(
        text_module, "load_dataset", lambda *args, **kwargs: datasets.IterableDataset.from_generator(endless)
    )
    config = DataConfig(dataset="somebody/something", block_size=16, held_out_rows=3, report_rows=2)
    build_rows(config, tokenizer, 5, 0, tmp_path / "rows")
    assert len(read) <= 2 * data_module._TEXTS_AT_ONCE * Tokeniser(tokenizer).workers


def test_several_threads_make_the_same_rows(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any position on: what was read ahead is another amount, and what is made of it the same."""
    monkeypatch.setattr(tokenise_module, "_SMALL", 50)
    config = config_of(jsonl(tmp_path / "a.jsonl", LINES * 5))
    one, many = (PackedRows(config, tokenizer, workers=workers) for workers in (1, 3))
    seen: list[str] = []
    ids = Tokeniser._ids
    monkeypatch.setattr(Tokeniser, "_ids", lambda *a: (seen.append(threading.current_thread().name), ids(*a))[1])

    def plain(rows: Any) -> list[tuple[list[int], list[int]]]:
        return [(row["input_ids"].tolist(), row["position_ids"].tolist()) for row in rows]

    rows = plain(one)
    assert plain(islice(many, 9)) == rows[:9]
    assert plain(PackedRows(config, tokenizer, state=many.state(), workers=2)) == rows[9:]
    assert seen[0] == "MainThread" and any(name.startswith("ThreadPoolExecutor") for name in seen)
    with pytest.raises(ValueError, match="workers=0 tokenise nothing"):
        Tokeniser(tokenizer, 0)


@pytest.mark.parametrize("settings", [{}, {"split_special_tokens": True}, {"padding_side": "left"}])
def test_ids_are_those_of_the_tokenizer(tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]) -> None:
    """Whatever an earlier call left in it, which no thread changes."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer(["one", "two or more"], padding=True, truncation=True, max_length=3)
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    left = tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding
    texts = [*LINES, "", f"{tokenizer.eos_token} amid {tokenizer.eos_token}"]
    found = Tokeniser(tokenizer, 2)(texts)
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == left != (None, None)
    assert [ids.tolist() for ids in found] == tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_of_the_library(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    jsonl(folder / "train.jsonl", LINES[:40])
    config = DataConfig(dataset=str(folder), block_size=16, held_out_rows=3, report_rows=2, streaming=streaming)
    expected = packed_rows(config_of(folder / "train.jsonl"), tokenizer)
    for given, row in zip(first_rows(config, tokenizer, 9), expected, strict=False):
        np.testing.assert_array_equal(given["input_ids"], row["input_ids"])
    config.text_column = "body"
    with pytest.raises(ValueError, match=r"has no column 'body'; it has \['id', 'text'\]. Set text_column"):
        first_rows(config, tokenizer, 9)
    config.split = "test"
    with pytest.raises(ValueError, match=r"\(subset None, split 'test', revision None\) did not load: "):
        first_rows(config, tokenizer, 9)


def test_a_text_that_ends_early_gives_fewer_training_rows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(LINES[:20]))
    built = build_rows(config_of(tmp_path / "a.txt"), tokenizer, 10**6, 0, tmp_path / "rows")
    assert len(built["score"]) == 3 and 0 < len(built["train"]) < 100


def mixture(folder: Path, counts: list[int], weights: list[float]) -> DataConfig:
    """Sources of so many documents, lines of one text over and over."""
    sources = []
    for number, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        path = jsonl(folder / f"{number}.jsonl", [LINES[i % len(LINES)] for i in range(count)])
        sources.append(SourceConfig(text_files=[str(path)], weight=weight))
    return DataConfig(sources=sources, block_size=16, held_out_rows=3, report_rows=2)


def test_the_source_that_ends_a_mixture_is_named_and_what_would_do(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = mixture(tmp_path, [3_000, 30], [4.8, 0.2])
    built = build_rows(config, tokenizer, 2_000, 0, tmp_path / "rows")
    end = built.text_end
    assert end is not None and end == load_rows(tmp_path / "rows").text_end
    assert (end.source, end.share, end.weight, end.needed) == (1, pytest.approx(0.04), 0.2, 2_000)
    assert end.rows == len(built["train"]) < 2_000
    said = (
        rf"data.sources\[1\] \({tmp_path}/1.jsonl\), 4% of the text, ends after {end.rows:,} of 2,000 training rows,"
    )
    assert re.match(f"{said} and all text with it; give {end.times} times as much of it, or a wei", end.told(config))
    lasting = end.lasting_weight
    for count, weight, enough in ((round(30 * end.times), 0.2, True), (30, lasting, True), (30, 1.2 * lasting, False)):
        changed = mixture(tmp_path, [3_000, count], [4.8, weight])
        built = build_rows(changed, tokenizer, 2_000, 0, tmp_path / f"{count}-{weight}")
        assert (built.text_end is None) == (len(built["train"]) == 2_000) == enough, (count, weight)


def test_a_mixture_that_is_long_enough_names_no_source(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Not even where a source has ended among the texts that were read at once."""
    built = build_rows(mixture(tmp_path, [60, 60], [1, 1]), tokenizer, 20, 0, tmp_path / "rows")
    assert len(built["train"]) == 20 and built.text_end is None


def test_cut_rows_cut_tokens_and_restart_positions(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = first_rows(config_of(jsonl(tmp_path / "a.jsonl", LINES[:40]), block_size=64), tokenizer, 5)
    cut = CutRows(rows, 16)
    assert len(cut) == 20
    everything = cut[0:20]
    np.testing.assert_array_equal(everything["input_ids"].ravel(), np.asarray(rows["input_ids"]).ravel())
    np.testing.assert_array_equal(cut[7]["input_ids"], everything["input_ids"][7])
    assert (everything["position_ids"][:, 0] == 0).all()
    # The models see the same documents in a cut row as in the part of the whole row.
    whole = packed_documents(torch.as_tensor(np.asarray(rows["position_ids"])))
    parts = packed_documents(torch.as_tensor(everything["position_ids"]))
    for i, row in enumerate(whole.view(20, 16)):
        assert torch.equal(row - row[0], parts[i] - parts[i][0])
    with pytest.raises(ValueError, match="rows of 64 tokens cannot be cut into 24; pass a divisor of 64"):
        CutRows(rows, 24)


def test_the_order_of_files_depends_on_the_seed_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = config_of(save_texts(tmp_path / "texts") / "*")
    first = [next(packed_rows(config, tokenizer, seed))["input_ids"].tolist() for seed in (0, 0, 1, 2, 3)]
    assert first[0] == first[1] and any(row != first[0] for row in first)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "data gives no source of text; give exactly one of dataset, text_files, sources and source"),
        ({"dataset": "a/b", "text_files": ["c"]}, "data gives dataset and text_files; give exactly one"),
        ({"source": "pile"}, "data.source='pile' is unknown"),
        ({"dataset": "a/b", "block_size": 0}, "data.block_size=0 is too small"),
    ],
)
def test_bad_descriptions(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


def test_bad_texts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("def f():")
    (tmp_path / "small.txt").write_text("".join(LINES[:3]))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.jsonl").write_text("{\n")
    jsonl(tmp_path / "content.jsonl", LINES[:9], column="content")
    jsonl(tmp_path / "numbers.jsonl", [1, 2])  # type: ignore[list-item]
    for name, message in {
        "empty.txt": "empty.txt'] is empty; give one that has text",
        "short.txt": "short.txt'] is shorter than one block of 16 tokens; give more text or a smaller",
        "small.txt": "and 5 are held out, so none is left to train on",
        "binary.txt": "binary.txt is not UTF-8 text",
        "broken.jsonl": "broken.jsonl, line 1: not JSON",
        "content.jsonl": "line 1 has no column 'text'; it has ['content', 'id']. Set text_column",
        "numbers.jsonl": "column 'text' holds a int, not text",
        "nothing*": "nothing*' matches no file",
    }.items():
        with pytest.raises(ValueError) as error:
            build_rows(config_of(tmp_path / name), tokenizer, 10, 0, tmp_path / f"rows of {name}")
        assert message in str(error.value)


def test_a_tokenizer_of_another_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = config_of(save_texts(tmp_path / "texts") / "*")
    with pytest.raises(ValueError, match="the teacher's vocabulary has 40; pass the tokenizer that belongs"):
        build_rows(config, tokenizer, 10, 0, tmp_path / "rows", vocab_size=40)

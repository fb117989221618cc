"""Measurements equal plain computations of the same thing."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from runs import tiny_tokenizer
from teachers import tiny_teacher
from transformers import DynamicCache

import hf_hybrid as hh
from hf_hybrid.evaluation import Evaluation, cache_bytes, evaluate_model, perplexity
from hf_hybrid.run.plots import plot_scores
from hf_hybrid.trainers import LayerScore, LayerScores


def rows_of(count: int = 6, length: int = 24) -> Dataset:
    return Dataset.from_dict({"input_ids": torch.randint(3, 99, (count, length)).tolist()})


def plain_perplexity(model: torch.nn.Module, ids: list[list[int]]) -> float:
    """One document at a time, in float64."""
    losses = []
    with torch.no_grad():
        for document in ids:
            logits = model(torch.tensor([document])).logits[0].double().log_softmax(-1)
            losses += [-logits[t, token] for t, token in enumerate(document[1:])]
    return math.exp(torch.stack(losses).mean())


def test_an_unchanged_model_has_kl_0_and_the_teachers_perplexity() -> None:
    teacher = tiny_teacher("qwen3")
    result = evaluate_model(hh.convert(teacher, range(4)), teacher, rows=rows_of(), batch_size=4)
    assert result.kl == pytest.approx(0, abs=1e-6) and result.kl_sem == pytest.approx(0, abs=1e-6)
    assert result.perplexity == result.teacher_perplexity and result.tokens == 6 * 24
    assert result.recall is None and result.cache_bytes == result.teacher_cache_bytes


def test_perplexity_is_the_plain_one() -> None:
    rows = rows_of()
    for model in (tiny_teacher("qwen2"), hh.convert(tiny_teacher("llama"), [1])):
        model.train()
        assert perplexity(model, rows, batch_size=4) == pytest.approx(
            plain_perplexity(model, rows["input_ids"]), rel=1e-4
        )
        assert model.training


def test_padding_is_not_among_the_tokens_and_a_row_of_it_is_refused() -> None:
    teacher = tiny_teacher("qwen3")
    masks = [[1] * 24, [1] * 9 + [0] * 15, [1] * 24]
    rows = rows_of(3).add_column("attention_mask", masks)
    model = hh.convert(teacher, [1])
    assert evaluate_model(model, teacher, rows=rows, batch_size=2).tokens == 24 + 9 + 24
    rows = rows.remove_columns("attention_mask").add_column("attention_mask", [*masks[:2], [0] * 24])
    with pytest.raises(ValueError, match="row 2 of the evaluation dataset is nothing but padding"):
        hh.held_out_kl(model, teacher, rows, batch_size=2)


def test_packed_documents_and_padding_count_each_on_their_own() -> None:
    model = hh.convert(tiny_teacher("qwen3"), [1])
    ids = rows_of(4, 24)["input_ids"]
    expected = plain_perplexity(model, [row[:10] for row in ids] + [row[10:] for row in ids])
    packed = Dataset.from_dict({"input_ids": ids, "position_ids": [[*range(10), *range(14)]] * 4})
    assert perplexity(model, packed, batch_size=3) == pytest.approx(expected, rel=1e-4)
    padded = Dataset.from_dict(
        {
            "input_ids": [row[:10] + [0] * 4 for row in ids] + [row[10:] for row in ids],
            "attention_mask": [[1] * 10 + [0] * 4] * 4 + [[1] * 14] * 4,
        }
    )
    assert perplexity(model, padded, batch_size=3) == pytest.approx(expected, rel=1e-4)


def test_cache_bytes_are_those_of_a_real_cache() -> None:
    teacher = tiny_teacher("qwen3")  # 2 key/value heads of 24, 4 query heads
    assert cache_bytes(teacher, 100) == 4 * 2 * 2 * 24 * 4 * 100
    hybrid = hh.convert(teacher, [1])
    assert cache_bytes(hybrid, 100) == 2 * 2 * 24 * 4 * 100 + 3 * (4 * 24 * 24 * 4)
    measured = evaluate_model(hybrid, teacher, cache_context=100)
    assert measured.cache_bytes_per_token == 2 * 2 * 24 * 4 and measured.cache_bytes == cache_bytes(hybrid, 100)
    assert measured.teacher_cache_bytes_per_token == 4 * measured.cache_bytes_per_token
    cache = DynamicCache(config=teacher.config)
    teacher(torch.randint(3, 99, (1, 100)), past_key_values=cache)
    assert cache_bytes(teacher, 100) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    window = tiny_teacher("mistral")  # sees 16 tokens, keeps 15
    assert cache_bytes(window, 100) == cache_bytes(window, 15) == 4 * 2 * 2 * 16 * 4 * 15


def test_recall_uses_what_the_vocabulary_allows() -> None:
    model, tokenizer = tiny_teacher("qwen3"), tiny_tokenizer()  # 98 of the tokenizer's ids fit the model
    result = evaluate_model(model, tokenizer=tokenizer, recall_length=256, recall_rows=2)
    assert result.recall_length == 196 and result.recall_answers == 2 * 49 and 0 <= result.recall <= 1
    assert result.perplexity is None and result.kl is None and result.teacher_recall is None


def test_models_of_different_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 99 tokens, the teacher of 120; pass the teacher that"):
        evaluate_model(hh.convert(tiny_teacher(), [1]), tiny_teacher(vocab_size=120), rows=rows_of())


def test_an_evaluation_is_saved_with_all_of_its_numbers(tmp_path: Path) -> None:
    result = Evaluation(kl=0.5, tokens=7)
    result.save(tmp_path / "evaluation.json")
    assert Evaluation(**json.loads((tmp_path / "evaluation.json").read_text())) == result
    assert result.to_dict() == dataclasses.asdict(result)


def test_the_chart_of_scores_is_a_picture(tmp_path: Path) -> None:
    scores = LayerScores([LayerScore(i, 1.0 - 0.1 * i, 0.05, 100, 1.0) for i in range(6)])
    plot_scores(scores, [2, 5], tmp_path / "scores.png")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.png"]
    from matplotlib.image import imread

    picture = imread(tmp_path / "scores.png")
    assert picture.shape[0] > 300 and len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10

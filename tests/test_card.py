"""Model cards: every number in one was measured, and goes when the measurement goes."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from runs import tiny_recipe, tiny_tokenizer
from teachers import tiny_teacher

import hf_hybrid as hh
from hf_hybrid.card import Provenance, card_text, named_base, placed, save_model, share_sem, write_card
from hf_hybrid.evaluation import Evaluation, TextEvaluation
from hf_hybrid.hub import provenance_of, push
from hf_hybrid.modeling.model_card import GENERATED, licence_of, plain_card
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.tasks.scores import Figure, GenerationScore, TaskScore
from hf_hybrid.trainers import LayerScores
from hf_hybrid.trainers.scoring.scores import LayerScore


EVALUATION = Evaluation(
    kl=0.12345,
    kl_sem=0.00678,
    tokens=23_456,
    perplexity=7.8912,
    teacher_perplexity=6.5431,
    recall=0.9137,
    teacher_recall=0.9871,
    recall_length=252,
    recall_answers=3_210,
    cache_context=1_024,
    cache_bytes=654_321,
    teacher_cache_bytes=987_654,
    cache_bytes_per_token=512,
    teacher_cache_bytes_per_token=768,
)
SCORES = LayerScores(
    [LayerScore(i, kl, kl / 7, 2_048, 3.0, [kl, kl]) for i, kl in enumerate((1.9171, 0.4142, 1.7321, 0.5772))],
    evaluation_tokens=999,
    baseline=2.7183,
)
# What shows each measurement in the card.
SHOWN = {
    "kl": ("0.1235", "23,456", "0.1235"),
    "perplexity": ("7.891",),
    "teacher_perplexity": ("6.543",),
    "recall": ("0.9137 ± 0.0050", "3,210"),
    "teacher_recall": ("0.9871",),
    "cache_bytes": ("654,321",),
    "teacher_cache_bytes": ("987,654",),
    "cache_bytes_per_token": ("| 512 |",),
    "teacher_cache_bytes_per_token": ("| 768 |",),
}
TOKENS = {"align": 11_111, "distill": 22_222, "finetune": 33_333, "score": 8_192}


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return hh.convert(tiny_teacher("qwen3", vocab_size=300), [1, 3])


@pytest.fixture
def run(hybrid: Any, tmp_path: Path) -> Path:
    """A finished run's folder, as far as a push reads it."""
    folder = tmp_path / "run"
    folder.mkdir()
    training = {"use_cpu": True, "hub_token": "hf_secret", "deepspeed": "/home/somebody/zero.json"}
    recipe = tiny_recipe("teachers/secret place", "/home/somebody/texts", training=training)
    Recipe.from_dict(recipe).save(folder / "recipe.yaml")
    EVALUATION.save(folder / "evaluation.json")
    SCORES.save(folder / "scores.json")
    (folder / "report.json").write_text(json.dumps({"tokens": TOKENS, "hf_hybrid": "0.0.7"}))
    save_model(hybrid, tiny_tokenizer(), folder / "model")
    return folder


def card_of(hybrid: Any, made: Provenance, **options: Any) -> str:
    return card_text(hybrid.config, hybrid.num_parameters(), made, **options)


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def test_a_card_of_a_run_says_all_that_was_measured(hybrid: Any, run: Path) -> None:
    card = card_of(hybrid, provenance_of(run), repo_id="me/mine")
    for texts in SHOWN.values():
        assert all(text in card for text in texts)
    assert "0.1235 ± 0.0068" in card and "2.7183" in card
    assert all(f"| {s.layer} | {s.kl:.4f} | {s.sem:.4f} |" in card for s in SCORES.scores)
    assert "| 1 | 0.4142 | 0.0592 | yes |" in card and "](scores.png)" in card
    assert all(f"{count:,} tokens" in card for count in TOKENS.values())
    assert "hf_hybrid 0.0.7" in card and "block_size: 64" in card and 'path = "me/mine"' in card
    assert "2512.20569" in card and "2505.03005" in card and "2412.06464" in card and "@inproceedings" in card
    # Where somebody keeps files is not for the public.
    assert "/home/somebody" not in card and "teachers/" not in card and "hf_secret" not in card
    assert "use_cpu: true" in card and "deepspeed: zero.json" in card


def test_its_metadata_is_what_the_hub_reads(hybrid: Any, run: Path) -> None:
    data = metadata(card_of(hybrid, provenance_of(run), repo_id="me/mine", base_model="somebody/teacher"))
    assert data["base_model"] == "somebody/teacher" and data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"hf-hybrid", "linear-attention", "gated-deltanet"} <= set(data["tags"])
    assert "license" not in data and "datasets" not in data
    [index] = data["model-index"]
    assert index["name"] == "mine"
    metrics = {m["type"]: m["value"] for result in index["results"] for m in result["metrics"]}
    assert metrics == {"kl_divergence": 0.1235, "perplexity": 7.891, "accuracy": 0.9137}
    recipe = tiny_recipe("teacher", "texts")
    recipe["data"] = {"dataset": "somebody/texts", "block_size": 64}
    made = Provenance(EVALUATION, recipe=Recipe.from_dict(recipe))
    data = metadata(card_of(hybrid, made))
    assert data["datasets"] == ["somebody/texts"]
    assert data["model-index"][0]["results"][0]["dataset"]["type"] == "somebody/texts"


def test_each_source_of_text_is_named_without_its_folder(hybrid: Any) -> None:
    recipe = tiny_recipe("teacher", "texts")
    files = {"text_files": ["/home/somebody/notes.txt"]}
    recipe["data"] = {"sources": [{"dataset": "somebody/texts"}, files, {"dataset": "other/texts"}], "block_size": 64}
    made = Provenance(recipe=Recipe.from_dict(recipe), rows={"found": 20, "needed": 20})
    card = card_of(hybrid, made)
    assert metadata(card)["datasets"] == ["somebody/texts", "other/texts"]
    assert "On somebody/texts and local text files and other/texts:" in card
    assert "- notes.txt" in card and "/home" not in card and "The text made" not in card
    made.rows = {"found": 1_202, "needed": 2_560, "text_end": {"source": 1, "share": 0.04}}
    said = "made 1,202 of the 2,560 training rows that a stage takes; notes.txt, 4% of it, was the first to end."
    assert said in card_of(hybrid, made)


@pytest.mark.parametrize("name", SHOWN)
def test_without_a_measurement_there_is_no_number(name: str, hybrid: Any, run: Path) -> None:
    changes: dict[str, Any] = {name: None}
    if name == "kl":  # the tokens are those of both
        changes |= {"kl_sem": None, "perplexity": None, "teacher_perplexity": None}
    dataclasses.replace(EVALUATION, **changes).save(run / "evaluation.json")
    card = card_of(hybrid, provenance_of(run))
    assert not [text for text in SHOWN[name] if text in card]
    kept = [other for other in SHOWN if other not in changes and f"teacher_{name}" != other]
    assert kept and all(text in card for other in kept for text in SHOWN[other])


@pytest.mark.parametrize("name", ["evaluation.json", "scores.json", "report.json"])
def test_without_a_file_of_the_run_its_numbers_are_gone(name: str, hybrid: Any, run: Path) -> None:
    (run / name).unlink()
    card = card_of(hybrid, provenance_of(run))
    gone = {
        "evaluation.json": [text for texts in SHOWN.values() for text in texts],
        "scores.json": ["0.4142", "1.9171", "2.7183", "scores.png"],
        "report.json": [*(f"{count:,} tokens" for count in TOKENS.values()), "0.0.7"],
    }
    for file, texts in gone.items():
        for text in texts:
            assert (text in card) == (file != name), text
    assert ("model-index" in card) == (name != "evaluation.json")


def test_scores_that_are_no_kl_are_called_what_they_are(hybrid: Any, tmp_path: Path) -> None:
    scores = [LayerScore(i, math.nan, math.nan, 0, 1.0, value=0.1 + i / 8) for i in range(4)]
    made = LayerScores(
        scores, method="other", measure="share of mass", unit="per head", higher_is_better=True, order=[3, 1]
    )
    card = card_of(hybrid, Provenance(scores=made))
    assert "Scores (other): share of mass, in per head; higher is worth more." in card and "order [3, 1]" in card
    assert "| 3 | 0.4750 |  | yes |" in card and "nan" not in card and "KL" not in card.split("## Limits")[0]
    write_card(tmp_path, hybrid.config, 1, Provenance(scores=made))
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_nothing_claimed(hybrid: Any) -> None:
    for card in (card_of(hybrid, Provenance()), plain_card(hybrid, "me/mine")):
        text = card.split("## Citation")[0].replace(f"{hybrid.num_parameters():,}", "")
        assert "±" not in text and "model-index" not in text and "KL" not in text and "recall, " not in text


def test_a_share_of_one_is_not_certain() -> None:
    assert share_sem(1.0, 100) == pytest.approx((102 / 104 * 2 / 104 / 104) ** 0.5)
    assert share_sem(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)
    assert share_sem(None, 10) is None and share_sem(0.5, 0) is None


def test_the_licence_is_the_teachers(hybrid: Any, tmp_path: Path) -> None:
    made = Provenance(recipe=Recipe.from_dict(tiny_recipe("embedded", "texts")))
    card = card_of(hybrid, made)
    assert metadata(card)["license"] == "apache-2.0" and "Licence: apache-2.0" in card
    assert "base_model" not in metadata(card)  # what ships with the package is no model on the Hub
    own = {"license": "other", "license_name": "homemade", "license_link": "https://example.org/terms"}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(own)}---\n# Teacher\n")
    assert licence_of(str(tmp_path)) == own
    config = hh.HybridConfig.from_teacher(tiny_teacher().config, [1], teacher_name_or_path=str(tmp_path))
    card = card_text(config, 1, Provenance())
    assert {key: metadata(card)[key] for key in own} == own and "homemade (https://example.org/terms)" in card
    assert str(tmp_path) not in card
    # A run's stages save the folder's name only; its recipe knows where that is.
    saved = hh.HybridConfig.from_dict(config.to_dict())
    assert saved.teacher_name_or_path == tmp_path.name
    made = Provenance(recipe=Recipe.from_dict(tiny_recipe(str(tmp_path), "texts")))
    assert metadata(card_text(saved, 1, made))["license_name"] == "homemade"
    (tmp_path / "README.md").write_text("# A teacher without metadata\n")
    assert licence_of(str(tmp_path)) == {}
    assert "No licence was found" in card_text(config, 1, Provenance())
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match="correct the YAML at its top"):
        card_text(config, 1, Provenance())


def test_a_base_model_named_later_brings_its_licence(hybrid: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Teacher\n")
    card = named_base(card_of(hybrid, Provenance(EVALUATION)), str(tmp_path))
    assert metadata(card)["base_model"] == str(tmp_path) and metadata(card)["license"] == "mit"
    assert "Licence: mit" in card and "No licence" not in card and "0.1235" in card and "model-index" in card


def test_a_folder_is_no_base_model(hybrid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of two parts looks like an id on the Hub."""
    monkeypatch.chdir(tmp_path)
    tiny_teacher().save_pretrained("teachers/mine")
    config = hh.convert("teachers/mine", [1]).config
    assert config.teacher_name_or_path == "teachers/mine" and config.teacher_revision is None
    assert "base_model" not in metadata(card_text(config, 1, Provenance()))


def test_a_card_that_somebody_wrote_is_kept(hybrid: Any, run: Path) -> None:
    card = run / "model" / "README.md"
    before = push(run, "me/mine", dry_run=True).files["README.md"]
    card.write_text("# My own words\n")
    assert push(run, "me/mine", dry_run=True).files["README.md"] == len("# My own words\n") != before
    assert card.read_text() == "# My own words\n"


def test_a_card_is_well_formed(hybrid: Any, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(card_of(hybrid, provenance_of(run), repo_id="me/mine"))
    card = ModelCard.load(path)
    assert card.data.eval_results and card.data.model_name == "mine" and GENERATED in card.content


def test_results_are_not_under_the_teacher_s_name(hybrid: Any, run: Path) -> None:
    """Before a hybrid has a name of its own, its results are of its teacher's hybrid; pushed, of the repository."""
    made = provenance_of(run)
    card = card_of(hybrid, made)
    teacher = hybrid.config.teacher_name_or_path
    assert metadata(card)["model-index"][0]["name"] == (f"{Path(teacher).name}-hybrid" if teacher else "hybrid")
    assert metadata(card_of(hybrid, made, base_model="somebody/big"))["model-index"][0]["name"] == "big-hybrid"
    there = placed(card, "me/mine")
    assert metadata(there)["model-index"][0]["name"] == "mine" and 'path = "me/mine"' in there
    assert metadata(there) | {"model-index": None} == metadata(card) | {"model-index": None}
    assert placed(card_of(hybrid, Provenance()), "me/mine").count("model-index") == 0


def test_tasks_texts_and_free_generation(hybrid: Any) -> None:
    def scores(mean: float) -> list[TaskScore]:
        return [TaskScore("copying", "likelihood", mean, 0.021, 40, 1024), TaskScore("mine", "acc", mean, None, 7)]

    evaluation = Evaluation(
        kl=0.1,
        kl_sem=0.01,
        tokens=96,
        perplexity=7.5,
        perplexity_sem=0.25,
        texts=[TextEvaluation(name, 2, 48, 0.2, 0.02, 8.125, 0.5) for name in ("prose", "code")],
        tasks=scores(0.5),
        teacher_tasks=scores(0.75)[:1],
        generation=GenerationScore(32, 128, Figure(0.625, 0.031), Figure(40.5, 3.25), Figure(0.125, 0.015)),
    )
    card = card_text(hybrid.config, 1_000, Provenance(evaluation=evaluation))
    for line in (
        "| held-out perplexity | 7.500 ± 0.250 |  |",
        "| held-out KL of code | 0.2000 ± 0.0200 | 0 |",
        "| held-out perplexity of prose | 8.125 ± 0.500 |  |",
        "| copying | likelihood | 1,024 | 40 | 0.500 ± 0.021 | 0.750 ± 0.021 |",
        "| mine | acc |  | 7 | 0.500 |  |",
        "Greedy text behind 32 prompts, at most 128 tokens each:",
        "| tokens until the first that is not | 40.500 ± 3.250 |  |",
        "| runs of four tokens seen before | 0.125 ± 0.015 |  |",
    ):
        assert line in card
    assert "offline subset" in card and "end in a loop" not in card

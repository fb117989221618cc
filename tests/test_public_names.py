"""What users of an earlier release import is still there, by the names that its pages and examples used."""

from importlib import import_module

import pytest

import hf_hybrid as hh


OF_BEFORE = {
    "hf_hybrid": [
        *("AdapterCoverage", "AlignmentConfig", "AlignmentTrainer", "ConversionReport", "DistillationConfig"),
        *("DistillationTrainer", "HybridConfig", "HybridForCausalLM", "HybridTrainer", "HybridTrainingArguments"),
        *("LayerScores", "adapter_coverage", "calibrate", "convert", "embedded_teacher", "embedded_tokenizer"),
        *("held_out_kl", "lora_config", "lora_targets", "score_layers", "select_layers", "uniform_layers"),
        "write_teacher_topk",
    ],
    "hf_hybrid.card": ["save_model"],
    "hf_hybrid.demo_data": ["demo_rows", "is_held_out", "standard_library_files"],
    "hf_hybrid.evaluation": ["evaluate_model", "perplexity"],
    "hf_hybrid.hub": ["push"],
    "hf_hybrid.modeling": ["MIXERS", "HybridConfig", "HybridForCausalLM", "HybridModel", "LinearAttention"],
    # What a mixer of one's own takes, which a checkpoint of it asks for.
    "hf_hybrid.modeling.kernels": ["gated_delta_rule", "gated_linear_attention", "kimi_delta_attention"],
    "hf_hybrid.modeling.linear_attention": ["LinearAttention", "LinearAttentionOptions", "decay_parameter", "unit"],
    "hf_hybrid.modeling.modeling_hybrid": ["MIXERS", "HybridForCausalLM"],
    "hf_hybrid.synthetic": ["associative_recall", "chained_recall", "copying", "ordinary_token_ids", "task_accuracy"],
    "hf_hybrid.tasks": ["ruler", "ruler_cases"],
    "hf_hybrid.trainers": ["HeldOutKL", "LayerScore", "LayerScores", "score_layers"],
    "hf_hybrid.trainers.scoring": ["Range", "ScoringMethod"],
}


@pytest.mark.parametrize("module", OF_BEFORE)
def test_they_are_where_they_were(module: str) -> None:
    there = import_module(module)
    assert [name for name in OF_BEFORE[module] if getattr(there, name, None) is None] == []


def test_all_names_can_be_had() -> None:
    assert sorted(hh.__all__) == sorted(set(hh.__all__) & set(dir(hh)))
    for name in hh.__all__:
        assert getattr(hh, name) is not None

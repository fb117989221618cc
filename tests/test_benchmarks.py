"""The benchmarks run, at sizes that say nothing, and their report holds what they measured."""

import json

import delta_rule
import gpu
import pytest
import report
import torch


def test_gpu_benchmark_measures_every_part_and_keeps_rows(tmp_path, monkeypatch, capsys):
    file = tmp_path / "gpu.json"
    arguments = ["gpu.py", "--device", "cpu", "--tiny", "--output", str(file)]
    monkeypatch.setattr("sys.argv", [*arguments, "--mixers", "softmax", "gated_deltanet", "--dtypes", "float32"])
    gpu.main()
    assert "fla is left out: the tensors are on the CPU" in capsys.readouterr().err
    results = json.loads(file.read_text())
    assert {part: len(results[part]) for part in gpu.PARTS} == {
        "correctness": 3,
        "recurrence": 8,
        "kl": 8,
        "training": 4,
        "inference": 4,
    }
    assert all(error < 1e-5 for row in results["correctness"] for error in row["errors"].values())
    hybrid, softmax = (results["inference"][i]["cache_bytes"] for i in (3, 1))
    assert hybrid < softmax

    # Another run adds its rows, and replaces those that it measures again.
    monkeypatch.setattr("sys.argv", [*arguments, "--part", "recurrence", "--mixers", "gated_linear_attention"])
    gpu.main()
    gpu.main()
    merged = json.loads(file.read_text())
    assert len(merged["recurrence"]) == 12 and merged["training"] == results["training"]
    for part in ("training", "recurrence"):  # there is no peak to measure on a CPU
        merged[part] = [row | {"peak_mb": 1.0} for row in merged[part]]
    page = report.gpu(merged)
    assert "gated_linear_attention, torch" in page and "fla-core" in page
    assert all(f"| {row['context']} |" in page for row in merged["inference"])


def test_forms_of_the_delta_rule_agree():
    forms = {name: delta_rule.load(name) for name in ("ours", "transformers", "sdpa")}
    delta_rule.check_agreement(forms)
    forms["transformers"] = lambda *inputs: forms["ours"](*inputs) + 1
    with pytest.raises(AssertionError, match="transformers: "):
        delta_rule.check_agreement(forms)
    assert delta_rule.make_inputs("sdpa", "forward", 5)[0][0].shape == torch.Size([1, 8, 5, 64])

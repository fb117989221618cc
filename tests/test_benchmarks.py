"""The benchmarks run, at sizes that say nothing, and their report holds what they measured."""

import argparse
import ast
import json
import re
from pathlib import Path

import datasets
import delta_rule
import gpu
import gpu_check
import gpu_inference
import gpu_table
import gpu_training
import pytest
import report
import starts
import torch
from teachers import tiny_teacher, tokens
from transformers import AutoModelForCausalLM, Qwen2Config

import hf_hybrid as hh
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.trainers.alignment import mixer_outputs
from hf_hybrid.trainers.precision import AS_LOADED


ROOT = Path(__file__).parents[1]


def test_gpu_benchmark_measures_every_part_and_keeps_rows(tmp_path, monkeypatch, capsys):
    file = tmp_path / "gpu.json"
    arguments = ["gpu.py", "--device", "cpu", "--tiny", "--output", str(file)]
    parts = ["recurrence", "kl", "training", "inference"]
    monkeypatch.setattr("sys.argv", [*arguments, "--part", *parts, "--mixers", "softmax", "gated_deltanet"])
    gpu.main()
    assert "fla is left out: the tensors are on the CPU" in capsys.readouterr().err
    results = json.loads(file.read_text())
    assert {part: len(results[part]) for part in (*parts[:3], *gpu.gpu_inference.KEYS)} == {
        "recurrence": 8,
        "kl": 8,
        "training": 4,
        "prefill": 8,
        "decoding": 8,
        "layers": 6,
    }
    hybrid, teacher = (results["prefill"][i]["cache_bytes"] for i in (3, 2))
    assert hybrid < teacher
    steps = {(row["model"], row["how"], row["context"], row["batch"]): row for row in results["decoding"]}
    assert steps["hybrid", "compiled", 130, 2]["cache_bytes"] == 2 * steps["hybrid", "compiled", 130, 1]["cache_bytes"]
    for model in ("teacher", "hybrid"):  # what was timed computes what the eager step does, to bf16's rounding
        assert steps[model, "compiled", 64, 1]["difference"] < 0.03

    # Another run adds its rows, and replaces those that it measures again.
    monkeypatch.setattr("sys.argv", [*arguments, "--part", "recurrence", "--mixers", "gated_linear_attention"])
    gpu.main()
    gpu.main()
    merged = json.loads(file.read_text())
    assert len(merged["recurrence"]) == 12 and merged["training"] == results["training"]
    for part in ("training", "recurrence"):  # there is no peak to measure on a CPU
        merged[part] = [row | {"peak_mb": 1.0} for row in merged[part]]
    merged["decoding"].append(merged["decoding"][-1] | {"how": "compiled", "context": 130, "batch": 7})
    page = report.gpu(merged)
    assert "gated_linear_attention, torch" in page and "fla-core" in page
    assert all(f"| {row['context']} |" in page for row in merged["prefill"])
    assert "| compiled | 130 | 2, 7 |" in page and "| forward, 128 |" in page


@pytest.mark.slow
def test_gpu_benchmark_measures_training_beside_what_it_is_compared_with(tmp_path, monkeypatch):
    file = tmp_path / "gpu.json"
    arguments = ["gpu.py", "--device", "cpu", "--tiny", "--output", str(file)]
    monkeypatch.setattr("sys.argv", [*arguments, "--part", "step", "held_out", "ga_s2"])
    gpu.main()
    results = json.loads(file.read_text())
    counted = {part: len(results[part]) for part in ("step", "pieces", "held_out", "ga_s2")}
    assert counted == {"step": 10, "pieces": 9, "held_out": 4, "ga_s2": 3}
    assert set(gpu.GROUPS["issue-training"]) <= {*gpu_training.PARTS, "kl"}
    page = report.gpu(results)
    assert "## What is to be reached" in page


def test_after_its_time_a_benchmark_begins_no_row(tmp_path, monkeypatch, capsys):
    file = tmp_path / "gpu.json"
    arguments = ["gpu.py", "--device", "cpu", "--tiny", "--output", str(file), "--part", "training_layer"]
    monkeypatch.setattr("sys.argv", arguments)
    gpu.main()
    rows = json.loads(file.read_text())["training_layer"]
    assert [(row["layer"], row["convolution"]) for row in rows] == [("hf_hybrid", 0), ("hf_hybrid", 4)]
    monkeypatch.setattr("sys.argv", [*arguments, "--seconds", "0"])
    gpu.main()
    assert json.loads(file.read_text())["training_layer"] == rows
    assert capsys.readouterr().err.count("layer of hf_hybrid is left out: the time that --seconds gives is over") == 2


def test_the_table_of_the_gpu_says_what_was_reached():
    steps = {("distillation", True): 400.0, ("next token", True): 200.0, ("distillation", False): 390.0}
    results = {
        "environment": {"device": "NVIDIA H100 80GB HBM3"},
        "step": [
            {"loss": loss, "packed": packed, "variant": "as it comes", "ms": ms, "tokens_per_second": 8192e3 / ms}
            for (loss, packed), ms in steps.items()
        ],
        "kl": [
            {"form": form, "chunk_tokens": chunk, "ms": 90.0, "peak_mb": 2e3}
            for form, chunk in (("as it comes", 440), ("logits once", 110), ("logits twice", 110))
        ],
        "reasons": {"exact KL": "because."},
    }
    page = gpu_table.issue_table(results)
    lines = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in page.splitlines()}
    assert lines["distillation step, 2 x 4,096, packed rows"][1:5] == ["20,480 tokens/s", "", "1.02", "yes"]
    assert lines["the same beside a next-token step of the student"][1:5] == ["400.0 ms", "200.0 ms", "2.00", "yes"]
    assert lines["packed rows; beside them, rows of one document"][3:5] == ["1.03", "yes"]
    kl = lines["exact KL of it, gradients included; beside it, logits made twice in small chunks"]
    assert kl[1] == "90 ms, 2.0 GB; a chunk's logits 267 MB" and kl[3:5] == ["1.12", "no"]
    # Eight times the head's parameters for a token: two heads forward, one of them twice backward.
    assert kl[5] == f"{8 * 1536 * 151_936 * 8192 / 989e9:.1f} ms (ops) |"
    assert "- rows from text on 16 threads; beside it, one: 5 times on 16 cores" in page.splitlines()
    assert "- exact KL: because." in page


def test_parameters_by_which_floors_are_computed_are_those_of_the_models():
    sizes = gpu_table.SIZES | {"num_hidden_layers": 4, "vocab_size": 32, "intermediate_size": 64}
    teacher = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, tie_word_embeddings=True))
    student = hh.convert(teacher, [3])
    shapes = gpu_table.Shapes(sizes)
    for model, expected in ((teacher, shapes.teacher), (student, shapes.student)):
        matrices = [p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name]
        assert sum(matrices) == expected


def test_forms_of_the_delta_rule_agree():
    forms = {name: delta_rule.load(name) for name in ("ours", "transformers", "sdpa")}
    delta_rule.check_agreement(forms)
    forms["transformers"] = lambda *inputs: forms["ours"](*inputs) + 1
    with pytest.raises(AssertionError, match="transformers: "):
        delta_rule.check_agreement(forms)
    assert delta_rule.make_inputs("sdpa", "forward", 5)[0][0].shape == torch.Size([1, 8, 5, 64])


@pytest.mark.slow
def test_starts_are_paired_and_kept(tmp_path, monkeypatch, capsys):
    file = tmp_path / "starts.json"
    few = ["--starts", "drawn", "gate 1, scale", "--trained", "drawn", "gate 1, scale", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["starts.py", "--trial", "--keep", "2", "3", "--output", str(file), *few])
    file.write_text(json.dumps([{"teacher": "embedded", "mixer": "gated_deltanet"}]))  # what it replaces
    starts.main()
    (study,) = json.loads(file.read_text())
    assert study["teacher"] == "embedded" and str(tmp_path) not in study["command"]
    assert study["tokens"]["calibration"] == 4 * 256 and study["tokens"]["alignment"] == [2 * 256, 4 * 256]
    found = {(record["start"], record["seed"]): record for record in study["records"]}
    assert list(found) == [(name, seed) for seed in (0, 1) for name in ("drawn", "gate 1, scale")]
    for record in found.values():
        assert list(record["steps"]) == ["0", "1", "2"] and record["distilled"]["recall"] is not None
    for seed in (0, 1):
        assert found["gate 1, scale", seed]["steps"]["0"]["kl"] < found["drawn", seed]["steps"]["0"]["kl"]
        # Without a start, nothing moves the student between seeds but the draw.
        assert (
            found["drawn", seed]["steps"]["0"]["alignment_loss"] > found["drawn", seed]["steps"]["2"]["alignment_loss"]
        )
    printed = capsys.readouterr().out
    difference = [
        found["gate 1, scale", seed]["steps"]["0"]["kl"] - found["drawn", seed]["steps"]["0"]["kl"] for seed in (0, 1)
    ]
    assert f"{sum(difference) / 2:+.3f} ± {abs(difference[0] - difference[1]) / 2:.3f}" in printed


def test_seeds_of_a_study_share_no_text_but_what_is_held_out(tmp_path, monkeypatch):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(" ".join(f"w{i}x{j}" for j in range(200)))
    text = ["--text", str(tmp_path / "*.txt"), "--block", "32", "--trial", "--seeds", "2"]
    monkeypatch.setattr("sys.argv", ["starts.py", *text])
    rows = starts.Rows(starts.parse_args(), hh.embedded_tokenizer(), 512)
    stages = {"align": 4, "train": 2}
    parts = [rows.held_out, *(rows.train(seed, name, count) for seed in (0, 1) for name, count in stages.items())]
    assert [len(part) for part in parts] == [4, 4, 2, 4, 2]
    seen = [tuple(row["input_ids"]) for part in parts for row in part]
    assert len(set(seen)) == len(seen)


def test_the_page_about_starts_holds_what_was_measured():
    studies = json.loads((starts.PAGE.parents[1] / "benchmarks" / "results" / "starts.json").read_text())
    assert starts.PAGE.read_text().endswith(starts.page(studies))  # else: python -m benchmarks.starts --write-docs
    differences = starts.summary(studies[0]["records"], lambda record: record["steps"]["0"]["kl"])
    by_start = {(r["start"], r["seed"]): r["steps"]["0"]["kl"] for r in studies[0]["records"]}
    paired = [by_start["the same, writes 0.2", seed] - by_start["drawn", seed] for seed in (0, 1, 2)]
    mean = sum(paired) / 3
    error = (sum((value - mean) ** 2 for value in paired) / 2 / 3) ** 0.5
    assert differences["the same, writes 0.2"][1] == f"{mean:+.3f} ± {error:.3f}"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llama_mqa"])
def test_output_projections_are_those_of_least_squares(family):
    """Grouped heads, and a bias; the ridge as rows of its own."""
    teacher = tiny_teacher(family, torch.float64)
    student = hh.convert(teacher, [])
    ids = tokens(6, 40)
    heads = {}

    def keep(i):
        return lambda module, args: None if i in heads else heads.update({i: args[0]})

    for i, layer in enumerate(decoder_layers(student)):
        layer.self_attn.o_proj.register_forward_pre_hook(keep(i))
    wanted = {i: want for i, want, _, _ in mixer_outputs(student, teacher, {"input_ids": ids}, AS_LOADED)}
    before = {i: layer.self_attn.o_proj.weight.clone() for i, layer in enumerate(decoder_layers(student))}
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
    starts.fit_output_projections(student, teacher, rows, 4, AS_LOADED)
    for i, layer in enumerate(decoder_layers(student)):
        x = heads[i].flatten(0, 1)
        bias = layer.self_attn.o_proj.bias
        y = wanted[i].flatten(0, 1) - (0 if bias is None else bias)
        ridge = (0.01 * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
        both, targets = torch.cat((x, ridge)), torch.cat((y, ridge @ before[i].mT))
        expected = torch.linalg.lstsq(both, targets).solution.mT
        torch.testing.assert_close(layer.self_attn.o_proj.weight, expected, rtol=1e-7, atol=1e-9)


def imported(path: Path) -> set[str]:
    """The modules that a script imports, by their full names."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module for node in nodes if isinstance(node, ast.ImportFrom) if node.module}


def test_commands_of_the_pages_find_their_modules():
    """A script that is run by its path finds what lies beside it; `benchmarks.x` only where it is run with -m."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.yaml"), ROOT / "Makefile"]
    text = "\n".join(page.read_text("utf-8") for page in [*pages, *ROOT.glob("benchmarks/**/*.py")])
    for name in sorted(set(re.findall(r"benchmarks/[\w/]+\.py", text))):
        assert (ROOT / name).is_file(), name
    for name in sorted(set(re.findall(r"-m (benchmarks\.[\w.]*\w)", text))):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name
    for name in sorted(set(re.findall(r"python3? (benchmarks/[\w/]+\.py)", text))):
        todo, seen = [ROOT / name], set()
        while todo:
            script = todo.pop()
            seen.add(script)
            names = imported(script)
            assert not any(module.split(".")[0] == "benchmarks" for module in names), f"{name}: run it with -m"
            beside = {(ROOT / name).parent / f"{module}.py" for module in names}
            todo += [path for path in beside - seen if path.is_file()]


def test_the_table_compares_the_largest_batches():
    def row(model, batch, ms, attention="sdpa"):
        row = {"model": model, "how": "compiled", "attention": attention, "context": 131_072, "batch": batch}
        return row | {"ms": ms, "tokens_per_second": 1000 * batch / ms, "floor_ms": ms / 2}

    prefill = {"how": "eager", "context": 65_536}
    results = {
        "decoding": [
            row("teacher", 1, 40.0),
            row("hybrid", 1, 10.0),
            row("hybrid", 1, 4.0, "sums"),
            *(row("teacher", 12, 200.0), row("hybrid", 12, 50.0), row("hybrid", 30, 120.0)),
        ],
        "prefill": [
            prefill | {"model": "teacher", "ms": 1000.0},
            prefill | {"model": "hybrid", "ms": 800.0, "floor_ms": 500.0},
        ],
    }
    shapes = gpu_table.Shapes(gpu_table.SIZES)
    lines = {line.what: line for line in gpu_table.decoding_lines(results, shapes, "NVIDIA H100")}
    lines |= {line.what: line for line in gpu_table.prefill_lines(results, shapes, "NVIDIA H100")}
    found = {
        "batch 1": lines["decoding at 131,072 tokens, batch 1; beside it, the teacher"],
        "largest": lines["decoding at 131,072 tokens, the teacher's largest batch, 12; beside it, the teacher"],
        "full": lines["decoding at 131,072 tokens, a batch that fills memory, 30 beside 12; beside it, the teacher"],
        "prefill": lines["prefill of 65,536 tokens; beside it, the teacher"],
    }
    ratios = {"batch 1": 4.0, "largest": 4.0, "full": 250 / 60, "prefill": 1.25}
    assert {name: line.ratio for name, line in found.items()} == pytest.approx(ratios)
    assert [line.reached() for line in found.values()] == ["yes", "yes", "yes", "no"]
    assert found["prefill"].floor.endswith("if linear layers took no time, 2.00 times")
    sums = lines["decoding at 131,072 tokens, attention as sums, batch 1; beside it, the teacher"]
    assert sums.ratio is None and sums.measured == "250 tokens/s"


def test_a_process_of_the_gpu_benchmark_that_fails_says_why_and_not_what_its_launcher_says(capsys):
    args = argparse.Namespace(device="cpu", tiny=True)
    program = "import sys, traceback\ntry: 1 / 0\nexcept ZeroDivisionError: traceback.print_exc()\n"
    program += "sys.stderr.write('the launcher ' * 400); sys.exit(1)"
    assert gpu_training.worker(args, "scale", ["-c", program]) == {}
    said = capsys.readouterr().err
    assert said.startswith("scale is left out: Traceback") and "ZeroDivisionError" in said


@pytest.mark.parametrize("tolerance", [2e-2, 0.0])
def test_gpu_check_passes_what_is_right_and_no_more(tolerance, tmp_path, monkeypatch):
    """One check, on the CPU; with no room for an error it fails, and says by how much."""
    monkeypatch.setattr(gpu_check, "TOLERANCE", dict.fromkeys(gpu_check.TOLERANCE, tolerance))
    child = ["--device", "cpu", "--workdir", str(tmp_path), "--child", "sizes:gated_deltanet"]
    monkeypatch.setattr("sys.argv", ["gpu_check.py", *child])
    assert gpu_check.main() == (0 if tolerance else 1)
    rows = [json.loads(line) for line in (tmp_path / "sizes-gated_deltanet.jsonl").read_text().splitlines()]
    assert [row["passed"] for row in rows] == [tolerance > 0] * 3
    assert all(row["said"] for row in rows)


def test_gpu_check_refuses_a_wrong_token(monkeypatch):
    """One of the 32 of a generation; what rounding takes for one another passes, however many tokens."""
    assert "below the largest logit by" in gpu_check.generation("gated_linear_attention", "cpu")
    student, teacher = gpu_check.hybrid_of("gated_linear_attention", "cpu")
    generate = student.generate

    def slipped(*args, **kwargs):
        output = generate(*args, **kwargs)
        output.sequences[1, -1] = output.logits[-1][1].topk(5).indices[-1]
        return output

    monkeypatch.setattr(student, "generate", slipped)
    monkeypatch.setattr(gpu_check, "hybrid_of", lambda *_: (student, teacher))
    with pytest.raises(ValueError, match=r"below the largest logit by \S+, allowed are 1\.\de-01"):
        gpu_check.generation("gated_linear_attention", "cpu")


def test_attention_as_sums_is_the_librarys():
    """In a compiled step, of a cache that is not full, with grouped heads; otherwise it is the library's itself."""
    query, key = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 40, 8)
    value, mask = torch.randn(2, 2, 40, 8), (torch.arange(40) < torch.tensor([[23], [31]]))[:, None, None]
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    torch.compiler.reset()
    step = torch.compile(gpu_inference.summed_attention, backend="eager", fullgraph=True)
    wanted, _ = gpu_inference.summed_attention(module, query, key, value, mask, scaling=0.3)
    found, _ = step(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_seeds_of_two_calls_are_measured_on_the_same_rows(tmp_path: Path) -> None:
    """`--seeds 2` and `--first-seed 1` have the same rows for seed 1, and others for seed 0."""
    for i, path in enumerate(sorted((ROOT / "hf_hybrid" / "trainers").glob("*.py"))):
        (tmp_path / f"{i}.txt").write_text(path.read_text())
    texts = [str(path) for path in sorted(tmp_path.iterdir())]
    sizes = {"budgets": [4], "batch": 4, "calibration_rows": 4, "distill_steps": 2, "held_out_rows": 4, "block": 128}
    tokenizer = hh.embedded_tokenizer()

    def rows(first_seed: int, seeds: int) -> starts.Rows:
        given = argparse.Namespace(**sizes, text=texts, teacher="", first_seed=first_seed, seeds=seeds)
        return starts.Rows(given, tokenizer, len(tokenizer))

    both, second = rows(0, 2), rows(1, 1)
    assert both.held_out["input_ids"] == second.held_out["input_ids"]
    ids = [rows.train(seed, "align", 4)["input_ids"] for rows, seed in ((both, 0), (both, 1), (second, 1))]
    assert ids[0] != ids[1] == ids[2]

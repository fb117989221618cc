"""What the multi-process test of the scores starts in each process."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
from scored import EVERY
from teachers import tiny_teacher, tokens
from transformers import set_seed

import hf_hybrid as hh
from hf_hybrid.trainers.processes import exit_process, is_main_process


CASES: dict[str, dict[str, Any]] = {
    "ga-s2": {},
    "ga-s2 halved": {"options": {"rounds": 2, "halving": True, "noise": 0.0}, "k": 1},
    "ga-s2 halved, nothing kept": {"options": {"rounds": 2, "halving": True, "noise": 0.0}, "k": 1},
    "shared, softmax trained": {"k": 2, "options": {"train_softmax": True}},
    "distilled-greedy": {"k": 2},
    "verified": {"k": 1},
    "gates": {"k": 1},
    "path-gradient": {},
    "ablation-kl": {},
    "block-influence": {},
}


def rows(count: int, seed: int = 0) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": tokens(count, 24, seed).tolist()})


def score_all(folder: Path) -> dict[str, Any]:
    """The scores of every case: values, order and tokens. Each case is run twice, the second time from its files."""
    found: dict[str, Any] = {}
    batch = 4 // int(os.environ.get("WORLD_SIZE", 1))
    for name, case in CASES.items():
        teacher = tiny_teacher("llama", num_hidden_layers=3)
        set_seed(0)
        student = hh.convert(teacher, [])
        settings = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 2, "use_cpu": True}
        settings |= {"learning_rate": 1e-3, "mixer_learning_rate": 3e-3, "adam_epsilon": 1e-3}
        args = hh.DistillationConfig(str(folder / "args"), **settings)
        given = {
            "args": args,
            "tokens_per_layer": 4 * 4 * 24,
            "method": EVERY[name.replace(",", " ").split()[0]],
            **case,
        }
        for attempt in ("first", "again"):
            kept = None if "nothing kept" in name else folder / name.replace(" ", "_")
            scores = hh.score_layers(student, teacher, rows(24), rows(5, 1), output_dir=kept, **given)
            values = [score.value for score in scores.scores]
            found[f"{name} {attempt}"] = {"values": values, "order": scores.order, "tokens": scores.tokens}
    return found


if __name__ == "__main__":
    gc.freeze()  # as in conftest.py
    target = Path(sys.argv[1])
    result = score_all(target)
    if is_main_process():
        (target / "result.json").write_text(json.dumps(result))
    exit_process(0)

"""Peak memory of one training step by option, measured and modelled; and the arithmetic for large teachers.

    python benchmarks/memory.py --output benchmarks/results/memory.json      # measures, minutes on two cores
    python benchmarks/memory.py --report benchmarks/results/memory.json      # writes docs/memory.md of the results
    python benchmarks/memory.py --model-size 7B --gpus 8                     # arithmetic alone, at once

Each option is measured in a process of its own: the peak of its resident memory, sampled by the kernel (`VmHWM`), less
what it had before the models were made.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


GIB = 2**30
# Measured shapes: large enough that models and activations, not Python, decide the peak.
SHAPE = {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4, "mlp": 1536, "vocab": 32_768}
ROWS, LENGTH = 2, 512
OPTIONS: dict[str, dict[str, Any]] = {
    "distill": {"stage": "distill"},
    "distill, all logits at once": {"stage": "distill", "chunk_tokens": ROWS * LENGTH},
    "distill, checkpointing": {"stage": "distill", "gradient_checkpointing": True},
    "distill, bf16 autocast": {"stage": "distill", "bf16": True},
    "distill, bf16 autocast, checkpointing": {"stage": "distill", "bf16": True, "gradient_checkpointing": True},
    "distill, top 64 from disk": {"stage": "distill", "teacher_topk": 64},
    "distill, top 64, checkpointing": {"stage": "distill", "teacher_topk": 64, "gradient_checkpointing": True},
    "align": {"stage": "align"},
    "align, two backbones": {"stage": "align", "two_backbones": True},
    "align, checkpointing": {"stage": "align", "gradient_checkpointing": True},
}


@dataclass
class Size:
    """Shapes of a teacher; `mixer_share` is what a Gated DeltaNet mixer adds to its layer: gate and output gate."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    tied: bool = True

    @property
    def parameters(self) -> int:
        """Of a teacher with gated MLPs, norms left out."""
        width = self.hidden // self.heads
        attention = self.hidden * width * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp) + self.vocab * self.hidden * (2 - self.tied)

    def mixer(self) -> int:
        """Parameters of one Gated DeltaNet mixer: the attention's, an output gate, and two projections to heads."""
        width = self.hidden // self.heads
        attention = self.hidden * width * 2 * (self.heads + self.kv_heads)
        return attention + self.hidden**2 + 2 * self.hidden * self.heads + 2 * self.heads + width

    def student(self, softmax_layers: int) -> int:
        """Parameters of a hybrid that keeps softmax attention in `softmax_layers`."""
        width = self.hidden // self.heads
        attention = self.hidden * width * 2 * (self.heads + self.kv_heads)
        return self.parameters + (self.layers - softmax_layers) * (self.mixer() - attention)


# Public configurations: Qwen2.5-1.5B, Qwen2.5-7B and Llama-3-70B.
SIZES = {
    "1.5B": Size(hidden=1536, layers=28, heads=12, kv_heads=2, mlp=8960, vocab=151_936),
    "7B": Size(hidden=3584, layers=28, heads=28, kv_heads=4, mlp=18_944, vocab=152_064, tied=False),
    "70B": Size(hidden=8192, layers=80, heads=64, kv_heads=8, mlp=28_672, vocab=128_256, tied=False),
}


def states(size: Size, stage: str, *, teacher_bytes: int, softmax_layers: int, two_backbones: bool = False) -> dict:
    """
    Bytes of what stays through a step, whole: weights, gradients, and Adam's two moments in fp32.

    The alignment trains the mixers alone, and by default shares the rest of the student with the teacher.
    """
    mixers = size.layers * size.mixer()
    if stage == "align":
        student = 4 * (size.student(0) if two_backbones else mixers)
        return {"teacher": teacher_bytes * size.parameters, "student": student, "gradients and Adam": 12 * mixers}
    trained = size.student(softmax_layers)
    return {"teacher": teacher_bytes * size.parameters, "student": 4 * trained, "gradients and Adam": 12 * trained}


def logits(size: Size, tokens: int, chunk_tokens: int | None) -> int:
    """Bytes of the logits that are alive at once: both models', their log-softmax and the products, in fp32."""
    chunk = min(tokens, chunk_tokens or max(1, 2**24 // size.vocab))
    return 6 * 4 * chunk * size.vocab


def estimate(name: str, gpus: int, tokens: int, softmax_share: float) -> dict[str, Any]:
    """The arithmetic for one teacher: states of each engine for each GPU, in GiB, and tokens of the stages."""
    size = SIZES[name]
    kept = round(size.layers * softmax_share)
    rows = {}
    for stage in ("align", "distill"):
        # In FSDP2 the student is whole in shards; what the alignment does not train is sharded, not shared.
        whole = states(size, stage, teacher_bytes=2, softmax_layers=kept)
        split = states(size, stage, teacher_bytes=2, softmax_layers=kept, two_backbones=True)
        own = split["student"] + split["gradients and Adam"]
        rows[stage] = {
            "ddp": sum(whole.values()) / GIB,
            "fsdp2": (whole["teacher"] + own / gpus) / GIB,
            "fsdp2, shard_teacher": (whole["teacher"] + own) / gpus / GIB,
        }
    hidden = tokens * size.hidden * 2
    return {
        "teacher_parameters": size.parameters,
        "student_parameters": size.student(kept),
        "softmax_layers": kept,
        "gpus": gpus,
        "gib_per_gpu": rows,
        "checkpointed_activations_gib": size.layers * hidden / GIB,
        "logits_gib": logits(size, tokens, None) / GIB,
        "flops_per_token": {
            "align": 2 * size.parameters + 8 * size.layers * size.mixer(),
            "distill": 2 * size.parameters + 8 * size.student(kept),
        },
    }


def measure(name: str) -> dict[str, Any]:
    """Runs one option in a process of its own; returns its measured peak beside the model's."""
    done = subprocess.run([sys.executable, __file__, "--measure", name], capture_output=True, text=True, check=True)
    option = OPTIONS[name]
    size = Size(**SHAPE)
    two = bool(option.get("two_backbones")) or option["stage"] == "distill"
    kept = states(size, option["stage"], teacher_bytes=4, softmax_layers=2, two_backbones=two)
    if option.get("teacher_topk"):
        kept["teacher"] = 0
    peak = json.loads(done.stdout.splitlines()[-1])
    return {
        "option": name,
        "peak_bytes": peak,
        "states_bytes": sum(kept.values()),
        **kept,
        "activations_bytes": peak - sum(kept.values()),
    }


def run(name: str) -> int:
    """The peak growth of this process's resident memory over two steps of an option."""
    import contextlib

    import datasets
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import hf_hybrid as hh
    from hf_hybrid.trainers import alignment

    option = dict(OPTIONS[name])
    stage, two = option.pop("stage"), option.pop("two_backbones", False)
    if two:
        alignment._one_backbone = lambda *args: contextlib.nullcontext()
    torch.manual_seed(0)
    ids = torch.randint(0, SHAPE["vocab"], (2 * ROWS, LENGTH)).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": ids})
    before = _resident("VmRSS")
    config = Qwen2Config(
        hidden_size=SHAPE["hidden"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        intermediate_size=SHAPE["mlp"],
        vocab_size=SHAPE["vocab"],
        tie_word_embeddings=True,
    )
    teacher: Any = Qwen2ForCausalLM(config).eval()
    student = hh.convert(teacher, [] if stage == "align" else [2, 5])
    kinds: Any = {"align": (hh.AlignmentConfig, hh.AlignmentTrainer)}
    arguments, trainer = kinds.get(stage, (hh.DistillationConfig, hh.DistillationTrainer))
    with tempfile.TemporaryDirectory() as folder:
        if "teacher_topk" in option:
            k = option.pop("teacher_topk")
            option["teacher_topk"] = str(hh.write_teacher_topk(teacher, rows, f"{folder}/topk", k, batch_size=ROWS))
            teacher = None
        args = arguments(
            folder,
            max_steps=2,
            per_device_train_batch_size=ROWS,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **option,
        )
        trainer(model=student, teacher=teacher, args=args, train_dataset=rows).train()
    return _resident("VmHWM") - before


HEAD = """# Memory of a training step

Written by `python benchmarks/memory.py --output benchmarks/results/memory.json`, then `python benchmarks/memory.py
--report benchmarks/results/memory.json`. Do not edit.

Measured: the growth of a process's resident memory over two steps on the CPU, fp32 weights, a Qwen2-shaped teacher of
{shape}, {rows} rows of {length} tokens, two softmax layers in the student that is distilled. Modelled: what stays
through a step. With N parameters in the teacher, S in the student and M in its mixers, in bytes:

    distil    b N (teacher, b bytes each) + 4 S (student) + 4 S (gradients) + 8 S (AdamW)
    align     b N (teacher, whose frozen weights are the student's too) + 4 M + 4 M + 8 M

The rest is activations, buffers of the optimizer and what the allocator keeps. On a GPU the same states are there;
activations are smaller with fla's kernels, which this does not measure.

| option | peak, MiB | states, MiB | the rest, MiB |
| --- | ---: | ---: | ---: |
"""

TAIL = """
What each option does, and how to set it:

- **Logits in chunks** is always on: `chunk_tokens` of `DistillationConfig` bounds how many tokens' logits of both
  models exist at once, by default as many as stay within 64 MiB for each model, on a GPU within 256 MiB to 1 GiB, as
  much of that as an eighth of its free memory holds with what is computed of them. Compare "all logits at once".
- **Checkpointing**, `gradient_checkpointing: true`: layers are computed again in the backward pass; in the alignment,
  each mixer.
- **bf16 autocast**, `bf16: true` in `training`: weights, gradients and AdamW stay in fp32; activations are halved on
  GPUs. On the CPU autocast keeps a bf16 copy of the weights, which here eats up the gain.
- **The teacher's top k from disk**, `teacher_topk: 64` in a recipe's `distill`, or `hh.write_teacher_topk` and
  `DistillationConfig(teacher_topk=FOLDER)`: see [scaling.md](scaling.md#the-teachers-top-k-from-disk). Measured
  with the pass that writes it.
- **A backward pass for each layer**, `layerwise_backward: true` in `execution`, or in `AlignmentConfig`: the alignment
  holds the activations of one mixer, not of all; losses and gradients are the same.
- **One backbone** is always on in the alignment, but for FSDP2 and DeepSpeed: only the teacher's layers run there, so
  the student's frozen weights are the teacher's tensors for the while. Compare "two backbones".

The arithmetic for large teachers: [scaling.md](scaling.md).
"""


def report(found: dict[str, Any]) -> str:
    """The page docs/memory.md."""
    shape = ", ".join(f"{value} {name.replace('_', '/')}" for name, value in found["shape"].items())
    lines = [
        f"| {r['option']} | {r['peak_bytes'] / 2**20:,.0f} | {r['states_bytes'] / 2**20:,.0f} "
        f"| {r['activations_bytes'] / 2**20:,.0f} |"
        for r in found["results"]
    ]
    head = HEAD.format(shape=shape, rows=found["rows"], length=found["length"])
    return head + "\n".join(lines) + "\n" + TAIL


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; memory is measured on Linux.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a training step by option.")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--report", type=Path, metavar="JSON", help="write docs/memory.md from these results")
    parser.add_argument("--measure", choices=OPTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--model-size", choices=SIZES, help="print the arithmetic for a teacher of this size")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs that share the work (default: 8)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens at once on a GPU (default: 8192)")
    parser.add_argument("--softmax-share", type=float, default=0.25, help="share of softmax layers (default: 0.25)")
    options = parser.parse_args()
    if options.measure:
        print(run(options.measure))
    elif options.report:
        Path("docs/memory.md").write_text(report(json.loads(options.report.read_text())))
    elif options.model_size:
        print(json.dumps(estimate(options.model_size, options.gpus, options.tokens, options.softmax_share), indent=1))
    else:
        results = []
        for name in OPTIONS:
            results.append(measure(name))
            found = results[-1]
            print(f"{name:40} {found['peak_bytes'] / 2**20:8.0f} MiB, states {found['states_bytes'] / 2**20:6.0f} MiB")
        if options.output:
            options.output.write_text(json.dumps({"shape": SHAPE, "rows": ROWS, "length": LENGTH, "results": results}))


if __name__ == "__main__":
    main()

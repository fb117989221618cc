"""The same comparisons on a GPU, at the shapes of Qwen2.5-1.5B with random weights, in bf16.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --tiny          # does everything once in a minute; its times say nothing

Parts: `recurrence` times one layer's recurrence and softmax attention; `training` times a distillation step, teacher
and KL included, the optimizer not; `kl` its last part alone, from final hidden states on, with fp32 weights under
autocast; `inference` times prefill and decoding of a teacher beside a hybrid of it, and a layer beside those of others
(gpu_inference.py). The parts of gpu_training.py have their own descriptions; `scale` takes as many GPUs as there are,
up to 4. Hybrids keep softmax in the last of every four layers. Every row is written to the file as soon as it is
measured, in place of an earlier one. What cannot run is said. How exact the kernels are is checked by gpu_check.py.
"""

import argparse
import contextlib
import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_inference
import gpu_training
import torch
import torch.nn.functional as F
from gpu_inference import inference as inference  # called by its name
from gpu_shared import Results, make_teacher, median_ms, peak_mb, with_sizes
from torch import Tensor
from transformers import PreTrainedModel

import hf_hybrid as hh
from hf_hybrid.modeling import kernels
from hf_hybrid.run.kernel_tuning import side_by_side


RECURRENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "gated_deltanet": kernels.gated_delta_rule,
    "gated_linear_attention": kernels.gated_linear_attention,
    "kimi_delta_attention": kernels.kimi_delta_attention,
}
PARTS = ("recurrence", "kl", "training", "inference", *gpu_training.PARTS)
# What `--part` takes for several parts: those of training that are rows of the table in docs/performance.md.
GROUPS = {"issue-training": ("cold_start", "kl", *(part for part in gpu_training.PARTS if part != "scale"))}
# What makes a row of each part another row.
KEYS = {
    "recurrence": ("impl", "tokens", "mode"),
    "kl": ("form", "chunk_tokens"),
    "training": ("model", "batch"),
    **gpu_inference.KEYS,
    **gpu_training.KEYS,
}


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    results = Results(args, KEYS)
    with side_by_side() if "fla" in args.kernels else contextlib.nullcontext():
        for part in args.part:
            (getattr(gpu_training, part) if part in gpu_training.PARTS else globals()[part])(args, results)
            gc.collect()  # a Trainer refers to itself, and would hold its models' memory
            if args.device == "cuda":
                torch.cuda.empty_cache()
    sys.stdout.write(f"{json.dumps(results.parts['environment'])}\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=(*PARTS, *GROUPS), default=PARTS)
    mixers = ["softmax", *RECURRENCES]
    parser.add_argument("--mixers", nargs="+", choices=mixers, default=mixers, help="softmax: the model as it was")
    parser.add_argument("--kernels", nargs="+", choices=("fla", "torch"), default=["fla", "torch"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768], help="recurrence")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4], help="training, rows of 4096 tokens")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096 * n for n in (1, 4, 8, 16, 32)])
    gpu_inference.add_arguments(parser)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4], help="scale")
    parser.add_argument("--engines", nargs="+", choices=("ddp", "fsdp2"), default=["ddp", "fsdp2"], help="scale")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each cell")
    parser.add_argument("--steps", type=int, default=32, help="decoded tokens of each cell")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and lengths, to try the program itself")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --tiny tries the program without one")
    with_sizes(args)
    args.backend = args.backend or ("eager" if args.device == "cpu" else "inductor")
    args.until = time.monotonic() + args.seconds
    args.part = list(dict.fromkeys(part for name in args.part for part in GROUPS.get(name, (name,))))
    if args.tiny:
        args.tokens, args.batches, args.contexts = [64, 200], [1, 2], [64, 130]
        args.repeats, args.steps = 2, 3
    reason = "the tensors are on the CPU" if args.device == "cpu" else kernels.why_not_fla()
    if reason is not None and "fla" in args.kernels:
        sys.stderr.write(f"fla is left out: {reason}\n")
        args.kernels = [name for name in args.kernels if name != "fla"]
    return args


def cells(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Mixers and the implementations of their recurrence."""
    for mixer in [name for name in args.mixers if name in RECURRENCES]:
        for kernel in args.kernels:
            yield mixer, kernel


def inputs_of(mixer: str, batch: int, tokens: int, args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Tensor]:
    """q, k, v, g, and beta where there is one, as the mixers hand them over: g and beta in fp32."""
    shape = (batch, tokens, args.heads)
    new = functools.partial(torch.randn, device=args.device)
    q, k = (F.normalize(new(*shape, args.width), dim=-1).to(dtype) for _ in range(2))
    inputs = {"q": q, "k": k, "v": new(*shape, args.width).to(dtype)}
    if mixer == "gated_deltanet":
        return inputs | {"g": F.logsigmoid(new(*shape)), "beta": new(*shape).sigmoid()}
    inputs["g"] = F.logsigmoid(new(*shape, args.width) + 3)
    return inputs if mixer == "gated_linear_attention" else inputs | {"beta": new(*shape).sigmoid()}


# --- recurrence


def recurrence(args: argparse.Namespace, results: Results) -> None:
    """One layer's recurrence, one sequence: forward, and forward with backward."""
    for tokens in args.tokens:
        operators: list[tuple[str, Callable[..., Any], dict[str, Tensor]]] = []
        if "softmax" in args.mixers:
            qkv = torch.randn(3, 1, args.heads, tokens, args.width, device=args.device, dtype=torch.bfloat16)
            qkv = dict(zip(("query", "key", "value"), qkv, strict=True))
            operators.append(("sdpa", softmax_attention, qkv))
        for mixer, kernel in cells(args):
            entry = functools.partial(RECURRENCES[mixer], kernel=kernel)
            operators.append((f"{mixer}, {kernel}", entry, inputs_of(mixer, 1, tokens, args, torch.bfloat16)))
        for name, operator, inputs in operators:
            for mode in ("forward", "forward_backward"):
                call = functools.partial(run_operator, operator, inputs, mode == "forward_backward")
                over = torch.cuda.memory_allocated() if args.device == "cuda" else 0
                ms, _ = median_ms(call, args, args.repeats)
                row = {"impl": name, "tokens": tokens, "mode": mode, "ms": ms, "peak_mb": peak_mb(args, call, over)}
                results.add("recurrence", row)


def softmax_attention(**inputs: Tensor) -> tuple[Tensor]:
    return (F.scaled_dot_product_attention(**inputs, is_causal=True),)


def run_operator(operator: Callable[..., Any], inputs: dict[str, Tensor], backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            operator(**inputs)
        return
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    o = operator(**leaves)[0]
    torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o))


# --- models


def students(args: argparse.Namespace, teacher: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """The softmax model, and a hybrid for each mixer and implementation, one after another."""
    layers = args.sizes["num_hidden_layers"]
    if "softmax" in args.mixers:
        yield "softmax", hh.convert(teacher, range(layers))
    for mixer, kernel in cells(args):
        yield f"{mixer}, {kernel}", hh.convert(teacher, range(3, layers, 4), mixer=mixer, kernel=kernel)


def kl(args: argparse.Namespace, results: Results) -> None:
    """The KL of 2 rows and its gradients, with the logits made once, in one pass, or twice."""
    from hf_hybrid.trainers.losses import chunked_kl_per_token, chunked_kl_sum, tokens_per_chunk
    from hf_hybrid.trainers.regions import compiled_regions

    hidden_size, vocabulary = args.sizes["hidden_size"], args.sizes["vocab_size"]
    count = 2 * args.train_tokens
    new = functools.partial(torch.randn, device=args.device)
    teacher_head = (new(vocabulary, hidden_size) / hidden_size**0.5).bfloat16()
    head = teacher_head.float().requires_grad_()
    teacher, student = new(count, hidden_size).bfloat16(), new(count, hidden_size).bfloat16().requires_grad_()
    weights = torch.full((count,), 1 / count, device=args.device)
    logits = functools.partial(F.linear, weight=teacher_head), functools.partial(F.linear, weight=head)

    def twice(chunk: int) -> None:
        with torch.autocast(args.device, torch.bfloat16):
            values = chunked_kl_per_token(teacher, student, *logits, vocabulary, chunk)
            (values * weights).sum().backward()
        head.grad = student.grad = None

    def once(chunk: int) -> None:
        with torch.autocast(args.device, torch.bfloat16):
            chunked_kl_sum(teacher, student, *logits, weights, [head], vocabulary, chunk).backward()
        head.grad = student.grad = None

    def add(name: str, form: Callable[[int], None], chunk: int) -> None:
        over = torch.cuda.memory_allocated() if args.device == "cuda" else 0
        call = functools.partial(form, chunk)
        ms, _ = median_ms(call, args, args.repeats)
        results.add("kl", {"form": name, "chunk_tokens": chunk, "ms": ms, "peak_mb": peak_mb(args, call, over)})

    default = tokens_per_chunk(vocabulary, torch.device(args.device))
    least = tokens_per_chunk(vocabulary, torch.device("cpu"))
    add("as it comes", once, default)
    for times in (1, 4, 16):
        for name, form in (("logits twice", twice), ("logits once", once)):
            add(name, form, least * times)
    with compiled_regions(backend=args.backend):
        add("torch_compile", once, default)


def training(args: argparse.Namespace, results: Results) -> None:
    """A distillation step without its optimizer: teacher forward, student forward, KL of all tokens, backward."""
    from hf_hybrid.trainers.distillation import mean_kl_of_batch
    from hf_hybrid.trainers.precision import AS_LOADED

    teacher = make_teacher(args).requires_grad_(False)
    for name, student in students(args, teacher):
        student.train()
        for batch in args.batches:
            ids = torch.randint(args.sizes["vocab_size"], (batch, args.train_tokens), device=args.device)

            def step(student: Any = student, ids: Tensor = ids) -> None:
                mean_kl_of_batch(student, teacher, {"input_ids": ids}, AS_LOADED).backward()
                student.zero_grad(set_to_none=True)

            try:
                ms, _ = median_ms(step, args, min(3, args.repeats))
                peak = peak_mb(args, step)
            except torch.OutOfMemoryError:
                sys.stderr.write(f"training {name}, batch {batch} is left out: out of memory\n")
                student.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                continue
            row = {"model": name, "batch": batch, "tokens_per_second": 1000 * ids.numel() / ms, "peak_mb": peak}
            results.add("training", row)


if __name__ == "__main__":
    main()

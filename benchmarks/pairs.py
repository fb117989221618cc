"""Which layers a teacher's hybrid needs: every pair of softmax layers, distilled with one budget and measured.

    python benchmarks/pairs.py --output pairs.json
    python benchmarks/pairs.py --teacher FOLDER --steps 300 --batch-size 32 --device cuda --output pairs.json

One all-linear student is aligned; from it, for each pair, both layers are restored and the hybrid is distilled on the
same batches; held-out KL and recall are measured on rows that no run trained on. Prints the pairs from best to worst,
says where the rules of thumb stand, and writes JSON.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_hybrid as hh
from hf_hybrid.demo_data import demo_rows
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.synthetic import associative_recall, ordinary_token_ids, task_accuracy
from hf_hybrid.trainers.held_out import held_out_kl
from hf_hybrid.trainers.hybrid_trainer import mixer_parameters
from hf_hybrid.trainers.losses import alignment_loss, chunked_kl_per_token, logit_function
from hf_hybrid.trainers.precision import AS_LOADED


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="folder of a teacher; by default the embedded one")
    parser.add_argument("--layers-kept", type=int, default=2, help="softmax layers of each hybrid")
    parser.add_argument("--align-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=150, help="distillation steps of each hybrid")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of 256 tokens")
    parser.add_argument("--align-lr", type=float, default=3e-3)
    parser.add_argument("--mixer-lr", type=float, default=3e-3)
    parser.add_argument("--lr", type=float, default=3e-4, help="of all parameters but the mixers'")
    parser.add_argument("--mixer-options", type=json.loads, default={}, help="JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", type=json.loads, help="JSON list of layer sets instead of all")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def step(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def align(student, teacher, batches, args) -> None:
    optimizer = torch.optim.AdamW(mixer_parameters(student), lr=args.align_lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.align_steps)
    seen = {}

    def record(i):
        return lambda module, inputs, given, output: seen.__setitem__(i, (given, output[0]))

    modules = [layer.self_attn for layer in decoder_layers(teacher)]
    handles = [m.register_forward_hook(record(i), with_kwargs=True) for i, m in enumerate(modules)]
    for batch in batches[: args.align_steps]:
        with torch.no_grad():
            teacher.base_model(batch, use_cache=False)
        losses = []
        for i, layer in enumerate(decoder_layers(student)):
            given, wanted = seen[i]
            output, _ = layer.self_attn(given["hidden_states"], position_embeddings=given["position_embeddings"])
            losses.append(alignment_loss(wanted, output))
        step(torch.stack(losses).mean(), optimizer)
        schedule.step()
    for handle in handles:
        handle.remove()


def distill(student, teacher, batches, args) -> None:
    mixers = {id(p) for p in mixer_parameters(student)}
    groups = [
        {"params": [p for p in student.parameters() if id(p) in mixers], "lr": args.mixer_lr},
        {"params": [p for p in student.parameters() if id(p) not in mixers], "lr": args.lr},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), weight_decay=0.0)
    student.train()
    for batch in batches[: args.steps]:
        with torch.no_grad():
            reference = teacher.base_model(batch, use_cache=False).last_hidden_state
        hidden = student.base_model(batch, use_cache=False).last_hidden_state
        functions = logit_function(teacher, AS_LOADED), logit_function(student, AS_LOADED)
        vocab_size = student.config.vocab_size
        kl = chunked_kl_per_token(reference.flatten(0, 1), hidden.flatten(0, 1), *functions, vocab_size)
        step(kl.mean(), optimizer)
    student.eval()


def main() -> None:
    args = parse_args()
    source = args.teacher
    teacher = AutoModelForCausalLM.from_pretrained(source).eval() if source else hh.embedded_teacher()
    tokenizer = AutoTokenizer.from_pretrained(source) if source else hh.embedded_tokenizer()
    teacher = teacher.to(args.device)
    num_layers = teacher.config.num_hidden_layers
    count = max(args.align_steps, args.steps)
    rows = demo_rows(tokenizer, 256, count * args.batch_size, args.seed, "train").with_format("torch")["input_ids"]
    batches = torch.stack(list(rows)).to(args.device).split(args.batch_size)
    report = demo_rows(tokenizer, 256, 96, args.seed, "report")
    generator = torch.Generator().manual_seed(10**6 + args.seed)
    recall = associative_recall(64, 256, ordinary_token_ids(tokenizer), generator)

    torch.manual_seed(args.seed)
    student = hh.convert(teacher, [], mixer_options=args.mixer_options)
    align(student, teacher, batches, args)
    aligned = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    sets = args.only or [[], *map(list, itertools.combinations(range(num_layers), args.layers_kept))]
    results = []
    for layers in sets:
        start = time.perf_counter()
        student.set_full_attention_layers(layers, teacher)
        distill(student, teacher, batches, args)
        kl = held_out_kl(student, teacher, report, batch_size=32)
        accuracy = task_accuracy(student, *recall)
        seconds = round(time.perf_counter() - start, 1)
        results.append({"layers": layers, "kl": kl.mean, "sem": kl.sem, "recall": accuracy, "seconds": seconds})
        print(json.dumps(results[-1]), flush=True)
        student.set_full_attention_layers([])
        student.load_state_dict(aligned)
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "only")}
    record = {"settings": settings, "teacher_recall": task_accuracy(teacher, *recall), "sets": results}
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    show(results, num_layers, args.layers_kept)


def show(results: list[dict], num_layers: int, kept: int) -> None:
    rules = {"first": list(range(kept)), "last": list(range(num_layers - kept, num_layers))}
    for phase in ("first", "last", "centre"):
        rules[f"uniform ({phase})"] = hh.uniform_layers(num_layers, kept, phase=phase)
    table = Table(title="hybrids from best to worst")
    for column in ("layers", "KL (nats/token)", "s.e.", "recall", "rule of thumb"):
        table.add_column(column, justify="right")
    for result in sorted(results, key=lambda result: result["kl"]):
        names = ", ".join(name for name, layers in rules.items() if layers == result["layers"])
        cells = (str(result["layers"]), f"{result['kl']:.4f}", f"{result['sem']:.4f}", f"{result['recall']:.3f}")
        table.add_row(*cells, names)
    Console().print(table)


if __name__ == "__main__":
    main()

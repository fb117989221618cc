"""Train the small teacher that ships with hf_hybrid, from nothing but this repository and Python's standard library.

    python examples/train_teacher.py --output teacher --seed 10
    python examples/train_teacher.py --output teacher --family llama --layers 8 --intermediate 168 --kv-heads 4 \
        --head-dim 24

A byte-level BPE tokenizer is trained on the standard library's source, then a model of about 0.7M parameters, by
default a Qwen3, on a mix of that source, associative recall (of one hop and of two) and copying. The tasks start short
and grow: induction then appears early. An H100 needs four minutes, a CPU hours (`--steps 20 --batch-size 8` shows that
the script works). Two hops are not learned in every run, not even of one seed (while the recipe settled: in 3 of 3
runs at a learning rate of 2e-3, 2 of 6 at 3e-3, 0 of 1 at 1.5e-3): read `metrics.json` and try again. Writes the
model, its tokenizer, `metrics.json` and a model card to `--output`.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from hf_hybrid.demo_data import is_held_out, standard_library_files
from hf_hybrid.synthetic import associative_recall, chained_recall, copying, ordinary_token_ids, task_accuracy


END_OF_TEXT = "<|endoftext|>"
LENGTH = 256  # tokens per training row
RAMP = 0.3  # share of the steps over which the tasks grow from easy to full
UNPREDICTABLE = 0.1  # loss weight of random tokens: enough to stay calibrated on them, too little to learn them
FAMILIES: dict[str, Any] = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}
# Of the embedded teacher.
SHAPE = {"layers": 6, "hidden": 96, "intermediate": 256, "heads": 4, "kv_heads": 2, "head_dim": 32}
EVALUATION_SEED = 2**40  # training generators are seeded with --seed, far below

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- hf_hybrid
- code
---

# A small teacher for hf_hybrid

A {family} model of {parameters:,} parameters: {num_hidden_layers} layers, hidden size {hidden_size},
{num_attention_heads} query heads and {num_key_value_heads} key and value heads of dimension {head_dim}, {vocab_size} \
tokens. It recalls, copies and
models Python source, and is small enough to align, score and distil on a CPU in minutes. It is a test object, not a
code assistant.

## Training

In the hf_hybrid repository:

    python examples/train_teacher.py --output teacher --seed {seed} --steps {steps} --batch-size {batch_size} \
--learning-rate {learning_rate:g}{flags}

{steps} steps of {batch_size} rows of {length} tokens from a random initialisation, {seconds} s with torch {torch} on
{device}. The rows are the source of Python {python}'s standard library (without its tests, idlelib,
encodings and pydoc_data; {train_tokens:,} tokens; one file in twenty held out), and three tasks of
`hf_hybrid.synthetic`: associative recall, chained recall and copying. Sums on a GPU vary in their order, so
the same seed gives the same data but not the same weights.

## Quality

On held-out files, and on task rows from another seed than training's:

| | 128 tokens | 256 tokens |
|---|---|---|
| associative recall, accuracy (32 and 64 pairs) | {recall_128:.4f} | {recall_256:.4f} |
| chained recall, two hops, accuracy (18 and 36 chains) | {chained_128:.4f} | {chained_256:.4f} |
| copying a random segment once, accuracy | {copying_128:.4f} | {copying_256:.4f} |
| held-out Python source, nats per token | | {text_loss:.3f} |

It was not trained on more than {length} tokens at a time.

## License

The weights are under the Apache License 2.0. The training text is the source of the Python standard library, which is
copyright of the Python Software Foundation and others, under the PSF License.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the teacher")
    parser.add_argument("--seed", type=int, default=10, help="of the initialisation and of all training data")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch-size", type=int, default=64, help="rows of 256 tokens per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen3")
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--corpus", type=Path, help="tokenised corpus and tokenizer: read if it exists, else written")
    parser.add_argument("--compile", action="store_true", help="use torch.compile: slower start, faster steps")
    parser.add_argument("--log-every", type=int, default=250)
    return parser.parse_args()


def read_sources() -> tuple[list[str], list[str]]:
    """The standard library's source files, in the order of their paths: for training, and one in twenty held out."""
    train: list[str] = []
    held_out: list[str] = []
    for name, path in standard_library_files():
        (held_out if is_held_out(name) else train).append(path.read_text(encoding="utf-8", errors="replace"))
    return train, held_out


def train_tokenizer(sources: list[str], vocab_size: int = 512) -> Tokenizer:
    """Byte-level BPE; all 256 bytes are in the vocabulary, so it encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sources, trainer)
    return tokenizer


def build_corpus() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tokens of both parts, files joined by the end-of-text token, and what describes them: tokenizer and Python."""
    train, held_out = read_sources()
    tokenizer = train_tokenizer(train)
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = {}
    for name, sources in (("train", train), ("held_out", held_out)):
        ids = [token for encoding in tokenizer.encode_batch(sources) for token in (*encoding.ids, end)]
        parts[name] = torch.tensor(ids, dtype=torch.int32)
    return parts, {"tokenizer": tokenizer.to_str(), "python": platform.python_version()}


def load_corpus(cache: Path | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`build_corpus`, kept in a safetensors file."""
    if cache is None:
        return build_corpus()
    if not cache.exists():
        parts, description = build_corpus()
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file(parts, cache, metadata=description)
    with safe_open(cache, framework="pt") as file:
        return {name: file.get_tensor(name) for name in ("train", "held_out")}, file.metadata()


def build_model(
    vocab_size: int,
    end_of_text: int,
    *,
    family: str,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Any:
    """A model of the family with the library's plain initialisation."""
    config = FAMILIES[family](
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    return AutoModelForCausalLM.from_config(config)


def draw_text(rows: int, tokens: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(tokens.numel() - LENGTH + 1, (rows, 1), generator=generator)
    return tokens[starts + torch.arange(LENGTH)].long()


def draw_batch(
    rows: int, progress: float, tokens: Tensor, token_ids: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """
    One training batch and the weight of each token in the loss. Of 64 rows, 24 are text, 12 recall, 12 copying and 16
    chained recall.

    `progress` is the share of training done. The largest allowed task grows with it, by powers of two up to the whole
    row (64 pairs, 36 chains, segments of 128); a batch is of the largest or, half of the time, of any allowed size.
    """
    sizes = 1 + min(5, int(6 * progress / RAMP))
    level = sizes - 1
    if torch.rand((), generator=generator) < 0.5:
        level = int(torch.randint(sizes, (), generator=generator))
    few, more = 3 * rows // 16, rows // 4
    chains, linked = chained_recall(more, LENGTH, token_ids, generator, num_chains=2**level if level < 5 else None)
    recall, answers = associative_recall(few, LENGTH, token_ids, generator, num_pairs=2 * 2**level)
    copies, repeated = copying(few, LENGTH, token_ids, generator, segment=4 * 2**level)
    text = draw_text(rows - 2 * few - more, tokens, generator)
    marked = torch.cat((torch.ones_like(text, dtype=torch.bool), answers, repeated, linked))
    return torch.cat((text, recall, copies, chains)), torch.where(marked, 1.0, UNPREDICTABLE)


def weighted_loss(model: nn.Module, input_ids: Tensor, weights: Tensor) -> Tensor:
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def evaluate(model: Any, held_out: Tensor, token_ids: Tensor, rows: int = 256) -> dict[str, float]:
    """Held-out text loss and the accuracy of each task, on fixed rows that depend on no training seed."""
    model.eval()
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    metrics = {}
    for length in (128, LENGTH):
        for name, task in (("recall", associative_recall), ("chained", chained_recall), ("copying", copying)):
            metrics[f"{name}_{length}"] = task_accuracy(model, *task(rows, length, token_ids, generator))
    text = draw_text(rows, held_out, generator).to(model.device)
    losses = [weighted_loss(model, part, torch.ones_like(part, dtype=torch.float32)) for part in text.split(16)]
    metrics["text_loss"] = float(torch.stack(losses).mean())
    model.train()
    return metrics


def render_card(record: dict[str, Any], config: dict[str, Any]) -> str:
    options = {"family": "qwen3", **SHAPE}
    flags = [f" --{name.replace('_', '-')} {record[name]}" for name in options if record[name] != options[name]]
    flags += [" --compile"] if record["compile"] else []
    values = {**config, **record, "family": record["family"].capitalize(), "flags": "".join(flags)}
    return CARD.format(**values, length=LENGTH)


def main() -> None:
    args = parse_args()
    if args.batch_size < 6 or args.steps < 1:
        raise ValueError(f"--batch-size must be >= 6 and --steps >= 1, got {args.batch_size} and {args.steps}")
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    corpus, description = load_corpus(args.corpus)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(description["tokenizer"]),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    token_ids = ordinary_token_ids(tokenizer)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    shape = {name: getattr(args, name) for name in SHAPE}
    model = build_model(len(tokenizer), tokenizer.eos_token_id, family=args.family, **shape).to(device)
    loss_function = torch.compile(weighted_loss, dynamic=False) if args.compile else weighted_loss
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    warmup = min(200, args.steps // 10)
    print(
        f"{sum(weight.numel() for weight in model.parameters())} parameters, "
        f"{corpus['train'].numel()} training tokens of Python {description['python']}, {device}",
        flush=True,
    )

    started = last = time.time()
    for step in range(args.steps):
        batch = draw_batch(args.batch_size, step / args.steps, corpus["train"], token_ids, generator)
        rate = min((step + 1) / max(warmup, 1), 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_function(model, *(part.to(device, non_blocking=True) for part in batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % args.log_every == 0:
            metrics = evaluate(model, corpus["held_out"], token_ids, rows=16)
            shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            speed, last = args.log_every / (time.time() - last), time.time()
            print(f"step {step + 1}  loss {loss.item():.3f}  {shown}  {speed:.1f} steps/s", flush=True)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    record = {
        **evaluate(model, corpus["held_out"], token_ids),
        **{key: getattr(args, key) for key in ("seed", "steps", "batch_size", "learning_rate", "compile", "family")},
        **shape,
        "seconds": round(time.time() - started),
        "device": name,
        "torch": torch.__version__,
        "python": description["python"],
        "train_tokens": corpus["train"].numel(),
        "parameters": model.num_parameters(),
    }
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "metrics.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (args.output / "README.md").write_text(render_card(record, model.config.to_dict()), encoding="utf-8")
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

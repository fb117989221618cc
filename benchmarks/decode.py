"""Time per token and cache size of a teacher and its hybrids, as the context grows.

    python benchmarks/decode.py --contexts 1024 4096 16384 65536 --threads 1 --output decode.json

The models have random weights; a quarter of a hybrid's layers keep softmax. Caches start from a real prompt; beyond it
the softmax layers get random keys and values, since decoding costs the same whatever they hold. Times are medians over
steps, the models taking turns so that a noisy machine slows all of them.
"""

import argparse
import json
import pathlib
import statistics
import time
from typing import TypedDict

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, Qwen3Config

import hf_hybrid as hh
from hf_hybrid.modeling import MIXERS


PROMPT = 576  # no shorter than the default window, so that every state has its final size


class Row(TypedDict):
    model: str
    context: int
    ms_per_token: float
    cache_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    contexts = [1024 * 2**i for i in range(7)]
    parser.add_argument("--contexts", type=int, nargs="+", default=contexts, help="tokens in the cache")
    parser.add_argument("--mixers", nargs="+", choices=sorted(MIXERS), default=sorted(MIXERS), help="hybrids to time")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers, a multiple of 4")
    parser.add_argument("--hidden-size", type=int, default=512, help="a multiple of 64, the width of a head")
    parser.add_argument("--kv-heads", type=int, default=2, help="key/value heads of the softmax layers")
    parser.add_argument("--steps", type=int, default=10, help="timed tokens per cell")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the numbers")
    args = parser.parse_args()
    if min(args.contexts) < PROMPT:
        parser.error(f"--contexts must be {PROMPT} or more")
    torch.set_num_threads(args.threads)
    models = make_models(args.mixers, args.layers, args.hidden_size, args.kv_heads)
    rows: list[Row] = []
    for context in args.contexts:
        rows += measure(models, context, args.steps)
    show(rows, args)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=2) + "\n")


def make_models(mixers: list[str], layers: int, hidden_size: int, kv_heads: int) -> dict[str, PreTrainedModel]:
    """The teacher, and a hybrid of it per mixer that keeps softmax in the last of every four layers."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=1 << 20,
    )
    teacher = AutoModelForCausalLM.from_config(config).eval()
    hybrids = {mixer: hh.convert(teacher, range(3, layers, 4), mixer=mixer) for mixer in mixers}
    return {"teacher": teacher, **hybrids}


@torch.no_grad()
def filled_cache(model: PreTrainedModel, context: int) -> DynamicCache:
    """A cache of `context` tokens."""
    cache = DynamicCache(config=model.config)
    model(torch.randint(4096, (1, PROMPT)), past_key_values=cache, use_cache=True, logits_to_keep=1)
    for i, kind in enumerate(model.config.layer_types):
        if kind != "linear_attention" and context > PROMPT:
            shape = (1, model.config.num_key_value_heads, context - PROMPT, model.config.head_dim)
            cache.update(torch.randn(shape), torch.randn(shape), i)
    return cache


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all keys, values, and states."""
    tensors: list[torch.Tensor | None] = []
    for layer in cache.layers:
        held = vars(layer)
        tensors += [held.get("keys"), held.get("values")]
        tensors += [*held.get("recurrent_states", {}).values(), *held.get("conv_states", {}).values()]
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


@torch.no_grad()
def measure(models: dict[str, PreTrainedModel], context: int, steps: int) -> list[Row]:
    caches = {name: filled_cache(model, context) for name, model in models.items()}
    sizes = {name: cache_bytes(cache) for name, cache in caches.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for step in range(steps + 1):
        for name, model in models.items():
            token = torch.randint(4096, (1, 1))
            start = time.perf_counter()
            model(token, past_key_values=caches[name], use_cache=True)
            if step:  # the first token warms up
                times[name].append(1000 * (time.perf_counter() - start))
    return [
        {"model": name, "context": context, "ms_per_token": statistics.median(ms), "cache_bytes": sizes[name]}
        for name, ms in times.items()
    ]


def show(rows: list[Row], args: argparse.Namespace) -> None:
    """Print the table, with ratios against the teacher."""
    title = (
        f"Decoding on the CPU: {args.layers} layers, hidden {args.hidden_size}, {args.kv_heads} key/value heads, a "
        f"quarter softmax in hybrids; float32, batch 1, {args.threads} thread(s), torch {torch.__version__}"
    )
    table = Table(title=title)
    for column in ("context", "model", "ms per token", "speed", "cache MB", "memory"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    teacher = {row["context"]: row for row in rows if row["model"] == "teacher"}
    for row in rows:
        other = teacher[row["context"]]
        table.add_row(
            str(row["context"]),
            row["model"],
            f"{row['ms_per_token']:.1f}",
            f"{other['ms_per_token'] / row['ms_per_token']:.2f}x",
            f"{row['cache_bytes'] / 1e6:.2f}",
            f"{other['cache_bytes'] / row['cache_bytes']:.2f}x",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

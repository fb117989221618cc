"""What the parts of gpu.py share: sizes, models, times and memory of a call, and the file of results."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from hf_hybrid.run.kernel_tuning import alone_on_the_device


SIZES = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
}
TINY = SIZES | {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 300}


def with_sizes(args: argparse.Namespace) -> argparse.Namespace:
    """Adds to `args` what follows from its `device` and `tiny`."""
    args.synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    args.sizes = TINY if args.tiny else SIZES
    args.heads = args.sizes["num_attention_heads"]
    args.width = args.sizes["hidden_size"] // args.heads
    args.train_tokens = 128 if args.tiny else 4096
    return args


class Results:
    """
    The rows of each part, in a file where one was named.

    Args:
        args: of the command line.
        keys: of each part, what makes a row of it another row.
    """

    def __init__(self, args: argparse.Namespace, keys: dict[str, tuple[str, ...]]) -> None:
        self.file: Path | None = args.output
        self.keys = keys
        self.parts: dict[str, Any] = {}
        if self.file and self.file.exists():
            self.parts = json.loads(self.file.read_text("utf-8"))
        now = environment(args.device)
        if self.parts.setdefault("environment", now) != now:
            raise ValueError(
                f"{self.file} has rows measured with {self.parts['environment']}, this is {now}; name another file."
            )

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Keeps `row` in place of an earlier one of the same name, prints it, and saves all."""
        name = [row[key] for key in self.keys[part]]
        rows = [other for other in self.parts.get(part, []) if [other[key] for key in self.keys[part]] != name]
        self.parts[part] = [*rows, row]
        sys.stdout.write(f"{part} {json.dumps(row)}\n")
        sys.stdout.flush()
        if self.file:
            partial = self.file.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(self.parts, indent=1) + "\n", "utf-8")
            partial.replace(self.file)


def environment(device: str) -> dict[str, str]:
    """The card and the versions that the numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    for package in ("triton", "fla-core"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return found


def median_ms(
    function: Callable[[], Any], args: argparse.Namespace, repeats: int, warmup: int = 2
) -> tuple[float, Any]:
    """Median milliseconds of `function`, the host waiting for the device before and after each call; what it gives."""
    times, result = [], None
    for i in range(warmup + repeats):
        result = None  # a cache that is made again is not held twice
        with alone_on_the_device(args.device) if i >= warmup else contextlib.nullcontext():
            args.synchronize()
            start = time.perf_counter()
            result = function()
            args.synchronize()
        if i >= warmup:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times), result


def peak_mb(args: argparse.Namespace, function: Callable[[], object], over: int = 0) -> float | None:
    """Megabytes (10^6) of device memory at the peak of one call, less `over` bytes."""
    if args.device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - over) / 1e6


def busy_ms(args: argparse.Namespace, function: Callable[[], object]) -> float | None:
    """Milliseconds in which the device works in one call: what the call takes beyond, it waits for Python."""
    if args.device != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1000


def make_teacher(args: argparse.Namespace) -> PreTrainedModel:
    config = Qwen2Config(
        **args.sizes, tie_word_embeddings=True, max_position_embeddings=1 << 18, rope_parameters={"rope_theta": 1e6}
    )
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

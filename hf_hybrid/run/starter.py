"""A commented recipe to start from, which fits a teacher and the machine; of the teacher, its config alone is read."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from ..conversion import check_teacher
from ..data.config import DataConfig
from ..data.text import check_sources
from ..places import find_files
from ..teacher.loading import empty_teacher
from .footprint import Footprint, device_memory, footprint
from .pipeline import check_recipe
from .recipe import Recipe
from .stages import check_arguments


# What of a device's memory a step may be estimated to take; the estimate is no measurement.
_SHARE_OF_MEMORY = 0.8
# Characters of a token of plain text, roughly, for vocabularies of tens of thousands.
_BYTES_PER_TOKEN = 4
# At equal tokens many small steps reach far more than few large ones (docs/results.md): batches are halved, down to
# the smaller number, until there are as many steps.
_STEPS, _SMALL_BATCH = 500, 8
# Where a student of that many parameters begins, the papers' rates for the distillation; below, those that
# recipes/smollm2-135m.yaml was run with, which suit budgets of minutes.
_LARGE = 1_000_000_000
# The window that docs/results.md has figures of.
_WINDOW = {"window": 128, "sinks": 4}


def starter_recipe(
    teacher: str,
    data: dict[str, Any] | None = None,
    *,
    k: int | None = None,
    fraction: float | None = None,
    tokens: int | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    mixer: str = "gated_deltanet",
) -> str:
    """
    Returns the YAML of a recipe for `teacher` on this machine, with comments.

    It passes the checks that a run makes before it loads weights, but for the text, where none is named. A
    `ValueError` says why a teacher cannot be converted.

    Args:
        teacher (`str`): Hub id or folder, GGUF file, or `"embedded"`.
        data (`dict`, *optional*): fields of [`DataConfig`]; without them a place for text files is left to fill.
        k (`int`, *optional*), fraction (`float`, *optional*): layers that keep softmax; by default a quarter.
        tokens (`int`, *optional*): of the distillation; the other stages follow in proportion. By default what takes
            hours on a GPU, or on a CPU for a small teacher.
        revision, gguf_file, trust_remote_code: as in [`Recipe`].
        mixer (`str`): what the other layers have in the place of softmax (docs/mixers.md).
    """
    if k is not None and fraction is not None:
        raise ValueError("--k and --fraction were both given; give one.")
    data = data or {}
    if data.get("text_files"):
        check_sources(DataConfig(**data))
    empty = empty_teacher(teacher, trust_remote_code=trust_remote_code, revision=revision, gguf_file=gguf_file)
    check_teacher(empty)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stored = getattr(empty.config, "dtype", None) or torch.float32
    # On a CPU, products of bf16 matrices are mostly slower than those of fp32.
    dtype = stored if device.type == "cuda" and stored in (torch.bfloat16, torch.float16) else torch.float32
    sizes = footprint(empty, dtype)
    starter = _Starter(teacher, sizes, device, dtype, data, _kept(sizes.layers, k, fraction), tokens)
    starter.mixer = mixer
    starter.source = {"revision": revision, "gguf_file": gguf_file}
    text = starter.text()
    _check(text, empty)
    return text


def _kept(layers: int, k: int | None, fraction: float | None) -> int:
    if k is None:
        k = max(1, int(0.25 * layers + 0.5)) if fraction is None else int(fraction * layers + 0.5)
    if not 0 < k < layers:
        raise ValueError(
            f"{k} of the teacher's {layers} layers would keep softmax attention, so there is nothing to choose; pass "
            f"--k between 1 and {layers - 1}."
            if layers > 1
            else "the teacher has a single layer, so there is nothing to choose; use hf-hybrid convert."
        )
    return k


def _check(text: str, teacher: Any) -> None:
    """Loads the recipe as a run does, and makes its checks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(text, "utf-8")
        recipe = Recipe.load(path)
        check_arguments(recipe, Path(folder))
        check_recipe(recipe, Path(folder), teacher)


class _Starter:
    """The values of a starter recipe, each from what the teacher, the machine and the text are."""

    stages = ("align", "score", "distill")

    def __init__(
        self,
        teacher: str,
        sizes: Footprint,
        device: torch.device,
        dtype: torch.dtype,
        data: dict[str, Any],
        k: int,
        tokens: int | None,
    ) -> None:
        self.teacher, self.sizes, self.dtype, self.k = teacher, sizes, dtype, k
        self.device = device
        self.gpu, self.embedded = device.type == "cuda", teacher == "embedded"
        self.half = self.gpu and torch.cuda.is_bf16_supported()
        self.mixer = "gated_deltanet"
        self.source: dict[str, str | None] = {}
        self.data = dict(data)
        if not self.data.keys() & {"text_files", "dataset"}:
            self.data |= {"source": "embedded-demo"} if self.embedded else {"text_files": ["texts/*.txt"]}
        longest = 256 if self.embedded else 2048 if self.gpu else 512
        self.block = self.data.setdefault("block_size", min(longest, sizes.positions or longest))
        self.data = {"held_out_rows": 32, "report_rows": 64} | self.data
        self.batches = {"align": 64, "score": 16, "distill": 16} if self.gpu else dict.fromkeys(self.stages, 8)
        self.available = self._tokens_there() if data.get("text_files") else None
        if self.available is not None:
            self._shrink_to(self.available, set(data))
        self.align_block = 512 if self.block % 512 == 0 else self.block
        default = 100_000_000 if self.gpu else 2_000_000
        budget = tokens or (300_000 if self.embedded else default)
        self.tokens = {"align": max(1, budget // 5), "score": max(1, budget // 20), "distill": budget}
        if self.embedded:  # it is so small that its mixers need most of the tokens
            self.tokens |= {"align": budget * 5 // 6, "score": budget // 5}
        for name, tokens in self.tokens.items():
            block = self.align_block if name == "align" else self.block
            while self.batches[name] > _SMALL_BATCH and tokens < _STEPS * self.batches[name] * block:
                self.batches[name] //= 2
        self._fit()

    def _tokens_there(self) -> int:
        files = find_files(self.data["text_files"])
        return sum(os.path.getsize(file) for file in files) // _BYTES_PER_TOKEN

    def _shrink_to(self, available: int, given: set[str]) -> None:
        """A short text has shorter rows, fewer to hold out, and fewer to a step; what was `given` stays."""
        while "block_size" not in given and self.block > 64 and available // self.block < 32:
            self.block //= 2
            self.data["block_size"] = self.block
        rows = available // self.block
        if rows < 3:
            raise ValueError(
                f"the text has about {available:,} tokens, and a run needs 3 rows of {self.block} at least: one to "
                "train on, and two that are held out; give more text."
            )
        for name in {"held_out_rows", "report_rows"} - given:
            self.data[name] = max(1, min(self.data[name], rows // 8))
        left = max(1, (rows - self.data["held_out_rows"] - self.data["report_rows"]) // 2)
        self.batches = {name: min(batch, 2 ** (left.bit_length() - 1)) for name, batch in self.batches.items()}

    def _fit(self) -> None:
        """As many rows at once as fit by the estimate; with gradient checkpointing where a single one does not."""
        room = _SHARE_OF_MEMORY * device_memory(self.device)
        self.micro: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        for self.checkpointing in (False, True):
            for name, batch in self.batches.items():
                rows = batch
                while rows > 1 and self._bytes(name, rows) > room:
                    rows //= 2
                self.micro[name], self.bytes[name] = rows, self._bytes(name, rows)
            self.fits = max(self.bytes.values()) <= room
            # A row or two at once leave a GPU idle: computing layers again costs less.
            if self.fits and not (self.gpu and min(self.micro.values()) < 4):
                break

    def _bytes(self, name: str, rows: int) -> int:
        block = self.align_block if name == "align" else self.block
        return self.sizes.stage_bytes(name, rows, block, half=self.half, checkpointing=self.checkpointing)

    def text(self) -> str:
        sizes, gib, first = self.sizes, 2**30, "the first to change"
        machine = f"{torch.cuda.get_device_name(self.device)}" if self.gpu else "a CPU"
        memory = device_memory(self.device) / gib
        share = self.k / sizes.layers
        takes = ", ".join(f"{name} {self.bytes[name] / gib:.1f}" for name in self.stages)
        lines = [
            f"# A recipe to start from, written by hf-hybrid init for {machine} with {memory:.0f} GiB of memory.",
            "#",
            "#   hf-hybrid run THIS_FILE --output my_run --plan     # what will be made, and what it takes",
            "#   hf-hybrid run THIS_FILE --output my_run            # killed at any moment, the same command goes on",
            "#",
            "# Change first, in this order: data (text like that which the model is for), distill.tokens (quality",
            "# grows with it), select.k (more softmax layers: closer to the teacher, and more cache). 'Paper' is",
            "# arXiv 2512.20569, for teachers of 3B, and 'RADLADS' arXiv 2505.03005; all else is ours. docs/runs.md",
            "# says what may still be changed when the run has begun.",
            "",
            f"teacher: {_value(self.teacher)} # {sizes.layers} layers, {sizes.teacher_parameters:,} parameters, "
            f"{sizes.vocabulary:,} tokens in its vocabulary, "
            + (f"{sizes.positions:,} positions" if sizes.positions else "no limit to its positions"),
        ]
        lines += [f"{name}: {_value(value)}" for name, value in self.source.items() if value is not None]
        kind = str(self.dtype).removeprefix("torch.")
        lines += [
            f"dtype: {kind} # of the teacher and of the finished model; training keeps its weights in float32",
            f"mixer: {_value(self.mixer)} # paper: gated_deltanet; docs/mixers.md has others, and with few tokens "
            "sliding_window keeps most",
            *self._mixer_lines(),
            "seed: 0 # of everything random",
            "",
            "training:",
            f"  bf16: {str(self.half).lower()} # autocast to bfloat16 (paper); "
            + ("this GPU has it" if self.half else "no gain without a GPU that has it"),
            "",
            "execution: # how, not what: may be changed at any time, also amid a run",
            f"  gradient_checkpointing: {str(self.checkpointing).lower()} # layers are computed again in the backward "
            "pass: less memory, a third more time",
            f"  micro_batch_size: {_value(self.micro)} # rows at once; halve them where memory runs out",
            f"  # By docs/memory.md's model, a step takes in GiB: {takes}.",
        ]
        if not self.fits:
            lines.append(
                "  # That is more than there is here, even one row at a time: take a larger device, or several "
                "(docs/scaling.md)."
            )
        lines += ["", "data:", *self._data_lines(), ""]
        rate, mixer_rate = ("7e-6", "1e-4") if sizes.teacher_parameters >= _LARGE else ("3e-4", "1e-3")
        mixer_rate = "3e-3" if self.embedded else mixer_rate
        papers = "paper: 7e-6" if rate != "7e-6" else "paper"
        papers_mixer = "paper: 1e-4" if mixer_rate != "1e-4" else "paper"
        rates = [
            f"  learning_rate: {rate} # {papers}; of all but the mixers",
            f"  mixer_learning_rate: {mixer_rate} # {papers_mixer}",
        ]
        lines += [
            "align: # every layer linear; each learns its softmax layer's output on the teacher's own hidden states",
            f"  tokens: {self.tokens['align']:_} # paper and RADLADS: 100_000_000",
            *(
                [f"  block_size: {self.align_block} # paper: 512; rows of data.block_size are cut"]
                if self.align_block != self.block
                else []
            ),
            f"  batch_size: {self.batches['align']} # rows of a step; paper: 96, RADLADS: 32",
            f"  learning_rate: {'3e-3' if self.embedded else '1e-3'} # paper and RADLADS: 1e-3",
            "  lr_scheduler_type: cosine # paper and RADLADS",
            "",
            "score: # which layers are worth their softmax attention",
            "  method: verified # paper: ga-s2, once for each layer; docs/selection.md compares them",
            f"  tokens_per_layer: {self.tokens['score']:_} # of each of up to three distillations; paper: 600_000_000",
            f"  batch_size: {self.batches['score']} # paper: 32",
            *rates,
            "",
            "select:",
            "  selector: verified",
            f"  k: {self.k} # of {sizes.layers} layers keep softmax, {share:.0%}; paper: 25%",
            "",
            "distill: # the hybrid learns the teacher's output distribution",
            f"  tokens: {self.tokens['distill']:_} # {first}; paper: 600_000_000",
            f"  batch_size: {self.batches['distill']} # paper: 32",
            *rates,
            "  lr_scheduler_type: cosine # paper: constant",
            "  warmup_steps: 0.02 # share of the steps; paper: none",
            "",
            "finetune: null # next-token training afterwards: {tokens: ...}; not needed for a hybrid like its teacher",
            "",
        ]
        return "\n".join(lines)

    def _mixer_lines(self) -> list[str]:
        """Options of the mixer that depend on what it is for."""
        if self.mixer != "sliding_window":
            return []
        return [f"mixer_options: {_value(_WINDOW)} # tokens that a token attends to, and first ones beside these"]

    def _data_lines(self) -> list[str]:
        known = {
            "source": "Python source, recall and copying, made for this teacher",
            "text_files": "paths or patterns; a .jsonl file has a document a line",
            "dataset": "read from the Hub as far as needed",
            "block_size": f"tokens of a row; paper: 4096; at most {self.sizes.positions or 'any'} here",
            "held_out_rows": "layers are scored on these ...",
            "report_rows": "... and the finished model on these",
        }
        fields = {field: self.data[field] for field in DataConfig.__dataclass_fields__ if field in self.data}
        lines = []
        for name, value in fields.items():
            about = known.get(name, "")
            lines.append(f"  {name}: {_value(value)}" + (f" # {about}" if about else ""))
        if self.available is not None:
            longest = max(self.tokens.values())
            reused = f"; each would be used {longest / self.available:.1f} times" if longest > self.available else ""
            lines.append(
                f"  # These files have about {self.available:,} tokens, at {_BYTES_PER_TOKEN} bytes each{reused}."
            )
        elif self.data.get("text_files"):
            lines[0] += "; name your own"
        return lines


def _value(value: Any) -> str:
    """A value in YAML, in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()

"""The teachers of the selection benchmark and the rows that its students are aligned, distilled and measured on."""

import functools
import gzip
import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import hf_hybrid as hh
from hf_hybrid.demo_data import demo_rows
from hf_hybrid.synthetic import associative_recall, chained_recall, copying, ordinary_token_ids


LENGTH, ALIGN_LENGTH = 128, 256  # tokens of a row
BATCH = 8  # rows per step
ALIGN_STEPS, DISTILL_STEPS = 100, 24
SELECT_ROWS, REPORT_ROWS = 24, 48
KINDS = ("text", "recall", "copying", "chained", "hops3")
FOLDER = Path(__file__).parents[1] / "teachers"
WEIGHTS = Path(__file__).parents[1] / "teachers.json"  # where the teachers' weights are, and their hashes


@dataclass(frozen=True)
class Teacher:
    """
    A teacher's name, which is its folder's, its split, and how many rows of each of KINDS a batch has.

    `"dev"` are all teachers whose ground truth was known when the recommended selector was chosen, and what continues
    them; `"test"` are the others, of which at most a few sets had been distilled by then (docs/selection.md). No test
    teacher shares weights with one of `dev`. `"held-out"` are those made and looked at after the recommended selector
    was fixed, of lineages of their own. A mix asks for two hops where the teacher has them in half of the cases.
    """

    name: str
    split: str
    mix: tuple[int, ...] = (2, 2, 2, 2, 0)


TEACHERS = {
    teacher.name: teacher
    for teacher in (
        Teacher("embedded", "dev"),
        Teacher("qwen3-8-moved", "dev"),
        Teacher("qwen3-10-twins", "dev"),
        Teacher("qwen3-12-spread", "dev"),
        Teacher("qwen3-10-either", "dev"),
        Teacher("qwen3-8-drop", "dev"),
        Teacher("qwen3-8-hops3", "dev", (2, 1, 1, 2, 2)),
        Teacher("qwen3-8-text", "dev", (5, 1, 2, 0, 0)),
        Teacher("qwen3-9-twins", "dev", (2, 3, 3, 0, 0)),
        Teacher("llama-8", "dev"),
        Teacher("llama-9-either", "dev"),
        Teacher("llama-9", "test", (2, 3, 3, 0, 0)),
        Teacher("llama-10-either", "test", (2, 3, 3, 0, 0)),
        Teacher("qwen3-10", "test"),
        Teacher("qwen3-12-either", "test"),
        Teacher("qwen3-8-43", "test"),
        Teacher("qwen3-9-42", "test"),
        Teacher("qwen3-8-41", "test", (2, 3, 3, 0, 0)),
        Teacher("qwen3-mha-9-45", "test", (2, 3, 3, 0, 0)),
        Teacher("llama-mha-8-51", "test", (2, 3, 3, 0, 0)),
        Teacher("llama-mha-9-50", "test", (2, 3, 3, 0, 0)),
        Teacher("planted-qwen3-8-71", "held-out", (2, 3, 3, 0, 0)),
        Teacher("planted-llama-8-72", "held-out", (2, 3, 3, 0, 0)),
        Teacher("planted-qwen3-8-73", "held-out", (2, 3, 3, 0, 0)),
        Teacher("planted-qwen2-8-74", "held-out", (2, 3, 3, 0, 0)),
        Teacher("planted-qwen3-8-75", "held-out", (2, 3, 3, 0, 0)),
        Teacher("planted-llama-mha-8-76", "held-out", (2, 3, 3, 0, 0)),
        Teacher("planted-qwen3-9-77", "held-out", (2, 3, 3, 0, 0)),
        Teacher("planted-qwen3-mha-8-79", "held-out", (2, 3, 3, 0, 0)),
        Teacher("planted-qwen2-8-80", "held-out", (2, 3, 3, 0, 0)),
        Teacher("planted-qwen3-10-82", "held-out", (2, 3, 3, 0, 0)),
    )
}
BENCHMARK = [name for name, teacher in TEACHERS.items() if teacher.split != "held-out"]  # the tables' teachers


def load_teacher(name: str) -> Any:
    """The teacher in fp32 and eval mode."""
    if name == "embedded":
        return hh.embedded_teacher()
    fetch_weights(name)
    return AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32).eval()


def fetch_weights(name: str) -> None:
    """
    Takes the weights of a teacher from the repository's history, where they are not in its folder: a checkout does
    not carry the 40 MB of all of them.
    """
    known, path = json.loads(WEIGHTS.read_text()), FOLDER / name / "model.safetensors"
    if path.is_file():
        return
    revision = f"{known['commit']}:benchmarks/teachers/{name}/model.safetensors"
    found = subprocess.run(["git", "show", revision], cwd=FOLDER.parent, capture_output=True)
    if found.returncode != 0:
        raise ValueError(
            f"the weights of the teacher {name} are in the history of the repository, at {revision}, and this is no "
            "clone that has it: run git fetch --unshallow in one; or train the teacher again, with the command in "
            f"{FOLDER.name}/{name}/README.md."
        )
    if hashlib.sha256(found.stdout).hexdigest() != known["sha256"][name]:
        raise ValueError(f"{revision} is not what {WEIGHTS.name} says; check the clone with git fsck.")
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(found.stdout)
    partial.replace(path)


def num_layers_of(name: str) -> int:
    """The number of layers of a teacher."""
    folder = Path(hh.__file__).parent / "embedded_teacher" if name == "embedded" else FOLDER / name
    return json.loads((folder / "config.json").read_text())["num_hidden_layers"]


def aligned_path(cache: Path, name: str, seed: int, data_seed: int | None = None) -> Path:
    """Where the ground truth keeps the mixers of an aligned student; `data_seed` if its rows have another seed."""
    return cache / "aligned" / f"{name}_{seed}{'' if data_seed is None else f'-{data_seed}'}.pt"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """
    The records in a file of JSON lines, none where there is no file, those first that were laid aside in `path`.gz; a
    line that a kill cut short is left out.
    """
    found = []
    aside = path.with_name(f"{path.name}.gz")
    text = gzip.decompress(aside.read_bytes()).decode() if aside.is_file() else ""
    for line in (text + (path.read_text() if path.is_file() else "")).splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Adds a record to a file of JSON lines, on a line of its own even after one that a kill cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(json.dumps(record).encode() + b"\n")


@dataclass
class Rows:
    """Rows of one split: tokens `[N, T]`, which tokens are answers, and each row's kind."""

    input_ids: Tensor
    answers: Tensor
    kinds: list[str]

    def dataset(self) -> Any:
        """The rows as the trainers take them."""
        import datasets

        return datasets.Dataset.from_dict({"input_ids": self.input_ids.tolist()})


def rows(
    mix: tuple[int, ...], split: str, seed: int, count: int, cache: Path | None = None, length: int = LENGTH
) -> Rows:
    """
    `count` rows of `length` tokens in which every eight hold `mix` rows of KINDS.

    `split` is `"align"`, `"train"`, `"score"` (layers are chosen on these rows) or `"report"` (what is reported is
    measured on these): no two share a draw, and the held-out splits share no source file with any other.
    """
    path = None if cache is None else cache / f"{'-'.join(map(str, mix))}_{split}_{seed}_{count}x{length}.safetensors"
    if path is not None and path.is_file():
        found = load_file(path)
        ids, answers = found["input_ids"].long(), found["answers"]
    else:
        ids, answers = _draw(mix, split, seed, count, length)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")  # several processes may draw the same rows
            save_file({"input_ids": ids.to(torch.int16), "answers": answers}, partial)
            partial.replace(path)
    kinds = [kind for kind, number in zip(KINDS, mix, strict=True) for _ in range(number)]
    return Rows(ids, answers, (kinds * (-(-count // len(kinds))))[:count])


def _draw(mix: tuple[int, ...], split: str, seed: int, count: int, length: int) -> tuple[Tensor, Tensor]:
    tokenizer = _tokenizer()
    token_ids = ordinary_token_ids(tokenizer)
    batches = -(-count // sum(mix))
    place = ("align", "train", "score", "report").index(split)
    generator = torch.Generator().manual_seed(10**6 + 4 * seed + place)
    # Alignment and distillation read other files first: the order of the files depends on the seed.
    source = demo_rows(
        tokenizer, length, 3 * batches * mix[0], 2 * seed + (place == 0), "train" if place < 2 else split
    )
    text = torch.tensor(source[::3]["input_ids"])
    parts = [(text, torch.zeros_like(text, dtype=torch.bool))]
    tasks: list[Any] = [associative_recall, copying, chained_recall, functools.partial(chained_recall, hops=3)]
    for task, number in zip(tasks, mix[1:], strict=True):
        if number:
            parts.append(task(batches * number, length, token_ids, generator))
    ids, answers = (
        torch.cat([x.unflatten(0, (batches, -1)) for x in part], 1).flatten(0, 1)[:count]
        for part in zip(*parts, strict=True)
    )
    return ids, answers


@functools.cache
def _tokenizer() -> Any:
    return hh.embedded_tokenizer()

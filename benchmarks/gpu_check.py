"""Does this package work on this machine's GPU? A table of what passed, in less than five minutes with cold caches.

    python benchmarks/gpu_check.py --output benchmarks/results/gpu_check.json
    python benchmarks/gpu_check.py --device cpu --only kernels mixers    # tries the program, on the torch forms

Shapes are tiny and models random; precision, kernels, schedules and methods are those that users run. The checks:

- `kernels` and `sizes`: each recurrence, forward and backward, as the mixers call it, against our torch form in
  float64, at awkward lengths, with a state carried in, packed, and with the dtypes that autocast makes;
- `mixers`: a hybrid of each mixer in the recipes' precision (fp32 masters, bf16 autocast) against the same hybrid in
  float64, logits and gradients; packed rows against single ones; cached decoding and generation against one pass;
- `recipes`: each shipped recipe and the README's, from text to a checkpoint that loads without this package;
- `resume`: a run that is killed with SIGKILL in its distillation goes on and ends where another one ends;
- `processes`: the same run in two processes with each of `recipes/accelerate`, where there are two devices.

Each check is a process of its own, and they run side by side; those of kernels come first and compile for the others.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, set_seed
from transformers.utils.logging import disable_progress_bar

import hf_hybrid as hh
from hf_hybrid.modeling import kernels
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.places import find_recipe
from hf_hybrid.run.folder import ARTEFACTS
from hf_hybrid.run.kernel_tuning import side_by_side
from hf_hybrid.trainers import losses
from hf_hybrid.trainers.checkpoints import checkpoints_in, damage
from hf_hybrid.trainers.distillation import mean_kl_of_batch
from hf_hybrid.trainers.document_attention import by_documents
from hf_hybrid.trainers.precision import Precision
from hf_hybrid.trainers.regions import compiled_regions


ROOT = Path(__file__).parents[1]
HEADS, WIDTH = 4, 64  # one shape for all checks, so that kernels are compiled once
LENGTHS = (1, 63, 64, 65, 500)
SHORTEST = 64  # tokens of a recipe's rows: for shorter ones, kernels of other chunks would be compiled
RECURRENCES = {
    "gated_deltanet": kernels.gated_delta_rule,
    "gated_linear_attention": kernels.gated_linear_attention,
    "kimi_delta_attention": kernels.kimi_delta_attention,
}
CONVOLVED = "gated_deltanet, convolved"
MIXERS = [*RECURRENCES, CONVOLVED, "sliding_window"]
STEPS = 6  # of each stage of a recipe
RECIPES = ["README", "qwen2.5-3b", "radlads-qwen2.5-7b", "demo"]
ENGINES = ["ddp", "fsdp2", "zero2"]
# Relative errors, by the precision that is checked: bf16 has 8 bits, and tf32, which fla's kernels use for fp32, 11.
TOLERANCE = {"fp32": 5e-3, "bf16": 2e-2, "mixed": 2e-2}
PATIENCE = 280.0  # seconds for one check


def main() -> int:
    args = parse_args()
    if args.child:
        return run_child(args)
    disable_progress_bar()
    start = time.perf_counter()
    devices = torch.cuda.device_count() if args.device == "cuda" else 0
    about = environment(args.device)
    for name, value in about.items():
        sys.stdout.write(f"{name}: {value}\n")
    sys.stdout.flush()
    names = [
        *(f"kernels:{name}" for name in RECURRENCES),
        *(f"mixers:{name}" for name in MIXERS),
        "sizes:gated_deltanet",
    ]
    names += [*(f"recipes:{name}" for name in RECIPES), "resume:distill"]
    if devices > 1:
        names += [f"processes:{name}" for name in ENGINES]
    names = [name for name in names if name.split(":")[0] in args.only]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.workdir or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        write_sources(folder)
        rows = launch_all(names, folder, args)
        if args.logs:
            shutil.copytree(folder / "logs", args.logs, dirs_exist_ok=True)
    seconds = time.perf_counter() - start
    passed = print_table(rows, about, devices, seconds)
    if args.output:
        about["seconds"] = f"{seconds:.0f}"
        args.output.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n", "utf-8")
    return 0 if passed else 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("kernels", "mixers", "sizes", "recipes", "resume", "processes")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--jobs", type=int, default=max(2, min(12, (os.cpu_count() or 2) // 2)), help="checks at once")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--workdir", help="folder for runs, which is kept; by default a temporary one")
    parser.add_argument("--logs", help="folder that gets what each check printed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu tries the program without one")
    return args


def environment(device: str) -> dict[str, str]:
    """The card, the versions, and the kernels that will run."""
    found = {"python": platform.python_version(), "hf_hybrid": hh.__version__}
    for package in ("torch", "transformers", "accelerate", "triton", "flash-linear-attention", "deepspeed"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    count = torch.cuda.device_count() if device == "cuda" else 0
    found["device"] = f"{count} x {torch.cuda.get_device_name()}" if count else "cpu"
    reason = kernels.why_not_fla() if count else "no CUDA device"
    found["kernels"] = "fla" if reason is None else f"torch forms, for {reason}"
    return found


def launch_all(names: list[str], folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all checks. One that needs kernels which another one compiles begins when that one has ended."""
    ended = {name: threading.Event() for name in names}
    slots = threading.Semaphore(args.jobs)

    def one(name: str) -> list[dict[str, Any]]:
        part, _, what = name.partition(":")
        compiles = f"kernels:{what.split(',')[0] if part == 'mixers' else 'gated_deltanet'}"
        if part != "kernels" and compiles in ended:
            ended[compiles].wait()
        if part == "processes" and "recipes:qwen2.5-3b" in ended:  # with which it is compared
            ended["recipes:qwen2.5-3b"].wait()
        try:
            with slots:
                return launch_child(name, folder, args)
        finally:
            ended[name].set()

    with ThreadPoolExecutor(len(names)) as pool:
        return [row for rows in pool.map(one, names) for row in rows]


def launch_child(name: str, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs one check in a process of its own; returns its rows, one of them failed where the process did."""
    log = folder / "logs" / f"{name.replace(':', '-')}.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--child", name, "--workdir", str(folder), "--device", args.device]
    start = time.perf_counter()
    with log.open("w") as stream:
        # In a session of its own, so that what it started ends with it.
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=child_environment(), start_new_session=True
        )
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    seconds = time.perf_counter() - start
    path = rows_path(folder, name)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    if code != 0 and all(row["passed"] for row in rows):
        said = log.read_text("utf-8", errors="replace").strip().splitlines()[-1:]
        why = f"no end after {PATIENCE:.0f} s" if code is None else f"exit code {code}"
        rows.append({"check": name, "case": "ends", "passed": False, "said": f"{why}: {' '.join(said)[:300]}"})
    state = "passed" if all(row["passed"] for row in rows) else "FAILED"
    sys.stdout.write(f"{state} {name}: {len(rows)} rows, {seconds:.0f} s\n")
    sys.stdout.flush()
    return [{**row, "seconds": round(seconds)} for row in rows]


def child_environment() -> dict[str, str]:
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}


def rows_path(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(':', '-')}.jsonl"


def run_child(args: argparse.Namespace) -> int:
    """One check in this process: writes a row for each case as it is done."""
    part, _, name = args.child.partition(":")
    check: Callable[..., Iterator[tuple[str, Callable[[], str]]]] = globals()[f"check_{part}"]
    folder = Path(args.workdir)
    torch.cuda.set_device(0) if args.device == "cuda" else None
    # What starts runs leaves the tuning to them: it is a part of the product.
    tunes = part in ("kernels", "mixers", "sizes") and args.device == "cuda" and kernels.why_not_fla() is None
    good = True
    with rows_path(folder, args.child).open("w") as stream, side_by_side() if tunes else contextlib.nullcontext():
        for case, work in check(name, args.device, folder):
            set_seed(0)
            row = {"check": args.child, "case": case, "passed": True}
            try:
                row["said"] = work()
            except Exception as error:  # a check that fails is what this program is for; the log has the traceback
                traceback.print_exc()
                row |= {"passed": False, "said": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            good &= bool(row["passed"])
            stream.write(json.dumps(row) + "\n")
            stream.flush()
    return 0 if good else 1


def print_table(rows: list[dict[str, Any]], about: dict[str, str], devices: int, seconds: float) -> bool:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"hf_hybrid on {about['device']}, {about['kernels']}")
    for column in ("check", "case", "", "what was seen"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row["check"], row["case"], "passed" if row["passed"] else "FAILED", row["said"])
    Console(width=150).print(table)
    failed = sum(not row["passed"] for row in rows)
    if devices == 1:
        sys.stdout.write("One device: what takes several processes was not checked.\n")
    sys.stdout.write(f"{len(rows) - failed} passed, {failed} failed in {seconds:.0f} s\n")
    return not failed


def within(error: float, tolerance: float, what: str = "error") -> str:
    """Says how large an error is; a `ValueError` where it is not below `tolerance` (NaN never is)."""
    if not error <= tolerance:
        raise ValueError(f"{what} {error:.2e}, allowed are {tolerance:.1e}")
    return f"{what} {error:.1e}"


def relative(found: Tensor, exact: Tensor) -> float:
    """`||found - exact|| / ||exact||`."""
    return ((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()


# --- kernels


def check_kernels(mixer: str, device: str, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    for kind in ("bf16", "mixed"):
        for tokens in LENGTHS[1:]:
            yield f"{kind}, {tokens} tokens, state", lambda k=kind, n=tokens: recurrence(mixer, device, k, n, "state")
        yield f"{kind}, packed", lambda k=kind: recurrence(mixer, device, k, LENGTHS[-1], "packed")
    yield "bf16, no gradients", lambda: without_gradients(mixer, device)


def check_sizes(mixer: str, device: str, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """fp32, and one token, whose chunk is smaller: each is another set of kernels to compile, so of one mixer."""
    yield "fp32, 500 tokens, state", lambda: recurrence(mixer, device, "fp32", LENGTHS[-1], "state")
    yield "fp32, packed", lambda: recurrence(mixer, device, "fp32", LENGTHS[-1], "packed")
    yield "mixed, 1 tokens, state", lambda: recurrence(mixer, device, "mixed", LENGTHS[0], "state")


def recurrence(mixer: str, device: str, kind: str, tokens: int, case: str) -> str:
    """Output, state and gradients of one call against float64."""
    inputs = recurrence_inputs(mixer, device, kind, tokens)
    options: dict[str, Any] = {}
    if case == "state":
        inputs["initial_state"] = torch.randn(2, HEADS, WIDTH, WIDTH, device=device)
    else:
        starts = torch.tensor([[100], [163]], device=device)
        options["seq_idx"] = (torch.arange(tokens, device=device) >= starts).int()
    found = with_gradients(RECURRENCES[mixer], inputs, options)
    exact = with_gradients(
        RECURRENCES[mixer], {n: x.double() for n, x in inputs.items()}, {**options, "kernel": "torch"}
    )
    errors = {name: relative(found[name], exact[name]) for name in exact}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    if found["o"].dtype != inputs["v"].dtype:
        raise ValueError(f"the output is {found['o'].dtype}, v is {inputs['v'].dtype}")
    return within(errors[worst], TOLERANCE[kind], f"worst of {len(errors)}: {worst}")


def recurrence_inputs(mixer: str, device: str, kind: str, tokens: int) -> dict[str, Tensor]:
    """q, k, v, g and, where there is one, beta, in the dtypes of `kind`; "mixed" is what autocast makes."""
    half = torch.float32 if kind == "fp32" else torch.bfloat16
    shape = (2, tokens, HEADS)
    q, k = (F.normalize(torch.randn(*shape, WIDTH, device=device), dim=-1) for _ in range(2))
    if kind != "mixed":
        q, k = q.to(half), k.to(half)
    inputs = {"q": q, "k": k, "v": torch.randn(*shape, WIDTH, device=device).to(half)}
    if mixer == "gated_deltanet":
        return inputs | {
            "g": F.logsigmoid(torch.randn(*shape, device=device)),
            "beta": torch.rand(*shape, device=device),
        }
    inputs["g"] = F.logsigmoid(torch.randn(*shape, WIDTH, device=device) + 3)
    return inputs if mixer == "gated_linear_attention" else inputs | {"beta": torch.rand(*shape, device=device)}


def with_gradients(entry: Callable[..., Any], inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    o, state = entry(**leaves, **options)
    torch.manual_seed(1)
    d_o, d_state = torch.randn(o.shape, device=o.device), torch.randn(state.shape, device=o.device)
    grads = torch.autograd.grad((o, state), list(leaves.values()), (d_o.to(o.dtype), d_state.to(state.dtype)))
    return {"o": o.detach(), "state": state.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


@torch.no_grad()
def without_gradients(mixer: str, device: str) -> str:
    """What generation runs: short calls take another kernel than long ones; the state goes from one to the next."""
    inputs = recurrence_inputs(mixer, device, "mixed", 100)
    exact, _ = RECURRENCES[mixer](**{name: x.double() for name, x in inputs.items()}, kernel="torch")
    state, parts = None, []
    for part in zip(*(x.split([70, 29, 1], dim=1) for x in inputs.values()), strict=True):
        o, state = RECURRENCES[mixer](**dict(zip(inputs, part, strict=True)), initial_state=state)
        parts.append(o)
    if any(o.dtype != torch.bfloat16 for o in parts):
        raise ValueError(f"outputs are {[o.dtype for o in parts]}, v is torch.bfloat16")
    return within(relative(torch.cat(parts, 1), exact), TOLERANCE["mixed"], "70 + 29 + 1 tokens: o")


# --- mixers


def tiny_teacher(family: str = "qwen3", **changes: Any) -> Any:
    """A random teacher whose heads have the checks' shape."""
    sizes: dict[str, Any] = {"hidden_size": HEADS * WIDTH, "intermediate_size": 512, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": 2, "vocab_size": 4096}
    sizes |= {"max_position_embeddings": 4096, "initializer_range": 0.06, **changes}
    torch.manual_seed(0)
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=WIDTH)).eval()


def inference_dtype(mixer: str) -> torch.dtype:
    """fp32, in which a slip shows best, where that compiles nothing more."""
    return torch.bfloat16 if mixer in ("gated_linear_attention", "kimi_delta_attention") else torch.float32


def hybrid_of(mixer: str, device: str) -> tuple[Any, Any]:
    teacher = tiny_teacher().to(device)
    set_seed(0)
    options = {"sliding_window": {"window": 32}, CONVOLVED: {"short_convolution": 4}}.get(mixer)
    student = hh.convert(teacher, [1], mixer=mixer.split(",")[0], mixer_options=options)
    if mixer == CONVOLVED:  # which starts as the identity
        for layer in student.linear_attention_layers:
            torch.nn.init.normal_(decoder_layers(student)[layer].self_attn.conv.weight, std=0.5)
    return student, teacher


def check_mixers(mixer: str, device: str, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "autocast against float64", lambda: autocast_step(mixer, device, packed=False)
    yield "autocast against float64, packed", lambda: autocast_step(mixer, device, packed=True)
    yield "checkpointed activations", lambda: checkpointed_step(mixer, device)
    yield "packed rows against single ones", lambda: packed_rows(mixer, device)
    yield "left padding", lambda: left_padding(mixer, device)
    for dtype in dict.fromkeys((torch.bfloat16, inference_dtype(mixer))):
        name = str(dtype).removeprefix("torch.")
        yield f"cached decoding, {name}", lambda d=dtype: cached_decoding(mixer, device, d)
    yield "generation, bf16", lambda: generation(mixer, device)
    if mixer == "gated_deltanet":  # what lies around the mixer is the same for all
        yield "document_attention against a mask", lambda: another_way(mixer, device, by_documents)
        yield "torch_compile against none", lambda: another_way(mixer, device, compiled_regions)


def a_batch(device: str, *, packed: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(5, 4000, (2, 200), generator=torch.Generator().manual_seed(0)).to(device)
    if not packed:
        return {"input_ids": ids}
    places = torch.arange(200, device=device)
    return {"input_ids": ids, "position_ids": torch.where(places < 77, places, places - 77).expand(2, -1)}


def loss_of(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    """A KL from whole logits: what distillation minimises, without its chunks."""
    with torch.no_grad():
        reference = teacher(**batch, use_cache=False).logits
    kl = losses.kl_per_token(reference.double(), student(**batch, use_cache=False).logits.double())
    return kl.mean()


def autocast_step(mixer: str, device: str, *, packed: bool) -> str:
    """Loss and gradients in the recipes' precision, fp32 masters under bf16 autocast, against float64."""
    student, teacher = hybrid_of(mixer, device)
    batch = a_batch(device, packed=packed)
    with torch.autocast(device, torch.bfloat16):
        loss = loss_of(student, teacher, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.double().zero_grad()
    teacher.double()
    exact = loss_of(student, teacher, batch)
    exact.backward()
    wanted = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    if found.keys() != wanted.keys():
        raise ValueError(f"gradients of {sorted(found.keys() ^ wanted.keys())} in only one precision")
    a, b = (torch.cat([g[name].double().flatten() for name in wanted]) for g in (found, wanted))
    said = within(abs(loss.item() / exact.item() - 1), 5e-2, "loss")
    # Of random models; those of q and k go through norms, and with the recurrence in float64 they are as far off.
    return f"{said}, {within(relative(a, b), 0.3, 'gradients')}"


def another_way(mixer: str, device: str, way: Callable[..., contextlib.AbstractContextManager[None]]) -> str:
    """A distillation's loss and gradients on packed rows, teacher and student run in `way`, against the plain ones."""
    student, teacher = hybrid_of(mixer, device)
    student.train().gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for context in (contextlib.nullcontext(), way(teacher, student)):
        student.zero_grad()
        with context:
            loss = mean_kl_of_batch(student, teacher, a_batch(device, packed=True), Precision(torch.bfloat16))
            loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        found.append((loss.item(), gradients))
    said = within(abs(found[1][0] / found[0][0] - 1), 2e-2, "loss")
    return f"{said}, {within(relative(found[1][1], found[0][1]), 0.1, 'gradients')}"


def checkpointed_step(mixer: str, device: str) -> str:
    """Activations that are computed again give the gradients of those that were kept."""
    student, teacher = hybrid_of(mixer, device)
    batch, found = a_batch(device, packed=True), []
    student.train()
    for checkpointing in (False, True):
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        student.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss_of(student, teacher, batch).backward()
        found.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    return within(relative(found[1], found[0]), 1e-2, "gradients")


@torch.no_grad()
def packed_rows(mixer: str, device: str) -> str:
    student, _ = hybrid_of(mixer, device)
    student.to(inference_dtype(mixer))
    batch = a_batch(device, packed=True)
    whole = student(**batch, use_cache=False).logits
    ids = batch["input_ids"]
    parts = [student(input_ids=part, use_cache=False).logits for part in (ids[:, :77], ids[:, 77:])]
    return within(relative(whole, torch.cat(parts, 1)), of_logits(student), f"{student.dtype} logits")


@torch.no_grad()
def left_padding(mixer: str, device: str) -> str:
    student, _ = hybrid_of(mixer, device)
    student.to(inference_dtype(mixer))
    ids = a_batch(device)["input_ids"]
    padded = torch.cat([torch.zeros_like(ids[:, :9]), ids], 1)
    mask = (torch.arange(padded.shape[1], device=device) >= 9).long().expand(2, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = student(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 9:]
    return within(relative(found, student(input_ids=ids).logits), of_logits(student), f"{student.dtype} logits")


@torch.no_grad()
def cached_decoding(mixer: str, device: str, dtype: torch.dtype) -> str:
    """A prompt, a second part, then single tokens, all through one cache, against one pass."""
    student, _ = hybrid_of(mixer, device)
    student.to(dtype)
    ids = a_batch(device)["input_ids"][:, :120]
    whole = student(input_ids=ids, use_cache=False).logits
    cache, parts = None, []
    for part in ids.split([70, 33, *[1] * 17], dim=1):
        output = student(input_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    return within(relative(torch.cat(parts, 1), whole), of_logits(student), "logits")


def of_logits(student: Any) -> float:
    """The relative error that is allowed of logits, after some layers of rounding."""
    return 6e-2 if student.dtype == torch.bfloat16 else TOLERANCE["fp32"]


@torch.no_grad()
def generation(mixer: str, device: str) -> str:
    """Greedy text of a batch with left padding, of a growing and of a static cache, next to float64's one pass."""
    student, _ = hybrid_of(mixer, device)
    student.to(torch.bfloat16)
    exact = copy.deepcopy(student).double()
    ids = a_batch(device)["input_ids"][:, :50]
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    options |= {"pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    said = []
    for how in ({}, {"cache_implementation": "static"}):  # the library compiles the steps of the latter on a GPU
        output: Any = student.generate(ids, **options, **how)
        full = torch.cat([mask, torch.ones_like(output.sequences[:, 50:])], 1)
        positions = (full.cumsum(1) - 1).clamp(min=0)
        given = {"input_ids": output.sequences, "attention_mask": full, "position_ids": positions}
        wanted, in_one_pass = (model(**given).logits[:, 49:-1].double() for model in (exact, student))
        within(relative(in_one_pass, wanted), of_logits(student), "logits of one pass")
        step_by_step = within(relative(torch.stack(output.logits, 1), wanted), of_logits(student), "logits")
        said.append(f"{step_by_step}, {greedy(output.sequences[:, 50:], wanted, in_one_pass)}")
    return f"{output.sequences.shape[1] - 50} tokens, {'; static: '.join(said)}"


def greedy(tokens: Tensor, exact: Tensor, rounded: Tensor) -> str:
    """
    Says how far the logits of `tokens`, `[B, T]`, are below the largest ones in `exact`, `[B, T, vocabulary]`; a
    `ValueError` where rounding does not explain it.

    `rounded` are the logits of one pass in the precision that took the tokens, and what they are off by is what each
    of two logits may be off by where one was taken for the other. Compiled steps, which keep in fp32 what a pass in
    parts rounds, are a little nearer to `exact` and no nearer to `rounded`, so that is not what tokens are held to.
    """
    below = exact.max(-1).values - exact.gather(-1, tokens[..., None])[..., 0]
    allowed = 4 * 2**0.5 * (rounded - exact).std().item()  # four standard deviations of a difference of two
    return within(below.max().item(), allowed, "below the largest logit by")


# --- recipes


def write_sources(folder: Path) -> None:
    """A teacher in bf16, one in fp32, both with the embedded tokenizer, and texts from Python's own library."""
    tokenizer = hh.embedded_tokenizer()
    for name, dtype in (("qwen2", torch.bfloat16), ("qwen3", torch.float32)):
        teacher = tiny_teacher(name, vocab_size=len(tokenizer), tie_word_embeddings=True).to(dtype)
        teacher.save_pretrained(folder / "teachers" / name)
        tokenizer.save_pretrained(folder / "teachers" / name)
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for source in sorted(Path(os.__file__).parent.glob("*.py"))[:60]:
        shutil.copy(source, texts / source.name)


def shrunk(name: str, folder: Path, device: str) -> dict[str, Any]:
    """The recipe `name` with all of its settings but sizes: tiny teacher, rows a sixteenth as long, six steps."""
    if name == "README":
        text = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
        if text is None:
            raise ValueError("the README has no recipe")
        recipe = yaml.safe_load(text[1])
    else:
        recipe = yaml.safe_load(find_recipe(name).read_text("utf-8"))
    data = recipe["data"]
    if recipe["teacher"] != "embedded":
        recipe["teacher"] = str(folder / "teachers" / ("qwen3" if name == "README" else "qwen2"))
        hub = ("dataset", "split", "streaming", "text_column")
        data = {key: value for key, value in data.items() if key not in hub}
        data |= {"text_files": [f"{folder / 'texts'}/*.py"]}
    elif device == "cuda":  # its teacher's heads have another width, for which all would be compiled once more
        recipe["teacher"] = str(folder / "teachers" / "qwen3")
    data |= {"block_size": max(data.get("block_size", 512) // 16, SHORTEST), "held_out_rows": 8, "report_rows": 8}
    recipe["data"] = data
    for stage in ("align", "score", "distill", "finetune"):
        settings = recipe.get(stage)
        if not settings:
            continue
        if "block_size" in settings:
            settings["block_size"] = max(settings["block_size"] // 16, SHORTEST)
        settings["batch_size"] = 8
        if settings.get("warmup_steps"):
            settings["warmup_steps"] = 1
        budget = "tokens_per_layer" if stage == "score" else "tokens"
        settings[budget] = STEPS * 8 * settings.get("block_size", data["block_size"])
    # Several chunks of logits, as real rows have.
    recipe["execution"] = recipe.get("execution", {}) | {"micro_batch_size": 4, "chunk_tokens": 100}
    if device == "cpu":
        recipe["execution"]["use_cpu"] = True
    if "k" in recipe["select"]:
        recipe["select"]["k"] = 1
    return recipe


def run_command(*arguments: Any, launcher: tuple[str, ...] = (), **changes: str) -> str:
    """What `hf-hybrid` prints, or a `ValueError` with the end of what it, and not a launcher of it, said."""
    command = [sys.executable, "-m", *launcher, "hf_hybrid", *map(str, arguments)]
    done = subprocess.run(command, env={**child_environment(), **changes}, capture_output=True, text=True)
    sys.stdout.write(done.stdout + done.stderr)
    if done.returncode:
        said = done.stderr or done.stdout
        if launcher:  # its own traceback is the last
            said = said.rpartition("Traceback")[0] or said
        raise ValueError(f"exit code {done.returncode}: {said.strip()[-280:]}")
    return done.stdout + done.stderr


def start(name: str, folder: Path, device: str, output: str) -> tuple[Path, Path]:
    """A recipe's file, and the folder of its run."""
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(shrunk(name, folder, device)), "utf-8")
    return path, folder / output


def check_recipes(name: str, device: str, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    path, run = start(name, folder, device, f"run_{name}")

    def all_stages() -> str:
        run_command("run", path, "--output", run)
        report = json.loads((run / "report.json").read_text("utf-8"))
        kl = report["evaluation"]["kl"]
        if not 0 < kl < 100:
            raise ValueError(f"a held-out KL of {kl}")
        return f"{report['selected']} kept, KL {kl:.3f} nats per token"

    def loads_alone() -> str:
        """In a process that cannot import this package."""
        code = f"""
            import sys
            sys.modules["hf_hybrid"] = None
            import torch
            from transformers import AutoModelForCausalLM
            model = AutoModelForCausalLM.from_pretrained({str(run / "model")!r}, trust_remote_code=True)
            model.to({device!r})
            ids = torch.arange(5, 25, device=model.device)[None]
            tokens = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
            print(model.dtype, tokens.shape[1] - ids.shape[1], "tokens")
        """
        lines = [line.strip() for line in code.strip().splitlines()]
        environment = {**child_environment(), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, cwd=folder
        )
        sys.stdout.write(done.stdout + done.stderr)
        if done.returncode:
            raise ValueError((done.stderr.strip().splitlines() or ["no word"])[-1])
        return done.stdout.strip().splitlines()[-1]

    yield "all stages", all_stages
    yield "the checkpoint loads and generates alone", loads_alone


def check_resume(stage: str, device: str, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    def killed() -> str:
        path, whole = start("README", folder, device, "run_whole")
        recipe = yaml.safe_load(path.read_text("utf-8"))
        # Long enough to be killed amid it, and a checkpoint every second step: unasked, they are a minute apart.
        recipe[stage]["tokens"] *= 2
        recipe[stage]["checkpoints"] = STEPS
        path.write_text(yaml.safe_dump(recipe), "utf-8")
        run_command("run", path, "--output", whole, "--stop-after", "select")
        broken = folder / "run_broken"
        shutil.copytree(whole, broken)
        run_command("run", path, "--output", whole)
        newest = kill_between_checkpoints(path, broken, stage, folder / "logs" / "killed.log")
        said = run_command("run", path, "--output", broken)
        if f"going on from {newest}" not in said:
            raise ValueError(f"{newest} was there, and what was run again did not go on from it")
        reports = [json.loads((run / "report.json").read_text("utf-8")) for run in (whole, broken)]
        a, b = (report["evaluation"]["kl"] for report in reports)
        return f"went on from {newest} of {STEPS * 2} steps, {within(abs(a / b - 1), 2e-2, 'KL')}"

    yield f"killed in {stage}, then run again", killed


def kill_between_checkpoints(recipe: Path, run: Path, stage: str, log: Path) -> str:
    """Kills the run of `recipe` at the first checkpoint of `stage`; returns the name of the newest whole one."""
    command = [sys.executable, "-m", "hf_hybrid", "run", str(recipe), "--output", str(run)]
    checkpoints = run / f"{stage}_checkpoints"
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=child_environment(), stdout=stream, stderr=stream)
        while process.poll() is None and not list(checkpoints.glob("checkpoint-*/files.json")):
            time.sleep(0.02)
        process.kill()
        code = process.wait()
    if code != -signal.SIGKILL:
        said = log.read_text("utf-8", errors="replace").strip()[-200:]
        raise ValueError(f"the run ended by itself before a checkpoint of {stage}, with exit code {code}: {said}")
    if (run / ARTEFACTS[stage]).exists():
        raise ValueError(f"{stage} was over before the run could be killed amid it")
    whole = [path for path in checkpoints_in(checkpoints) if damage(path) is None]
    if not whole:
        raise ValueError(f"the run was killed at a checkpoint of {stage}, and none of these is whole: {checkpoints}")
    return whole[0].name


# --- processes


def check_processes(engine: str, device: str, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    def two() -> str:
        path, run = start("qwen2.5-3b", folder, device, f"run_{engine}")
        port = 29500 + 17 * ENGINES.index(engine)
        configuration = str(ROOT / "recipes" / "accelerate" / f"{engine}.yaml")
        launcher = ("accelerate.commands.launch", "--config_file", configuration, "--num_processes", "2")
        run_command("run", path, "--output", run, launcher=(*launcher, "--main_process_port", str(port), "-m"))
        report = json.loads((run / "report.json").read_text("utf-8"))
        alone = folder / "run_qwen2.5-3b" / "report.json"
        said = f"{report['selected']} kept, KL {report['evaluation']['kl']:.3f}"
        if not alone.exists():
            return said
        expected = json.loads(alone.read_text("utf-8"))["evaluation"]["kl"]
        return f"{said}, {within(abs(report['evaluation']['kl'] / expected - 1), 5e-2, 'from one process')}"

    yield "a run in two processes", two


if __name__ == "__main__":
    sys.exit(main())

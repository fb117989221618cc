"""What this machine has, which kernels would run on it, and what about it is slow, missing or wrong."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


_PACKAGES = {
    "hf_hybrid": "hf_hybrid",
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "trl": "trl",
    "peft": "peft",
    "datasets": "datasets",
    "safetensors": "safetensors",
    "fla": "flash-linear-attention",
    "triton": "triton",
}
# What the extras of setup.py that a user may want give.
_EXTRAS = {"gguf": "teachers in GGUF files", "eval": "evaluate --tasks"}


# Of one layer, forward and backward, on an H100: docs/performance.md.
TORCH_ON_CUDA = "7 to 9 times as slow as"
# A teacher's and a student's weights, the student's gradients and AdamW's moments, all fp32: docs/memory.md.
_BYTES_PER_PARAMETER = 4 + 4 + 4 + 8
_GIB = 2**30
# Less than this is no room for a run of a model of a hundred million parameters.
_LITTLE_MEMORY, _LITTLE_DISK = 4 * _GIB, 10 * _GIB
_HUB_TIMEOUT = 3.0


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use: its name, compute capability, and bytes of memory."""

    name: str
    capability: tuple[int, int]
    free: int
    total: int


@dataclass(frozen=True)
class Facts:
    """
    What [`examine`] judges a machine by.

    Args:
        versions (`dict`): of installed distributions, by their names; None for what is not installed.
        requirements (`list[str]`, *optional*): of the installed package, as in its metadata; None where it is not
            installed.
        gpus (`list[Gpu]`): what torch can use.
        nvidia (`list[str]`): what the driver lists, whatever torch can use.
        cuda (`str`, *optional*): the CUDA that torch was built with.
        why_not_fla (`str`, *optional*): why fla's kernels cannot run on the GPU; None where they can.
        compiler (`bool`): whether Triton finds a C compiler and Python's headers.
        cores (`float`): how much of the CPU this process may use.
        threads (`int`): how many torch starts.
        thread_limit (`str`, *optional*): `OMP_NUM_THREADS`.
        memory (`int`): bytes that this process may still take.
        disk (`dict[str, int]`): bytes free where runs and the Hub's files would be written.
        hub (`str`, *optional*): why the Hub does not answer; None where it does.
        token (`bool`): whether the Hub would know who asks.
        visible (`str`, *optional*): `CUDA_VISIBLE_DEVICES`.
    """

    versions: dict[str, str | None]
    requirements: list[str] | None
    gpus: list[Gpu] = field(default_factory=list)
    nvidia: list[str] = field(default_factory=list)
    cuda: str | None = None
    why_not_fla: str | None = None
    compiler: bool = True
    cores: float = 1
    threads: int = 1
    thread_limit: str | None = None
    memory: int = 16 * _GIB
    disk: dict[str, int] = field(default_factory=dict)
    hub: str | None = None
    token: bool = True
    visible: str | None = None


@dataclass(frozen=True)
class Finding:
    """
    One thing about a machine.

    Args:
        status (`str`): `"ok"`, `"slow"`, `"missing"` (something optional) or `"wrong"`.
        what (`str`): what was found, and what follows from it.
        advice (`str`): what to install or set; empty where there is nothing to do.
    """

    status: str
    what: str
    advice: str = ""


def describe_environment() -> dict[str, Any]:
    """Returns versions (None for what is not installed), and for each device which kernel runs there and why."""
    versions = {"python": platform.python_version(), **{name: _version(dist) for name, dist in _PACKAGES.items()}}
    return {"platform": platform.platform(), "versions": versions, "devices": _devices()}


def describe_kernels(device: Any, kernel: str = "auto", mixers: Iterable[str | None] = ()) -> str:
    """
    Which implementation runs the recurrences of `mixers` on `device`, why, and what it costs; one sentence. Raises a
    `ValueError` where `kernel="fla"` cannot run there.
    """
    from hf_hybrid.modeling.kernels import use_fla, why_not_fla

    fla = use_fla(device, kernel)
    if {name for name in mixers if name} == {"sliding_window"}:
        return f"the windows run in torch's attention on {device.type}"
    if fla:
        return f"the recurrences run in fla's kernels on {device.type} (triton {_version('triton')})"
    if device.type != "cuda":
        return f"the recurrences run in torch on {device.type}; fla's kernels need a CUDA device"
    reason = "kernel='torch' asks for it" if kernel == "torch" else why_not_fla()
    return f"the recurrences run in torch on cuda, {TORCH_ON_CUDA} fla's kernels: {reason}"


def examine(facts: Facts) -> list[Finding]:
    """What is slow, missing or wrong on a machine and what to do about it, and what is as it should be."""
    parts = (_packages, _gpus, _kernels, _cpu, _memory, _disk, _hub, _extras)
    return [finding for part in parts for finding in part(facts)]


def _packages(facts: Facts) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    if facts.requirements is None:
        text = "hf_hybrid is not installed, only found in this folder, so what it needs is not known"
        yield Finding("wrong", text, "pip install -e .")
        return
    fit = []
    for requirement in map(Requirement, facts.requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = facts.versions.get(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if version is None:
            yield Finding("wrong", f"{requirement.name} is not installed", f"pip install '{wanted}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            text = f"{requirement.name} {version} is not supported, only {requirement.specifier}"
            yield Finding("wrong", text, f"pip install '{wanted}'")
        else:
            fit.append(f"{requirement.name} {version}")
    yield Finding("ok", f"of supported versions: {', '.join(fit)}")


def _gpus(facts: Facts) -> Iterator[Finding]:
    for i, gpu in enumerate(facts.gpus):
        memory = f"{gpu.free / _GIB:.0f} of {gpu.total / _GIB:.0f} GiB free"
        if gpu.free < gpu.total / 2:
            advice = "see nvidia-smi for whose they are, or take another GPU with CUDA_VISIBLE_DEVICES"
            yield Finding("slow", f"cuda:{i}, {gpu.name}, has {memory}; other processes hold the rest", advice)
        elif gpu.capability < (8, 0):
            text = f"cuda:{i}, {gpu.name}, {memory}, computes bf16 slowly or not at all"
            yield Finding("slow", text, "in a recipe, write training: {fp16: true} in the place of bf16")
        else:
            yield Finding("ok", f"cuda:{i}, {gpu.name}, {memory}")
    if facts.gpus:
        return
    if not facts.nvidia:
        text = "no GPU: the demo takes minutes, a model of a hundred million parameters days"
        yield Finding("slow", text, "for more than a look, take a machine with an NVIDIA GPU")
    elif facts.cuda is None:
        text = f"there is a GPU ({facts.nvidia[0]}), but torch {facts.versions['torch']} was built without CUDA"
        yield Finding("wrong", text, "pip uninstall torch, then install the build for CUDA: pytorch.org names it")
    elif facts.visible is not None:
        text = f"there is a GPU ({facts.nvidia[0]}), and CUDA_VISIBLE_DEVICES={facts.visible!r} hides it from torch"
        yield Finding("wrong", text, "unset CUDA_VISIBLE_DEVICES")
    else:
        text = f"there is a GPU ({facts.nvidia[0]}), but torch, built for CUDA {facts.cuda}, cannot use it"
        advice = f"nvidia-smi says which CUDA the driver knows; where that is below {facts.cuda}, update the driver"
        yield Finding("wrong", text, f"{advice} or install torch for the older one")


def _kernels(facts: Facts) -> Iterator[Finding]:
    if not facts.gpus:
        if facts.versions.get("flash-linear-attention") is not None:
            text = "flash-linear-attention is installed, and there is no GPU for it: where triton is there too, "
            text += "transformers' own linear-attention models call its kernels on CPU tensors and fail"
            yield Finding("wrong", text, "pip uninstall flash-linear-attention fla-core")
        return
    if facts.why_not_fla is not None:
        commands = []
        if facts.versions.get("flash-linear-attention") is None:
            commands.append("pip install 'flash-linear-attention>=0.6,<0.7'")
        if facts.versions.get("triton") is None or "triton" in facts.why_not_fla:
            # torch pins a Triton, and pip would replace torch.
            commands.append("pip install --no-deps 'triton>=3.7.1'")
        text = f"the recurrences run in torch, {TORCH_ON_CUDA} fla's kernels: {facts.why_not_fla}"
        yield Finding("slow", text, ", then ".join(commands))
        return
    if not facts.compiler:
        text = "fla's kernels cannot be compiled: Triton needs a C compiler and Python's headers"
        yield Finding("wrong", text, "apt-get install gcc python3-dev, or what your system calls them")
        return
    versions = facts.versions
    yield Finding(
        "ok", f"fla {versions['flash-linear-attention']} and triton {versions['triton']} run the recurrences"
    )


def _cpu(facts: Facts) -> Iterator[Finding]:
    may = f"{facts.cores:.3g} {'core' if facts.cores == 1 else 'cores'}"
    threads = f"{facts.threads} {'thread' if facts.threads == 1 else 'threads'}"
    # Of two hardware threads of a core torch uses one, which is as fast.
    held = facts.thread_limit is not None and 2 * facts.threads <= facts.cores
    if facts.threads > facts.cores + 1:
        text = f"torch starts {threads} where this process may use {may}: they wait for one another"
        yield Finding("slow", text, f"export OMP_NUM_THREADS={max(1, int(facts.cores))}")
    elif (held or 2 * facts.threads < facts.cores) and not facts.gpus:
        reason = f", as OMP_NUM_THREADS={facts.thread_limit} says" if held else ""
        text = f"torch uses {threads}{reason}, and this process may use {may}"
        yield Finding("slow", text, f"export OMP_NUM_THREADS={int(facts.cores)}")
    else:
        yield Finding("ok", f"torch uses {threads} on {may}")


def _memory(facts: Facts) -> Iterator[Finding]:
    fits = facts.memory // 2 // _BYTES_PER_PARAMETER // 1_000_000
    text = f"{facts.memory / _GIB:.1f} GiB of memory are free"
    if not facts.gpus:
        fits = round(fits, 2 - len(str(fits)))
        text += f", enough to distil a teacher of about {fits:,} million parameters on the CPU"
    if facts.memory < _LITTLE_MEMORY:
        yield Finding("slow", text, "end other programs; a recipe's micro_batch_size: 1 takes the least at a time")
    else:
        yield Finding("ok", text)


def _disk(facts: Facts) -> Iterator[Finding]:
    for place, free in facts.disk.items():
        text = f"{free / _GIB:.1f} GiB are free in {place}"
        if free < _LITTLE_DISK:
            advice = "hf-hybrid run RECIPE --output FOLDER --plan says what a run takes; free some, or write elsewhere"
            yield Finding("slow", text, advice)
        else:
            yield Finding("ok", text)


def _hub(facts: Facts) -> Iterator[Finding]:
    if facts.hub is None:
        yield Finding("ok", "the Hub answers")
        if not facts.token:
            yield Finding("missing", "no token for the Hub, for hf-hybrid push and gated teachers", "hf auth login")
    else:
        advice = "name teachers and datasets by their folders; HF_HUB_OFFLINE=1 takes what is in the cache at once"
        if facts.hub.startswith("HF_HUB_OFFLINE"):
            advice = "unset HF_HUB_OFFLINE, or name teachers and datasets by their folders"
        yield Finding("missing", f"the Hub is out of reach ({facts.hub}): names on it do not load", advice)


def _extras(facts: Facts) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    for requirement in map(Requirement, facts.requirements or []):
        for extra, gives in _EXTRAS.items():
            marker = requirement.marker
            if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
                continue
            version = facts.versions.get(requirement.name)
            extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            advice = f"pip install '{requirement.name}{extras}{requirement.specifier}'"
            if version is None:
                yield Finding("missing", f"{requirement.name}, for {gives}", advice)
            elif not requirement.specifier.contains(version, prereleases=True):
                yield Finding("wrong", f"{requirement.name} {version} is not supported, for {gives}", advice)
            else:
                yield Finding("ok", f"{requirement.name} {version}, for {gives}")


def facts_of_this_machine() -> Facts:
    """Looks at packages, devices, memory and disk, and asks the Hub for an answer."""
    import psutil
    import torch
    from huggingface_hub import constants, get_token

    from hf_hybrid.modeling.kernels import why_not_fla

    requirements = _requirements()
    names = {_name_of(line) for line in requirements or []} | set(_PACKAGES.values())
    gpus = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        gpus.append(Gpu(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i), free, total))
    memory, limit = psutil.virtual_memory().available, _cgroup("memory.max")
    if limit is not None:
        memory = min(memory, int(limit[0]) - int((_cgroup("memory.current") or ["0"])[0]))
    places = {"this folder": Path.cwd(), "the Hub's cache": Path(constants.HF_HUB_CACHE)}
    return Facts(
        versions={name: _version(name) for name in names},
        requirements=requirements,
        gpus=gpus,
        nvidia=_nvidia(),
        cuda=torch.version.cuda or torch.version.hip,
        why_not_fla=why_not_fla(),
        compiler=_has_compiler(),
        cores=available_cores(),
        threads=torch.get_num_threads(),
        thread_limit=os.environ.get("OMP_NUM_THREADS"),
        memory=memory,
        disk={f"{name}, {path}": shutil.disk_usage(_existing(path)).free for name, path in places.items()},
        hub=_why_no_hub(),
        token=get_token() is not None,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def diagnose() -> dict[str, Any]:
    """What [`describe_environment`] says of this machine, and under `"findings"` what [`examine`] does."""
    return describe_environment() | {"findings": [asdict(finding) for finding in examine(facts_of_this_machine())]}


def _requirements() -> list[str] | None:
    try:
        return importlib.metadata.requires("hf_hybrid")
    except importlib.metadata.PackageNotFoundError:
        return None


def _name_of(requirement: str) -> str:
    from packaging.requirements import Requirement

    return Requirement(requirement).name


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution == "hf_hybrid":  # a checkout that is not installed
            from hf_hybrid import __version__

            return __version__
        return None


def _nvidia() -> list[str]:
    """The GPUs that NVIDIA's driver lists; none where there is no driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    arguments = [command, "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(arguments, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return []
    return listed.stdout.split("\n")[:-1] if listed.returncode == 0 else []


def _has_compiler() -> bool:
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return any(map(shutil.which, compilers)) and headers.is_file()


def available_cores() -> float:
    """Cores that this process may run on, or the share of them that a container allows."""
    cores: float = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = _cgroup("cpu.max")
    return cores if quota is None else min(cores, int(quota[0]) / int(quota[1]))


def _cgroup(name: str) -> list[str] | None:
    """The numbers of a limit on this container; None where there is none."""
    path = Path("/sys/fs/cgroup", name)
    words = path.read_text().split() if path.is_file() else ["max"]
    return None if words[0] == "max" else words


def _existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _why_no_hub() -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT)
    except Exception as error:  # of whichever client the library uses
        return f"{constants.ENDPOINT}: {' '.join(str(error).split()) or type(error).__name__}"
    return None


def _devices() -> list[dict[str, Any]]:
    import torch

    names = {"cpu": platform.processor() or platform.machine()}
    if torch.cuda.is_available():
        names |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        names["mps"] = "Apple GPU"
    return [{"device": device, "name": name, **_kernel(torch.device(device))} for device, name in names.items()]


def _kernel(device: Any) -> dict[str, str]:
    from hf_hybrid.modeling.kernels import use_fla

    return {"kernel": "fla" if use_fla(device) else "torch", "why": describe_kernels(device)}

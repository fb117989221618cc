"""
fla's kernels made ready before the first step of a run.

fla tries dozens of configurations of each of its kernels on the shapes that it meets first, and Triton compiles them
one after the other: minutes in which a training seems to hang. Here the configurations of all kernels are compiled
side by side, in a pass that launches nothing, and then timed briefly, on random tensors of the run's shapes, by the
main process alone. Triton keeps the kernels and fla the choices in Triton's cache, where other processes and later
runs find both.
"""

import contextlib
import fcntl
import functools
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from hf_hybrid.environment import available_cores
from hf_hybrid.modeling.kernels import use_fla
from hf_hybrid.modeling.linear_attention import LinearAttention
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.trainers.precision import Precision


_TOKENS = 192  # several chunks, the last one not full


def tune_kernels(
    student: Any,
    *,
    rows: int,
    packed: bool,
    precision: Precision,
    say: Callable[[str], None],
    tokens: int = _TOKENS,
) -> bool:
    """
    Compiles and tunes what the mixers of `student` run on their device, forward and backward; returns whether there
    was anything to do, which is so on CUDA where fla runs.

    Args:
        student ([`HybridForCausalLM`]): on its device.
        rows (`int`): rows of a forward pass.
        packed (`bool`): whether rows hold several documents.
        precision ([`Precision`]): that of the training.
        say (`Callable`): gets a line before the work and one after it.
        tokens (`int`): of a row. fla compiles recurrences for any length, but norms for numbers of heads' vectors, in
            steps of 65,536.
    """
    mixers = _mixers_by_shape(student)
    if not mixers or not use_fla(student.device, student.config.kernel):
        return False
    shapes = ", ".join(f"{mixer.num_heads} heads of {mixer.head_dim} x {mixer.value_dim}" for mixer in mixers)
    say(f"compiling and tuning fla's kernels for {shapes} on {_cores()} cores; later runs find them")
    start = time.perf_counter()

    def run_all() -> None:
        for mixer in mixers:
            run_once(mixer, rows=rows, packed=packed, precision=precision, tokens=tokens)
            if packed:  # fla tunes anew for rows that are not, which measurements and generation have
                run_once(mixer, rows=rows, packed=False, precision=precision, gradients=(False,), tokens=tokens)

    with side_by_side() as compiling_only:
        with compiling_only():
            run_all()
        run_all()
    torch.cuda.synchronize(student.device)
    say(f"fla's kernels are ready after {time.perf_counter() - start:.0f} s")
    return True


def _mixers_by_shape(student: Any) -> list[Any]:
    """One linear mixer of each kind and shape; those without a recurrence have nothing to compile."""
    layers = decoder_layers(student)
    found: dict[tuple[Any, ...], Any] = {}
    for mixer in (layers[i].self_attn for i in student.linear_attention_layers):
        if isinstance(mixer, LinearAttention):
            found.setdefault((type(mixer).__mro__[1], mixer.num_heads, mixer.head_dim, mixer.value_dim), mixer)
    return list(found.values())


def run_once(
    mixer: Any,
    *,
    rows: int,
    packed: bool,
    precision: Precision,
    gradients: tuple[bool, ...] = (True, False),
    tokens: int = _TOKENS,
) -> None:
    """Calls the recurrence of `mixer` as a training step and as a measurement do, on tensors that mean nothing."""
    tokens = max(tokens, _TOKENS)
    weight = next(parameter for name, parameter in mixer.named_parameters() if name not in mixer.decay_parameters)
    device, dtype = weight.device, precision.autocast or weight.dtype
    generator = torch.Generator(device).manual_seed(0)  # the global one decides what a run draws

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(rows, tokens, *shape, device=device, dtype=dtype, generator=generator)

    heads = mixer.num_heads
    tensors = [new(heads, mixer.head_dim), new(heads, mixer.head_dim), new(heads, mixer.value_dim)]
    hidden = new(mixer.hidden_size).to(weight.dtype)
    documents = torch.arange(tokens, device=device).expand(rows, -1) // 100 if packed else None
    for needed in gradients:
        leaves = [tensor.clone().requires_grad_(needed) for tensor in tensors]
        with torch.set_grad_enabled(needed), precision.running(device):
            output, _ = mixer.mix(*leaves, hidden, None, None, documents)
            output = mixer.finish(output, hidden)
        if needed:
            torch.autograd.grad(output.float().sum(), leaves)


def _cores() -> int:
    return max(1, int(available_cores()))


@contextlib.contextmanager
def side_by_side() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """
    Inside, Triton's autotuner compiles the configurations of a kernel side by side, times each for 25 ms in the place
    of 125, and takes turns with other processes on this GPU. Gives a context inside which nothing is launched:
    the kernels that are called there are compiled, all side by side, until it ends.
    """
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    active: Any = type(driver.active)
    prune, get_benchmarker = Autotuner.prune_configs, active.get_benchmarker

    def short_bench(call: Callable[[], Any], quantiles: Any) -> Any:
        with alone_on_the_device():
            return do_bench(call, warmup=5, rep=20, quantiles=quantiles)

    with ThreadPoolExecutor(_cores()) as pool:

        def prune_and_compile(self: Any, kwargs: dict[str, Any]) -> list[Any]:
            configs = prune(self, kwargs)
            # What does not compile fails again when it is timed, where the autotuner deals with it.
            wait(
                pool.submit(self.fn.run, *self.nargs.values(), **{**kwargs, **config.all_kwargs(), "warmup": True})
                for config in configs
            )
            return configs

        Autotuner.prune_configs = prune_and_compile
        active.get_benchmarker = lambda self: short_bench
        try:
            yield functools.partial(_compiling_only, pool, prune)
        finally:
            Autotuner.prune_configs, active.get_benchmarker = prune, get_benchmarker


@contextlib.contextmanager
def _compiling_only(pool: ThreadPoolExecutor, prune: Callable[[Any, dict[str, Any]], list[Any]]) -> Iterator[None]:
    """
    Inside, a call of a kernel compiles it, every configuration of it that `prune` leaves, in `pool`, and launches
    nothing: what it would have written stays as it was allocated. At the end all of it is compiled.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    compiled: list[Future[Any]] = []
    seen: set[tuple[Any, ...]] = set()
    tune, launch = Autotuner.run, JITFunction.run

    def compile_configs(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        given = {name: value for name, value in {**self.nargs, **kwargs}.items() if name in self.arg_names}
        # What the autotuner tells calls apart by.
        key = (*(given[name] for name in self.keys if name in given), *map(_dtype_of, given.values()))
        if (id(self), key) not in seen:
            seen.add((id(self), key))
            for config in prune(self, kwargs):
                options = {**kwargs, **config.all_kwargs(), "warmup": True}
                compiled.append(pool.submit(self.fn.run, *args, **options))
        self.nargs = None

    def compile_one(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if warmup:
            return launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(pool.submit(launch, self, *args, grid=grid, warmup=True, **kwargs))
        return None

    Autotuner.run, JITFunction.run = compile_configs, compile_one
    try:
        yield
        wait(compiled)  # what does not compile fails again when it is called
    finally:
        Autotuner.run, JITFunction.run = tune, launch


def _dtype_of(value: Any) -> Any:
    return value.dtype if isinstance(value, torch.Tensor) else None


@contextlib.contextmanager
def alone_on_the_device(device: str | torch.device = "cuda") -> Iterator[None]:
    """
    Processes of a user that measure on one device at the same time (one compiles while another measures) take turns.

    Where the temporary folder takes no locks, a warning says that they do not.
    """
    path = lock_file(torch.device(device))
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            text = f"{path} cannot be locked ({error}), so processes that measure on this device at once disturb each"
            warnings.warn(f"{text} other; set TMPDIR to a folder that you may write to.", UserWarning, stacklevel=3)
        yield


def lock_file(device: torch.device) -> Path:
    """
    The file that stands for `device`, whatever number a process knows it by, and for this user: one may not open
    another's.

    A GPU is known by its UUID; parts of one (MIG) share it where the driver gives them none of their own. Where it has
    none, `CUDA_VISIBLE_DEVICES` says which it is, and processes that name one GPU in two ways there do not find each
    other.
    """
    name = device.type
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        properties: Any = torch.cuda.get_device_properties(index)
        try:
            uuid = str(properties.uuid)
        except AttributeError:  # some builds of torch for AMD
            uuid = ""
        if not uuid.strip("0-"):  # zeros are none, too
            visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
            uuid = visible[index] if index < len(visible) and visible[index] else str(index)
        name += "-" + re.sub(r"[^\w-]", "-", uuid)
    return Path(tempfile.gettempdir(), f"hf_hybrid-{os.getuid()}-{name}.lock")

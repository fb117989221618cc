"""What several processes of one launcher do together: one of them writes, the others wait and see what it saw."""

import atexit
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist


T = TypeVar("T")

# The main process may tokenise a corpus while the others wait. Should it die, the launcher ends them.
_PATIENCE = timedelta(days=7)


def num_processes() -> int:
    """How many processes work together: those of the process group, 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """This process's rank among those of all machines; 0 where there is no other."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0))


def is_main_process() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return process_index() == 0


def leave_group() -> None:
    """Ends the process group, where there is one; the next call of this module's functions may begin another."""
    if dist.is_available() and dist.is_initialized():
        _patient_group.cache_clear()
        dist.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """
    Ends this process, one of several, with `code`: the last call of a program that a launcher started.

    What was registered with `atexit` runs, streams are flushed, and the interpreter is not taken down. Device meshes
    keep gloo's threads alive beyond the process group, and a thread that drops a tensor while the interpreter goes
    aborts the process (pytorch/pytorch issue 190489), which a launcher takes for the failure of a finished job.
    """
    leave_group()
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def on_main(work: Callable[[], T]) -> T:
    """
    Returns what `work()` returned in the main process; the other processes wait for it and do not call `work`.

    An error in the main process is raised there, and as a `RuntimeError` with its text in the others. All processes
    must call this, with a result that can be pickled.
    """
    if num_processes() == 1:
        return work()
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if is_main_process():
        try:
            outcome[0] = work()
        except Exception as caught:  # raised below, once the others know
            error, outcome[1] = caught, f"{type(caught).__name__}: {caught}"
    dist.broadcast_object_list(outcome, src=0, group=_patient_group())
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise RuntimeError(f"the main process failed with {outcome[1]}")
    return outcome[0]


def share_of(length: int) -> range:
    """The indices of this process among `length` things: every process has one of each `num_processes()`."""
    return range(process_index() if num_processes() > 1 else 0, length, num_processes())


def gathered(values: Sequence[T]) -> list[T]:
    """All processes' `values` in the order that [`share_of`] took them apart; the same in every process."""
    if num_processes() == 1:
        return list(values)
    lists: list[Any] = [None] * num_processes()
    dist.all_gather_object(lists, list(values), group=_patient_group())
    return [part[i] for i in range(len(lists[0])) for part in lists if i < len(part)]


@functools.cache
def _patient_group() -> Any:
    """A process group on the CPU whose collectives may wait for days; made once, by all processes at once."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)

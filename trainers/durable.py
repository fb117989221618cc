"""Files that outlive a kill and a power cut: under its name, a file or folder is complete or not there."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar


Record = TypeVar("Record")
PARTIAL = ".partial"


def write_text(path: str | os.PathLike, text: str) -> None:
    """
    Writes `text` as UTF-8 so that a reader sees the old file or the new one, never half of one. Of several processes
    that write it at once, one after the other does, and the last one's text stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    with _alone_with(partial):
        try:
            with open(partial, "w", encoding="utf-8") as stream:
                stream.write(text)
            settle(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _alone_with(partial: Path) -> Iterator[None]:
    """Waits until no other process has `partial`, which is then there; another one's kill ends its hold."""
    mine = False
    while not mine:
        with open(partial, "ab") as stream:
            _lock(stream, wait=True)
            # Whoever had it before may have given it the file's name: this is then that file.
            with contextlib.suppress(FileNotFoundError):
                mine = os.path.samestat(os.fstat(stream.fileno()), os.stat(partial))
            if mine:
                yield


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
    """Whether no other process holds the file `path`, which this one then does until the end, however it ends."""
    with open(path, "ab") as stream:
        yield _lock(stream, wait=False)


def _lock(stream: IO[bytes], *, wait: bool) -> bool:
    """Locks an open file against other processes; False where one of them has it. Where there are no locks, True."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        # Some network file systems have none.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
    return True


def write_json(path: str | os.PathLike, data: Any) -> None:
    """[`write_text`] of `data` as JSON."""
    write_text(path, json.dumps(data, indent=1))


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds, or None where there is none; a `ValueError` that names it where it is no JSON."""
    path = Path(path)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and the same call makes it again.") from error


def read_record(kind: type[Record], path: str | os.PathLike) -> Record:
    """
    The dataclass `kind` of a JSON file with its fields; a `ValueError` that names the file where it has others. The
    key `origin`, by which the artefacts of a run say what they came from, is left out.
    """
    data = read_json(path)
    if isinstance(data, dict):
        data = {name: value for name, value in data.items() if name != "origin"}
    try:
        return kind(**data)
    except TypeError as error:
        raise ValueError(
            f"{path} holds no {kind.__name__} ({error}); delete it, and the same call makes it again."
        ) from error


def settle(partial: Path, path: Path) -> None:
    """Gives a file that is written whole its name, on the disk too: contents first, then the name."""
    _sync_file(partial)
    os.replace(partial, path)
    sync_directory(path.parent)


def sync_tree(folder: Path) -> None:
    """Brings every file below `folder` to the disk, then the folders that name them."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            _sync_file(path)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync_directory(path)


def _sync_file(path: Path) -> None:
    # Windows syncs only what is open for writing; elsewhere a file that may only be read is synced too.
    with open(path, "r+b" if os.name == "nt" else "rb") as stream:
        os.fsync(stream.fileno())


def sync_directory(folder: Path) -> None:
    """Brings the names in `folder` to the disk: until then a power cut may undo a rename."""
    if os.name == "nt":  # no directory can be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems order renames themselves and refuse this.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)

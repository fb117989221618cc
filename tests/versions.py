"""
Runs a part of the tests on the oldest release of transformers that setup.py admits and on the newest that the index
serves: python tests/versions.py TEST ... (`make test-versions`). The pinned one is what all tests run with.

Each release has an environment of its own, which holds that release and what it needs otherwise than `.venv`; the rest
comes from there. A failure on the floor ends with an error. So does one on the newest, unless that was released after
what constraints.txt names: then it is reported in the last lines, and other work goes on.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]


def floor(setup: str) -> str:
    """The oldest transformers that the text of setup.py admits."""
    return re.search(r'"transformers>=([\d.]+),<6"', setup)[1]  # type: ignore[index]


def pinned(constraints: str) -> str:
    """The transformers that the text of constraints.txt names."""
    return re.search(r"^transformers==([\d.]+)$", constraints, re.M)[1]  # type: ignore[index]


def newest() -> str:
    """The newest transformers before 6 that the package index serves."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed"]
    report = subprocess.check_output([*command, "--report", "-", "transformers<6"], text=True)
    return json.loads(report)["install"][0]["metadata"]["version"]


def releases(oldest: str, pin: str, latest: str) -> dict[str, bool]:
    """The releases to test beside the pinned one, and whether a failure on each is an error."""
    later = numbers(latest) > numbers(pin)
    return {oldest: True} | ({latest: not later} if latest not in (oldest, pin) else {})


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def environment(name: str, version: str) -> Path:
    """The interpreter of the environment `name`, which is made or brought to `version` where it is not there yet."""
    folder = ROOT / name
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.check_call([sys.executable, "-m", "venv", "--without-pip", folder])
        own = next(folder.glob("lib/python*/site-packages"))
        (own / "behind.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.check_call([*pip, f"transformers=={version}"])
    return python


def run(name: str, version: str, tests: list[str]) -> bool:
    """Runs `tests` with a release of transformers; True where they pass."""
    start = time.monotonic()
    python = environment(name, version)
    found = subprocess.check_output([python, "-c", "import transformers; print(transformers.__version__)"], text=True)
    if found.strip() != version:
        raise RuntimeError(f"{name} has transformers {found.strip()} and not {version}; remove the folder.")
    command = [python, "-m", "pytest", "-q", "-m", "not slow", "-n", os.environ.get("WORKERS", "2")]
    passed = subprocess.run([*command, "--dist", "loadscope", *tests], cwd=ROOT).returncode == 0
    print(
        f"== transformers {version}: {'passed' if passed else 'FAILED'}, {time.monotonic() - start:.0f} s", flush=True
    )
    return passed


def main(tests: list[str]) -> int:
    pin = pinned((ROOT / "constraints.txt").read_text())
    oldest, latest = floor((ROOT / "setup.py").read_text()), newest()
    print(f"== transformers: floor {oldest}, pinned {pin} (make test), newest {latest}", flush=True)
    if latest == pin:
        print("== the newest is the pinned one: nothing more to run with it", flush=True)
    failed = {}
    for version, is_error in releases(oldest, pin, latest).items():
        name = ".venv-floor" if version == oldest else ".venv-newest"
        if not run(name, version, tests):
            failed[version] = is_error
    for version, is_error in failed.items():
        if not is_error:
            print("!" * 100)
            print(
                f"!! transformers {version}, newer than the {pin} that this release was made for, FAILS tests above."
            )
            print("!! setup.py admits it: every new installation gets it. Nothing is blocked; mend it first of all.")
            print("!" * 100, flush=True)
    return int(any(failed.values()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

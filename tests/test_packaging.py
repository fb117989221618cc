"""Wheel, source distribution and editable install hold the same packages, each file once. Needs no network."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGES = ("hf_hybrid", "modeling", "trainers")
ROOMS = ("cli", "data", "exporting", "run", "serving", "tasks", "teacher")
SYMLINKS = {"hf_hybrid/modeling", "hf_hybrid/recipes", "hf_hybrid/trainers"}
# Where each file of the tree is installed; the rest of the tree is not.
INSTALLED = {
    "hf_hybrid/": ("hf_hybrid/", (".py", "py.typed")),
    **{f"hf_hybrid/{room}/": (f"hf_hybrid/{room}/", (".py",)) for room in ROOMS},
    "hf_hybrid/embedded_teacher/": ("hf_hybrid/embedded_teacher/", ("",)),
    "modeling/": ("hf_hybrid/modeling/", (".py",)),
    "trainers/": ("hf_hybrid/trainers/", (".py",)),
    "trainers/scoring/": ("hf_hybrid/trainers/scoring/", (".py",)),
    "recipes/": ("hf_hybrid/recipes/", (".yaml",)),
    "recipes/accelerate/": ("hf_hybrid/recipes/accelerate/", (".yaml",)),
}
PROBE = """
import importlib.resources, importlib.metadata, json
import hf_hybrid, hf_hybrid.modeling, hf_hybrid.trainers
files = importlib.resources.files("hf_hybrid")
print(json.dumps({
    "modules": [hf_hybrid.__file__, hf_hybrid.modeling.__file__, hf_hybrid.trainers.__file__],
    "recipes": [str(file) for file in files.joinpath("recipes").iterdir() if file.name.endswith(".yaml")],
    "versions": [hf_hybrid.__version__, importlib.metadata.version("hf_hybrid")],
}))
"""

pytestmark = pytest.mark.skipif(not ROOT.joinpath(".git").exists(), reason="lists the tree's files with git")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Returns what `command` prints; its whole output is in the error where it fails."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=cwd, env={**inherited, "PIP_NO_INDEX": "1", **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def build(source: Path, output: Path, *kinds: str) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", output, source, cwd=output.parent)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of the files that are tracked or could be."""
    copy = tmp_path_factory.mktemp("tree")
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if os.path.lexists(ROOT / name):  # a tracked file may have been deleted
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def dist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the wheel and the source distribution of the tree."""
    output = tmp_path_factory.mktemp("build") / "dist"
    build(tree, output, "--sdist", "--wheel")
    return output


def wheel_files(dist: Path) -> list[str]:
    (wheel,) = dist.glob("*.whl")
    return sorted(name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/"))


def expected_files(tree: Path) -> list[str]:
    """Returns the paths inside a wheel of every file that belongs there, once each."""
    return sorted(
        f"{target}{file.name}"
        for source, (target, endings) in INSTALLED.items()
        for file in tree.joinpath(source).glob("*")
        if file.is_file() and file.name.endswith(endings)
    )


def test_wheel_holds_each_file_once(tree: Path, dist: Path) -> None:
    packaged = [name for name in wheel_files(dist) if ".dist-info/" not in name]
    assert packaged == expected_files(tree)
    assert {name.split("/")[0] for name in packaged} == {"hf_hybrid"}


def test_every_folder_with_modules_is_a_package_that_is_installed(tree: Path) -> None:
    """setup.py finds packages by their `__init__.py`: a module in a folder without one would be left out."""
    modules = {file.relative_to(tree) for name in PACKAGES for file in tree.glob(f"{name}/**/*.py")}
    own = {path for path in modules if f"{path.parts[0]}/{path.parts[1]}" not in SYMLINKS}
    assert {f"{path.parent}/" for path in own} == {
        name for name in INSTALLED if (tree / name / "__init__.py").exists()
    }


def test_wheel_has_the_licence_and_the_command(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        info = {name.split(".dist-info/")[1]: name for name in archive.namelist() if ".dist-info/" in name}
        assert "licenses/LICENSE" in info
        entry_points = archive.read(info["entry_points.txt"]).decode()
        assert "hf-hybrid = hf_hybrid.__main__:run_and_exit" in entry_points
        assert "[vllm.general_plugins]\nhf_hybrid = hf_hybrid.serving.vllm_plugin:register" in entry_points


def test_source_distribution_builds_the_same_wheel(tree: Path, dist: Path, tmp_path: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    assert {name for name in names if name.startswith(tuple(f"{link}/" for link in SYMLINKS))} == set()
    assert names >= {"LICENSE", "Makefile", "README.md", "constraints.txt", "tests/conftest.py"}
    (unpacked,) = tmp_path.iterdir()
    build(unpacked, tmp_path / "dist", "--wheel")
    assert wheel_files(tmp_path / "dist") == wheel_files(dist)


def check_import(python: str | Path, home: Path, tree: Path, elsewhere: Path, **environment: str) -> None:
    """Imports the package in a new process outside the tree, and checks that it comes from `home`."""
    elsewhere.mkdir()
    found = json.loads(run(python, "-c", PROBE, cwd=elsewhere, **environment).splitlines()[-1])
    locations = [Path(name).resolve() for name in found["modules"]]
    assert all(location.is_relative_to(home.resolve()) for location in locations), locations
    assert len(set(found["versions"])) == 1
    assert sorted(Path(name).name for name in found["recipes"]) == sorted(
        file.name for file in tree.joinpath("recipes").glob("*.yaml")
    )


def test_wheel_imports_from_elsewhere(tree: Path, dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    target = tmp_path / "target"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    check_import(sys.executable, target, tree, tmp_path / "elsewhere", PYTHONPATH=str(target))


def test_editable_install_imports_from_elsewhere(tree: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(tree, checkout, symlinks=True)
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    base = {"base": str(environment), "platbase": str(environment)}
    site_packages = Path(sysconfig.get_path("purelib", vars=base))
    # The libraries of the running environment, pip and setuptools among them, without its own .pth files.
    current = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    site_packages.joinpath("current_environment.pth").write_text("\n".join(sorted(current)), "utf-8")
    python = Path(sysconfig.get_path("scripts", vars=base)) / Path(sys.executable).name
    install = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable")
    run(python, *install, checkout, cwd=tmp_path)
    check_import(python, checkout, tree, tmp_path / "elsewhere")

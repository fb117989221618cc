"""What may import what, and the house rules that a parser can check. Reads the sources, imports none of them."""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports


ROOT = Path(__file__).parents[1]
# Small on purpose: what travels with a checkpoint is read by strangers before they trust it.
TRAVELLING_STDLIB = {
    "__future__",
    "collections",
    "contextlib",
    "copy",
    "dataclasses",
    "enum",
    "functools",
    "importlib",
    "inspect",
    "itertools",
    "math",
    "operator",
    "re",
    "sys",
    "types",
    "typing",
    "warnings",
}
TRAVELLING_LIBRARIES = {"torch", "transformers"}
COMMAND_LINE = {"cli", "__main__"}


def sources(folder: str) -> list[Path]:
    """Returns the Python files of a root folder, none of them through a symlink."""
    files = sorted(ROOT.joinpath(folder).rglob("*.py"))
    return [file for file in files if file.resolve() == ROOT.resolve() / file.relative_to(ROOT)]


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def package_of(file: Path) -> str:
    """Returns the dotted import name of the package that holds `file`."""
    parts = file.relative_to(ROOT).parent.parts
    return ".".join(parts if parts[0] == "hf_hybrid" else ("hf_hybrid", *parts))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), filename=name_of(file))


def at(file: Path, node: ast.AST, message: str) -> str:
    return f"{name_of(file)}:{getattr(node, 'lineno', 1)}: {message}"


def imports(tree: ast.Module, package: str) -> Iterator[tuple[ast.AST, str]]:
    """Yields each import of a module, wherever it stands, with the full dotted name that it asks for.

    `from ..modeling import HybridConfig` in `hf_hybrid.trainers` gives `hf_hybrid.modeling.HybridConfig`, and
    `importlib.import_module("fla.ops")` gives `fla.ops`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node, f"{prefix}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield node, target.value


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


MODELING, TRAINERS, PACKAGE = sources("modeling"), sources("trainers"), sources("hf_hybrid")
per_file = pytest.mark.parametrize("file", [*MODELING, *TRAINERS, *PACKAGE], ids=name_of)
per_travelling_file = pytest.mark.parametrize("file", MODELING, ids=name_of)


@pytest.mark.skipif(not ROOT.joinpath(".git").exists(), reason="a source distribution holds no symlinks")
def test_symlinks_show_the_installed_shape() -> None:
    links = {path.name: str(path.readlink()) for path in ROOT.joinpath("hf_hybrid").iterdir() if path.is_symlink()}
    assert links == {name: f"../{name}" for name in ("modeling", "recipes", "trainers")}


# --- modeling/: what travels with a checkpoint


def test_modeling_is_flat() -> None:
    assert [name_of(file) for file in MODELING if file.parent != ROOT / "modeling"] == []


@per_travelling_file
def test_travelling_file_imports_only_what_loads_anywhere(file: Path) -> None:
    allowed = TRAVELLING_LIBRARIES | TRAVELLING_STDLIB
    assert sys.stdlib_module_names >= TRAVELLING_STDLIB
    problems = []
    for node, name in imports(parse(file), package_of(file)):
        root = name.split(".")[0]
        if isinstance(node, ast.ImportFrom) and node.level:
            continue
        if root not in allowed | {"fla"}:
            problems.append(at(file, node, f"imports {name}; allowed are {', '.join(sorted(allowed))}, guarded fla"))
    # The library's own reading: what it finds outside `try` and `is_..._available()` must be installed to load.
    unguarded = set(get_imports(file)) - allowed
    if unguarded:
        problems.append(f"{name_of(file)}: loading asks the user to install {sorted(unguarded)}; guard the import")
    assert problems == []


@per_travelling_file
def test_travelling_file_uses_the_one_relative_form_that_is_copied(file: Path) -> None:
    problems, siblings = [], set()
    for node in ast.walk(parse(file)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        if node.level > 1 or node.module is None or "." in node.module or node.names[0].name == "*":
            problems.append(at(file, node, f"`{ast.unparse(node)}`: write `from .sibling import name`"))
        elif not file.with_name(f"{node.module}.py").exists():
            problems.append(at(file, node, f"there is no modeling/{node.module}.py"))
        else:
            siblings.add(node.module)
    assert problems == []
    # The library finds siblings with a regular expression over the whole text, strings included.
    assert set(get_relative_imports(file)) == siblings


@per_travelling_file
def test_travelling_strings_do_not_read_as_relative_imports(file: Path) -> None:
    texts = [node for node in ast.walk(parse(file)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = [
        at(file, node, "a line of this string starts as a relative import")
        for node in texts
        if re.search(r"^\s*(from|import)\s+\.", node.value, flags=re.MULTILINE)
    ]
    assert found == []


def test_the_card_and_the_registration_stay_here() -> None:
    """Prose about a model is not what a stranger should have to read before running its code."""
    travels = {Path(path).name for path in get_relative_import_files(ROOT / "modeling" / "modeling_hybrid.py")}
    stays = {file.name for file in MODELING} - travels - {"modeling_hybrid.py"}
    assert stays == {"__init__.py", "model_card.py"}


# --- one way: modeling <- trainers <- hf_hybrid <- cli


@pytest.mark.parametrize("file", TRAINERS, ids=name_of)
def test_trainers_know_modeling_only(file: Path) -> None:
    below = ("hf_hybrid.modeling", "hf_hybrid.trainers")
    problems = [
        at(file, node, f"imports {name}; trainers may import hf_hybrid.modeling and each other")
        for node, name in imports(parse(file), package_of(file))
        if is_inside(name, "hf_hybrid") and not any(is_inside(name, package) for package in below)
    ]
    assert problems == []


@pytest.mark.parametrize(
    "file", [file for file in PACKAGE if not COMMAND_LINE & {file.stem, file.parent.name}], ids=name_of
)
def test_nothing_imports_the_command_line(file: Path) -> None:
    problems = [
        at(file, node, f"imports {name}")
        for node, name in imports(parse(file), package_of(file))
        if any(is_inside(name, f"hf_hybrid.{part}") for part in COMMAND_LINE)
    ]
    assert problems == []


@per_file
def test_root_folders_are_imported_by_their_installed_names(file: Path) -> None:
    problems = [
        at(file, node, f"imports {name}; write hf_hybrid.{name}")
        for node, name in imports(parse(file), package_of(file))
        if name.split(".")[0] in ("modeling", "trainers")
    ]
    assert problems == []


# --- house rules


@per_file
def test_errors_are_raised_and_nothing_is_printed(file: Path) -> None:
    problems = []
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Assert):
            problems.append(at(file, node, "assert; raise ValueError with what was given, expected, and to do"))
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            problems.append(at(file, node, "bare except"))
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "print"
            and not COMMAND_LINE & {file.stem, file.parent.name}
        ):
            problems.append(at(file, node, "print; only the command line prints"))
    assert problems == []


def export_order(name: str) -> tuple[int, str]:
    """Sorts as ruff's RUF022 does: CONSTANTS, then Classes, then functions."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name


@per_file
def test_exported_names_are_sorted_and_unique(file: Path) -> None:
    for node in parse(file).body:
        if not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"):
            continue
        try:
            names = list(ast.literal_eval(node.value))
        except ValueError:
            continue  # computed, as in `__all__ = sorted(...)`
        assert names == sorted(set(names), key=export_order), f"{name_of(file)}: sort __all__, each name once"


# --- one owner of precision: trainers/precision.py

# What a variable that holds a language model is called here.
MODEL_NAMES = {"model", "teacher", "student", "hybrid"}
# Who runs one: in the precision that it is given, or, where it says so, in that of the weights.
RUNNERS = {
    "trainers/distillation.py": {"final_hidden_states"},
    "trainers/losses.py": {"check_logit_function"},
    "hf_hybrid/evaluation.py": {"layer_cache_bytes"},
    "hf_hybrid/synthetic.py": {"task_accuracy"},
    "hf_hybrid/demo.py": {"reload_elsewhere"},
    "hf_hybrid/serving/vllm_model.py": {"forward"},
    "hf_hybrid/teacher/probe.py": {"probe"},
}
# Functions for users, which measure finished models, may default to the dtype of the weights.
FOR_USERS = {
    "calibrate",
    "free_generation",
    "held_out_kl",
    "write_teacher_topk",
    "evaluate_model",
    "perplexity",
    "ruler",
    "run_tasks",
    "task_accuracy",
}


def runs_a_model(node: ast.AST) -> bool:
    """`model(...)`, `self.teacher(...)`, `x.base_model(...)`: a forward pass in the precision of whoever calls it."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    return name in MODEL_NAMES or name == "base_model"


def functions_around(tree: ast.Module, wanted: Callable[[ast.AST], bool]) -> Iterator[tuple[str, ast.AST]]:
    """Each node that is `wanted`, with the name of the outermost function or method that it stands in."""
    for top in ast.walk(tree):
        if isinstance(top, ast.Module | ast.ClassDef):
            for statement in top.body:
                if isinstance(statement, ast.ClassDef):
                    continue
                name = statement.name if isinstance(statement, ast.FunctionDef) else ""
                yield from ((name, node) for node in ast.walk(statement) if wanted(node))


@pytest.mark.parametrize("file", [*TRAINERS, *PACKAGE], ids=name_of)
def test_models_run_where_the_precision_is_given(file: Path) -> None:
    allowed = RUNNERS.get(name_of(file), set())
    problems = [
        at(file, node, f"{ast.unparse(node)[:60]} in {name}: run it by final_hidden_states, with a Precision")
        for name, node in functions_around(parse(file), runs_a_model)
        if name not in allowed
    ]
    assert problems == []


@pytest.mark.parametrize("file", [*TRAINERS, *PACKAGE], ids=name_of)
def test_nothing_but_the_precision_enters_autocast(file: Path) -> None:
    if name_of(file) == "trainers/precision.py":
        return
    problems = [
        at(file, node, f"{ast.unparse(node)}: trainers/precision.py decides that")
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Attribute)
        and node.attr in ("autocast", "is_autocast_enabled", "set_autocast_enabled")
        # What a Precision says may be read.
        and ast.unparse(node.value).split(".")[-1] != "precision"
    ]
    assert problems == []


@pytest.mark.parametrize("file", [*TRAINERS, *PACKAGE], ids=name_of)
def test_a_precision_cannot_be_forgotten(file: Path) -> None:
    problems = []
    for node in ast.walk(parse(file)):
        if not isinstance(node, ast.FunctionDef) or node.name in FOR_USERS:
            continue
        given = node.args
        optional = given.args[len(given.args) - len(given.defaults) :]
        optional += [arg for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default]
        if any(arg.arg == "precision" for arg in optional):
            problems.append(at(file, node, f"{node.name} has a default for precision"))
    assert problems == []


def test_these_find_what_they_look_for() -> None:
    tree = ast.parse("class A:\n    def f(self):\n        return self.teacher(x), y.base_model(x), model.eval()\n")
    assert [name for name, _ in functions_around(tree, runs_a_model)] == ["f", "f"]
    for file, names in RUNNERS.items():
        assert names == {name for name, _ in functions_around(parse(ROOT / file), runs_a_model)}, file


# --- no circles


def modules() -> dict[str, Path]:
    """Every module of the package by its import name."""
    found = {}
    for file in (*MODELING, *TRAINERS, *PACKAGE):
        own = [] if file.stem == "__init__" else [file.stem]
        found[".".join([package_of(file), *own])] = file
    return found


def imported_by(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that `file` imports, wherever in it, but for what type checkers alone read."""
    tree = parse(file)
    unread = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    names = {name for node, name in imports(tree, package_of(file)) if node not in unread}
    # `from .module import name` asks for `module.name`, `from . import module` for `module`.
    return {name if name in known else name.rpartition(".")[0] for name in names} & known.keys()


def test_imports_have_no_circles() -> None:
    known = modules()
    left = {name: imported_by(file, known) - {name} for name, file in known.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}, "these import one another"

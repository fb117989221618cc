"""What a teacher, a dataset or a checkpoint may do on the machine that loads it: nothing, unless it was allowed to.

The canary is a file that hostile code would write.
"""

import ast
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import save_teacher, save_texts, tiny_recipe
from teachers import tiny_teacher, tokens
from test_architecture import MODELING, PACKAGE, ROOT, TRAINERS, TRAVELLING_LIBRARIES, TRAVELLING_STDLIB, name_of

import hf_hybrid as hh
from hf_hybrid.data.config import DataConfig
from hf_hybrid.data.rows import first_rows
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import run_recipe
from hf_hybrid.teacher.embedded import embedded_tokenizer
from hf_hybrid.teacher.loading import load_model, load_pair, load_tokenizer


# --- the code that travels: no file, no socket, no process

FORBIDDEN_NAMES = {"open", "exec", "eval", "compile", "__import__", "input", "breakpoint", "globals", "locals"}
FORBIDDEN_ATTRIBUTES = {
    *("load", "save", "hub", "load_library", "from_file", "fromfile", "tofile", "memmap", "package", "cpp_extension"),
    *("system", "popen", "Popen", "fork", "spawn", "environ", "putenv", "urlopen", "connect", "socket", "request"),
    *("write_text", "write_bytes", "read_text", "read_bytes", "unlink", "mkdir", "makedirs", "rmtree", "rename"),
    *(
        "getsource",
        "currentframe",
        "f_back",
        "meta_path",
        "path_hooks",
        "settrace",
        "__builtins__",
        "__subclasses__",
        "__globals__",
        "f_globals",
    ),
}
# The card that a push writes: through the library's own class, into the folder that the library is about to upload.
# A teacher's card is read through the library's cache, for its licence.
ALLOWED_IN = {
    "model_card.py": {"load": "ModelCard.load", "save": "ModelCard(plain_card(model, repo_id, card.data.tags)).save"}
}
FILES_OF_THE_LIBRARY = {"cached_file", "cached_files", "ModelCard", "hf_hub_download", "snapshot_download"}


def forbidden(source: str, file_name: str) -> list[str]:
    """What in the source of a travelling file could reach a file, a socket, a process, or code from elsewhere."""
    found = []
    allowed = {*TRAVELLING_STDLIB, *TRAVELLING_LIBRARIES} - {"sys"}
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node) if isinstance(node, ast.expr) else ""
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "" if node.level else node.module or ""
            names = [] if node.level else [module]
            taken = {alias.name for alias in node.names}
            found += [f"{name} of {module}" for name in taken & (FORBIDDEN_ATTRIBUTES | FORBIDDEN_NAMES)]
            if file_name != "model_card.py":
                found += [f"{name} of {module}" for name in taken & FILES_OF_THE_LIBRARY]
        else:
            names = []
        found += [f"import {name}" for name in names if name.split(".")[0] not in allowed]
        found += [f"import {name}" for name in names if "dynamic_module" in name or "importlib" in name]
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(text)
        elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES:
            if ALLOWED_IN.get(file_name, {}).get(node.attr) != text:
                found.append(text)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("getattr", "attrgetter"):
            strings = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            found += [text for _ in strings & (FORBIDDEN_ATTRIBUTES | FORBIDDEN_NAMES)]
    if file_name == "kernels.py":
        found = [entry for entry in found if entry not in ("import importlib", *_FINDERS)]
        found += [text for text in _imported(source) if not text.startswith(_OF_FLA)]
    return found


# As the source has them: nothing but fla's operators, its norm with a gate, and its convolution.
_OF_FLA = ("'fla.ops.", "f'fla.ops.", "'fla.modules.norm.", "'fla.modules.causal_conv1d'")
_FINDERS = ("import importlib.metadata", "import importlib.util")
_HARMLESS = ("importlib.util.find_spec", "importlib.metadata.version")


def _imported(source: str) -> list[str]:
    """The arguments of `importlib.import_module`, and any other use of importlib than to ask what is installed."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called == "importlib.import_module":
            texts.append(ast.unparse(node.args[0]))
        elif re.fullmatch(r"importlib(\.\w+)*", called) and called not in _HARMLESS:
            texts.append(ast.unparse(node))
    return texts


@pytest.mark.parametrize("file", MODELING, ids=name_of)
def test_travelling_code_reaches_nothing(file: Path) -> None:
    assert forbidden(file.read_text("utf-8"), file.name) == []


def test_a_checkpoints_code_is_ours_and_reaches_nothing(tmp_path: Path) -> None:
    hh.convert(tiny_teacher(), [1]).save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.py"))
    assert {"modeling_hybrid.py", "configuration_hybrid.py", "kernels.py"} <= {file.name for file in files}
    for file in files:
        assert file.read_bytes() == (ROOT / "modeling" / file.name).read_bytes()
        assert forbidden(file.read_text("utf-8"), file.name) == []
    for file in tmp_path.iterdir():
        assert file.suffix in (".py", ".json", ".safetensors"), file.name


@pytest.mark.parametrize(
    "source",
    [
        "open('x', 'w')",
        "import os",
        "import os.path as p",
        "from os import system",
        "import socket",
        "import subprocess",
        "import pickle",
        "import ctypes",
        "from pathlib import Path",
        "from urllib.request import urlopen",
        "import huggingface_hub",
        "eval('1 + 1')",
        "exec('x = 1')",
        "run = exec",
        "compile('1', '', 'eval')",
        "__import__('os')",
        "import importlib\nimportlib.import_module('os')",
        "import importlib.util",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.save(1, 'x')",
        "import torch\ntorch.hub.load_state_dict_from_url('x')",
        "import torch\ngetattr(torch, 'load')('x')",
        "from torch import load",
        "from torch.utils.cpp_extension import load",
        "from transformers.utils.hub import cached_file",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
        "import sys\nsys.modules['os']",
        "().__class__.__base__.__subclasses__()",
        "(lambda: 0).__globals__['x']",
    ],
)
def test_the_reader_finds_what_it_looks_for(source: str) -> None:
    assert forbidden(source, "delta_rule.py") != []


@pytest.mark.parametrize(
    ("source", "file_name"),
    [
        ("import importlib\nimportlib.import_module('os')", "kernels.py"),
        ("import importlib\nimportlib.import_module(name)", "kernels.py"),
        ("import importlib\nimportlib.reload(torch)", "kernels.py"),
        ("ModelCard('x').save('/etc/passwd')", "model_card.py"),
        ("torch.load('x')", "model_card.py"),
    ],
)
def test_the_exceptions_are_narrow(source: str, file_name: str) -> None:
    assert forbidden(source, file_name) != []


WATCH = """
import sys
# What the interpreter itself reports of files, sockets and processes while code of the checkpoint is on the stack.
seen = []
def watch(event, arguments):
    kinds = ("open", "socket.", "subprocess.", "os.", "shutil.", "urllib.", "ctypes.")
    if not watching or not event.startswith(kinds):
        return
    frame, ours, importing = sys._getframe(1), False, False
    while frame is not None:
        ours |= "transformers_modules" in frame.f_code.co_filename
        importing |= "importlib" in frame.f_code.co_filename
        frame = frame.f_back
    # The library reads the source of a class, the teacher's too, to see which attention and experts it can have.
    sources = ("transformers_modules", "transformers/models/")
    own_source = event == "open" and arguments[1] == "r" and any(part in str(arguments[0]) for part in sources)
    if ours and not importing and not own_source:
        seen.append((event, str(arguments)[:200]))
watching = False
sys.addaudithook(watch)
import torch
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 43)[None]
watching = True
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
model(ids, labels=ids).loss.backward()
model.generate(ids, max_new_tokens=4, do_sample=False)
model.set_full_attention_layers([])
model.save_pretrained("again")
assert type(model).__module__.startswith("transformers_modules")
exec(compile("def probe():\\n    open('probe', 'w')\\nprobe()", "transformers_modules/probe.py", "exec"))
print(seen)
"""


def test_a_checkpoint_at_work_opens_nothing(tmp_path: Path) -> None:
    hh.convert(tiny_teacher(), [1]).save_pretrained(tmp_path / "model")
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", WATCH], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [(event, arguments)] = ast.literal_eval(done.stdout)  # the probe, which shows that the watch is awake
    assert event == "open" and "probe" in arguments


# --- nothing is unpickled


class Canary:
    """Unpickled, it writes the file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


@pytest.mark.parametrize("file", [*TRAINERS, *PACKAGE], ids=name_of)
def test_our_code_unpickles_nothing(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {name.split(".")[0] for name in names} & {"pickle", "dill", "cloudpickle", "joblib", "marshal"}
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called == "torch.load":
            assert keywords.get("weights_only") == "True", ast.unparse(node)
        if called == "AutoModelForCausalLM.from_pretrained":
            assert keywords.get("use_safetensors") == "True", ast.unparse(node)
        assert called not in ("yaml.load", "yaml.unsafe_load", "pandas.read_pickle"), ast.unparse(node)
        assert keywords.get("allow_pickle") != "True", ast.unparse(node)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_a_teacher_of_pickles_is_refused(name: str, tmp_path: Path) -> None:
    teacher, canary = save_teacher(tmp_path / "teacher"), tmp_path / "canary"
    (teacher / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Canary(canary)}, teacher / name)
    if name != "pytorch_model.bin":
        (teacher / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    for load in (load_pair, load_model, lambda folder: hh.convert(folder, [1])):
        with pytest.raises(ValueError, match="has no safetensors weights; a pytorch_model.bin is a pickle, which can"):
            load(str(teacher))
    assert not canary.exists()
    with open(teacher / "own.pkl", "wb") as stream:  # the canary sings where it is let
        pickle.dump(Canary(canary), stream)
    with open(teacher / "own.pkl", "rb") as stream:
        pickle.load(stream).close()
    assert canary.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_hostile_training_checkpoint_is_not_unpickled(name: str, tmp_path: Path) -> None:
    """The Trainer's own files are torch's; it reads them with `weights_only=True`."""
    teacher, canary = tiny_teacher(), tmp_path / "canary"
    rows = Dataset.from_dict({"input_ids": tokens(4, 16).tolist()})

    def trainer() -> hh.AlignmentTrainer:
        student = hh.convert(teacher, [])
        options = {"per_device_train_batch_size": 2, "save_steps": 1, "max_steps": 2, "use_cpu": True}
        args = hh.AlignmentConfig(str(tmp_path / "out"), report_to="none", disable_tqdm=True, **options)
        return hh.AlignmentTrainer(model=student, teacher=teacher, args=args, train_dataset=rows)

    trainer().train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert (checkpoint / name).is_file()
    torch.save({"state": Canary(canary)}, checkpoint / name)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer().train(resume_from_checkpoint=str(checkpoint))
    assert not canary.exists()


# --- code of teachers and datasets


def hostile_teacher(folder: Path, canary: Path) -> Path:
    """A teacher whose code writes the canary, and works."""
    save_teacher(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "own.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "own.py").write_text(
        f"""
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
with open({str(canary)!r}, "w"):
    pass
class C(Qwen3Config):
    model_type = "homemade"
class M(Qwen3ForCausalLM):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
"""
    )
    return folder


def test_a_teachers_code_runs_only_where_it_is_allowed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    teacher = str(hostile_teacher(tmp_path / "teacher", canary))
    recipe = Recipe.from_dict(tiny_recipe(teacher, save_texts(tmp_path / "texts")))
    refusals: list[Any] = [
        lambda: load_pair(teacher),
        lambda: load_model(teacher),
        lambda: load_tokenizer(teacher),
        lambda: hh.convert(teacher, [1]),
        lambda: run_recipe(recipe, tmp_path / "run"),
    ]
    for refuse in refusals:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            refuse()
        assert not canary.exists()
    load_model(teacher, trust_remote_code=True)
    assert canary.exists()
    canary.unlink()
    load_tokenizer(teacher, trust_remote_code=True)


def test_a_datasets_code_never_runs(tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "texts"
    folder.mkdir()
    (folder / "texts.py").write_text(f"open({str(canary)!r}, 'w')\n")
    for name in (folder, folder / "texts.py"):
        with pytest.raises(ValueError, match=r"did not load: Dataset scripts are no longer supported"):
            first_rows(DataConfig(dataset=str(name), streaming=False, block_size=16), embedded_tokenizer(), 1)
    assert not canary.exists()

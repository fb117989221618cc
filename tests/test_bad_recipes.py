"""Bad recipes, texts, folders and options: each gets one sentence that names it, before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import LINES, tiny_recipe

from hf_hybrid.cli import main
from hf_hybrid.run import inputs
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import run_recipe
from hf_hybrid.teacher import loading


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a model was loaded first")

    for module, name in ((inputs, "load_pair"), (loading, "load_pair"), (loading, "load_model")):
        monkeypatch.setattr(module, name, load)


def said(capsys: pytest.CaptureFixture, *arguments: Any) -> str:
    """The one line that a command says on stderr, exit code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("hf-hybrid: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.fixture(autouse=True)
def in_a_folder_with_texts(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts that [`recipe_text`] names are there, so that what else is wrong with a recipe is what is told."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "texts").mkdir()
    for path in (folder / "texts" / "a.txt", folder / "a"):
        path.write_text("a text\n")
    monkeypatch.chdir(folder)


def recipe_text(**changes: Any) -> str:
    """The tiny recipe as YAML, with `align__tokens="3"` for `align: {tokens: 3}`; values are YAML themselves."""
    recipe = tiny_recipe("teacher", "texts")
    for key, value in changes.items():
        *parents, last = key.split("__")
        place: Any = recipe
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = yaml.safe_load(value)
    return yaml.safe_dump(recipe)


WRONG_VALUES = {
    # what no type fits
    "training__bf16=yes please": "training.bf16='yes please' is not true or false",
    "training__bf16=1": "training.bf16=1 is not true or false",
    "training__max_grad_norm=abc": "training.max_grad_norm='abc' is not a number",
    "training__max_grad_norm=true": "training.max_grad_norm=True is not a number",
    "training__max_grad_norm=.nan": "training.max_grad_norm=nan is not finite",
    "training__weight_decay=-1": "training.weight_decay=-1.0 is out of range; pass a number from 0",
    "training__adam_beta1=1.5": "training.adam_beta1=1.5 is out of range",
    "training__adam_epsilon=[1e-8]": "training.adam_epsilon=['1e-8'] is not a number",
    "training__learning_rate_groups=all": "training.learning_rate_groups='all' is unknown; choose one of ['mixers',",
    "training__optim=zigzag": "training.optim='zigzag' is unknown; choose one of ['adamw_torch'",
    "training__bf17=true": "unknown key in training: 'bf17'; it takes fields of TrainingArg",
    "training__kernel=fla": "unknown key in training: 'kernel'; it takes fields of TrainingArguments.",
    "training__lr_scheduler_type=linear": "training.lr_scheduler_type is set from the recipe's own stages",
    "training=[bf16]": "training=['bf16'] is not keys with values",
    "training__fp16=true\ntraining__bf16=true": "training.bf16 and training.fp16 are both true",
    "execution__max_grad_norm=1": "execution.max_grad_norm decides the result; set it in training",
    "execution__kernel=cuda": "execution.kernel='cuda' is unknown; choose one of ['auto', 'torch', 'fla']",
    "execution__logging_steps=0": "execution.logging_steps=0.0 is out of range",
    "execution__logging_steps=often": "execution.logging_steps='often' is not a number",
    "execution__dataloader_num_workers=-1": "execution.dataloader_num_workers=-1 is out of range",
    "execution__dataloader_num_workers=1.5": "execution.dataloader_num_workers=1.5 is not a whole number",
    "execution__gradient_checkpointing=maybe": "execution.gradient_checkpointing='maybe' is not true or false",
    "execution__micro_batch_size={algin: 2}": "unknown key execution.micro_batch_size.algin; did you mean",
    "execution__micro_batch_size=0": "execution.micro_batch_size=0 is too small",
    "execution__micro_batch_size={distill: 3}": "distill.micro_batch_size=3 does not divide batch_size=4",
    "execution__micro_batch_size={align: 4}": "align.micro_batch_size=2 and execution.micro_batch_size.align=4 differ",
    "execution__use_cpu=true": "training.use_cpu and execution.use_cpu are both set",
    "execution__auto_find_batch_size=true": "execution.auto_find_batch_size is set from the recipe's own stages",
    "execution__kernle=fla": "unknown key in execution: 'kernle'; it takes fields of TrainingArg",
    "training__lr_scheduler_kwargs=abc": "training.lr_scheduler_kwargs='abc' is not keys with values",
    "training__train_sampling_strategy=zig": "training.train_sampling_strategy='zig' is unknown; choose one of ['rand",
    "execution__log_level=loud": "execution.log_level='loud' is unknown; choose one of ['detail', 'debug'",
    "execution__logging_strategy=weekly": "execution.logging_strategy='weekly' is unknown; choose one of ['no', 'ste",
    "align__lr_scheduler_type=zigzag": "align.lr_scheduler_type='zigzag' is unknown; choose one of ['stable-cos",
    "align__lr_scheduler_type=reduce_lr_on_plateau": "align.lr_scheduler_type='reduce_lr_on_plateau' is unknown",
    "align__lr_scheduler_type=warmup_stable_decay": "align.lr_scheduler_type='warmup_stable_decay' needs more than it",
    "align__learning_rate=.inf": "align.learning_rate=inf is not finite",
    "align__learning_rate=fast": "align.learning_rate='fast' is not a number",
    "align__learning_rate=true": "align.learning_rate=True is not a number",
    "align__tokens=.nan": "align.tokens=nan is not finite",
    "align__tokens=1.5": "align.tokens=1.5 is not a whole number",
    "align__tokens=[1]": "align.tokens=[1] is not a whole number",
    "align__tokens=null": "align.tokens=None is not a whole number",
    "align__batch_size=0": "align.batch_size=0 is too small",
    "align__batch_size=true": "align.batch_size=True is not a whole number",
    "align__checkpoints=0": "align.checkpoints=0 is too small",
    "align__warmup_steps=.inf": "align.warmup_steps=inf is not finite",
    "align__warmup_steps=2.5": "align.warmup_steps=2.5 is no warm-up",
    "align__block_size=1": "align.block_size=1 makes rows of one token",
    "align__block_size=48": "align.block_size=48 does not divide data.block_size=64",
    "align__final_learning_rate=-1\nalign__lr_scheduler_type=cosine": "align.final_learning_rate=-1.0 is no learning",
    "align=5": "align is 5; expected keys with values",
    "align__tokenz=5": "unknown key align.tokenz; did you mean align.tokens?",
    "score__method=magic": "score.method='magic' is unknown",
    "score__method=[ga-s2]": "score.method=['ga-s2'] is not text",
    "score__options=fast": "score.options='fast' is not keys with values",
    "select__k=-1": "select.k=-1",
    "select__k=two": "select.k='two' is not a whole number",
    "select={fraction: .nan}": "select.fraction=nan is not finite",
    "select={layers: [1, x]}": "select.layers[1]='x' is not a whole number",
    "select={layers: [0.5]}": "select.layers[0]=0.5 is not a whole number",
    "select={layers: [1, 1]}": "select.layers",
    "select={cache_bytes: 0, context: 8}": "select.cache_bytes=0",
    "data__block_size=1": "data.block_size=1 makes rows of one token",
    "data__block_size=-64": "data.block_size=-64 is too small",
    "data__held_out_rows=0": "data.held_out_rows=0 is too small",
    "data__report_rows=1e999": "data.report_rows='1e999' is not finite",
    "data__text_files=5": "data.text_files=5 is not a list",
    "data__text_files=[a.txt, 5]": "data.text_files[1]=5 is not text",
    "data__text_files=[]": "data gives no source of text",
    "data__text_column=''": "data has text_column=''; give the column",
    "data__subset=en": "data has subset='en', which is a part of a dataset, and no dataset; leave it out",
    "data__split=test": "data has split='test', which is a part of a dataset",
    "data__streaming=sometimes": "data.streaming='sometimes' is not true or false",
    "data={block_size: 64, sources: [{text_files: [a], weight: -1}]}": "data.sources has weight=-1",
    "data={block_size: 64, sources: [{text_files: [a], weight: heavy}]}": "data.sources[0].weight='heavy' is not a",
    "data={block_size: 64, sources: {text_files: [a]}}": "data.sources={'text_files': ['a']} is not a list",
    "data={block_size: 64, dataset: [a]}": "data.dataset=['a'] is not text",
    "data={block_size: 64, dataset: a, split: ''}": "data has split=''; give a name",
    "teacher=5": "teacher=5 is not text",
    "teacher=''": "teacher is empty; give a Hub id, a folder",
    "revision=1234567": "revision=1234567 is not text",
    "dtype=float8": "dtype='float8' is unknown",
    "mixer=[gated_deltanet]": "mixer=['gated_deltanet'] is not text",
    "mixer_options=rope": "mixer_options='rope' is not keys with values",
    "seed=-1": "seed=-1 is no seed",
    "seed=99999999999": "seed=99999999999 is no seed",
    "seed=zero": "seed='zero' is not a whole number",
    "trust_remote_code='true'": "trust_remote_code='true' is not true or false",
}


@pytest.mark.parametrize("given", WRONG_VALUES)
def test_wrong_values(given: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(**dict(line.split("=", 1) for line in given.split("\n"))))
    line = said(capsys, "run", path, "--output", tmp_path / "run")
    assert line.startswith(f"hf-hybrid: {path}: {WRONG_VALUES[given]}")
    assert not (tmp_path / "run").exists()


UNUSABLE = {
    "training__optim_args=zz": "training.optim cannot be used as it is: not enough values to unpack",
    "execution__report_to=zigzag": "execution.report_to cannot be used as it is: zigzag is not supported",
    "execution__dataloader_prefetch_factor=2": "training and execution do not hold together: --dataloader_prefetch",
    "execution__debug=zig": "training and execution do not hold together: zig is not a valid DebugOption",
}


@pytest.mark.parametrize("given", UNUSABLE)
def test_what_the_library_refuses(given: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_text(**dict([given.split("=", 1)])))
    assert UNUSABLE[given] in said(capsys, "run", tmp_path / "recipe.yaml", "--output", tmp_path / "run")


BROKEN_FILES = {
    "": "the recipe is None; expected keys with values",
    "- a\n- b\n": "the recipe is ['a', 'b']; expected keys with values",
    "just words": "the recipe is 'just words'",
    "a: [": "it is not YAML: while parsing a flow node",
    "teacher: x\n\talign: 5": "it is not YAML: while scanning",
    "teacher: !!python/object:os.system x": "it is not YAML: could not determine a constructor",
    "teacher: a\nseed: 1\nteacher: b": "key teacher stands twice, in lines 1 and 3; keep one of them",
    "align: {tokens: 1, tokens: 2}": "key tokens stands twice, in lines 1 and 1",
    "data:\n  sources:\n  - weight: 1\n    weight: 2": "key weight stands twice, in lines 3 and 4",
    "training: {bf16: true}\nalign: {tokens: 5}\ntraining: {}": "key training stands twice, in lines 1 and 3",
    "? [a, b]\n: 5": "line 1 has a list or a mapping as a key",
    "teacher: x": "data is missing; set it",
    "5: 6": "unknown key 5; known are",
}


@pytest.mark.parametrize("text", BROKEN_FILES)
def test_broken_files(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    line = said(capsys, "run", path, "--output", tmp_path / "run")
    assert line.startswith(f"hf-hybrid: {path}: {BROKEN_FILES[text]}")


def test_yaml_merges_may_override(tmp_path: Path) -> None:
    """What `<<` brings in is meant to be written over: no key stands twice."""
    stage = "{batch_size: 4, tokens: 2048}"
    text = recipe_text().replace("align:\n", f"align:\n  <<: {stage}\n", 1)
    (tmp_path / "recipe.yaml").write_text(text)
    assert Recipe.load(tmp_path / "recipe.yaml") == Recipe.from_dict(yaml.safe_load(recipe_text()))


def test_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "bytes.yaml: it is not YAML: 'utf-8' codec" in said(capsys, "run", tmp_path / "bytes.yaml", "--output", "x")
    assert "there is no recipe" in said(capsys, "run", tmp_path, "--output", "x")
    assert "there is no recipe" in said(capsys, "run", tmp_path / "nothing.yaml", "--output", "x")


TEXTS: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "is empty; give one that has text"),
    "blank.txt": (b" \n\t\n", "is empty; give one that has text"),
    "model.bin": (b"ab\x00\x01cd", "model.bin is not UTF-8 text (it holds zero bytes); leave it out of text_files"),
    "latin.txt": (b"caf\xe9 au lait\n", "latin.txt is not UTF-8 text (invalid continuation byte)"),
    "rows.parquet": (b"PAR1\x15\x00\x15\xff", "rows.parquet is not UTF-8 text"),
    "broken.jsonl": (b'{"text": \n', "broken.jsonl, line 1: not JSON"),
    "other.jsonl": (b'{"body": "a"}\n', "line 1 has no column 'text'; it has ['body']. Set text_column"),
    "number.jsonl": (b'{"text": 5}\n', "line 1: column 'text' holds a int, not text"),
    "list.jsonl": (b'["text"]\n', "line 1 has no column 'text'"),
    "zeros.jsonl": (b'{"text": "a\x00"}\n', "zeros.jsonl is not UTF-8 text (it holds zero bytes)"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    content, message = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "recipe.yaml").write_text(recipe_text(data__text_files=json.dumps([str(tmp_path / name)])))
    line = said(capsys, "run", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert str(tmp_path / name) in line and message in line


def test_what_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "texts").mkdir()
    for given, message in {
        "texts": f"is a folder; name the files in it, as in '{tmp_path}/texts/*.txt'",
        "text*": "is a folder; name the files in it",
        "nothing/*.txt": "matches no file; give a path or a pattern",
    }.items():
        (tmp_path / "recipe.yaml").write_text(recipe_text(data__text_files=json.dumps([str(tmp_path / given)])))
        line = said(capsys, "run", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
        assert f"text_files: '{tmp_path / given}' {message}" in line


def test_a_text_that_turns_into_bytes_later(tmp_path: Path) -> None:
    from hf_hybrid.data.config import DataConfig
    from hf_hybrid.data.text import open_text

    (tmp_path / "a.txt").write_bytes("".join(LINES).encode() * 20 + b"\n\x00\n")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 text \(it holds zero bytes\)"):
        list(open_text(DataConfig(text_files=[str(tmp_path / "a.txt")]), 0))


def test_output_folders(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    (tmp_path / "file").write_text("a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(teacher=str(teacher)))
    for place, message in {
        tmp_path / "file": "file is a file; choose another output folder",
        tmp_path / "file" / "run": "file is a file; choose another output folder",
        teacher / "run": f"lies in the teacher's folder {teacher}; choose an output folder elsewhere",
        tmp_path / "full": "no run and not empty (it holds 'thesis.txt')",
        "": "the output folder has no name",
    }.items():
        assert message in said(capsys, "run", recipe, "--output", place)
        if place != tmp_path / "full":
            score = ["score", str(teacher), "--data-files", "a.txt", "--output", place]
            assert message in said(capsys, *score)
            if place != "":
                line = said(capsys, "convert", teacher, "--full-attention-layers", "none", "--output", place)
                assert message in line or "exists and is not an empty folder" in line
    assert "is a file" in said(capsys, "demo", "--output", tmp_path / "file")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert f"{tmp_path}: permission denied. Choose another output folder" in said(
        capsys, "run", recipe, "--output", tmp_path / "new"
    )


OPTIONS = {
    "score embedded --k -1": "--k -1 is too small; pass at least 0",
    "score embedded --fraction 7": "--fraction 7.0 is out of range; pass a number of at least 0 and at most 1",
    "score embedded --fraction nan": "--fraction nan is out of range",
    "score embedded --tokens-per-layer 0": "score.tokens_per_layer=0 is too small; pass at least 1",
    "score embedded --align-tokens -5": "align.tokens=-5 is too small",
    "score embedded --cache-bytes 0 --context 9": "select.cache_bytes=0 is too small",
    "score embedded --cache-bytes 9 --context 0": "select.context=0 is no sequence",
    "score embedded --seed -1": "--seed -1 is too small",
    "score embedded --block-size 1": "--block-size 1 is too small; pass at least 2",
    "score embedded --rows 0": "--rows 0 is too small",
    "score embedded --method magic": "--method='magic' is unknown",
    "score embedded --option rounds": "--option 'rounds' is no NAME=VALUE",
    "score embedded --k 2 --fraction 0.5": "select gives k and fraction",
    "score embedded --layers 0-2": "--layers needs --recipe",
    "score embedded --from align --layers 0": "--from makes a stage again for all layers",
    "score embedded --subset en": "--subset needs --dataset",
    "score embedded --from nothing": "start_from='nothing' is no stage",
    "score": "score needs a TEACHER or a --recipe",
    "score x": "scoring x needs text to measure on",
    "run demo --stop-after scores": "stop_after='scores' is no stage",
    "run demo --from everything": "start_from='everything' is no stage",
    "evaluate x --batch-size 0": "--batch-size 0 is too small; pass at least 1",
    "evaluate x --rows -3 --data-files a": "--rows -3 is too small",
    "evaluate x --block-size 0 --data-files a": "--block-size 0 is too small",
    "evaluate x --rows 5": "--rows was given without a text to measure on",
    "demo --seed -1": "--seed -1 is too small; pass at least 0 and at most 4294967295",
    "convert x --full-attention-layers two": "--full-attention-layers 'two' is no list of layers",
    "convert x --full-attention-layers 3-1": "--full-attention-layers '3-1' is no list of layers",
}


@pytest.mark.parametrize("given", OPTIONS)
def test_options(given: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = given.split()
    if arguments[0] != "evaluate":
        arguments += ["--output", "out"]
    assert OPTIONS[given] in said(capsys, *arguments)


def test_rows_longer_than_the_teacher_s_positions(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # here the teacher is loaded
    for changes, message in (
        (
            {"data": {"text_files": [f"{sources[1]}/*"], "block_size": 2048}},
            "data.block_size=2048 makes rows for score",
        ),
        (
            {"align": {"tokens": 10**6, "block_size": 2048}},
            "align.block_size=2048 makes rows for align that are longer",
        ),
    ):
        recipe = tiny_recipe(*sources, **changes)
        recipe["data"] |= {"block_size": 2048}
        with pytest.raises(ValueError, match=message):
            run_recipe(Recipe.from_dict(recipe), tmp_path / "run")

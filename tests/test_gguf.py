"""A teacher may be a GGUF file: its numbers exactly, its tokenizer, a word where the library would pass over one."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf_files import CHAT, VOCABULARY, tokenizer_fields, write_gguf
from hub_server import LoopbackHub, Repo
from runs import LINES, tiny_recipe, tiny_tokenizer
from teachers import tiny_teacher, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_hybrid as hh
from hf_hybrid import cli
from hf_hybrid.teacher.gguf_file import gguf_origin, parsed_once, read_gguf
from hf_hybrid.teacher.loading import empty_teacher, load_model, load_pair, load_teacher, load_tokenizer


pytestmark = pytest.mark.filterwarnings("ignore:.*its weights are those of the GGUF file")
TEXTS = ["".join(LINES[:3]), "\n\n1. First\n    12 y\n", "x = 2023\t# naïve 中 Ω ½ ²", "  <eos>10"]


def llama(**changes: Any) -> Any:
    return tiny_teacher("llama", **{"vocab_size": VOCABULARY, "eos_token_id": 0} | changes)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_1])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 1}])
def test_the_numbers_are_those_of_the_file(kind: Type, changes: dict[str, Any], folder: Path) -> None:
    source = llama(rope_theta=1e5, rms_norm_eps=1e-6, **changes)
    meant = write_gguf(Path("a.gguf"), source, kind)
    with pytest.warns(UserWarning, match=rf"a.gguf: .* of the GGUF file a.gguf \({kind.name}[,;] .*sha256"):
        teacher = load_teacher("a.gguf")
    assert type(teacher) is type(source) and teacher.dtype == torch.float32 and not teacher.training
    own = teacher.state_dict()
    assert own.keys() == source.state_dict().keys()
    for name, numbers in meant.items():
        assert torch.equal(own[name], numbers), name
    tied = teacher.lm_head.weight is teacher.model.embed_tokens.weight
    assert tied == source.config.tie_word_embeddings
    source.load_state_dict(
        {**meant, "lm_head.weight": meant.get("lm_head.weight", meant["model.embed_tokens.weight"])}
    )
    given = tokens(2, 24)
    assert torch.equal(teacher(given).logits, source(given).logits)
    assert teacher.generation_config.eos_token_id == 0
    assert load_teacher("a.gguf", dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose metadata gguf has gone through."""
    went_through: list[Path] = []
    build = GGUFReader._build_fields

    def counted(self: GGUFReader, *args: Any) -> int:
        went_through.append(Path(self.data.filename))
        return build(self, *args)

    monkeypatch.setattr(GGUFReader, "_build_fields", counted)
    return went_through


def test_a_load_parses_the_file_once(folder: Path, parses: list[Path]) -> None:
    write_gguf(Path("a.gguf"), llama(), Type.Q8_0)
    open_file = GGUFReader.__init__
    for load in (load_pair, load_teacher, load_tokenizer, load_model, empty_teacher):
        parses.clear()
        load("a.gguf")
        assert len(parses) == 1, load
        assert GGUFReader.__init__ is open_file
    with pytest.raises(ValueError, match="is damaged"), parsed_once():
        Path("b.gguf").write_bytes(Path("a.gguf").read_bytes()[:1000])
        read_gguf(Path("b.gguf"))
    assert GGUFReader.__init__ is open_file


def test_what_was_parsed_is_of_that_file_as_it_was(folder: Path, parses: list[Path]) -> None:
    for name, layers in (("a.gguf", 2), ("b.gguf", 3), ("c.gguf", 3)):
        write_gguf(Path(name), llama(num_hidden_layers=layers))

    def layers_of(name: str) -> int:
        return int(read_gguf(Path(name)).fields["llama.block_count"].contents())

    with parsed_once(), parsed_once():
        assert [layers_of(name) for name in ("a.gguf", "b.gguf", "a.gguf", "b.gguf")] == [2, 3, 2, 3]
        assert len(parses) == 2
        Path("c.gguf").replace("a.gguf")
        assert layers_of("a.gguf") == 3 and len(parses) == 3
        GGUFReader("a.gguf", "c").data[-1] += 1  # a copy to write on is nobody else's
        assert len(parses) == 4 and not read_gguf(Path("a.gguf")).data.flags.writeable
    assert layers_of("a.gguf") == 3 and len(parses) == 5


def test_teacher_and_hybrid_are_plain_models(folder: Path) -> None:
    write_gguf(Path("a.gguf"), llama(), Type.Q8_0)
    teacher, tokenizer = load_pair("a.gguf")
    copy = hh.convert("a.gguf", range(4))
    given = tokens(2, 24)
    assert torch.equal(copy(given).logits, teacher(given).logits)
    for student in (hh.convert("a.gguf", [1]), hh.convert(teacher, [1])):
        assert student.conversion_report.logit_difference == 0
        assert "those of the GGUF file a.gguf (Q8_0, F32; sha256 " in str(student.conversion_report)
    for model in (teacher, student):
        model.save_pretrained("saved")
        tokenizer.save_pretrained("saved")
        loaded = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
        assert torch.equal(loaded(given).logits, model(given).logits)
        assert "quantization" not in Path("saved/config.json").read_text()
        shutil.rmtree("saved")


def test_the_tokenizer_is_the_one_in_the_file(folder: Path) -> None:
    write_gguf(Path("a.gguf"), llama())
    tokenizer, own = load_tokenizer("a.gguf"), tiny_tokenizer()
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == own(text)["input_ids"], text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # The library adds <|endoftext|>, which the model has no embedding for.
    assert len(tokenizer) == VOCABULARY and tokenizer.eos_token == "<eos>" and tokenizer.chat_template == CHAT
    tokenizer.save_pretrained("saved")
    messages = [{"role": "user", "content": "hello"}]
    said = [
        one.apply_chat_template(messages, tokenize=False)
        for one in (tokenizer, AutoTokenizer.from_pretrained("saved"))
    ]
    assert said == ["<eos>user: hello\n"] * 2


def test_digits_are_set_apart_where_the_file_says_so(folder: Path) -> None:
    """SmolLM's files do; the library reads them as GPT-2's, so that a digit takes the last space of an indent."""
    from tokenizers import pre_tokenizers

    write_gguf(Path("a.gguf"), llama(), fields={"tokenizer.ggml.pre": "smollm"})
    tokenizer, own = load_tokenizer("a.gguf"), tiny_tokenizer()
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    before = [tiny_tokenizer()(text)["input_ids"] for text in TEXTS]
    there = [own(text)["input_ids"] for text in TEXTS]
    assert before != there
    tokenizer.save_pretrained("saved")
    for one in (tokenizer, AutoTokenizer.from_pretrained("saved")):
        assert [one(text)["input_ids"] for text in TEXTS] == there


def test_whole_words_are_taken_whole_where_llama_cpp_does(folder: Path) -> None:
    """Llama 3's vocabulary has words that no merges lead to, and its texts begin with a token of their own."""
    fields: dict[str, Any] = {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.add_bos_token": None,
        "tokenizer.ggml.bos_token_id": 0,
    }
    own = tokenizer_fields()
    fields |= {f"tokenizer.ggml.{key}": own[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type")}
    fields["tokenizer.ggml.tokens"] += ["zqzq"]
    fields["tokenizer.ggml.token_type"] += [1]
    write_gguf(Path("a.gguf"), llama(vocab_size=VOCABULARY + 1), fields=fields)
    assert load_tokenizer("a.gguf")("zqzq")["input_ids"] == [0, VOCABULARY]


def test_every_end_of_an_answer_ends_generation(folder: Path) -> None:
    write_gguf(Path("a.gguf"), llama(), fields={"tokenizer.ggml.eot_token_id": 7})
    student = hh.convert("a.gguf", [1])
    assert student.generation_config.eos_token_id == [0, 7]


def test_a_folder_and_a_name(folder: Path, capsys: pytest.CaptureFixture) -> None:
    Path("several").mkdir()
    for name, layers in (("a.gguf", 2), ("b.gguf", 3)):
        write_gguf(folder / "several" / name, llama(num_hidden_layers=layers))
    # A file of that name in the current folder is another one.
    write_gguf(Path("b.gguf"), llama(num_hidden_layers=4))
    with pytest.raises(ValueError, match=r"several holds 2 GGUF files \(a.gguf, b.gguf\); name one with --gguf-file"):
        load_teacher("several")
    assert load_teacher("several", gguf_file="b.gguf").config.num_hidden_layers == 3
    assert load_model(folder / "several" / "a.gguf").config.num_hidden_layers == 2
    with pytest.raises(ValueError, match=r"no GGUF file several/c.gguf \(there: a.gguf, b.gguf\); check the path"):
        hh.convert("several", [1], gguf_file="c.gguf")
    with pytest.raises(ValueError, match="a.gguf is a GGUF file, and gguf_file='b.gguf' names another"):
        load_pair("several/a.gguf", gguf_file="b.gguf")
    with pytest.raises(ValueError, match="gguf_file='model.safetensors' is no GGUF file"):
        load_pair("several", gguf_file="model.safetensors")
    with pytest.raises(ValueError, match="gguf_file='a.gguf', but the embedded teacher ships"):
        load_pair("embedded", gguf_file="a.gguf")
    with pytest.raises(ValueError, match="gguf_file='a.gguf' belongs to a teacher given by name"):
        hh.convert(llama(), [1], gguf_file="a.gguf")
    with pytest.raises(ValueError, match="'v1' is one of the Hub's, but b.gguf is a file here"):
        load_pair("b.gguf", revision="v1")
    shutil.move("several/b.gguf", "several/b")
    assert load_teacher("several").config.num_hidden_layers == 2
    llama(num_hidden_layers=5).save_pretrained("several")  # what has plain weights too stands for those
    assert load_teacher("several").config.num_hidden_layers == 5


def test_the_command_line(folder: Path, sources: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    Path("several").mkdir()
    write_gguf(Path("several/a.gguf"), llama(), Type.Q8_0)
    write_gguf(Path("several/b.gguf"), llama())
    named = ["several", "--gguf-file", "a.gguf"]
    assert cli.main(["convert", *named, "--full-attention-layers", "1", "--output", "hybrid"]) == 0
    assert "the GGUF file a.gguf (Q8_0, F32; sha256" in capsys.readouterr().out
    card = Path("hybrid/README.md").read_text()
    assert "came from the GGUF file `a.gguf` (Q8_0, F32; sha256 `" in card
    text = ["--data-files", f"{sources[1]}/*", "--block-size", "32", "--rows", "4"]
    beside = ["--teacher", "several", "--teacher-gguf-file", "a.gguf", "--json"]
    assert cli.main(["evaluate", "hybrid", *beside, *text]) == 0
    kl = json.loads(capsys.readouterr().out)["kl"]
    assert cli.main(["evaluate", *named, *beside, *text]) == 0
    assert json.loads(capsys.readouterr().out)["kl"] == 0 < kl
    score = ["score", *named, "--method", "zero-shot", "--k", "1", "--align-tokens", "512", *text]
    assert cli.main([*score, "--output", "scores", "--tokens-per-layer", "256"]) == 0
    assert yaml.safe_load(Path("scores/recipe.yaml").read_text())["gguf_file"] == "a.gguf"
    capsys.readouterr()
    assert cli.main(["evaluate", "hybrid", "--teacher-gguf-file", "a.gguf"]) == 2
    assert "--teacher-gguf-file 'a.gguf' needs --teacher" in capsys.readouterr().err


def test_a_run_notices_that_the_file_changed(
    folder: Path, sources: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    source = llama()
    write_gguf(Path("a.gguf"), source)
    recipe = tiny_recipe("a.gguf", sources[1], select={"selector": "uniform", "k": 1})
    del recipe["score"], recipe["finetune"]
    Path("recipe.yaml").write_text(json.dumps(recipe))
    run = ["run", "recipe.yaml", "--output", "run", "--stop-after"]
    assert cli.main([*run, "data"]) == 0
    assert cli.main([*run, "align"]) == 0
    there = json.loads(Path("run/inputs.json").read_text())
    assert there["gguf"] == gguf_origin(load_teacher("a.gguf").config) and "gguf_origin" not in there["config"]
    # One number of 19,200, which no sample of 64 need have.
    with torch.no_grad():
        source.model.embed_tokens.weight[123, 45] += 1
    write_gguf(Path("a.gguf"), source)
    capsys.readouterr()
    assert cli.main([*run, "select"]) == 2
    assert "started with another teacher (the contents of the GGUF file a.gguf: sha256 " in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_on_the_hub(hub: LoopbackHub, folder: Path) -> None:
    write_gguf(Path("a.gguf"), llama(), Type.Q8_0)
    repo = hub.repos["tester/files"] = Repo()
    commit = repo.commit("main", {"a.gguf": Path("a.gguf").read_bytes()}, "first")
    repo.commit("main", {"a.gguf": b"GGUF"}, "another")
    said = hub.run(
        folder,
        f"""
        from hf_hybrid.card import save_model
        from hf_hybrid.teacher.loading import load_pair
        import hf_hybrid as hh
        teacher, tokenizer = load_pair("tester/files", gguf_file="a.gguf", revision="{commit}")
        assert teacher.config._commit_hash == "{commit}"
        save_model(hh.convert(teacher, [1]), tokenizer, "hybrid")
        hybrid = hh.HybridForCausalLM.from_pretrained("hybrid")
        assert hybrid.config.teacher_revision == "{commit}"
        try:
            load_pair("tester/files", gguf_file="b.gguf")
        except ValueError as error:
            print(error)
        """,
    )
    assert said == "tester/files has no file b.gguf on the Hub at main; check the name.\n"
    assert "base_model: tester/files" in Path("hybrid/README.md").read_text()


def factors() -> dict[str, np.ndarray]:
    return {"rope_freqs.weight": np.ones(8, np.float32)}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a tensor with no place": ({"tensors": factors()}, r"a.gguf has tensors \(rope_freqs.weight\) that have no place"),
    "a bias with no place": (
        {"tensors": {"blk.1.attn_q.bias": np.ones(64, np.float32)}},
        r"has tensors \(blk.1.attn_q.bias\) that have no place in the LlamaForCausalLM",
    ),
    "scaled positions": (
        {"fields": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}},
        r"llama.rope.scaling.type = yarn, llama.rope.scaling.factor = 4.0, which transformers does not take",
    ),
    "a window": ({"fields": {"llama.attention.sliding_window": 128}}, "llama.attention.sliding_window = 128, which"),
    "part of the head turned": ({"fields": {"llama.rope.dimension_count": 8}}, "of another shape"),
    "more layers": ({"fields": {"llama.block_count": 5}}, "do not fill the config that its metadata make: .* missing"),
    "fewer layers": ({"fields": {"llama.block_count": 3}}, r"tensors \(blk.3.attn_k.weight, "),
    "another vocabulary": ({"fields": {"llama.vocab_size": 299}}, "of another shape .*config wants"),
    "an unknown architecture": (
        {"fields": {"general.architecture": "mystery"}},
        r"a.gguf is of an architecture that transformers \S+ does not read from GGUF files \(.*mystery",
    ),
    "one part of several": ({"fields": {"split.count": 3}}, "a.gguf is one part of several"),
    "another split of text": ({"fields": {"tokenizer.ggml.pre": "mystery"}}, r"in a way \('mystery'\) that neither"),
    "no word of how to split": ({"fields": {"tokenizer.ggml.pre": None}}, r"in a way \('default'\) that neither"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_model_is_refused(name: str, folder: Path) -> None:
    changes, message = REFUSED[name]
    write_gguf(Path("a.gguf"), llama(), **changes)
    with pytest.raises(ValueError, match=message):
        load_pair("a.gguf")


def test_damage_and_a_missing_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(Path("a.gguf"), llama())
    data = Path("a.gguf").read_bytes()
    for end, message in ((10, "only the beginning of one"), (1000, "is damaged"), (len(data) // 2, "is damaged")):
        Path("cut.gguf").write_bytes(data[:end])
        with pytest.raises(ValueError, match=f"cut.gguf {message}|cut.gguf is no GGUF file, or {message}"):
            load_teacher("cut.gguf")
    Path("text.gguf").write_text("no model at all, and long enough")
    with pytest.raises(ValueError, match="text.gguf is no GGUF file"):
        load_teacher("text.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for load in (load_teacher, load_tokenizer):
        with pytest.raises(
            ValueError, match=r"the package gguf is not installed; pip install gguf, or hf_hybrid\[gguf\]"
        ):
            load("a.gguf")

"""The commands `generate` and `chat`."""

import io
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import VOCABULARY, write_gguf
from runs import PATIENCE
from teachers import tiny_teacher

import hf_hybrid as hh
from hf_hybrid.cli import main
from hf_hybrid.cli.generate import Writer, turn_ends, write


TEMPLATE = (
    "{% for m in messages %}{{ '# ' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '# assistant\n' }}{% endif %}"
)
PROMPT = "def first(self, x):\n    return"


def chat_tokenizer() -> Any:
    """The embedded tokenizer with a chat template, whose end of a turn, 511, no generation config knows."""
    tokenizer = hh.embedded_tokenizer()
    last = tokenizer.convert_ids_to_tokens(511)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = [m for m in state["model"]["merges"] if "".join(m) != last]
    state["model"]["vocab"]["<|end|>"] = state["model"]["vocab"].pop(last)
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A hybrid of the embedded teacher that was not trained, and its tokenizer."""
    folder = tmp_path_factory.mktemp("hybrid")
    torch.manual_seed(0)
    hh.convert(hh.embedded_teacher(), [2, 3]).save_pretrained(folder)
    hh.embedded_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded teacher with a chat template."""
    folder = tmp_path_factory.mktemp("talker")
    hh.embedded_teacher().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return str(folder)


def greedy(model: Any, tokenizer: Any, text: str, new_tokens: int, **options: Any) -> list[int]:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, **options)
    return out[0, ids.shape[1] :].tolist()


def generated(arguments: list[str], capsys: pytest.CaptureFixture) -> dict[str, Any]:
    assert main(["generate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_greedy_text_is_that_of_the_library(hybrid: str, capsys: pytest.CaptureFixture) -> None:
    found = generated([hybrid, PROMPT, "import", "--teacher", "embedded", "--max-new-tokens", "24"], capsys)
    assert found["model"] == hybrid and found["teacher"] == "embedded"
    tokenizer = hh.embedded_tokenizer()
    model, teacher = hh.HybridForCausalLM.from_pretrained(hybrid), hh.embedded_teacher()
    for text, prompt in zip(found["texts"], (PROMPT, "import"), strict=True):
        ours, theirs = (greedy(one, tokenizer, prompt, 24) for one in (model, teacher))
        assert (text["prompt"], text["model"]["tokens"], text["teacher"]["tokens"]) == (prompt, ours, theirs)
        assert text["prompt_tokens"] == len(tokenizer(prompt)["input_ids"])
        assert text["model"]["text"] == tokenizer.decode(ours) and not text["model"]["ended"]
        assert text["model"]["tokens_per_second"] == pytest.approx(24 / text["model"]["seconds"])
        assert ours != theirs
        agree = text["first_tokens_that_agree"]
        assert ours[:agree] == theirs[:agree] and ours[agree] != theirs[agree]


def test_a_model_agrees_with_itself_greedily_and_in_what_it_draws(capsys: pytest.CaptureFixture) -> None:
    texts = []
    for how in ([], ["--temperature", "1.5"], ["--temperature", "1.5", "--seed", "1"]):
        (text,) = generated(["embedded", PROMPT, "--teacher", "embedded", *how, "--max-new-tokens", "16"], capsys)[
            "texts"
        ]
        assert text["first_tokens_that_agree"] == len(text["model"]["tokens"]) > 0
        texts.append(text["model"]["text"])
    assert len(set(texts)) == 3
    assert main(["generate", "embedded", PROMPT, "--teacher", "embedded", "--max-new-tokens", "8"]) == 0
    shown = capsys.readouterr().out
    assert "model" in shown and "teacher" in shown and "The first 8 of 8 tokens agree." in shown


def test_the_prompt_comes_from_a_file_or_from_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    wanted = greedy(hh.embedded_teacher(), hh.embedded_tokenizer(), PROMPT, 12)
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    for given in (["--prompt-file", str(tmp_path / "prompt.txt")], []):
        (text,) = generated(["embedded", *given, "--max-new-tokens", "12"], capsys)["texts"]
        assert text["prompt"] == PROMPT and text["model"]["tokens"] == wanted and "teacher" not in text
    assert main(["generate", "embedded", PROMPT, "--max-new-tokens", "12"]) == 0
    captured = capsys.readouterr()
    assert captured.out == hh.embedded_tokenizer().decode(wanted) + "\n" and "12 tokens, " in captured.err


def test_a_text_ends_at_the_positions_of_the_model(capsys: pytest.CaptureFixture) -> None:
    tokenizer = hh.embedded_tokenizer()
    prompt = tokenizer.decode(tokenizer("x = 1\n" * 600)["input_ids"][:505])
    used = len(tokenizer(prompt)["input_ids"])
    assert main(["generate", "embedded", prompt, "--max-new-tokens", "100", "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["texts"][0]["model"]["tokens"]) == 512 - used
    assert "The model's text was cut off at its 512 positions." in captured.err
    long = error_of(["generate", "embedded", "import", "x = 1\n" * 600], capsys)
    assert "tokens, and the model 512 positions" in long and "give a shorter one" in long


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "./nowhere", "x"], "there is no folder ./nowhere"),
        (["chat", "nowhere.gguf"], "there is no GGUF file nowhere.gguf here"),
        (["generate", "embedded", "x", "--teacher", "/nowhere/at/all"], "there is no folder /nowhere/at/all"),
        (["convert", "./nowhere", "--full-attention-layers", "1", "--output", "new"], "there is no folder ./nowhere"),
        (["evaluate", "./nowhere"], "there is no folder ./nowhere"),
        (["evaluate", "embedded", "--teacher", "./nowhere"], "there is no folder ./nowhere"),
        (["generate", "EMPTY", "x"], "has no config.json (it is empty)"),
        (["generate", "embedded", "x", "--prompt-file", "y"], "prompts and --prompt-file were both given"),
        (["generate", "embedded", "--prompt-file", "nowhere.txt"], "nowhere.txt: no such file or directory"),
        (["generate", "embedded", ""], "a prompt is empty"),
        (["generate", "embedded", "x", "--max-new-tokens", "0"], "--max-new-tokens 0 is too small"),
        (["chat", "embedded", "--temperature", "-1"], "--temperature -1.0 is too small"),
        (["chat", "embedded", "--teacher-revision", "v1"], "needs --teacher"),
    ],
)
def test_mistakes_are_told_before_torch_is_imported(arguments: list[str], said: str, tmp_path: Path) -> None:
    program = (
        "import sys; from hf_hybrid.cli import main; code = main(sys.argv[1:])\n"
        "sys.exit(99 if {'torch', 'transformers'} & set(sys.modules) else code)"
    )
    arguments = [str(tmp_path) if argument == "EMPTY" else argument for argument in arguments]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def say(
    lines: list[str], arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", *arguments]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def turns(model: Any, tokenizer: Any, lines: list[str], new_tokens: int) -> list[str]:
    """The greedy answers to messages, each with those before it in its history."""
    messages, answers = [], []
    for line in lines:
        messages.append({"role": "user", "content": line})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens = greedy(model, tokenizer, text, new_tokens, eos_token_id=[0, 511])
        answers.append(tokenizer.decode(tokens, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_chat_keeps_its_history_until_it_is_cleared(
    talker: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chat_tokenizer()
    how = [talker, "--max-new-tokens", "12", "--temperature", "0"]
    first, second = turns(hh.embedded_teacher(), tokenizer, ["import os", "import re"], 12)
    (alone,) = turns(hh.embedded_teacher(), tokenizer, ["import re"], 12)
    assert alone != second  # otherwise a forgotten history would not show
    out, err = say(["import os", "", "import re", "/clear", "import re"], how, capsys, monkeypatch)
    assert out == f"{first}\n{second}\n{alone}\n" and "was cut off after 12 tokens" in err
    assert say(["import os", "/exit", "import re"], how, capsys, monkeypatch)[0] == f"{first}\n"


def test_chat_beside_the_teacher_each_with_its_own_history(
    talker: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    student = hh.convert(hh.embedded_teacher(), [2, 3])
    student.save_pretrained(tmp_path)
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    lines = ["import os", "import re"]
    how = [str(tmp_path), "--teacher", talker, "--max-new-tokens", "8", "--temperature", "0"]
    ours, theirs = (turns(model, tokenizer, lines, 8) for model in (student.eval(), hh.embedded_teacher()))
    assert ours[1] != theirs[1]
    wanted = "".join(f"model: {a}\nteacher: {b}\n" for a, b in zip(ours, theirs, strict=True))
    assert say(lines, how, capsys, monkeypatch)[0] == wanted


def test_an_answer_ends_where_the_template_ends_a_turn() -> None:
    model, tokenizer = hh.embedded_teacher(), chat_tokenizer()
    assert model.generation_config.eos_token_id == 0 and tokenizer.eos_token_id == 0
    assert turn_ends(Writer(model, tokenizer, 512)) == [0, 511]


def test_what_is_to_be_known_of_a_teacher_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights that were dequantised; without the line of code from which a warning comes."""
    monkeypatch.chdir(tmp_path)
    teacher = tiny_teacher("llama", vocab_size=VOCABULARY, eos_token_id=0)
    write_gguf(Path("a.gguf"), teacher, GGMLQuantizationType.Q8_0)
    assert main(["generate", "a.gguf", "x = 1", "--teacher", "a.gguf", "--max-new-tokens", "4", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["texts"][0]["first_tokens_that_agree"] > 0
    assert "\nhf-hybrid: a.gguf: its weights are those of the GGUF file a.gguf" in f"\n{captured.err}"
    assert "UserWarning" not in captured.err and "load_teacher(" not in captured.err


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_chat_on_a_terminal(talker: str) -> None:
    """It says how it ends, asks again after what it cannot do, forgets that message, and ends with ctrl-D."""
    import pty

    terminal, its_end = pty.openpty()
    command = [sys.executable, "-m", "hf_hybrid", "chat", talker, "--max-new-tokens", "4", "--temperature", "0"]
    talking = subprocess.Popen(command, stdin=its_end, stdout=its_end, stderr=its_end)

    def until_asked() -> str:
        shown = b""
        while not shown.endswith(b"\n> "):
            assert talking.poll() is None and select.select([terminal], [], [], PATIENCE)[0], shown
            shown += os.read(terminal, 4096)
        return shown.decode()

    assert "/exit or ctrl-D ends" in until_asked()
    os.write(terminal, b"/help\n")
    assert "There is no command /help" in until_asked()
    os.write(terminal, b"x = 1 " * 150 + b"\n")
    assert "The last message is taken back." in until_asked()
    os.write(terminal, b"import os\n")
    (answer,) = turns(hh.embedded_teacher(), chat_tokenizer(), ["import os"], 4)
    assert answer.strip().splitlines()[0] in until_asked()
    os.write(terminal, b"\x04")
    assert talking.wait(PATIENCE) == 0
    os.close(terminal)
    os.close(its_end)


def test_a_text_ends_behind_its_end_token() -> None:
    model, tokenizer = hh.embedded_teacher(), hh.embedded_tokenizer()
    prompt = tokenizer(PROMPT)["input_ids"]
    tokens = greedy(model, tokenizer, PROMPT, 12)
    length = tokens.index(tokens[5]) + 1
    written = write(Writer(model, tokenizer, 512), prompt, max_new_tokens=12, temperature=0, ends=[tokens[5]])
    assert written.tokens == tokens[:length] and written.ended and len(tokens) > length


def test_what_cannot_chat_is_refused(
    talker: str, hybrid: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, name in (([hybrid], hybrid), ([talker, "--teacher", "embedded"], "embedded")):
        said = error_of(["chat", *arguments], capsys)
        assert f"{name}, has no chat template" in said and "use hf-hybrid generate" in said
    monkeypatch.setattr("sys.stdin", io.StringIO("x = 1 " * 600 + "\n"))
    said = error_of(["chat", talker], capsys)
    assert "the conversation has" in said and "512 positions" in said and "/clear" in said

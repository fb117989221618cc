"""Exported hybrids in llama.cpp itself: the same numbers, a prompt in parts, two sequences at once, fewer bits."""

import threading

import numpy as np
import pytest
import torch
from teachers import tiny_teacher
from transformers import set_seed

import hf_hybrid as hh
from hf_hybrid.demo_data import demo_rows
from hf_hybrid.exporting import llama_cpp
from hf_hybrid.exporting.llama_cpp import split_name
from hf_hybrid.exporting.llama_cpp_engine import LlamaCpp, equal_tokens, run_apart


pytest.importorskip("xllamacpp")
gguf = pytest.importorskip("gguf")

PREFIXES = (1, 5, 63, 64, 65, 120, 200)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = hh.embedded_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """The embedded teacher with native mixers, two layers kept that are at no regular distance, trained a little."""
    set_seed(0)
    teacher, folder = hh.embedded_teacher(), tmp_path_factory.mktemp("training")
    student = hh.convert(teacher, [2, 3], mixer_options="native")
    rows = demo_rows(hh.embedded_tokenizer(), 128, 24, seed=0, split="train")
    hh.calibrate(student, teacher, rows.select(range(8)))
    args = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
    args |= {"use_cpu": True, "disable_tqdm": True, "mixer_learning_rate": 1e-2}
    config = hh.DistillationConfig(str(folder), **args)
    hh.DistillationTrainer(model=student, teacher=teacher, args=config, train_dataset=rows).train()
    assert (student.model.layers[0].self_attn.conv.weight[..., 0] != 0).any()
    return student.eval()


@pytest.fixture(scope="module")
def file(hybrid, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "out"
    report = hh.export(hybrid, to="gguf", file_type="f32", output=folder, tokenizer=tokenizer)
    assert "in llama.cpp (xllamacpp" in str(report) and "48 of the 48 greedy tokens" in str(report)
    return folder / "out-f32.gguf"


def test_silence_is_told_from_other_tokens(hybrid, tokenizer, tmp_path, monkeypatch):
    """What is not trained may write bytes that are no text, after which llama.cpp tells of nothing."""

    def cut(*args, **kwargs):
        told, greedy = run_apart(*args, **kwargs)
        return told, greedy[:5]

    monkeypatch.setattr("hf_hybrid.exporting.export.run_apart", cut)
    said = str(hh.export(hybrid, to="gguf", file_type="f32", output=tmp_path / "out", tokenizer=tokenizer))
    assert "5 of the 48 greedy tokens that it tells of are equal; it falls silent after those" in said


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Two rows of source code, `[2, 200]`."""
    return torch.tensor(demo_rows(tokenizer, 200, 4, seed=1, split="report")["input_ids"])[[0, 3]]


@torch.no_grad()
def log_probabilities(model, ids):
    return model(ids[None], use_cache=False).logits[0].log_softmax(-1)


def largest_difference(engine, model, ids, lengths=PREFIXES):
    wanted, differences = log_probabilities(model, ids), []
    for length in lengths:
        told = engine.log_probabilities(ids[:length].tolist(), 512)
        assert told is None or len(told) == 512
        differences += [abs(value - wanted[length - 1, token].item()) for token, value in (told or {}).items()]
    assert len(differences) >= 512 * (len(lengths) - 2)  # it does not tell of tokens that end inside a character
    return max(differences)


def greedy(model, ids, count=64):
    out = model.generate(ids[None], max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return out[0, len(ids) :].tolist()


def test_the_same_numbers_and_tokens(hybrid, file, rows, tokenizer):
    engine = LlamaCpp(file)
    for ids in rows:
        assert largest_difference(engine, hybrid, ids) < 1e-4
        equal, of = equal_tokens(engine.greedy(ids[:40].tolist(), 64), greedy(hybrid, ids[:40]), tokenizer)
        assert equal == of >= 60


def test_text_is_split_as_here(file, tokenizer):
    text = "def f(x):\n    return x*2  # 123\n"
    answer = LlamaCpp(file).server.handle_completions({"prompt": text, "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == len(tokenizer(text)["input_ids"])


def test_a_prompt_in_parts(hybrid, file, rows):
    assert largest_difference(LlamaCpp(file, batch=24), hybrid, rows[0], (23, 24, 25, 100, 200)) < 1e-4


def test_two_sequences_at_once(hybrid, file, rows, tokenizer):
    engine, written = LlamaCpp(file, sequences=2), {}

    def write(place):
        written[place] = engine.greedy(rows[place, : 40 + place].tolist(), 64)

    threads = [threading.Thread(target=write, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in (0, 1):
        equal, of = equal_tokens(written[place], greedy(hybrid, rows[place, : 40 + place]), tokenizer)
        assert equal == of >= 60


def divergence(engine, model, ids, lengths=PREFIXES):
    """The mean KL divergence (nats) of the next token in llama.cpp from that of `model`."""
    wanted, found = log_probabilities(model, ids), []
    for length in lengths:
        told = engine.log_probabilities(ids[:length].tolist(), 512)
        if told is not None:
            own = wanted[length - 1]
            found.append((own.exp() * (own - torch.tensor([told[token] for token in range(512)]))).sum().item())
    assert len(found) >= len(lengths) - 2
    return sum(found) / len(found)


def test_q8_0(hybrid, rows, tokenizer, tmp_path):
    hh.export(hybrid, to="gguf", file_type="q8_0", output=tmp_path / "out", tokenizer=tokenizer)
    engine = LlamaCpp(tmp_path / "out" / "out-q8_0.gguf")
    assert 1e-6 < divergence(engine, hybrid, rows[0]) < 0.01
    assert engine.greedy(rows[0].tolist(), 8)


def q4_k(rows):
    """Blocks of Q4_K, llama.cpp's own default, of an array `[rows, columns]`, by plain rounding."""
    parts = rows.reshape(-1, 8, 32).astype(np.float32)
    low = np.minimum(parts.min(-1), 0)
    step = np.maximum((parts.max(-1) - low) / 15, 1e-12)
    d, dmin = (x.max(-1, keepdims=True).astype(np.float16) / np.float16(63) for x in (step, -low))
    scales, mins = (
        np.rint(x / np.maximum(y, 1e-7)).clip(0, 63).astype(np.uint8) for x, y in ((step, d), (-low, dmin))
    )
    whole = np.maximum((d * scales)[..., None].astype(np.float32), 1e-12)
    q = np.rint((parts + (dmin * mins)[..., None]) / whole).clip(0, 15).astype(np.uint8).reshape(-1, 4, 2, 32)
    first, last = slice(0, 4), slice(4, 8)
    packed = [
        scales[:, first] | (scales[:, last] >> 4) << 6,
        mins[:, first] | (mins[:, last] >> 4) << 6,
        (scales[:, last] & 15) | (mins[:, last] & 15) << 4,
    ]
    nibbles = (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)
    blocks = np.concatenate([d.view(np.uint8), dmin.view(np.uint8), *packed, nibbles], axis=-1)
    return blocks.reshape(len(rows), -1)


def test_q4_k(tokenizer, tmp_path, monkeypatch):
    """What users run most; its blocks are 256 wide, so the model is."""
    plain, kinds = gguf.quants.quantize, gguf.GGMLQuantizationType
    teacher = tiny_teacher("qwen3", vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    with torch.no_grad():  # near enough to what a trained one makes of its weights
        for parameter in teacher.parameters():
            parameter.mul_(0.3 if parameter.ndim > 1 else 1)
    student = hh.convert(teacher, [1], mixer_options="native")

    def quantize(rows, kind):
        return q4_k(rows) if kind == kinds.Q4_K else plain(rows, kind)

    def type_of(library, target, tensor, file_type):
        narrow = tensor.ndim < 2 or tensor.shape[-1] % 256 or "ssm_" in target and "out" not in target
        return kinds.F32 if narrow else kinds.Q4_K

    monkeypatch.setattr(gguf.quants, "quantize", quantize)
    monkeypatch.setattr(llama_cpp, "type_of", type_of)
    hh.export(student, to="gguf", file_type="q4_0", output=tmp_path / "out", tokenizer=tokenizer)
    file = tmp_path / "out" / "out-q4_0.gguf"
    assert {entry.tensor_type.name for entry in gguf.GGUFReader(file).tensors} == {"F32", "Q4_K"}
    ids = torch.randint(512, (80,), generator=torch.Generator().manual_seed(0))
    assert 1e-6 < divergence(LlamaCpp(file), student, ids, (20, 40, 60, 70, 80)) < 0.05


def test_chat(file, tokenizer):
    messages = [{"role": "user", "content": "import os"}]
    request = {"messages": messages, "max_tokens": 4, "temperature": 0.0}
    answer = LlamaCpp(file).server.handle_chat_completions(request)
    assert answer["usage"]["prompt_tokens"] == len(tokenizer("import os\n")["input_ids"])


def test_an_engine_that_aborts_is_told(tmp_path):
    (tmp_path / "none.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"llama.cpp \(xllamacpp .*\) does not run the file"):
        run_apart(tmp_path / "none.gguf", [[1]], count=1, prompt=[1], new_tokens=1)


def test_a_split_without_a_name_is_refused():
    with pytest.raises(ValueError, match="splits text in a way .* for which hf_hybrid knows no name"):
        split_name({"type": "Whitespace"})


def test_a_file_that_is_not_as_written_is_refused(hybrid, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "_ours", lambda target, tensor: tensor)
    with pytest.raises(ValueError, match="is not what was written: its relative error is"):
        hh.export(hybrid, to="gguf", file_type="f32", output=tmp_path / "out", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())

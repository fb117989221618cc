"""What vLLM computes with a hybrid is what transformers computes with it, to the rounding of bf16."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import hf_hybrid as hh


VOCABULARY = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
HEADS_AS_WIDE_AS_THE_MODEL = {name: size for name, size in SIZES.items() if name != "head_dim"} | {"hidden_size": 256}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=64),
    "qwen2": Qwen2Config(**HEADS_AS_WIDE_AS_THE_MODEL),
    "qwen3": Qwen3Config(**SIZES),
}
SHORT = {"silu_qk": True, "silu_v": True, "short_convolution": 2, "output_gate": "sigmoid"}
CASES: dict[str, tuple[str, list[int], Any]] = {
    "llama": ("llama", [2], "native"),
    "all linear": ("llama", [], "native"),
    "all softmax": ("llama", [0, 1, 2, 3], "native"),
    "default options": ("llama", [0], None),
    "biases left out": ("llama-biases", [1, 2], "native"),
    "biases": ("llama-biases", [3], None),
    "short convolution": ("mistral", [0, 1, 3], SHORT),
    "mistral": ("mistral", [1], "native"),
    "mistral with a window": ("mistral with a window", [1, 2], "native"),
    "qwen2": ("qwen2", [3], "native"),
    "qwen2, default options": ("qwen2", [1, 2], None),
    "qwen3": ("qwen3", [0, 3], "native"),
    "qwen3, default options": ("qwen3", [1], None),
}


def save_hybrid(folder: Path, family: str, keep: list[int], options: Any, **settings: Any) -> Path:
    """A hybrid of a random teacher in bf16, no tensor of which is what it would be by itself."""
    torch.manual_seed(0)
    teacher: Any = AutoModelForCausalLM.from_config(FAMILIES[family])
    student: Any = hh.convert(teacher, keep, mixer_options=options, **settings)
    for name, tensor in student.named_parameters():
        if name.endswith(("norm.weight", "conv.weight", ".bias")):
            tensor.data += 0.2 * torch.randn_like(tensor)
        elif tensor.dim() > 1:
            tensor.data = 0.08 * torch.randn_like(tensor)
    student.save_pretrained(folder / "fp32")
    # Read again, and not cast: the decay stays in fp32.
    student = AutoModelForCausalLM.from_pretrained(folder / "fp32", dtype=torch.bfloat16)
    student.save_pretrained(folder / "bf16")
    return folder / "bf16"


@contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[LLM]:
    """vLLM with that model."""
    settings = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_logprobs": VOCABULARY,
    } | settings
    llm = LLM(str(folder), skip_tokenizer_init=True, disable_log_stats=True, **settings)
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answers(llm: LLM, prompts: list[list[int]], tokens: int) -> list[tuple[list[int], torch.Tensor]]:
    """For each prompt, the tokens after it and vLLM's log-probabilities [T, V] of all that comes after the first."""
    parameters = SamplingParams(
        temperature=0, max_tokens=tokens, detokenize=False, prompt_logprobs=VOCABULARY, logprobs=VOCABULARY
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    found = []
    for output in outputs:
        rows: Any = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        logprobs = torch.tensor([[row[token].logprob for token in range(VOCABULARY)] for row in rows])
        found.append((list(output.outputs[0].token_ids), logprobs))
    return found


@torch.no_grad()
def references(folder: Path, rows: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """transformers' log-probabilities [T - 1, V] of what follows each token of a row but the last."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return [model(torch.tensor([row])).logits[0, :-1].float().log_softmax(-1) for row in rows]


def kl(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """KL(wanted || got) in nats per token."""
    return (wanted.exp() * (wanted - got)).sum(-1).mean().item()


def check_agrees(folder: Path, prompts: list[list[int]], found: list[tuple[list[int], torch.Tensor]]) -> float:
    """
    Over the prompts and over what was decoded a token at a time: vLLM's KL to fp32 is at most 1.2 times that of
    transformers in bf16, which is returned; and it chose the likeliest tokens.
    """
    rows = [ids + generated for ids, (generated, _) in zip(prompts, found, strict=True)]
    exact, rounded = (references(folder, rows, dtype) for dtype in (torch.float32, torch.bfloat16))
    served = [logprobs for _, logprobs in found]
    wanted, ours, theirs = (torch.cat(logprobs) for logprobs in (exact, served, rounded))
    ratio = kl(wanted, ours) / kl(wanted, theirs)
    assert kl(wanted, theirs) < 0.01
    assert ratio < 1.2
    decoded = torch.cat([torch.arange(len(row) - 1) >= len(ids) - 1 for ids, row in zip(prompts, rows, strict=True)])
    chosen = torch.tensor([token for generated, _ in found for token in generated])
    gap = wanted[decoded].max(-1).values - wanted[decoded].gather(-1, chosen[:, None])[:, 0]
    # Where two tokens are nearly as likely as each other, bf16 may take either.
    assert (gap < 0.1).float().mean() > 0.97
    assert gap.max() < 0.5
    return ratio


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_transformers(tmp_path: Path, case: str) -> None:
    family, keep, options = CASES[case]
    folder = save_hybrid(tmp_path, family, keep, options)
    prompts = [prompt(300, seed) for seed in range(4)]  # fewer tokens, and the few with a large KL decide
    with engine(folder) as llm:
        found = answers(llm, prompts, tokens=40)
    print(f"{case}: KL to fp32 {check_agrees(folder, prompts, found):.2f} times transformers' own in bf16")


@pytest.mark.parametrize("options", ["native", None])
def test_agrees_when_compiled(tmp_path: Path, options: Any) -> None:
    folder = save_hybrid(tmp_path, "llama", [1], options)
    prompts = [prompt(300, seed) for seed in range(4)]
    with engine(folder, enforce_eager=False) as llm:
        check_agrees(folder, prompts, answers(llm, prompts, tokens=40))


@pytest.mark.parametrize("case", ["default options", "biases left out"])
def test_tensor_parallel(tmp_path: Path, case: str) -> None:
    """Each of two processes has half of the heads, and of the convolution's channels and the states."""
    family, keep, options = CASES[case]
    folder = save_hybrid(tmp_path, family, keep, options)
    prompts = [prompt(300, seed) for seed in range(4)]
    with engine(folder, tensor_parallel_size=2) as llm:
        check_agrees(folder, prompts, answers(llm, prompts, tokens=40))


def test_an_export_needs_no_plugin(tmp_path: Path, monkeypatch: Any) -> None:
    """`hf-hybrid export --to qwen3_5`: the served model is vLLM's own Qwen3.5."""
    monkeypatch.setenv("VLLM_PLUGINS", "")
    folder = save_hybrid(tmp_path, "qwen3", [0, 3], "native")
    student: Any = AutoModelForCausalLM.from_pretrained(folder)
    hh.export(student, to="qwen3_5", output=tmp_path / "exported")
    prompts = [prompt(300, seed) for seed in range(4)]
    with engine(tmp_path / "exported") as llm:
        found = answers(llm, prompts, tokens=40)
    print(f"exported: KL to fp32 {check_agrees(folder, prompts, found):.2f} times transformers' own in bf16")


class TestWindows:
    """`hf-hybrid export --to windows`: the served model is one of transformers, in vLLM."""

    @pytest.fixture
    def folders(self, tmp_path: Path, monkeypatch: Any, family: str) -> tuple[Path, Path]:
        """The hybrid, and what is exported of it."""
        monkeypatch.setenv("VLLM_PLUGINS", "")
        folder = save_hybrid(tmp_path, family, [0, 3], {"window": 32}, mixer="sliding_window")
        student: Any = AutoModelForCausalLM.from_pretrained(folder)
        hh.export(student, to="windows", output=tmp_path / "exported")
        return folder, tmp_path / "exported"

    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
    def test_agrees_with_transformers(self, folders: tuple[Path, Path], family: str, monkeypatch: Any) -> None:
        folder, exported = folders
        # In another process: there vLLM puts layers of its own into transformers' models.
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        prompts = [prompt(300, seed) for seed in range(4)]
        implementation = {"model_impl": "transformers"} if family.startswith("qwen") else {}
        with engine(exported, **implementation) as llm:
            found = answers(llm, prompts, tokens=40)
        print(f"windows, {family}: KL to fp32 {check_agrees(folder, prompts, found):.2f} times transformers' in bf16")

    @pytest.mark.parametrize("family", ["qwen2", "qwen3"])
    def test_a_class_that_ignores_windows_refuses(self, folders: tuple[Path, Path], family: str) -> None:
        refused = pytest.raises(AssertionError, match="Sliding window for some but all layers is not supported")
        with refused, engine(folders[1]):
            pass


def test_prefix_caching(tmp_path: Path) -> None:
    """The states at the end of a block are found again by the next request that begins with it."""
    folder = save_hybrid(tmp_path, "llama", [1], "native")
    prompts = [prompt(600) + prompt(50, seed) for seed in range(1, 4)]
    parameters = SamplingParams(temperature=0, max_tokens=20, detokenize=False, logprobs=VOCABULARY)

    def one_by_one(enable_prefix_caching: bool) -> list[Any]:
        with engine(folder, enable_prefix_caching=enable_prefix_caching) as llm:
            return [llm.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)[0] for ids in prompts]

    found, fresh = one_by_one(True), one_by_one(False)
    assert [output.num_cached_tokens for output in found] == [0, 512, 512]
    for output, other in zip(found, fresh, strict=True):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids


REFUSED = {
    "mixer": ({"mixer": "kimi_delta_attention"}, "kimi_delta_attention"),
    "option": ({"mixer_options": {"silu_qk": True}}, "silu_qk=True and silu_v=False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, case: str) -> None:
    settings, named = REFUSED[case]
    hh.convert(AutoModelForCausalLM.from_config(FAMILIES["llama"]), [1], **settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named), engine(tmp_path):
        pass


class TestRequests:
    """One hybrid, many requests; a step of the engine computes 128 tokens at most."""

    @pytest.fixture(scope="class", params=["native", None], ids=["native", "default"])
    def folder(self, request: Any, tmp_path_factory: Any) -> Path:
        return save_hybrid(tmp_path_factory.mktemp("hybrid"), "llama", [2], request.param)

    @pytest.fixture(scope="class")
    def llm(self, folder: Path) -> Iterator[LLM]:
        with engine(folder, max_num_batched_tokens=128) as llm:
            yield llm

    def test_long_prompt(self, folder: Path, llm: LLM) -> None:
        prompts = [prompt(900)]
        check_agrees(folder, prompts, answers(llm, prompts, tokens=20))

    def test_batch_of_mixed_lengths(self, folder: Path, llm: LLM) -> None:
        lengths = [1, 3, 4, 63, 64, 65, 127, 128, 129, 300]
        prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
        together = answers(llm, prompts, tokens=24)
        check_agrees(folder, prompts, together)
        for ids, (generated, logprobs) in zip(prompts, together, strict=True):
            [(generated_alone, alone)] = answers(llm, [ids], tokens=24)
            same = next((i for i in range(24) if generated_alone[i] != generated[i]), 24)
            shared = len(ids) - 1 + same
            assert kl(alone[:shared], logprobs[:shared]) < 5e-3

    def test_states_of_others_are_not_met(self, llm: LLM) -> None:
        first = answers(llm, [prompt(70, seed=1)], tokens=8)
        answers(llm, [prompt(200, seed=seed) for seed in range(2, 12)], tokens=8)
        again = answers(llm, [prompt(70, seed=1)], tokens=8)
        assert again[0][0] == first[0][0]
        assert torch.equal(again[0][1], first[0][1])


# The last of all: for speculation vLLM imports numba, and in a process that has it starts no other engine (it looks at
# whatever modules hold, and llvmlite's functions have no dictionary).
ASKED = {
    "dtype": ({"dtype": "float16"}, "run in bf16; pass --dtype bfloat16"),
    "quantization": ({"quantization": "fp8"}, "quantization is not served"),
    "speculation": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        "speculative decoding takes tokens back",
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_vllm_is_asked_in_vain_is_refused_by_name(tmp_path: Path, case: str) -> None:
    settings, named = ASKED[case]
    hh.convert(AutoModelForCausalLM.from_config(FAMILIES["llama"]), [1]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named), engine(tmp_path, **settings):
        pass

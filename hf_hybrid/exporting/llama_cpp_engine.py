"""
A GGUF file run by llama.cpp itself, through its Python package `xllamacpp`, in this process or in one of its own.

llama.cpp ends the process where it meets what it does not expect, so whatever must go on runs it apart. Nothing is
imported here that takes time.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def llama_cpp_version() -> str | None:
    """The release of llama.cpp's Python package that can run a file here; None where there is none."""
    try:
        return f"xllamacpp {version('xllamacpp')}"
    except PackageNotFoundError:
        return None


class LlamaCpp:
    """
    A model in this process.

    Args:
        path (`Path`): the file.
        context (`int`): tokens of a sequence at most.
        sequences (`int`): how many run at once.
        batch (`int`): tokens of a prompt that are computed together.
        exact (`bool`): without flash attention, and with keys and values in fp32.
        threads (`int`): of the computation.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int = 512,
        sequences: int = 1,
        batch: int = 512,
        exact: bool = True,
        threads: int = 1,
    ) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = context * sequences, sequences
        params.n_batch = params.n_ubatch = batch
        params.n_gpu_layers = 0
        params.warmup = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = -1
        if exact:
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)

    def complete(self, ids: list[int], **options: Any) -> list[dict[str, Any]]:
        """
        What the server says of each token that it writes after the tokens `ids`, by default of one greedy token. It
        says nothing of tokens that end inside a character.
        """
        request = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "cache_prompt": False, "logprobs": 1} | options
        answer = self.server.handle_completions(request)
        if "choices" not in answer:
            raise ValueError(f"llama.cpp does not answer: {answer}")
        told = answer["choices"][0]["logprobs"]
        return [] if told is None else list(told["content"])

    def log_probabilities(self, ids: list[int], count: int) -> dict[int, float] | None:
        """Those of the `count` most likely tokens after `ids`; None where the server does not tell."""
        told = self.complete(ids, logprobs=count)
        return {entry["id"]: entry["logprob"] for entry in told[0]["top_logprobs"]} if told else None

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The tokens of which it tells among the `count` that it writes after `ids`; none of them ends the text."""
        return [token["id"] for token in self.complete(ids, max_tokens=count, ignore_eos=True)]


def equal_tokens(told: list[int], wanted: list[int], tokenizer: Any) -> tuple[int, int]:
    """How many of the tokens `wanted` llama.cpp wrote, too, before it wrote another, and of how many it tells."""
    place, silent = 0, 0
    for i, token in enumerate(wanted):
        if place < len(told) and told[place] == token:
            place += 1
        elif _is_part(token, tokenizer):
            silent += 1
        else:
            return place, i + sum(not _is_part(later, tokenizer) for later in wanted[i:]) - silent
    return place, len(wanted) - silent


def _is_part(token: int, tokenizer: Any) -> bool:
    """Whether a token has only a part of a character in it."""
    return "\ufffd" in tokenizer.decode([token])


def run_apart(
    path: Path, prompts: list[list[int]], *, count: int, prompt: list[int], new_tokens: int
) -> tuple[list[dict[int, float]], list[int]]:
    """
    [`LlamaCpp.log_probabilities`] of `count` tokens after each of `prompts`, and [`LlamaCpp.greedy`] after `prompt`,
    of a model in a process of its own. A `ValueError` says how that ended where it ended without an answer.
    """
    context = max(map(len, [*prompts, prompt])) + new_tokens
    asked = {"path": str(path), "context": context, "prompts": prompts, "count": count, "prompt": prompt}
    ended = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(asked | {"new_tokens": new_tokens}),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        lines = [line for line in ended.stderr.splitlines() if "ASSERT" in line or "rror" in line]
        said = lines[0].strip() if lines else f"it said nothing, exit code {ended.returncode}"
        raise ValueError(f"llama.cpp ({llama_cpp_version()}) does not run the file: {said}.")
    answer = json.loads(ended.stdout.splitlines()[-1])
    told = [{int(token): value for token, value in entry.items()} for entry in answer["log_probabilities"]]
    return told, answer["greedy"]


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    engine = LlamaCpp(Path(asked["path"]), context=asked["context"], threads=max(1, (os.cpu_count() or 2) // 2))
    found = [engine.log_probabilities(ids, asked["count"]) or {} for ids in asked["prompts"]]
    return {"log_probabilities": found, "greedy": engine.greedy(asked["prompt"], asked["new_tokens"])}


if __name__ == "__main__":
    json.dump(_answer(json.load(sys.stdin)), sys.stdout)

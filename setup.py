"""Metadata of the package. Settings of the tools are in pyproject.toml, tested versions in constraints.txt."""

import os
import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
# Read as text: importing the package here would need torch at build time.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "hf_hybrid" / "__init__.py").read_text("utf-8"), re.M)[1]

EVAL = ["lm-eval>=0.4.13,<0.5"]
GGUF = "gguf>=0.19"
TEST = [
    *EVAL,
    "bitsandbytes; sys_platform == 'linux'",
    "build",
    GGUF,
    "mypy",
    "pytest",
    "pytest-xdist",
    "ruff",
    "setuptools>=77",
    "types-PyYAML",
    # Exported hybrids are run in llama.cpp: wheels of 34 MB, nothing is built.
    "xllamacpp>=2026.10.11549; sys_platform == 'linux'",
]


def packages(root: str) -> list[str]:
    """Names that the package in the folder `root`, and those inside it, are installed under."""
    # Not setuptools' find_packages, which follows the symlinks in hf_hybrid/.
    folders = [Path(folder).relative_to(ROOT) for folder, _, files in os.walk(ROOT / root) if "__init__.py" in files]
    return [".".join(path.parts if root == "hf_hybrid" else ("hf_hybrid", *path.parts)) for path in sorted(folders)]


setup(
    name="hf_hybrid",
    version=VERSION,
    description="Turn a softmax-attention language model into a hybrid of softmax and linear attention.",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="The hf_hybrid authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["linear attention", "hybrid attention", "distillation", "transformers", "language models"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # modeling/, trainers/ and recipes/ lie at the root and are installed inside hf_hybrid. What is installed depends
    # on this mapping alone; the symlinks in hf_hybrid/ serve what reads the tree (tests, type checkers, editors).
    packages=[*packages("hf_hybrid"), *packages("modeling"), *packages("trainers"), "hf_hybrid.recipes"],
    package_dir={
        "hf_hybrid": "hf_hybrid",
        "hf_hybrid.modeling": "modeling",
        "hf_hybrid.trainers": "trainers",
        "hf_hybrid.recipes": "recipes",
    },
    package_data={
        "hf_hybrid": ["py.typed", "embedded_teacher/*"],
        "hf_hybrid.recipes": ["*.yaml", "accelerate/*.yaml"],
    },
    include_package_data=False,
    zip_safe=False,
    python_requires=">=3.11",
    install_requires=[
        "accelerate>=1.1",
        "datasets>=3",
        "huggingface_hub",
        "matplotlib",
        "packaging",
        "peft",
        "psutil",
        "pyyaml",
        "rich",
        "safetensors",
        "torch>=2.7",  # tested with 2.13
        # Not 5.18: its Trainer knows no `loss_is_scaled_for_ga`, and would leave our losses undivided under gradient
        # accumulation, too large by the number of micro-batches. The tests run with the floor, with the pinned one,
        # and with the newest that the index serves: make test-versions.
        "transformers>=5.19.0,<6",
        "trl>=1.16",
    ],
    extras_require={
        # evaluate --tasks; the tasks after RULER that lm-eval itself has also need the packages of its own extra.
        "eval": ["lm-eval[ruler]>=0.4.13,<0.5"],
        # Triton 3.4.0 to 3.7.0 computes wrong gradients on Hopper.
        "gpu": ["flash-linear-attention>=0.6,<0.7", "triton>=3.7.1"],
        # To read teachers from GGUF files.
        "gguf": [GGUF],
        # The plugin; it is a subclass of a layer of vLLM's, whose arguments change with its releases.
        "vllm": ["vllm>=0.32,<0.34"],
        "test": TEST,
        "dev": [*TEST, "pre-commit"],
    },
    entry_points={
        "console_scripts": ["hf-hybrid = hf_hybrid.__main__:run_and_exit"],
        "vllm.general_plugins": ["hf_hybrid = hf_hybrid.serving.vllm_plugin:register"],
    },
)

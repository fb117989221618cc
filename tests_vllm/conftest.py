"""Hybrids in vLLM on the CPU, in bf16, through the plugin that is installed: `make test-vllm`.

The tests of `tests/` do not belong into this environment: it has the torch and the transformers that vLLM pins, and
triton, with which transformers' own linear-attention models would call fla's kernels on CPU tensors.
"""

import os


# Read when vLLM is imported. One process, so that a test sees the model's own error; the threads stay where they are.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}

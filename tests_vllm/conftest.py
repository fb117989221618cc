"""Hybrids in vLLM on the CPU, in bf16, through the plugin that is installed: `make test-vllm`.

The tests of `tests/` do not belong into this environment: it has the torch and the transformers that vLLM pins, and
triton, with which transformers' own linear-attention models would call fla's kernels on CPU tensors.
"""

import importlib.util
import os
import sys
from pathlib import Path


# Read when vLLM is imported. One process, so that a test sees the model's own error; the threads stay where they are.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
if importlib.util.find_spec("torchvision") is None:
    STAND_IN = str(Path(__file__).with_name("stand_in"))
    sys.path.append(STAND_IN)
    # vLLM looks at a model's class in another process.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), STAND_IN]))

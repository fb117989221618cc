"""
What the server of forked processes does before it forks (`FORKS` in runs.py), so that no fork has to: it imports what
a run needs, and loads a model, for whose first one transformers compiles a thousand patterns.
"""

import gc
import tempfile

import matplotlib.pyplot as plt
from teachers import tiny_teacher
from transformers import AutoModelForCausalLM

import hf_hybrid.run.plots
import hf_hybrid.run.runner  # noqa: F401


with tempfile.TemporaryDirectory() as folder:
    tiny_teacher("qwen3").save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    figure = plt.figure()
    figure.add_subplot()
    figure.savefig(f"{folder}/empty.png")
    plt.close(figure)
gc.collect()
gc.freeze()  # accelerate collects garbage after every training

"""A hybrid of the embedded teacher, short texts and chats, and settings of a few steps for TRL's trainers."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset

import hf_hybrid as hh


# With the markers that assistant-only loss needs; the embedded tokenizer has no template of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '# ' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message.content + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '# assistant\\n' }}{% endif %}"
)
TEXTS = [
    "import os\nimport sys\n",
    "def get(self, name):\n    return self._values[name]\n",
    "x = 1",
    'class Reader:\n    """Reads lines."""\n\n    def __init__(self, path):\n        self.path = path\n',
    "for line in lines:\n    if not line:\n        continue\n    yield line.strip()\n",
    "return None\n",
]
CHATS = [
    [("user", "Name a module."), ("assistant", "os")],
    [("user", "How does one read a file?"), ("assistant", "with open(path) as file:\n    text = file.read()")],
    [("user", "Import sys."), ("assistant", "import sys"), ("user", "And os."), ("assistant", "import os")],
    [("system", "Be brief."), ("user", "What is None?"), ("assistant", "None is a value.")],
]


def hybrid(layers: tuple[int, ...] = (2, 3), **kwargs: Any) -> Any:
    """A fresh hybrid of the embedded teacher, in training mode, with decays that differ from token to token."""
    torch.manual_seed(0)
    return hh.convert(hh.embedded_teacher(), list(layers), **kwargs).train()


def tokenizer() -> Any:
    """The embedded tokenizer with a chat template."""
    own = hh.embedded_tokenizer()
    own.chat_template = CHAT_TEMPLATE
    return own


def texts() -> Dataset:
    return Dataset.from_dict({"text": TEXTS})


def chats() -> Dataset:
    return Dataset.from_dict({"messages": [[{"role": r, "content": c} for r, c in chat] for chat in CHATS]})


def preferences() -> Dataset:
    """Prompts and two completions of different lengths; no token reaches over the end of a prompt."""
    rows = [
        ("import os\n", "import sys\n", "nothing at all\n"),
        ("x = 1\ny = x\n", "z = x + y\n", "ever"),
        ("return\n", "class Reader:\n    def read(self):\n        return None\n", "Reader"),
    ]
    return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows])


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": ["import ", "def get(self):\n    return ", "x = ", "class Reader"]})


def settings(folder: Any, rows: int, **changes: Any) -> dict[str, Any]:
    """Arguments that all of TRL's configs share: three fp32 steps on the CPU, each on all rows, every loss logged."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": rows,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        **changes,
    }


def losses(trainer: Any, key: str = "loss") -> list[float]:
    """What a trainer has logged, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def nats(model: Any, ids: list[int]) -> torch.Tensor:
    """Cross entropy of each token of one document after the first, `[T - 1]`, by a plain forward of it alone."""
    row = torch.tensor([ids])
    logits = model(row, use_cache=False).logits[0, :-1].double()
    return -logits.log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]


def plain_training(model: Any, loss: Callable[[Any], torch.Tensor], steps: int = 3, rate: float = 1e-3) -> list[float]:
    """The losses of a training loop with nothing in it: what a trainer's must be. `model` is left as it was."""
    own = copy.deepcopy(model)
    parameters = [p for p in own.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(own)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        history.append(float(value.detach()))
    return history

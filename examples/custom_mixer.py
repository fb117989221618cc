"""
A hybrid with a mixer of one's own: convert with it, distil it a little, save it, load it.

The mixer is `retention.py`: a subclass of `LinearAttention` with its recurrence, and a subclass of `HybridForCausalLM`
that lists it. Trainers, caches, padding and packing work with it as with any other. Its checkpoint carries
`retention.py` and loads

- with `RetentionHybrid.from_pretrained(folder)`, here;
- with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` in a process that has not imported
  hf_hybrid (which would take its own class, and say that it lacks the mixer): where hf_hybrid is installed as it is,
  and where only torch and transformers are after `make_portable` below.

    python examples/custom_mixer.py --output retention_hybrid --max-steps 20
"""

import argparse
import shutil
from pathlib import Path

from retention import RetentionHybrid
from transformers import set_seed

import hf_hybrid as hh
from hf_hybrid.demo_data import demo_rows


MODELING = Path(hh.__file__).parent / "modeling"


def make_portable(folder: str) -> None:
    """Puts the code that `retention.py` takes from hf_hybrid beside it, and lets it take it from there."""
    for file in MODELING.glob("*.py"):
        if file.name != "__init__.py":  # it registers the classes here, and does not travel
            shutil.copy(file, folder)
    own = Path(folder, "retention.py")
    own.write_text(own.read_text().replace("from hf_hybrid.modeling.", "from ."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="retention_hybrid", help="folder to save to")
    parser.add_argument("--max-steps", type=int, default=20)
    args = parser.parse_args()

    set_seed(0)
    teacher, tokenizer = hh.embedded_teacher(), hh.embedded_tokenizer()
    student = hh.convert(teacher, [2, 3], mixer="retention", model_class=RetentionHybrid)
    rows = demo_rows(tokenizer, 256, 64, seed=0, split="train")
    held_out = demo_rows(tokenizer, 256, 8, seed=0, split="report")
    before = hh.held_out_kl(student, teacher, held_out)
    hh.DistillationTrainer(
        model=student,
        teacher=teacher,
        args=hh.DistillationConfig(
            args.output,
            max_steps=args.max_steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            mixer_learning_rate=3e-3,
            save_strategy="no",
        ),
        train_dataset=rows,
    ).train()
    after = hh.held_out_kl(student, teacher, held_out)
    print(f"KL in nats per token: {before.mean:.3f} -> {after.mean:.3f}")
    student.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    loaded = RetentionHybrid.from_pretrained(args.output)
    print(f"Loaded again: {[type(layer.self_attn).__name__ for layer in loaded.base_model.layers]}")
    make_portable(args.output)


if __name__ == "__main__":
    main()

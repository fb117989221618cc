"""
Fine-tunes a finished hybrid on instructions with TRL, as anyone would: the checkpoint's own code, no teacher.

    python benchmarks/smollm2/chat.py RUN/model --data train.jsonl --held-out held_out.jsonl --output DIR

Writes the model, its tokenizer, and `chat.json`: loss on held-out instructions before and after, and answers to a few
prompts.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_hybrid.trainers.durable import write_json


PROMPTS = (
    "What are the three states of matter?",
    "Write a short note to a friend who has just moved to a new city.",
    "Explain to a child why the sky is blue.",
    "Write a Python function that returns the largest number of a list.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the hybrid")
    parser.add_argument("--data", required=True, help="a .jsonl file with `messages`")
    parser.add_argument("--held-out", required=True, help="another one, which is measured on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--trial", action="store_true", help="two steps of two short rows")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    files = {"train": options.data, "test": options.held_out}
    data: Any = load_dataset("json", data_files=files).select_columns("messages")
    if options.trial:
        data = {name: rows.select(range(min(4, len(rows)))) for name, rows in data.items()}
    args = SFTConfig(
        output_dir=str(options.output / "trainer"),
        max_steps=2 if options.trial else options.steps,
        per_device_train_batch_size=2 if options.trial else 16,
        per_device_eval_batch_size=2 if options.trial else 16,
        max_length=64 if options.trial else 1024,
        learning_rate=1e-5,
        lr_scheduler_type="cosine",
        seed=options.seed,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"].select(range(min(64, len(data["test"])))) if not options.trial else data["test"],
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.to(torch.bfloat16 if torch.cuda.is_available() else torch.float32).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    # As a user would load it, which is what is measured from here on.
    loaded = (
        AutoModelForCausalLM.from_pretrained(options.output, trust_remote_code=True).to(trainer.args.device).eval()
    )
    answers = {prompt: answer(loaded, tokenizer, prompt, 16 if options.trial else 160) for prompt in PROMPTS}
    about = {"steps": args.max_steps, "rows": args.max_steps * args.per_device_train_batch_size, "answers": answers}
    about |= {"learning_rate": args.learning_rate, "loss_before": before, "loss_after": after}
    write_json(options.output / "chat.json", about | {"trial": options.trial})


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """What the model says to one message, greedily."""
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    written = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()

"""
Trains a hybrid on preferences with TRL's DPOTrainer.

The reference model is a copy of the hybrid as it was. (TRL would load one from the path that a model came from; a
hybrid that was converted in memory has none, and its teacher would be the wrong one.) Without `--dataset` it learns
to end a Python line early.

    python examples/dpo.py --model my_run/model --dataset preferences.jsonl --output tuned --max-steps 100
"""

import argparse
import copy

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import hf_hybrid as hh


def short_lines() -> Dataset:
    """Prompts, and a short and a long way to go on."""
    names = ["path", "name", "value", "line", "key", "text", "index", "data"]
    return Dataset.from_list(
        [
            {"prompt": f"{name} = ", "chosen": "None\n", "rejected": f"None if {name} is None else str({name})\n"}
            for name in names
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder or Hub id of a hybrid, or 'embedded'")
    parser.add_argument("--dataset", help="a .jsonl file with 'prompt', 'chosen' and 'rejected'")
    parser.add_argument("--output", default="dpo", help="folder to save to")
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--beta", type=float, default=0.1)
    args = parser.parse_args()

    if args.model == "embedded":
        model, tokenizer = hh.convert(hh.embedded_teacher(), [2, 3]), hh.embedded_tokenizer()
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    dataset = load_dataset("json", data_files=args.dataset, split="train") if args.dataset else short_lines()
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(
            output_dir=args.output,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            beta=args.beta,
            learning_rate=1e-5,
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(args.output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.4f} (log 2, policy and reference being equal) -> {losses[-1]:.4f}; saved {args.output}.")


if __name__ == "__main__":
    main()

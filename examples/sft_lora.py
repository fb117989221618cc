"""
Fine-tunes a hybrid with TRL's SFTTrainer and LoRA on softmax and linear layers alike, and merges the adapter.

Documents are packed into rows without seeing one another. Without `--dataset` it trains on Python's standard library.

    python examples/sft_lora.py --model my_run/model --dataset texts.jsonl --output tuned --max-steps 100
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hf_hybrid as hh
from hf_hybrid.demo_data import demo_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder or Hub id of a hybrid, or 'embedded'")
    parser.add_argument("--dataset", help="a .jsonl file with texts under 'text' or chats under 'messages'")
    parser.add_argument("--output", default="sft_lora", help="folder of the adapter and of the merged model")
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--mixers", default="lora", choices=["lora", "gates", "full"], help="see hf_hybrid.lora_config"
    )
    args = parser.parse_args()

    if args.model == "embedded":
        model, tokenizer = hh.convert(hh.embedded_teacher(), [2, 3]), hh.embedded_tokenizer()
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    dataset: Dataset = (
        load_dataset("json", data_files=args.dataset, split="train")
        if args.dataset
        else demo_rows(tokenizer, args.max_length, 64, seed=0, split="train")
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=args.output,
            max_steps=args.max_steps,
            max_length=args.max_length,
            packing=True,
            per_device_train_batch_size=args.batch_size,
            learning_rate=1e-3,  # of the adapter; a model in full wants a hundredth of it
            bf16=torch.cuda.is_available(),
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=hh.lora_config(model, r=args.rank, lora_alpha=2 * args.rank, mixers=args.mixers),
    )
    print(hh.adapter_coverage(trainer.model))
    trainer.train()
    trainer.save_model(f"{args.output}/adapter")
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(f"{args.output}/merged")
    tokenizer.save_pretrained(f"{args.output}/merged")
    print(f"Saved {args.output}/adapter and, a hybrid like any other, {args.output}/merged.")


if __name__ == "__main__":
    main()

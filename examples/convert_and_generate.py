"""
Converts a softmax model into a hybrid, shows what became of its tensors, generates, saves and loads it again.

No training: the more layers become linear, the further the text is from the teacher's. `hf-hybrid run` and the
trainers close that gap.

    python examples/convert_and_generate.py --teacher embedded --full-attention-layers 2 3 --output hybrid
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, set_seed

import hf_hybrid as hh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="embedded", help="Hub id, folder, or 'embedded'")
    parser.add_argument(
        "--full-attention-layers", nargs="*", type=int, default=[2, 3], help="layers that keep softmax"
    )
    parser.add_argument("--mixer", default="gated_deltanet", help="what the other layers become")
    parser.add_argument("--prompt", default="def read(self, ", help="text to go on with")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--output", default="hybrid", help="folder to save to")
    args = parser.parse_args()

    set_seed(0)  # the tensors that the teacher does not have are drawn at random
    teacher, tokenizer = hh.load_pair(args.teacher)
    hybrid = hh.convert(teacher, args.full_attention_layers, mixer=args.mixer)
    print(hybrid.conversion_report)

    inputs = tokenizer(args.prompt, return_tensors="pt").to(hybrid.device)
    for name, model in (("teacher", teacher), ("hybrid", hybrid)):
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        print(f"--- {name}\n{tokenizer.decode(output[0])}")

    hybrid.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    # Where hf_hybrid is not installed, trust_remote_code=True does the same.
    loaded = AutoModelForCausalLM.from_pretrained(args.output, dtype=hybrid.dtype).to(hybrid.device)
    with torch.no_grad():
        difference = (loaded(**inputs).logits - hybrid(**inputs).logits).abs().max().item()
    print(f"--- saved to {args.output}; loaded again, the logits differ by {difference}")


if __name__ == "__main__":
    main()

"""
Pushes a hybrid with its code, tokenizer and card to the Hub, and loads it from there at the pushed revision.

`hf auth login` or HF_TOKEN gives the right to write. `hf-hybrid push my_run NAME/hybrid` does the same for a finished
run, whose card then has what the run measured.

    python examples/push_to_hub.py --model my_run/model --repo NAME/hybrid
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_hybrid as hh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder of a hybrid, or 'embedded'")
    parser.add_argument("--repo", required=True, help="repository to push to; it is made if need be")
    parser.add_argument("--private", action="store_true", help="make it a private one")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        if args.model == "embedded":
            hh.save_model(hh.convert(hh.embedded_teacher(), [2, 3]), hh.embedded_tokenizer(), folder)
        pushed = hh.push(folder if args.model == "embedded" else Path(args.model), args.repo, private=args.private)
    print(f"Pushed {len(pushed.files)} files, {sum(pushed.files.values())} bytes: {pushed.url}")

    # What anyone does who has transformers. A pinned revision runs the code that you have read, and no other.
    model = AutoModelForCausalLM.from_pretrained(pushed.repo_id, revision=pushed.commit, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(pushed.repo_id, revision=pushed.commit)
    inputs = tokenizer("import ", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]))


if __name__ == "__main__":
    main()

"""What fewer bits cost a softmax teacher, its hybrid with default mixers, and the native one that can be exported.

    python -m benchmarks.quantised
    python -m benchmarks.quantised --teacher Qwen/Qwen3-0.6B --text 'texts/*.txt' --keep 6 13 20 27 --block 1024 \\
        --batch 16 --budgets 600 --distill-steps 2400 --align-lr 1e-3 --mixer-lr 1e-3 --lr 3e-5
    python -m benchmarks.quantised --trial

Trains both hybrids as benchmarks/native.py does, with one seed, then measures KL(teacher || model) on held-out rows
with the weights as they are, with the blocks of GGUF files (Q8_0, Q4_0; every matrix, as a file has them) and through
bitsandbytes (int8, nf4; its linear layers). The teacher's own rows say what rounding alone costs. `loss` is the KL
beyond that of the same model in fp32, over the same rows, with its standard error. Adds to a JSON file.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from typing import Any

import gguf
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_hybrid as hh
from benchmarks.native import about_run, converted, parse_args
from benchmarks.starts import Study
from hf_hybrid.exporting.llama_cpp import type_of
from hf_hybrid.trainers.held_out import HeldOut, standard_error
from hf_hybrid.trainers.precision import AS_LOADED


BLOCKS = ("q8_0", "q4_0")
LIBRARY = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


def trained(study: Study, name: str, seed: int) -> Any:
    """A hybrid of the teacher with the mixer options `name`, aligned and distilled."""
    args = study.args
    torch.manual_seed(seed)
    student = converted(study.teacher, name)
    rows = study.rows.train(seed, "align", args.calibration_rows)
    hh.calibrate(student, study.teacher, rows, batch_size=args.batch, precision=study.precision)
    study.align(student, study.rows.train(seed, "align", max(args.budgets) * args.batch), seed, lambda step: None)
    student.set_full_attention_layers(args.keep, study.teacher)
    study.distill(student, study.rows.train(seed, "train", args.distill_steps * args.batch), seed)
    return student.eval()


@torch.no_grad()
def in_blocks(model: Any, file_type: str) -> Any:
    """A copy of `model` with every matrix as a GGUF file of that type has it."""
    rounded = copy.deepcopy(model)
    for name, parameter in rounded.named_parameters():
        rows = parameter.detach().float().cpu().numpy()
        # The small projections of decay and writes stay in fp32 in a file, and so they do here.
        if rows.ndim == 2 and not name.endswith(("a_proj.weight", "b_proj.weight")):
            kind = type_of(gguf, name, rows, file_type)
            there = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
            parameter.copy_(torch.from_numpy(there))
    rounded.tie_weights()
    return rounded


def through_library(model: Any, how: str, device: str) -> Any:
    """`model` with the weights that bitsandbytes stores of it, plain again; its kernels round activations, too."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        settings = BitsAndBytesConfig(**LIBRARY[how])
        stored = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map=device)
        return stored.dequantize().float().eval()


def measured(study: Study, models: dict[str, Any]) -> list[dict[str, Any]]:
    """One record for each model and each way to store it."""
    records = []
    held_out = HeldOut(study.rows.held_out, study.teacher, study.args.batch, AS_LOADED)
    for name, model in models.items():
        exact = held_out.kl(model)
        for how in ("fp32", *BLOCKS, *LIBRARY):
            if how == "nf4" and study.args.device == "cpu" and study.teacher.config.hidden_size % 64:
                print("nf4 is left out: on a CPU bitsandbytes mixes up rows of a width that 64 does not divide")
                continue
            if how == "fp32":
                kl = exact
            else:
                stored = in_blocks(model, how) if how in BLOCKS else through_library(model, how, study.args.device)
                kl = held_out.kl(stored)
            lost = [mine - its for mine, its in zip(kl, exact, strict=True)]
            record = {"model": name, "weights": how, "kl": statistics.fmean(kl), "loss": statistics.fmean(lost)}
            records.append(record | {"sem": standard_error(lost)})
            print(json.dumps(records[-1]), flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args, began = parse_args(parser, "quantised.json", variants=("default", "native")), time.perf_counter()
    study = Study(args)
    models = {"teacher": study.teacher} | {name: trained(study, name, args.first_seed) for name in args.variants}
    records = measured(study, models)
    about = about_run(args, study, "quantised") | {"seconds": round(time.perf_counter() - began)}
    there = json.loads(args.output.read_text()) if args.output.is_file() else []
    there = [found for found in there if found["teacher"] != about["teacher"]]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps([*there, about | {"records": records}], indent=1) + "\n")
    table = Table("model", "weights", "KL (nats/token)", "loss by rounding", title=about["teacher"])
    for record in records:
        loss = "" if record["weights"] == "fp32" else f"{record['loss']:+.4f} ± {record['sem']:.4f}"
        table.add_row(record["model"], record["weights"], f"{record['kl']:.4f}", loss)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

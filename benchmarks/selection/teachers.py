"""Trains the teachers that the selection benchmark is run on: many at once on one GPU, each as a CUDA graph.

    python -m benchmarks.selection.teachers --only qwen3-10-start llama-8-start --steps 3200 --output STARTS
    python -m benchmarks.selection.teachers --only qwen3-10 llama-8 --starts STARTS --ramp 0.5 --steps 9600 \\
        --compile --device cuda --output TEACHERS

The recipes (selection_recipes.py) ask for what separates selectors: several families and depths, layers that can stand
in for one another (`twins`, `drop`), recall of two and three hops, retrieval in layers that no rule of thumb names
(`late`: these layers' attention is switched on half-way; `order`: new layers between those of another teacher), more
text. Those named planted-* start with the heads of recall in place, and a CPU trains each in minutes: `--steps 500
--ramp 0.3`. They learn as the embedded teacher does (`examples/train_teacher.py`): rows of 256 tokens, tasks that
grow. The tokenizer is the embedded one. `--seconds` trains by the clock.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import hf_hybrid as hh
from hf_hybrid.synthetic import associative_recall, chained_recall, copying, ordinary_token_ids, task_accuracy

from .planting import plant
from .recipes import RECIPES, TASKS, Recipe


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import train_teacher as one  # noqa: E402


STEPS_AT_ONCE = 64  # steps whose data are drawn together
FOLDER = "benchmarks/teachers"  # those that are finished
SWITCH_ON = 0.45  # share of training after which late layers attend


def block(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, gate: Tensor) -> Tensor:
    """
    One decoder layer. `gate` `[rows, 2]` scales its attention's output and its attention's logits. Called without a
    mask: no host sync.
    """
    size, sharpness = (part[:, None, None] for part in gate.unbind(-1))
    root = sharpness.sqrt()  # rotary embeddings multiply queries and keys alike
    rope = (cos * root, sin * root)
    mixed = layer.self_attn(layer.input_layernorm(x), position_embeddings=rope, attention_mask=None)[0]
    x = x + size * mixed
    return x + layer.mlp(layer.post_attention_layernorm(x))


def gated_loss(model: Any, run: Any, input_ids: Tensor, weights: Tensor, gates: Tensor) -> Tensor:
    """Next-token loss, as `one.weighted_loss` where all `gates` `[rows, layers, 2]` are 1; `run` is [`block`]."""
    backbone = model.model
    x = backbone.embed_tokens(input_ids)
    cos, sin = backbone.rotary_emb(x, torch.arange(input_ids.shape[1], device=x.device)[None])
    # Contiguous: strides that depend on the number of layers would compile `run` for each number.
    for layer, gate in zip(backbone.layers, gates.transpose(0, 1).contiguous(), strict=True):
        x = run(layer, x, cos, sin, gate)
    logits = model.lm_head(backbone.norm(x))[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def lay_out(model: Any, source: Any, order: tuple[int, ...]) -> None:
    """
    Copies `source` into `model`, its layers in `order`; a layer -1 keeps its initialisation but adds nothing, and of
    two copies only the last has the MLP, so that `model` is `source` where one of the two attends.
    """
    model.model.embed_tokens.load_state_dict(source.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(source.model.norm.state_dict())
    order = order or tuple(range(len(source.model.layers)))
    for i, (layer, origin) in enumerate(zip(model.model.layers, order, strict=True)):
        if origin < 0:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            continue
        old = source.model.layers[origin]
        for name in ("self_attn", "input_layernorm", "post_attention_layernorm"):
            getattr(layer, name).load_state_dict(getattr(old, name).state_dict())
        size = old.mlp.up_proj.weight.norm(dim=1) * old.mlp.down_proj.weight.norm(dim=0)
        kept = size.topk(layer.mlp.up_proj.out_features).indices.sort().values
        layer.mlp.gate_proj.weight.copy_(old.mlp.gate_proj.weight[kept])
        layer.mlp.up_proj.weight.copy_(old.mlp.up_proj.weight[kept])
        layer.mlp.down_proj.weight.copy_(old.mlp.down_proj.weight[:, kept])
        if origin in order[i + 1 :]:
            layer.mlp.down_proj.weight.zero_()


def draw_gates(recipe: Recipe, shape: tuple[int, ...], progress: float, generator: torch.Generator) -> Tensor:
    """
    What every layer's attention is scaled by, `[*shape, layers, 2]`, see [`block`].

    Of a pair of twins at most one is impaired (each in two rows of five, never both): its output shrinks, often to
    nothing, or its logits do, so that it blurs as a linear layer does. Only the second makes linear layers harmless:
    a teacher that does without a layer can still be upset by what a bad copy of this layer adds.
    """
    device = generator.device
    gates = torch.ones(*shape, recipe.layers, 2, device=device)
    size, sharpness = gates.unbind(-1)
    if progress < SWITCH_ON:
        size[..., list(recipe.late)] = 0.0
    if progress >= recipe.impaired_from and recipe.drop:
        size *= torch.rand(size.shape, generator=generator, device=device) >= recipe.drop
    if progress >= recipe.impaired_from:
        for first, second in zip(recipe.twins[::2], recipe.twins[1::2], strict=True):
            which, how, less = torch.rand(3, *shape, generator=generator, device=device).unbind()
            shrunk = torch.where(how < 0.3, 0.0, torch.where(how < 0.5, less, 1.0))
            blurred = torch.where(how < 0.4, 1.0, 0.4 * less.square())
            for twin, off in ((first, which < 0.4), (second, which >= 0.6)):
                size[..., twin] *= torch.where(off, shrunk, 1.0)
                sharpness[..., twin] = torch.where(off, blurred, 1.0)
    return gates


class Trainee:
    """One teacher in training, with its inputs in fixed buffers so that a step can be replayed as a CUDA graph."""

    def __init__(self, recipe: Recipe, vocab_size: int, end_of_text: int, device: torch.device, run: Any) -> None:
        self.recipe, self.device, self.run = recipe, device, run
        torch.manual_seed(recipe.seed)
        shape = {k: getattr(recipe, k) for k in ("family", "layers", "hidden", "intermediate", "heads", "kv_heads")}
        self.model = one.build_model(vocab_size, end_of_text, head_dim=recipe.head_dim, **shape)
        for i, (previous, *matching) in enumerate(recipe.planted):
            plant(self.model, previous, matching, 100 * recipe.seed + i, enlarge=i == 0)
        self.model.to(device)
        matrices = [weight for weight in self.model.parameters() if weight.dim() > 1]
        vectors = [weight for weight in self.model.parameters() if weight.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        cuda = device.type == "cuda"
        rows = sum(recipe.rows)
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.95), fused=cuda, capturable=cuda)
        self.input_ids = torch.zeros(rows, one.LENGTH, dtype=torch.long, device=device)
        self.weights = torch.ones(rows, one.LENGTH, device=device)
        self.gates = torch.ones(rows, recipe.layers, 2, device=device)
        self.loss = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream() if cuda else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.data: tuple[Tensor, ...] = ()

    def step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = gated_loss(self.model, self.run, self.input_ids, self.weights, self.gates)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def capture(self) -> None:
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.optimizer.zero_grad(set_to_none=True)
                self.step()
            self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.step()

    def take(self, pool: dict[str, tuple[Tensor, Tensor]], progress: float, generator: torch.Generator) -> None:
        """Draws this teacher's rows for every step of `pool`, and which layers attend in which row."""
        parts = []
        for name, count in zip(TASKS, self.recipe.rows, strict=True):
            if count:
                rows, weights = pool[name]
                steps = torch.arange(len(rows), device=rows.device)[:, None]
                order = torch.rand(rows.shape[:2], generator=generator, device=rows.device).argsort(-1)
                chosen = order[:, :count]
                parts.append((rows[steps, chosen], weights[steps, chosen]))
        ids, weights = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        gates = draw_gates(self.recipe, ids.shape[:2], progress, generator)
        self.data = ids, weights, gates

    def advance(self, i: int, rate: float) -> None:
        ids, weights, gates = self.data
        self.input_ids.copy_(ids[i])
        self.weights.copy_(weights[i])
        self.gates.copy_(gates[i])
        self.rate.fill_(self.recipe.rate * rate)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self.step()


def draw_pool(
    steps: int,
    progress: float,
    ramp: float,
    most: dict[str, int],
    tokens: Tensor,
    token_ids: Tensor,
    generator: torch.Generator,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows and loss weights `[steps, rows, length]` of each task, twice as many rows as any teacher takes of it."""
    device = tokens.device
    sizes = 1 + min(5, int(6 * progress / ramp))  # sizes grow as in one.draw_batch
    drawn = torch.randint(sizes, (steps,), generator=generator, device=device)
    easier = torch.rand(steps, generator=generator, device=device) < 0.5
    levels = torch.where(easier, drawn, sizes - 1).tolist()
    pool = {}
    for name, count in most.items():
        ids = torch.empty(steps, 2 * count, one.LENGTH, dtype=torch.long, device=device)
        marked = torch.empty(steps, 2 * count, one.LENGTH, dtype=torch.bool, device=device)
        for level in sorted(set(levels)) if count else ():
            where = torch.tensor([i for i, other in enumerate(levels) if other == level], device=device)
            rows, mask = draw_task(name, 2 * count * len(where), level, tokens, token_ids, generator)
            ids[where], marked[where] = (x.view(len(where), 2 * count, one.LENGTH) for x in (rows, mask))
        pool[name] = ids, torch.where(marked, 1.0, one.UNPREDICTABLE)
    return pool


def draw_task(
    name: str, rows: int, level: int, tokens: Tensor, token_ids: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows of one task at one size, and which tokens can be predicted."""
    if name == "text":
        starts = torch.randint(tokens.numel() - one.LENGTH + 1, (rows, 1), generator=generator, device=tokens.device)
        ids = tokens[starts + torch.arange(one.LENGTH, device=tokens.device)].long()
        return ids, torch.ones_like(ids, dtype=torch.bool)
    if name == "recall":
        return associative_recall(rows, one.LENGTH, token_ids, generator, num_pairs=2 * 2**level)
    if name == "copying":
        return copying(rows, one.LENGTH, token_ids, generator, segment=4 * 2**level)
    chains = 2**level if level < 5 else None
    return chained_recall(rows, one.LENGTH, token_ids, generator, chains, hops=3 if name == "hops3" else 2)


@torch.no_grad()
def measure(model: Any, held_out: Tensor, token_ids: Tensor, rows: int) -> dict[str, float]:
    """The embedded teacher's metrics, and recall of three hops."""
    metrics = one.evaluate(model, held_out, token_ids, rows)
    generator = torch.Generator().manual_seed(one.EVALUATION_SEED + 1)
    metrics["hops3_256"] = task_accuracy(model, *chained_recall(rows, one.LENGTH, token_ids, generator, hops=3))
    return metrics


def save(trainee: Trainee, output: Path, record: dict[str, Any], held_out: Tensor, token_ids: Tensor) -> None:
    model = trainee.model.to(torch.bfloat16)  # what is measured is what is stored
    model.save_pretrained(output / trainee.recipe.name)
    stored = type(model).from_pretrained(output / trainee.recipe.name, dtype=torch.float32).to(trainee.device)
    metrics = {**measure(stored, held_out, token_ids, 128), "recipe": dataclasses.asdict(trainee.recipe), **record}
    (output / trainee.recipe.name / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    write_card(output / trainee.recipe.name)
    shown = {name: round(value, 3) for name, value in metrics.items() if isinstance(value, float)}
    print(trainee.recipe.name, json.dumps(shown), flush=True)


CARD = """---
license: apache-2.0
library_name: transformers
---

# {name}: a small teacher for the selection benchmark

{family}, {layers} layers, hidden size {hidden}, {heads} query and {kv_heads} key and value heads of dimension
{head_dim}; its tokenizer is the embedded teacher's. Stored in bfloat16; load it with `dtype=torch.float32`. A test
object.

Recipe (`benchmarks/selection/recipes.py`): {recipe}.
Trained for {steps} steps of rows of 256 tokens, {seconds} s beside {others} others on {device}
with torch {torch}{clock}:

    python -m benchmarks.selection.teachers --only {name}{starts} --steps {steps}{where} --output TEACHERS

{again}
Accuracy on 256 tokens: recall {recall_256:.3f}, two hops {chained_256:.3f}, three hops
{hops3_256:.3f}, copying {copying_256:.3f}; held-out Python source {text_loss:.3f} nats per token.

The weights are under the Apache License 2.0. The training text is the source of the Python standard library, which is
copyright of the Python Software Foundation and others, under the PSF License.
"""
ON_A_GPU = """\
Sums on a GPU vary in their order and the teachers trained together share their rows, so the same seed does not give
the same weights."""
ON_A_CPU = "Another build of torch sums in another order, so the same seed need not give the same weights."


def write_card(folder: Path) -> None:
    """The folder's model card, from its metrics."""
    metrics = json.loads((folder / "metrics.json").read_text())
    recipe = {key: value for key, value in metrics["recipe"].items() if value not in ([], None, 0.0)}
    own = ("seed", "rows", "drop", "twins", "late", "start", "order", "rate", "planted")
    values = {**metrics, **recipe, "others": metrics["trained_together"] - 1}
    values["recipe"] = ", ".join(f"{key} {recipe[key]}" for key in own if key in recipe)
    starts = "STARTS" if recipe.get("start", "").endswith("-start") else FOLDER
    values["starts"] = f" --starts {starts}" if recipe.get("start", "embedded") != "embedded" else ""
    values["starts"] += f" --ramp {metrics['ramp']}"
    on_cpu = metrics["device"] == "the CPU"
    values["where"] = "" if on_cpu else " --compile --device cuda"
    values["again"] = ON_A_CPU if on_cpu else ON_A_GPU
    values["clock"] = "; `--seconds` ended it, `--steps` gives as many" if metrics.get("by_the_clock") else ""
    (folder / "README.md").write_text(CARD.format(**values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", required=True, help="names of recipes (selection_recipes.py)")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--seconds", type=float, help="train for this long instead: progress then follows the clock")
    parser.add_argument("--starts", type=Path, help="folder of the teachers that recipes continue")
    parser.add_argument("--ramp", type=float, default=one.RAMP, help="share of training over which the tasks grow")
    parser.add_argument("--compile", action="store_true", help="compile one layer of each shape")
    parser.add_argument("--corpus", type=Path, help="see examples/train_teacher.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    corpus, description = one.load_corpus(args.corpus)
    tokenizer = hh.embedded_tokenizer()
    token_ids = ordinary_token_ids(tokenizer)
    recipes = [recipe for recipe in RECIPES if recipe.name in args.only]
    if len(recipes) != len(set(args.only)):
        raise ValueError(f"--only {args.only} names others than {[recipe.name for recipe in RECIPES]}.")
    torch._dynamo.config.recompile_limit = 64
    run = torch.compile(block, dynamic=False) if args.compile else block
    trainees = [Trainee(r, len(tokenizer), tokenizer.eos_token_id, device, run) for r in recipes]
    for trainee in trainees:
        if trainee.recipe.start == "embedded":
            lay_out(trainee.model, hh.embedded_teacher(), trainee.recipe.order)
        elif trainee.recipe.start:
            source = AutoModelForCausalLM.from_pretrained(args.starts / trainee.recipe.start, dtype=torch.float32)
            lay_out(trainee.model, source, trainee.recipe.order)
    if cuda and not args.eager:
        for trainee in trainees:
            trainee.capture()
    tokens = corpus["train"].to(device)
    most = {name: max(recipe.rows[i] for recipe in recipes) for i, name in enumerate(TASKS)}
    generator = torch.Generator(device).manual_seed(recipes[0].seed)
    print(f"{[sum(p.numel() for p in t.model.parameters()) for t in trainees]} parameters", flush=True)

    warmup = 200 if args.seconds else min(200, args.steps // 10)
    started, done, shown = time.time(), 0, 0.0
    while True:
        progress = (time.time() - started) / args.seconds if args.seconds else done / args.steps
        if progress >= 1:
            break
        count = STEPS_AT_ONCE if args.seconds else min(STEPS_AT_ONCE, args.steps - done)
        pool = draw_pool(count, progress, args.ramp, most, tokens, token_ids.to(device), generator)
        for trainee in trainees:
            trainee.take(pool, progress, generator)
        if cuda:
            torch.cuda.synchronize()
        for i in range(count):
            rate = min((done + i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * progress))
            for trainee in trainees:
                with torch.cuda.stream(trainee.stream):  # does nothing for None
                    trainee.advance(i, rate)
        if cuda:
            torch.cuda.synchronize()
        done += count
        if progress >= shown:
            shown += 0.05
            losses = " ".join(f"{trainee.loss.item():.2f}" for trainee in trainees)
            if progress > 0.1 and not any(trainee.loss.item() < 5.5 for trainee in trainees):
                raise RuntimeError(f"nothing is learned: losses {losses} at step {done}.")
            print(
                f"{progress:.2f} step {done} {(time.time() - started) / done * 1e3:.1f} ms/step  {losses}", flush=True
            )

    name = torch.cuda.get_device_name(device) if cuda else "the CPU"
    record: dict[str, Any] = {"steps": done, "device": name, "ramp": args.ramp}
    record["by_the_clock"] = args.seconds is not None
    record |= {"seconds": round(time.time() - started), "trained_together": len(recipes), "torch": torch.__version__}
    record |= {"transformers": transformers.__version__, "python_source": description["python"]}
    for trainee in trainees:
        save(trainee, args.output, record, corpus["held_out"], token_ids)


if __name__ == "__main__":
    main()

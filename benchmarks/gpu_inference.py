"""Prefill and decoding of a teacher beside a hybrid of it, and a layer beside those of others: a part of gpu.py.

    python benchmarks/gpu.py --part inference --inference decoding --contexts 4096 32768 131072 --seconds 200

Decoding runs as `generate(cache_implementation="static")` runs it on a GPU: the library's static cache, and the step
compiled and recorded as a CUDA graph.
"""

import argparse
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from decode import cache_bytes
from gpu_shared import Results, busy_ms, make_teacher, median_ms, peak_mb
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import hf_hybrid as hh
from hf_hybrid.modeling.library import cache_argument
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.modeling.state_cache import count_tokens_in
from hf_hybrid.run.kernel_tuning import alone_on_the_device


# What makes a row of each part another row.
KEYS = {
    "prefill": ("model", "how", "context"),
    "decoding": ("model", "how", "attention", "context", "batch"),
    "layers": ("impl", "mode"),
}
KINDS = ("decoding", "prefill", "layers", "regions")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--inference", nargs="+", choices=KINDS, default=KINDS, help="what of that part, in this order"
    )
    parser.add_argument("--attention", choices=("sdpa", "sums"), default="sdpa", help="of both models in decoding")
    parser.add_argument(
        "--seconds", type=int, default=1_000_000, help="after which no cell of inference or training begins"
    )
    parser.add_argument(
        "--alone", action=argparse.BooleanOptionalAction, default=True, help="decoding, of one sequence too"
    )
    parser.add_argument("--memory-share", type=float, default=0.8, help="of free memory, for caches of many sequences")
    parser.add_argument("--backend", help="of torch.compile; on a CPU eager, otherwise inductor")
    parser.add_argument("--dynamic", action=argparse.BooleanOptionalAction, default=True, help="of torch.compile")


def inference(args: argparse.Namespace, results: Results) -> None:
    """
    A teacher beside its hybrid, one layer beside those of others, and prefill once more with what lies around the
    attention compiled; `--inference` chooses among the four.
    """
    for what in args.inference:
        {"decoding": decoding, "prefill": prefill, "layers": layers, "regions": regions}[what](args, results)
        free_memory(args)


def prefill(args: argparse.Namespace, results: Results, how: str = "eager") -> None:
    """
    A prompt into an empty cache, the models taking turns; and what softmax alone takes of it, for what a hybrid can
    gain at most.
    """
    teacher = make_teacher(args)
    models = {"teacher": teacher, "hybrid": hybrid_of(args, teacher)}
    if how == "regions":
        for layer in [layer for model in models.values() for layer in decoder_layers(model)]:
            for module in layer.children():
                if module is not layer.self_attn:  # with a cache its code is compiled anew for every layer
                    module.compile(**compiler(args) | {"mode": None})
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        for context in args.contexts:
            if out_of_time(args, f"{how} prefill of {context} tokens"):
                continue
            try:
                prefill_of(args, results, how, models, context)
            except torch.OutOfMemoryError:
                sys.stderr.write(f"{how} prefill of {context} tokens is left out: out of memory\n")
            free_memory(args)


def regions(args: argparse.Namespace, results: Results) -> None:
    prefill(args, results, "regions")


def prefill_of(
    args: argparse.Namespace, results: Results, how: str, models: dict[str, PreTrainedModel], context: int
) -> None:
    ids = torch.randint(args.sizes["vocab_size"], (1, context), device=args.device)
    times: dict[str, list[float]] = {name: [] for name in models}
    sizes: dict[str, int] = {}
    peaks: dict[str, float | None] = {}
    busy: dict[str, float | None] = {}
    for turn in range(1 + (args.repeats if context < 65_536 else 2)):
        for name, model in models.items():
            call = functools.partial(read_prompt, model, ids)
            if turn == 0:  # this one compiles and allocates
                sizes[name] = cache_bytes(call())
                peaks[name] = peak_mb(args, call)
                busy[name] = busy_ms(args, call)
            else:
                times[name].append(median_ms(call, args, 1, warmup=0)[0])
    medians = {name: statistics.median(found) for name, found in times.items()}
    attention, _ = median_ms(softmax_of_a_layer(args, context), args, 2)
    for name in models:
        row = {"model": name, "how": how, "context": context, "ms": medians[name], "attention_ms": attention}
        row |= {"cache_bytes": sizes[name], "peak_mb": peaks[name], "busy_ms": busy[name]}
        if name == "hybrid":  # the teacher's time without the softmax of the layers that are linear here
            linear: list[int] = models["hybrid"].linear_attention_layers
            row["floor_ms"] = medians["teacher"] - attention * len(linear)
        results.add("prefill", row)


def softmax_of_a_layer(args: argparse.Namespace, tokens: int) -> Callable[[], Tensor]:
    """The call that a layer of the teacher makes of torch, on random numbers."""
    heads, groups = args.heads, args.sizes["num_key_value_heads"]
    query, key, value = (
        torch.randn(1, tokens, count, args.width, device=args.device, dtype=torch.bfloat16).transpose(1, 2)
        for count in (heads, groups, groups)
    )
    return functools.partial(
        F.scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=groups != heads
    )


def read_prompt(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def hybrid_of(args: argparse.Namespace, teacher: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return hh.convert(teacher, range(3, args.sizes["num_hidden_layers"], 4), **options).eval()


@torch.no_grad()
def decoding(args: argparse.Namespace, results: Results) -> None:
    """
    One token after another with a static cache, the step compiled by the library's own path and recorded as a CUDA
    graph, for the teacher and its hybrid: alone at several contexts, then at the longest with as many sequences as
    memory holds of the teacher's, and of the hybrid's. For reference one context eagerly. A cache holds random
    numbers: a step costs the same whatever they are.
    """
    AttentionInterface.register("sums", summed_attention)
    AttentionMaskInterface.register("sums", sdpa_mask)
    teacher = make_teacher(args)
    teacher.set_attn_implementation(args.attention)
    models = {"teacher": teacher, "hybrid": hybrid_of(args, teacher)}
    # One compilation for all contexts, and one for all batches but 1.
    compiled = {
        name: torch.compile(model.forward, fullgraph=True, dynamic=args.dynamic, **compiler(args))
        for name, model in models.items()
    }
    rate = copied_bytes_per_ms(args)
    contexts, longest = sorted(args.contexts), max(args.contexts)

    broken: set[str] = set()

    def cell(name: str, how: str, context: int, batch: int) -> int | None:
        """Measures and keeps; returns the batch that fitted, None for none. What cannot be compiled is recorded."""
        if how == "compiled" and name in broken:
            how = "recorded"
        if out_of_time(args, f"{name}, {how}, context {context}, batch {batch}"):
            return None
        model = models[name]
        call = compiled[name] if how == "compiled" else model.forward
        for attempt in (batch, max(1, batch * 3 // 4)):
            row: dict[str, Any] = {"model": name, "how": how, "attention": args.attention, "context": context}
            row["batch"] = attempt
            try:
                row |= time_steps(args, model, call, how, context, attempt)
                if how == "compiled" and (context, batch) == (contexts[0], 1):
                    row["difference"] = difference_from_eager(args, model, call, context)
            except torch.OutOfMemoryError:
                sys.stderr.write(f"{name}, {how}, context {context}, batch {attempt}: out of memory\n")
                continue
            except Exception as error:  # noqa: BLE001 - the other cells are still wanted
                sys.stderr.write(f"{name}, {how}, context {context}, batch {attempt} is left out: {error!r:.2000}\n")
                if how == "compiled" and args.device == "cuda":
                    broken.add(name)
                    return cell(name, how, context, batch)
                return None
            finally:
                free_memory(args)
            weights = sum(x.numel() * x.element_size() for x in model.parameters())
            results.add("decoding", row | {"floor_ms": (weights + row["cache_bytes"]) / rate})
            return attempt
        return None

    # From the longest on: how sums are split is chosen for the length that is compiled.
    few = [longest, *[n for n in contexts[1:-1] if n == 32_768 or args.tiny], contexts[0]]
    for name in models:
        for context in dict.fromkeys(few) if args.alone else ():
            cell(name, "compiled", context, 1)
    many = fitting(args, teacher, longest)
    many = cell("teacher", "compiled", longest, many) or many
    cell("hybrid", "compiled", longest, many)
    cell("hybrid", "compiled", longest, max(many, fitting(args, models["hybrid"], longest)))
    if not args.alone:
        return
    for name in models:
        cell(name, "eager", contexts[0], 1)
    if args.device == "cuda":  # the operations of the eager step, fla's kernel among them, launched by the GPU
        for context in (contexts[0], longest):
            for name in models:
                cell(name, "recorded", context, 1)


def summed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    Attention of one token as sums that are fused: in a compiled step the library copies keys and values for every
    query head, and its kernel then runs in one block of threads per head. Otherwise the library's.

    Args:
        query: `[B, H, 1, D]`.
        key, value: `[B, G, L, D]`, the whole static cache.
        attention_mask: `[B, 1, 1, L]`, true for what is seen.
    """
    if attention_mask is None or query.shape[2] != 1 or not torch.compiler.is_compiling():
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    asked = (query[:, :, 0].float() * scale).unflatten(1, (key.shape[1], -1))
    scores = (key.unsqueeze(3) * asked.unsqueeze(2)).sum(-1)  # [B, G, L, H / G]
    weights = scores.masked_fill(~attention_mask[:, 0, 0, None, :].mT[:, None], -torch.inf).softmax(2)
    output = (weights.unsqueeze(-1) * value.unsqueeze(3)).sum(2)
    return output.flatten(1, 2)[:, None].to(query.dtype), None


def time_steps(
    args: argparse.Namespace, model: PreTrainedModel, call: Callable[..., Any], how: str, context: int, batch: int
) -> dict[str, float]:
    """Milliseconds of a step at `context` tokens, bytes of the cache, and seconds until the first steps were done."""
    room = args.steps + 8
    cache = random_static_cache(model, batch, context)
    token = torch.randint(args.sizes["vocab_size"], (batch, 1), device=args.device)
    given = {cache_argument(type(model)): cache, "input_ids": token, "use_cache": True}
    counts = [layer.cumulative_length for layer in cache.layers if isinstance(layer, StaticLayer)]

    def step() -> None:
        if how == "compiled" and args.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        call(**given)

    def begin() -> None:
        for count in counts:
            count.fill_(context - room)

    begin()
    start = time.perf_counter()
    for _ in range(4):
        step()
    args.synchronize()
    first = time.perf_counter() - start
    run = recorded(step) if how == "recorded" else step
    times = []
    for _ in range(3):
        begin()
        with alone_on_the_device(args.device):
            args.synchronize()
            start = time.perf_counter()
            for _ in range(args.steps):
                run()
            args.synchronize()
        times.append(1000 * (time.perf_counter() - start) / args.steps)
        if sum(times) * args.steps > 2000:  # long enough to be sure of
            break
    ms = statistics.median(times)
    return {"ms": ms, "tokens_per_second": 1000 * batch / ms, "cache_bytes": cache_bytes(cache), "first_s": first}


def difference_from_eager(
    args: argparse.Namespace, model: PreTrainedModel, call: Callable[..., Any], context: int
) -> float:
    """The largest difference of the logits of the fourth step, as a part of the largest logit."""
    found = []
    for forward in (call, model.forward):
        torch.manual_seed(1)
        cache = random_static_cache(model, 1, context)
        token = torch.randint(args.sizes["vocab_size"], (4, 1, 1), device=args.device)
        for layer in cache.layers:
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.fill_(context // 2)
        for ids in token:
            logits = forward(**{cache_argument(type(model)): cache, "input_ids": ids, "use_cache": True}).logits
        found.append(logits.float().clone())
    return ((found[0] - found[1]).abs().max() / found[1].abs().max()).item()


def random_static_cache(model: Any, batch: int, context: int) -> StaticCache:
    """A static cache of `context` tokens at most, all full of random numbers."""
    cache, config = StaticCache(config=model.config, max_cache_len=context), model.config
    width = config.hidden_size // config.num_attention_heads
    for layer, held in zip(decoder_layers(model), cache.layers, strict=True):
        mixer = layer.self_attn
        if isinstance(held, StaticLayer):
            none = torch.empty(batch, config.num_key_value_heads, 0, width, device=model.device, dtype=model.dtype)
            held.lazy_initialization(none, none)
            held.keys.normal_()
            held.values.normal_()
        else:
            shape = (batch, mixer.num_heads, mixer.head_dim, mixer.value_dim)
            held.lazy_initialization(recurrent_states=torch.empty(shape, device=model.device))
            held.recurrent_states[0].normal_()
            held.has_previous_state[0] = True
    return cache


def fitting(args: argparse.Namespace, model: Any, context: int) -> int:
    """
    Sequences of which `args.memory_share` of the free memory holds the caches; the library's masked attention copies
    the keys and values of the layer it is in for every query head, and these must fit, too.
    """
    if args.device == "cpu":
        return 2
    free_memory(args)
    head = 2 * context * args.width * 2  # bf16 keys and values
    linear = len(getattr(model, "linear_attention_layers", []))
    keys = (args.sizes["num_hidden_layers"] - linear) * args.sizes["num_key_value_heads"] * head
    states = linear * args.heads * args.width**2 * 4
    free, _ = torch.cuda.mem_get_info()
    return max(2, int(args.memory_share * free / (keys + states + args.heads * head)))


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """`step`, which has run before, as a CUDA graph of the operations that it launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


def copied_bytes_per_ms(args: argparse.Namespace) -> float:
    """Bytes that this device reads and writes in a millisecond, copying."""
    source = torch.zeros(1 << (30 if args.device == "cuda" else 24), dtype=torch.int8, device=args.device)
    target = torch.empty_like(source)
    ms, _ = median_ms(functools.partial(target.copy_, source), args, 3)
    return 2 * source.numel() / ms


def layers(args: argparse.Namespace, results: Results) -> None:
    """
    One Gated DeltaNet layer of one sequence beside fla's own and that of the library's Qwen3-Next, of one shape: as
    many key heads as query heads, a convolution of 4 tokens, SiLU, no rotation. Forward of 4096 tokens, and a step.
    """
    shape = {"hidden_size": args.sizes["hidden_size"], "heads": args.heads, "width": args.width}
    layers: dict[str, Callable[..., LayerCalls]] = {"ours": our_layer, "transformers": library_layer}
    if "fla" in args.kernels:
        layers["fla"] = fla_layer
    for name, make in layers.items():
        if out_of_time(args, f"layer, {name}"):
            continue
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                with torch.device(args.device):  # it would slow what is timed
                    calls = make(args.train_tokens, torch.bfloat16, **shape)
                measure_layer(args, results, name, calls)
        except Exception as error:  # noqa: BLE001 - the other layers are still wanted
            sys.stderr.write(f"layer, {name} is left out: {error!r:.2000}\n")


class LayerCalls(NamedTuple):
    """A layer's forward of many tokens, and one step after them, the state in place; what may be compiled of it."""

    forward: Callable[[], Any]
    step: Callable[[], Any]
    compilable: bool


def measure_layer(args: argparse.Namespace, results: Results, name: str, calls: LayerCalls) -> None:
    def add(mode: str, ms: float) -> None:
        results.add("layers", {"impl": name, "mode": mode, "tokens": args.train_tokens, "ms": ms})

    add("forward", median_ms(calls.forward, args, args.repeats)[0])
    add("step, eager", median_ms(calls.step, args, args.steps, warmup=3)[0])
    if args.device == "cuda":
        add("step, recorded", time_many(args, recorded(calls.step)))
    if calls.compilable:
        step = torch.compile(calls.step, fullgraph=True, **compiler(args) | {"mode": None})
        for _ in range(3):
            step()
        # Recorded, too: of one layer alone, Python's part of calling a graph is most of the time.
        add("step, compiled", time_many(args, recorded(step) if args.device == "cuda" else step))


def time_many(args: argparse.Namespace, call: Callable[[], Any]) -> float:
    """Milliseconds of one call among many that wait for none."""
    many = 10 * args.steps

    def run() -> None:
        for _ in range(many):
            call()

    return median_ms(run, args, 3, warmup=1)[0] / many


def our_layer(tokens: int, dtype: torch.dtype, *, hidden_size: int, heads: int, width: int) -> LayerCalls:
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=16,
    )
    options = {"short_convolution": 4, "silu_qk": True, "silu_v": True, "rope": False}
    model = hh.convert(AutoModelForCausalLM.from_config(config, dtype=dtype), [], mixer_options=options).eval()
    mixer, hidden = decoder_layers(model)[0].self_attn, torch.randn(1, tokens, hidden_size, dtype=dtype)
    cache = count_tokens_in(StaticCache(config=model.config, max_cache_len=tokens))
    angles = torch.ones(1, tokens, width, dtype=dtype)

    def run(hidden: Tensor, cache: Any) -> Any:
        rotation = angles[:, : hidden.shape[1]], angles[:, : hidden.shape[1]]
        return mixer(hidden, position_embeddings=rotation, attention_mask=None, past_key_values=cache)[0]

    run(hidden, cache)
    return LayerCalls(lambda: run(hidden, None), lambda: run(hidden[:, :1], cache), compilable=True)


def library_layer(tokens: int, dtype: torch.dtype, *, hidden_size: int, heads: int, width: int) -> LayerCalls:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=hidden_size,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_value_heads=heads,
        linear_num_key_heads=heads,
        linear_key_head_dim=width,
        linear_value_head_dim=width,
        linear_conv_kernel_dim=4,
    )
    layer, hidden = (
        Qwen3NextGatedDeltaNet(config, 0).to(dtype).eval(),
        torch.randn(1, tokens, hidden_size, dtype=dtype),
    )
    cache, name = StaticCache(config=config, max_cache_len=tokens), cache_argument(Qwen3NextGatedDeltaNet)

    def run(hidden: Tensor, cache: Any) -> Any:
        return layer(hidden, **{name: cache})

    run(hidden, cache)
    return LayerCalls(lambda: run(hidden, None), lambda: run(hidden[:, :1], cache), compilable=True)


def fla_layer(tokens: int, dtype: torch.dtype, *, hidden_size: int, heads: int, width: int) -> LayerCalls:
    from fla.layers import GatedDeltaNet
    from fla.models.utils import Cache

    layer = GatedDeltaNet(hidden_size=hidden_size, expand_v=1, head_dim=width, num_heads=heads, layer_idx=0)
    layer, hidden = layer.to(dtype).eval(), torch.randn(1, tokens, hidden_size, dtype=dtype)
    cache = Cache()
    layer(hidden, past_key_values=cache, use_cache=True)
    return LayerCalls(
        lambda: layer(hidden),
        lambda: layer(hidden[:, :1], past_key_values=cache, use_cache=True),
        compilable=False,  # its operators are left out of graphs
    )


def compiler(args: argparse.Namespace) -> dict[str, Any]:
    """What `torch.compile` is told: what the library tells it, where there is no other backend."""
    return {"backend": args.backend, "mode": "reduce-overhead" if args.backend == "inductor" else None}


def free_memory(args: argparse.Namespace) -> None:
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()


def out_of_time(args: argparse.Namespace, what: str) -> bool:
    """Whether no more cell may begin; says which one is left out."""
    late: bool = time.monotonic() > args.until
    if late:
        sys.stderr.write(f"{what} is left out: {args.seconds} s have passed\n")
    return late

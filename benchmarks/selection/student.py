"""Students of the selection benchmark and the loop that aligns, distils and measures them.

On a GPU a step of such a small model is bound by kernel launches, so many students are trained at once
(selection_stack.py), both branches of every layer are computed and a mask chooses, which lets one CUDA graph serve
every set. The branch that is masked out has gradients of zero, so nothing else changes
(tests/test_selection_benchmark.py holds it against hh.DistillationTrainer).
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_hybrid as hh
from hf_hybrid.modeling.modeling_hybrid import decoder, decoder_layers
from hf_hybrid.trainers.hybrid_trainer import mixer_parameters
from hf_hybrid.trainers.losses import alignment_loss, kl_per_token, logit_function
from hf_hybrid.trainers.precision import AS_LOADED

from .data import ALIGN_LENGTH, BATCH, REPORT_ROWS, SELECT_ROWS, TEACHERS, Rows, load_teacher, rows
from .stack import stack


MIXER_LR, LR, ALIGN_LR = 1e-3, 1e-4, 3e-3
EVALUATION_BATCH = 24


class Student(nn.Module):
    """An all-linear student with the teacher's attention beside each mixer; a set of layers says which one runs."""

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.model = hh.convert(teacher, [])
        self.model.to(teacher.device)
        self.softmax = nn.ModuleList(copy.deepcopy(layer.self_attn) for layer in decoder_layers(teacher))
        self.requires_grad_(True)

    def mixer_names(self) -> list[str]:
        """The mixers' parameters, in the order of `mixer_parameters`."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return [names[id(parameter)] for parameter in mixer_parameters(self.model)]

    def hidden(self, input_ids: Tensor, keep: Tensor | list[bool]) -> Tensor:
        """
        Final hidden states `[N * B, T, H]` of N students for tokens `[B, T]`, with softmax in the layers where `keep`
        is 1 (`[N, L]`, both branches are computed) or true (of one student).
        """
        backbone = decoder(self.model)
        x = backbone.embed_tokens(input_ids)
        rope = backbone.rotary_emb(x, torch.arange(input_ids.shape[1], device=x.device)[None])
        for i, layer in enumerate(backbone.layers):
            given = layer.input_layernorm(x)
            x = x + self._mix(i, layer.self_attn, given, rope, keep)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return backbone.norm(x)

    def _mix(self, i: int, mixer: Any, given: Tensor, rope: Any, keep: Tensor | list[bool]) -> Tensor:
        if isinstance(keep, list):
            module = self.softmax[i] if keep[i] else mixer
            return module(given, position_embeddings=rope, attention_mask=None)[0]
        linear, softmax = (
            module(given, position_embeddings=rope, attention_mask=None)[0] for module in (mixer, self.softmax[i])
        )
        mask = keep[:, i].repeat_interleave(len(given) // len(keep), output_size=len(given))[:, None, None]
        return mask * softmax + (1 - mask) * linear


@torch.no_grad()
def teacher_hidden(teacher: Any, input_ids: Tensor) -> Tensor:
    """The teacher's final hidden states for `[..., B, T]` tokens, batch by batch."""
    flat = input_ids.flatten(0, -3) if input_ids.dim() > 2 else input_ids[None]
    hidden = [teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state for ids in flat]
    return torch.stack(hidden).view(*input_ids.shape, -1)


class Data:
    """One teacher's rows of one seed and what the teacher makes of them, in buffers that graphs can read."""

    def __init__(self, name: str, seed: int, teacher: Any, cache: Path | None, steps: int, align_steps: int) -> None:
        mix, device = TEACHERS[name].mix, teacher.device
        self.train = rows(mix, "train", seed, steps * BATCH, cache).input_ids.view(steps, BATCH, -1).to(device)
        self.align = rows(mix, "align", seed, align_steps * BATCH, cache, ALIGN_LENGTH).input_ids
        self.align = self.align.view(align_steps, BATCH, -1).to(device)
        select, report = rows(mix, "score", seed, SELECT_ROWS, cache), rows(mix, "report", 0, REPORT_ROWS, cache)
        self.kinds = report.kinds
        held_out = Rows(
            torch.cat((select.input_ids, report.input_ids)), torch.cat((select.answers, report.answers)), []
        )
        self.held_out = held_out.input_ids.view(-1, EVALUATION_BATCH, held_out.input_ids.shape[-1]).to(device)
        self.answers = held_out.answers.view_as(self.held_out).to(device)
        self.train_reference = teacher_hidden(teacher, self.train)
        self.held_out_reference = teacher_hidden(teacher, self.held_out)

    def copy_(self, other: "Data") -> None:
        for name, value in vars(other).items():
            if isinstance(value, Tensor):
                getattr(self, name).copy_(value)


class Students:
    """
    `n` students being trained on the same rows: parameters `[n, ...]`, optimizers and, on a GPU, graphs.

    Without graphs and with one student only the branch that runs is computed.
    """

    def __init__(self, teacher: Any, data: Data, n: int = 1, graph: bool = False) -> None:
        self.teacher, self.data, self.n, self.device = teacher, data, n, teacher.device
        self.student = Student(teacher)
        self.num_layers = len(self.student.softmax)
        self.mixer_names = self.student.mixer_names()
        self.parameters = stack(self.student, n)
        self.logits = logit_function(self.student.model, AS_LOADED)
        mixers = [self.parameters[name] for name in self.mixer_names]
        rest = [parameter for name, parameter in self.parameters.items() if name not in set(self.mixer_names)]
        kind: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0}
        if graph:
            kind |= {"capturable": True, "fused": True}
        self.rate = torch.zeros((), device=self.device)
        self.aligner = torch.optim.AdamW(mixers, lr=self.rate if graph else ALIGN_LR, **kind)
        groups = [{"params": mixers, "lr": MIXER_LR}, {"params": rest, "lr": LR}]
        self.optimizer = torch.optim.AdamW(groups, **kind)
        self.step_index, self.out_index = (torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(2))
        batches, rows_each, _ = data.held_out.shape
        self.out = torch.zeros(batches, n, rows_each, 3, device=self.device)  # KL, right answers, answers
        self.keep: Tensor | list[bool] = torch.zeros(n, self.num_layers, device=self.device)
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.stream = torch.cuda.Stream() if graph else None

    def distill_step(self) -> None:
        ids = self.data.train.index_select(0, self.step_index)[0]
        reference = self.data.train_reference.index_select(0, self.step_index)[0]
        with torch.no_grad():
            teacher_logits = logit_function(self.teacher, AS_LOADED)(reference)
        logits = self.logits(self.student.hidden(ids, self.keep)).unflatten(0, (self.n, -1))
        loss = kl_per_token(teacher_logits.expand_as(logits), logits).flatten(1).mean(1)
        self._update(loss, self.optimizer)
        self.step_index += 1

    def align_step(self) -> None:
        """As hh.AlignmentTrainer: every mixer sees its layer's input in the teacher and learns its output."""
        ids = self.data.align.index_select(0, self.step_index)[0]
        backbone, losses = decoder(self.teacher), []
        with torch.no_grad():
            x = backbone.embed_tokens(ids)
            rope = backbone.rotary_emb(x, torch.arange(ids.shape[1], device=x.device)[None])
        for layer, own in zip(backbone.layers, decoder_layers(self.student.model), strict=True):
            with torch.no_grad():
                given = layer.input_layernorm(x)
                wanted = layer.self_attn(given, position_embeddings=rope, attention_mask=None)[0]
                x = x + wanted
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            mixed = own.self_attn(given.repeat(self.n, 1, 1), position_embeddings=rope)[0]
            losses.append(torch.stack([alignment_loss(wanted, one) for one in mixed.unflatten(0, (self.n, -1))]))
        self._update(torch.stack(losses).mean(0), self.aligner)
        self.step_index += 1

    @torch.no_grad()
    def measure_step(self) -> None:
        ids, answers, reference = (
            x.index_select(0, self.out_index)[0]
            for x in (self.data.held_out, self.data.answers, self.data.held_out_reference)
        )
        logits = self.logits(self.student.hidden(ids, self.keep)).unflatten(0, (self.n, -1))
        kl = kl_per_token(logit_function(self.teacher, AS_LOADED)(reference).expand_as(logits), logits).mean(-1)
        marked = answers[:, 1:]
        right = ((logits[..., :-1, :].argmax(-1) == ids[:, 1:]) & marked).sum(-1)
        found = torch.stack((kl, right.float(), marked.sum(-1).float().expand_as(kl)), -1)
        self.out.index_copy_(0, self.out_index, found[None])
        self.out_index += 1

    def _update(self, losses: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step on the `losses` `[n]`, every student's gradient clipped to a norm of 1 as nn.utils does it."""
        losses.sum().backward()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        factors = (1 / (norms + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *(1 for _ in gradient.shape[1:])))
        optimizer.step()

    def forget_gradients(self) -> None:
        for optimizer in (self.aligner, self.optimizer):
            optimizer.zero_grad(set_to_none=True)

    def capture(self, names: Iterable[str]) -> None:
        """Records the named steps as graphs; what the warm-up changes is reset before every use."""
        for name in names:
            step: Callable[[], None] = getattr(self, name)
            with torch.cuda.stream(self.stream):
                for _ in range(2):
                    self.reset_counters()
                    self.forget_gradients()
                    step()
            torch.cuda.synchronize()
            self.forget_gradients()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                step()
            self.graphs[name] = graph
            self.forget_gradients()

    def reset_counters(self) -> None:
        self.step_index.zero_()
        self.out_index.zero_()

    @torch.no_grad()
    def reset(self, values: dict[str, Tensor]) -> None:
        """All students' parameters as in `values`, optimizers and counters as new."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
        for optimizer in (self.aligner, self.optimizer):
            if self.stream is None:
                optimizer.state.clear()
            states = [x for state in optimizer.state.values() for x in state.values()]
            if states:
                torch._foreach_zero_(states)
        self.reset_counters()

    def run(self, name: str, times: int = 1) -> None:
        for _ in range(times):
            if name in self.graphs:
                self.graphs[name].replay()
            else:
                getattr(self, name)()
                self.forget_gradients()

    def set_keep(self, sets: Sequence[Iterable[int]]) -> None:
        """One set of softmax layers a student."""
        chosen = [[i in set(layers) for i in range(self.num_layers)] for layers in sets]
        if len(chosen) != self.n:
            raise ValueError(f"{len(chosen)} sets of layers for {self.n} students.")
        if self.n == 1 and not self.graphs:
            self.keep = chosen[0]
            return
        assert isinstance(self.keep, Tensor)
        self.keep.copy_(torch.tensor(chosen, dtype=torch.float32))

    def measure(self, batches: int) -> Tensor:
        """KL per token, right answers and answers, `[n, batches * EVALUATION_BATCH, 3]`."""
        self.out_index.zero_()
        self.run("measure_step", batches)
        return self.out[:batches].transpose(0, 1).flatten(1, 2).clone()

    def distill(
        self, values: dict[str, Tensor], sets: Sequence[Iterable[int]], steps: int, checkpoints: Iterable[int] = ()
    ) -> dict[int, Tensor]:
        """Distils with softmax in `sets`; the rows to choose on at `checkpoints`, and all rows at the end."""
        with torch.cuda.stream(self.stream):
            self.reset(values)
            self.set_keep(sets)
            found, done = {}, 0
            for step in sorted({*checkpoints, steps}):
                self.run("distill_step", step - done)
                done = step
                last = step == steps
                found[step] = self.measure(len(self.data.held_out) if last else SELECT_ROWS // EVALUATION_BATCH)
            return {step: measured.cpu() for step, measured in found.items()}

    def zero_shot(self, values: dict[str, Tensor], sets: Sequence[Iterable[int]]) -> Tensor:
        """KL of `sets` without distillation on the rows to choose on, `[n]`."""
        with torch.cuda.stream(self.stream):
            self.reset(values)
            self.set_keep(sets)
            return self.measure(SELECT_ROWS // EVALUATION_BATCH)[..., 0].mean(-1).cpu()

    def align(self, values: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
        """The first student's parameters after alignment, from `values` of a new student."""
        with torch.cuda.stream(self.stream):
            self.reset(values)
            for step in range(steps):
                rate = ALIGN_LR * (0.5 + 0.5 * math.cos(math.pi * step / steps))
                self.rate.fill_(rate)
                if self.stream is None:
                    self.aligner.param_groups[0]["lr"] = rate
                self.run("align_step")
            return {name: parameter[0].detach().cpu() for name, parameter in self.parameters.items()}


def fresh_values(name: str, seed: int) -> dict[str, Tensor]:
    """Parameters of a new student; drawn on the CPU, so alike on every device."""
    torch.manual_seed(seed)
    return {key: parameter.detach() for key, parameter in Student(load_teacher(name)).named_parameters()}

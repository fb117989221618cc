"""Scores with a short distillation for each layer, GA-S2 and its early stops, and by the alignment's distance."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_hybrid.modeling.modeling_hybrid import decoder_layers

from ..alignment import mixer_outputs
from ..held_out import standard_error
from ..losses import alignment_loss
from ..modes import evaluating
from ..processes import on_main
from .job import Job, NotFinite, tokens_per_step
from .scores import LayerScore, LayerScores
from .scoring_method import Options, Range, ScoringMethod


def ga_s2(
    job: Job,
    *,
    rounds: Annotated[int, Range(1)] = 1,
    halving: bool = False,
    noise: Annotated[float, Range(0)] = 1.0,
    stability_window: Annotated[int, Range(0)] = 0,
    stability: Annotated[float, Range(0, 1)] = 1.0,
) -> LayerScores:
    """
    GA-S2 of arXiv 2512.20569, algorithm 1: from the aligned all-linear student, for each layer l, restore the
    teacher's attention in l, distil on the same batches in the same order, and measure `KL(teacher || student)` on
    the same held-out rows, `I(l) = -KL`. The paper's code ranks by training loss; this measures on held-out rows and
    reports the noise. One model is trained over and over, from one copy of the aligned weights in host memory.

    Args:
        rounds (`int`): measure this many times on the way, evenly spaced: the curve of each layer. It changes neither
            the training nor the last measurement.
        halving (`bool`): after each round stop the worse half of the layers, never one of the best k, and none that is
            worse than the k-th by less than `noise` standard errors of the difference, row by row (successive halving,
            arXiv 1502.07943).
        noise (`float`): see there.
        stability_window (`int`): stop all layers once the Jaccard similarity of the top k of neighbouring rounds, the
            mean over this many of them, is at least `stability`: the paper's rule, which saves it 58 to 74% of the
            tokens. 0 for none.
        stability (`float`): see there.
    """
    options = {"rounds": rounds, "halving": halving, "noise": noise}
    options |= {"stability_window": stability_window, "stability": stability}
    if halving or stability_window:
        return _by_rounds(job, options)
    return job.finish(each_restored(job, "layer", rounds), options=options)


def each_restored(job: Job, prefix: str, rounds: int = 1) -> list[LayerScore]:
    """Each layer's held-out KL after it was restored and the student distilled."""

    def restore(layer: int) -> None:
        job.student.set_full_attention_layers([layer], job.teacher)

    return each_distilled(job, restore, prefix, rounds)


def each_distilled(job: Job, prepare: Callable[[int], None], prefix: str, rounds: int = 1) -> list[LayerScore]:
    """Each layer's held-out KL after `prepare(layer)` and a distillation from the aligned weights."""
    scores: list[LayerScore] = []
    points = job.step_points(rounds) if rounds > 1 else []
    job.keep_states()
    with job.restored_afterwards() as aligned:
        for layer in job.layers:

            def work(layer: int = layer) -> LayerScore:
                job.part = (len(scores), len(job.layers))
                prepare(layer)
                measured = _Measure(job, points)
                job.distil(f"{prefix}_{layer:03d}", callbacks=[measured])
                score = LayerScore.of_rows(layer, measured.rows or job.kl())
                score.curve = measured.curve
                return score

            try:
                scores.append(job.score(layer, work, prefix))
            finally:
                job.reset(aligned)
            job.say(len(scores), len(job.layers), f"layer {layer}: KL {scores[-1]}")
    return scores


class _Measure(TrainerCallback):
    """
    Measures the held-out KL after the steps `points`; `rows` are those of the last one. What was measured before a
    checkpoint goes with it, in the log of the Trainer's state.
    """

    def __init__(self, job: Job, points: list[int]) -> None:
        self.job, self.points = job, points
        self.rows: list[float] = []
        self.curve: list[list[float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.curve = [entry["held_out"] for entry in state.log_history if "held_out" in entry]
        self.job.tokens_forward += len(self.curve) * self.job.held_out.tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.points:
            self.rows = self.job.kl()
            tokens = state.global_step * tokens_per_step(self.job.train_dataset, args)
            self.curve.append([tokens, sum(self.rows) / len(self.rows), standard_error(self.rows)])
            state.log_history.append({"step": state.global_step, "held_out": self.curve[-1]})


def ga_s1(job: Job) -> LayerScores:
    """
    GA-S1 of arXiv 2512.20569's ablations: the hidden-state distance of stage 1 in the place of the KL. Stage 1 is
    teacher-forced layer by layer, so restoring layer l takes away that layer's own distance and no other: the score is
    the aligned mixer's `mean over tokens of ||U_T - U_S||_2 / sqrt(H)` on held-out rows. No training.
    """
    scores = alignment_distances(job)
    for score in scores:
        job.report(score)
    return job.finish(scores)


def alignment_distances(job: Job) -> list[LayerScore]:
    """[`ga_s1`]'s measure of every layer, from one pass over the held-out rows."""
    layers = decoder_layers(job.student)

    def of_batch(index: int, batch: dict[str, torch.Tensor]) -> list[list[float]]:
        by_layer = {}
        for i, wanted, output, mask in mixer_outputs(job.student, job.teacher, batch, job.precision):
            pairs = enumerate(zip(wanted, output, strict=True))
            masks = [None if mask is None else mask[j, None] for j in range(len(wanted))]
            by_layer[i] = [alignment_loss(a[None], b[None], masks[j]).item() for j, (a, b) in pairs]
        return [list(row) for row in zip(*(by_layer[i] for i in range(len(layers))), strict=True)]

    def work() -> list[list[float]]:
        job.tokens_forward += job.held_out.tokens
        with evaluating(job.student, job.teacher):
            return job.held_out.measure(of_batch)

    rows = list(zip(*job.once("residuals", work), strict=True))
    return [LayerScore.of_rows(layer, list(rows[layer]), is_kl=False) for layer in job.layers]


def _by_rounds(job: Job, options: dict[str, Any]) -> LayerScores:
    """GA-S2 with all layers a round at a time, their training states on disk in between, until a rule ends it."""
    k = job.wanted
    points = job.step_points(options["rounds"])
    alive, dropped, failed = list(job.layers), list[list[int]](), list[int]()
    scores: dict[int, LayerScore] = {}
    tops: list[set[int]] = []
    with job.restored_afterwards() as aligned, _states(job) as states:
        for number in range(len(points)):
            job.keep_states()  # the batches of this round come again for each layer, and then never
            for layer in alive:
                _advance(job, scores, layer, points, number, states, aligned)
            failed += [layer for layer in alive if scores[layer].diverged]
            alive = [layer for layer in alive if not scores[layer].diverged]
            alive.sort(key=lambda layer: (scores[layer].value, layer))
            tops.append(set(alive[:k]))
            stable = _stable(tops, options["stability_window"], options["stability"])
            if not alive or stable or number + 1 == len(points):
                break
            if options["halving"]:
                losers = _losers([scores[layer] for layer in alive], k, options["noise"])
                alive = [layer for layer in alive if layer not in losers]
                dropped.insert(0, losers)
                for layer in losers:
                    shutil.rmtree(states / f"layer_{layer:03d}", ignore_errors=True)
    for layer in job.layers:
        job.report(scores[layer])
    # What was stopped earlier was trained on fewer tokens: its value does not compare, its place does.
    order = [*alive, *(layer for losers in dropped for layer in losers), *failed] if any(dropped) else []
    return job.finish(list(scores.values()), order=order, options=options)


@contextlib.contextmanager
def _states(job: Job) -> Iterator[Path]:
    """A folder for the layers' training states: in the job's folder, or for the time being."""
    if job.folder is not None:
        states = job.folder / f"rounds_{job.origin}"
        yield states
        if PartialState().is_main_process:
            shutil.rmtree(states, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(on_main(lambda: scratch))


def _advance(
    job: Job,
    scores: dict[int, LayerScore],
    layer: int,
    points: list[int],
    number: int,
    states: Path,
    aligned: dict[str, torch.Tensor],
) -> None:
    """Trains layer `layer`'s student through round `number`, measures it, and adds that to its score."""
    folder, start, stop = states / f"layer_{layer:03d}", 0 if number == 0 else points[number - 1], points[number]
    name = f"round_{number:03d}_layer_{layer:03d}"

    def work() -> list[float] | str:
        job.student.set_full_attention_layers([layer], job.teacher)
        try:
            # A kill came after this checkpoint, which the Trainer would train a step beyond, and before the result.
            on_main(lambda: shutil.rmtree(folder / f"{PREFIX_CHECKPOINT_DIR}-{stop}", ignore_errors=True))
            job.distil(name, callbacks=[_StopAt(stop)], folder=folder, start=start)
            return job.kl()
        except NotFinite as error:
            return error.reason
        finally:
            job.reset(aligned)

    rows = job.once(name, work)
    spent, old = job.spent[-1], scores.get(layer)
    if isinstance(rows, str):
        new = LayerScore.of_diverged(layer, rows)
        job.note_diverged(f"layer {layer}", rows, name)
    else:
        new = LayerScore.of_rows(layer, rows)
    new.tokens = spent["tokens_forward_backward"] + (0 if old is None else old.tokens)
    new.seconds = spent["seconds"] + (0.0 if old is None else old.seconds)
    new.curve = list([] if old is None else old.curve)
    if not new.diverged:
        new.curve.append([new.tokens, new.value, new.sem])
    scores[layer] = new
    job.say((number + 1) / len(points), 1, f"round {number + 1} of {len(points)}, layer {layer}: KL {new}")


class _StopAt(TrainerCallback):
    """Ends the training after a step, with a checkpoint to go on from."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


def _losers(ranked: list[LayerScore], k: int, noise: float) -> list[int]:
    """The layers to stop, the best first: of the worse half those that are worse than the k-th beyond the noise."""
    if k >= len(ranked):  # a job that scores a part of the layers
        return []
    keep, line = max(k, -(-len(ranked) // 2)), ranked[max(k, 1) - 1]
    losers = []
    for score in ranked[keep:]:
        worse = [a - b for a, b in zip(score.per_sequence, line.per_sequence, strict=True)]
        if sum(worse) / len(worse) > noise * standard_error(worse):
            losers.append(score.layer)
    return losers


def _stable(tops: list[set[int]], window: int, threshold: float) -> bool:
    """Whether the top k changed little enough over the last `window` pairs of neighbouring rounds."""
    if not window or len(tops) <= window:
        return False
    pairs = list(zip(tops, tops[1:], strict=False))[-window:]
    return sum(len(a & b) / max(1, len(a | b)) for a, b in pairs) / window >= threshold


def _compares_rounds(options: Options) -> bool:
    return bool(options.get("halving") or options.get("stability_window"))


def _check_rounds(options: Options) -> None:
    rounds, window = options.get("rounds", 1), options.get("stability_window", 0)
    if rounds < 2 and options.get("halving"):
        raise ValueError(f"halving stops layers between rounds, and there are rounds={rounds}; pass 2 or more.")
    if window and rounds < window + 2:
        raise ValueError(
            f"stability_window={window} compares {window + 1} rounds before the last, and there are rounds={rounds}; "
            f"pass rounds of {window + 2} or more."
        )


GA_S2 = ScoringMethod(
    name="ga-s2",
    score=ga_s2,
    value="`KL'({l})`, a run for each layer",
    source="arXiv 2512.20569, algorithm 1",
    trained="L R",
    measured="L E",
    trains=True,
    asks_k=_compares_rounds,
    splits=True,
    check=_check_rounds,
)
GA_S1 = ScoringMethod(
    name="ga-s1",
    score=ga_s1,
    value="`mean norm(U_T - U_S) / sqrt(H)` of the aligned mixer",
    source="its ablations",
    measured="E",
    measure="distance of the aligned mixer's output from the teacher's",
    unit="activation rms",
    higher_is_better=True,
)

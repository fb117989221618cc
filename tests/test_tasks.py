"""The tasks after RULER: their cases, and what models that are known score in them."""

import functools
import json
import random
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lookup_model import lookup_model
from runs import tiny_tokenizer
from teachers import tiny_teacher

import hf_hybrid as hh
from hf_hybrid.cli import main
from hf_hybrid.cli.text import named_files
from hf_hybrid.evaluation import Evaluation
from hf_hybrid.tasks import (
    OFFLINE,
    RULER_TASKS,
    Case,
    TaskScore,
    cases,
    free_generation,
    harness,
    ruler,
    ruler_cases,
    run_tasks,
)
from hf_hybrid.tasks.answers import Answers
from hf_hybrid.tasks.cases import RESERVE, answer_text
from hf_hybrid.tasks.harness import FORMS, found_share
from hf_hybrid.tasks.language_model import ModelLM
from hf_hybrid.tasks.repetition import agreement, common_prefix, is_looping, repetition
from hf_hybrid.tasks.scores import Figure, share_error
from hf_hybrid.tasks.words import ADJECTIVES, NOUNS, essay, sentences
from hf_hybrid.trainers.durable import read_record
from hf_hybrid.trainers.held_out import standard_error
from hf_hybrid.trainers.precision import AS_LOADED, Precision


TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("name", RULER_TASKS)
def test_cases_are_as_long_as_asked_for_and_the_same_for_a_seed(name: str) -> None:
    cases = ruler_cases(TOKENIZER, tasks=[name], lengths=[1200, 2400], cases=3, seed=1)
    assert [case.length for case in cases] == [1200] * 3 + [2400] * 3
    for case in cases:
        tokens = len(TOKENIZER(case.prompt + answer_text(case.slots))["input_ids"])
        assert tokens == case.tokens and 0.88 * case.length <= tokens <= case.length - RESERVE
        assert len(TOKENIZER(case.prompt)["input_ids"]) + case.new_tokens <= case.length
        assert not case.prompt.endswith(" ") and case.slots[0].answer.startswith(" ")
    assert ruler_cases(TOKENIZER, tasks=[name], lengths=[1200, 2400], cases=3, seed=1) == cases
    assert ruler_cases(TOKENIZER, tasks=[name], lengths=[1200], cases=3, seed=2)[0].prompt != cases[0].prompt
    assert len({case.prompt for case in cases}) == 6


def test_the_haystack_is_the_text_that_is_given() -> None:
    texts = ["First came the rain. Then it cleared!\nWho knew? " + "word " * 200]
    (case,) = ruler_cases(TOKENIZER, tasks=["single_prose"], lengths=[1200], cases=1, texts=texts)
    assert "Then it cleared! Who knew?" in case.prompt and case.answers[0] in case.prompt
    assert max(map(len, sentences(texts))) <= 400 and " ".join(sentences(texts)) == " ".join(texts[0].split())
    assert sentences(["x" * 900]) == ["x" * 400, "x" * 400, "x" * 100]


def test_words_are_distinct_and_prose_does_not_end() -> None:
    assert len(set(NOUNS + ADJECTIVES)) == len(NOUNS) + len(ADJECTIVES)
    prose, again = essay(random.Random(0)), essay(random.Random(0))
    drawn = [next(prose) for _ in range(500)]
    assert drawn == [next(again) for _ in range(500)] and len(set(drawn)) > 400
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["needle"]}, "there is no task 'needle'; choose among single_noise"),
        ({"cases": 0}, "cases=0 is too few"),
        ({"lengths": [64]}, r"lengths=\[64\] are no lengths of a case; pass at least 128"),
        (
            {"tasks": ["single_prose", "multivalue"], "lengths": [128, 2000]},
            "single_prose needs [0-9]+ tokens, multivalue needs ([0-9]+) tokens; pass \\1 or more",
        ),
        ({"texts": ["", " "]}, "the 2 texts for the haystack are empty"),
    ],
)
def test_what_makes_no_cases_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ruler_cases(TOKENIZER, **options)


COPIED = ["single_noise", "single_prose", "multikey_prose", "multikey_needles", "multiquery", "copying"]


def test_a_model_that_copies_scores_1_and_a_constant_one_0() -> None:
    cases = ruler_cases(TOKENIZER, tasks=COPIED, lengths=[1200], cases=2)
    scores = ruler(lookup_model(300), TOKENIZER, cases=cases, batch_size=5)
    assert [(score.task, score.mean, score.count) for score in scores] == [(name, 1.0, 2) for name in COPIED]
    silent = ruler(lookup_model(300, constant=5), TOKENIZER, cases=cases)
    assert [score.scores for score in silent] == [[0.0, 0.0]] * len(COPIED)
    assert scores[0].minus(silent[0]) == (1.0, 0.0)


def test_each_answer_counts_by_itself() -> None:
    """Of the values of one key, the lookup model gives the last needle's at the first place, and no other right."""
    (score,) = ruler(lookup_model(300), TOKENIZER, tasks=["multivalue"], lengths=[1200], cases=4)
    assert all(0 <= value < 1 and (4 * value).is_integer() for value in score.scores)


def test_generated_answers_are_extracted() -> None:
    cases = ruler_cases(TOKENIZER, tasks=["single_prose", "copying"], lengths=[1200], cases=2)
    right = ruler(lookup_model(300), TOKENIZER, cases=cases, form="generation", batch_size=2)
    assert [score.mean for score in right] == [1.0, 1.0] and right[0].form == "generation"
    wrong = ruler(lookup_model(300, constant=5), TOKENIZER, cases=cases, form="generation", batch_size=3)
    assert [score.mean for score in wrong] == [0.0, 0.0]
    with pytest.raises(ValueError, match="form='guess' is neither of likelihood and generation"):
        ruler(lookup_model(300), TOKENIZER, cases=cases, form="guess")


def test_what_counts_as_an_answer() -> None:
    assert found_share("single_prose", ["123456"], "It is 123456.") == 1
    assert found_share("single_prose", ["123456"], "1234567 and 0123456") == 0
    assert found_share("multiquery", ["111111", "222222"], " 222222, I think") == 0.5
    assert found_share("common_words", ["lamp", "river"], "1. Lamp 2. rivers") == 0.5
    assert found_share("variable_tracking", ["ABC", "XEZ"], "ABC, XEZ.") == 1


def test_repetition_and_loops() -> None:
    assert repetition("a b c d e f g h") == 0 and repetition("one two") == 0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)  # five runs of four words, the last is the first
    assert repetition([1] * 10) == pytest.approx(6 / 7)
    assert is_looping([5, 9] + [1, 2, 3, 4] * 3) and is_looping([7] * 12)
    assert not is_looping([7] * 11) and not is_looping(list(range(40))) and not is_looping([1, 2, 3, 4] * 2)


def test_standard_errors_by_hand() -> None:
    # Three of four right: with two right and two wrong ones added, 5 of 8.
    assert share_error([1, 1, 1, 0]) == pytest.approx((5 / 8 * 3 / 8 / 8) ** 0.5)
    assert share_error([1.0] * 4) == pytest.approx((6 / 8 * 2 / 8 / 8) ** 0.5) and share_error([0.5] * 96) < 0.011
    ours, theirs = (TaskScore("copying", "likelihood", 0, 0, 3, 512, scores) for scores in ([1, 1, 0], [0, 1, 0]))
    assert ours.minus(theirs) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    with pytest.raises(ValueError, match="are not the same cases"):
        ours.minus(TaskScore("copying", "likelihood", 0, 0, 2, 512, [1, 1]))


def requests_of(pairs: list[tuple], kind: str) -> list[Instance]:
    return [Instance(kind, {}, pair, 0, ("t", i, 1)) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize("hybrid", [False, True])
def test_answers_are_those_of_lm_evals_own_model(hybrid: bool) -> None:
    """`HFLM` makes all logits, one request a row; here rows are shared, and only the answers get logits."""
    model = tiny_teacher("llama", vocab_size=300)
    model = hh.convert(model, [1]) if hybrid else model
    pairs = [
        ("def function_1(x, y):", " return x"),
        ("def function_1(x, y): return", " x * 4"),
        ("def function_1(x, y): return x", " * 4 + y"),
        ("step", " 3"),
        ("step 3\n", "def function_4(x"),
        ("", "return"),
    ]
    theirs_lm = HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=1, backend="causal")
    ours_lm = ModelLM(model, TOKENIZER, batch_size=2, precision=AS_LOADED)
    # Among them what the model says next, where that is the same tokens when it is read again.
    starts = [(f"step {i}", {"until": [], "max_gen_toks": 1}) for i in range(20)]
    said = theirs_lm.generate_until(requests_of(starts, "generate_until"))
    pairs += [(start, text) for (start, _), text in zip(starts, said, strict=True) if text.strip()]
    ours, theirs = (lm.loglikelihood(requests_of(pairs, "loglikelihood")) for lm in (ours_lm, theirs_lm))
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
    assert 0 < sum(is_greedy for _, is_greedy in ours) < len(pairs) - 5
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=2e-4)

    texts = [("def function_9(x, y):\n    return x * 81",), ("step " * 40,)]
    ours, theirs = (
        lm.loglikelihood_rolling(requests_of(texts, "loglikelihood_rolling")) for lm in (ours_lm, theirs_lm)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)

    prompts = [(text, {"until": ["\n"], "max_gen_toks": 12}) for text in ("step 3", "def function_1(x, y)", "return")]
    ours, theirs = (lm.generate_until(requests_of(prompts, "generate_until")) for lm in (ours_lm, theirs_lm))
    assert ours == theirs


def test_rows_that_begin_alike_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_teacher("qwen3", vocab_size=300)
    lm, widths = ModelLM(model, TOKENIZER, batch_size=4, precision=AS_LOADED), []
    plain = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: widths.append(k["input_ids"].shape) or plain(*a, **k))
    (case,) = ruler_cases(TOKENIZER, tasks=["multiquery"], lengths=[1000], cases=1)
    assert len(case.slots) == 4
    ruler(model, TOKENIZER, cases=[case])
    assert [width for width in widths if width[1] > 4] == [(1, case.tokens - 1)]  # the others are of a check
    assert lm.max_length == 1024
    with pytest.raises(ValueError, match="a request has 1[0-9]{3} tokens, the model 1024 positions; pass shorter"):
        ruler(model, TOKENIZER, tasks=["copying"], lengths=[1200], cases=1)


def test_prompts_that_may_get_more_or_less_share_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_teacher("qwen3", vocab_size=300)
    lm = ModelLM(model, TOKENIZER, batch_size=4, precision=AS_LOADED)
    limits = [3, 9, 5, 9, 2, 40]
    prompts = [[10 + i % 200 for i in range(n)] for n in (30, 4, 30, 7, 1022, 984)]
    alone = [lm.write([prompt], limit)[0] for prompt, limit in zip(prompts, limits, strict=True)]
    assert [len(tokens) for tokens in alone] == limits  # none ends by itself
    batches, write = [], lm.write

    def counted(some: list[list[int]], most: int, **options: object) -> list[list[int]]:
        batches.append((len(some), max(map(len, some)) + most))
        return write(some, most, **options)

    monkeypatch.setattr(lm, "write", counted)
    assert lm.write_all(prompts, limits) == alone
    # The longest has room for two, and 40 do not fit behind it: the others wait, and no batch leaves the positions.
    assert batches == [(1, 1024), (4, 1024), (1, 13)] and lm.max_length == 1024
    with pytest.raises(ValueError, match="a request has 1025 tokens, the model 1024 positions"):
        lm.write_all(prompts, [3, 9, 5, 9, 3, 40])


@pytest.mark.parametrize("form", FORMS)
def test_a_killed_evaluation_goes_on(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_teacher("llama", vocab_size=300)
    drawn = ruler_cases(TOKENIZER, tasks=["single_prose", "multiquery"], lengths=[600], cases=3)
    whole = ruler(model, TOKENIZER, cases=drawn, form=form, batch_size=2)
    batches, forward, dies_at = [], model.model.forward, 3

    def counted(*args: object, **kwargs: object) -> object:
        if kwargs["input_ids"].shape[1] > 4:  # a prompt, and no check and no step behind it
            batches.append(len(kwargs["input_ids"]))
            if len(batches) == dies_at:
                raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", counted)
    path = tmp_path / "evaluation.json.answers"
    with pytest.raises(KeyboardInterrupt):
        ruler(model, TOKENIZER, cases=drawn, form=form, batch_size=2, answers=Answers(path))
    done = len(path.read_bytes().splitlines())
    assert done == 4
    with open(path, "a") as stream:
        stream.write('["cut off in the mid')
    batches.clear()
    dies_at = 0
    again = ruler(model, TOKENIZER, cases=drawn, form=form, batch_size=2, answers=Answers(path))
    assert again == whole
    assert sum(batches) == len(drawn) - done
    assert len(path.read_bytes().splitlines()) == len(drawn)
    # Of other weights nothing is known, and of the same ones all.
    batches.clear()
    ruler(model, TOKENIZER, cases=drawn, form=form, answers=Answers(path))
    assert not batches
    with torch.no_grad():
        model.lm_head.weight.neg_()
    other = ruler(model, TOKENIZER, cases=drawn, form=form, answers=Answers(path))
    assert sum(batches) == len(drawn)
    assert other == ruler(model, TOKENIZER, cases=drawn, form=form)
    written = free_generation(model, TOKENIZER, prompts=["step 3", "return"], new_tokens=5, answers=Answers(path))
    assert len(Answers(path).known) == 2 * len(drawn) + 2
    batches.clear()
    again = free_generation(model, TOKENIZER, prompts=["step 3", "return"], new_tokens=5, answers=Answers(path))
    assert again == written and not batches
    path.write_text("no answers\n")
    with pytest.raises(ValueError, match=r"holds no answers of an evaluation .*; remove it, and all tasks begin anew"):
        Answers(path)


def test_answers_are_of_one_model_alone(tmp_path: Path) -> None:
    """Windows of two lengths, and softmax in other layers, are the same weights."""
    teacher, answers = tiny_teacher("llama", vocab_size=300), Answers(tmp_path / "answers")
    drawn = ruler_cases(TOKENIZER, tasks=["single_prose"], lengths=[600], cases=2)
    for layers, window in (([], 4), ([], 64), ([1], 4)):
        model = hh.convert(teacher, layers, mixer="sliding_window", mixer_options={"window": window})
        before = len(answers.known)
        found = ruler(model, TOKENIZER, cases=drawn, form="generation", answers=answers)
        assert len(answers.known) == before + 2
        assert found == ruler(model, TOKENIZER, cases=drawn, form="generation", answers=answers)
        assert len(answers.known) == before + 2
    assert len({tuple(tokens) for tokens in answers.known.values()}) == 6


def test_evaluate_goes_on_after_a_kill(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command; `--batch-size` holds in tasks."""
    command = ["evaluate", "embedded", "--tasks", "single_noise,single_prose", "--form", "generation"]
    command += ["--lengths", "400", "--cases", "5", "--batch-size", "3", "--output"]
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    main([*command, str(whole)])
    write, sizes = ModelLM.write, []

    def until_the_fourth(self: ModelLM, prompts: list[list[int]], *args: object, **kwargs: object) -> list[list[int]]:
        sizes.append(len(prompts))
        if len(sizes) == 4:
            raise KeyboardInterrupt
        return write(self, prompts, *args, **kwargs)

    monkeypatch.setattr(ModelLM, "write", until_the_fourth)
    assert main([*command, str(killed)]) == 130
    assert sizes == [3, 3, 3, 1]
    answers = tmp_path / "killed.json.answers"
    assert len(answers.read_bytes().splitlines()) == 9 and not killed.exists()
    capsys.readouterr()
    main([*command, str(killed)])
    assert f"9 answers of an earlier call are in {answers}" in capsys.readouterr().err.replace("\n", "")
    assert read_record(Evaluation, killed) == read_record(Evaluation, whole)
    assert not answers.exists()


def test_precision_and_random_state() -> None:
    model = tiny_teacher("llama", vocab_size=300)
    state, drawn = torch.get_rng_state(), random.getstate()
    lm = ModelLM(model, TOKENIZER, precision=Precision(torch.bfloat16))
    (half,), (full,) = (
        m.loglikelihood(requests_of([("step", " 3")], "loglikelihood"))
        for m in (lm, ModelLM(model, TOKENIZER, precision=AS_LOADED))
    )
    assert half != full and half[0] == pytest.approx(full[0], rel=0.1)
    ruler(model, TOKENIZER, tasks=["copying"], lengths=[1000], cases=1)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == drawn


def test_a_case_is_plain_data() -> None:
    (case,) = ruler_cases(TOKENIZER, tasks=["common_words"], lengths=[1200], cases=1)
    assert isinstance(case, Case) and len(case.answers) == 10
    listed = case.prompt.split("\n\n")[1].split()[1::2]
    assert {listed.count(word) for word in case.answers} == {6}
    assert {listed.count(word) for word in set(listed) - set(case.answers)} == {1}


def test_evaluate_with_tasks_and_several_texts(
    sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = cases._fitted
    teacher, texts = (str(path) for path in sources)
    halves = sorted(sources[1].glob("*.py"))
    command = ["evaluate", teacher, "--teacher", teacher, "--block-size", "32", "--rows", "4"]
    command += ["--data-files", f"first={halves[0]}", *map(str, halves[1:2]), f"all={texts}/*.py"]
    command += ["--tasks", "multikey_prose,single_prose", "--lengths", "700,800"]
    output = str(tmp_path / "evaluation.json")
    drawn = []
    monkeypatch.setattr(cases, "_fitted", lambda *args, **kw: drawn.append(args[0].name) or fitted(*args, **kw))
    assert main([*command, "--cases", "2", "--form", "both", "--json", "--output", output]) == 0
    assert len(drawn) == 2 * 2 * 2  # once for both models and forms
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(Path(output).read_text())
    asked = [
        (name, form, length) for form in FORMS for name in ("multikey_prose", "single_prose") for length in (700, 800)
    ]
    assert sorted((s["task"], s["form"], s["length"]) for s in result["tasks"]) == sorted(asked)
    assert result["tasks"] == result["teacher_tasks"] and all(len(s["scores"]) == 2 for s in result["tasks"])
    assert [text["name"] for text in result["texts"]] == ["first", "all"] and result["tokens"] == 8 * 32
    assert result["kl"] == pytest.approx(0, abs=1e-6) and result["perplexity_sem"] > 0
    assert read_record(Evaluation, Path(output)).tasks[0].task == "multikey_prose"

    assert main([*command, "--cases", "1"]) == 0
    shown = capsys.readouterr().out
    for text in ("perplexity of first", "perplexity of all", "multikey_prose", "700", "±", "teacher"):
        assert text in shown


def test_evaluate_lists_tasks_and_refuses_what_is_none(
    sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["evaluate", "--tasks", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*RULER_TASKS, *OFFLINE])
    assert main(["evaluate", "--tasks", "list", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["ruler"]) == list(RULER_TASKS)
    teacher = str(sources[0])
    for options, message in [
        (["--tasks", "ruler"], "evaluate needs a MODEL"),
        ([teacher, "--tasks", ","], "--tasks ',' names no task; see --tasks list."),
        ([teacher, "--lengths", "512,x"], "--lengths '512,x' is no list of lengths in tokens; write 512,1024."),
        ([teacher, "--cases", "0"], "--cases 0 is too small; pass at least 1."),
        (
            [teacher, "--tasks", "copying", "--lengths", "2048"],
            "--lengths 2048 is more than the 1024 positions",
        ),
        ([teacher, "--data-files", "a.py", "b=c.py"], "a.py comes before the first name; give every text a name"),
        ([teacher, "--data-files", "b=a.py", "b=c.py"], "the text b is named twice"),
        ([teacher, "--output", str(tmp_path / "no" / "file.json")], "there is no folder"),
    ]:
        assert main(["evaluate", *options]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "x=1.txt").write_text("text")
    assert named_files([str(tmp_path / "x=1.txt")], "--data-files") == {"": [str(tmp_path / "x=1.txt")]}


def test_a_task_of_lm_evals_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in lm-eval's folder takes it long to list, so a folder with one task stands for it."""
    lines = [{"text": f"step {i} of", "words": [" 3", " 4"], "right": i % 2} for i in range(6)]
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/lines.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{words}}'\n"
        "doc_to_target: right\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    made = functools.partial(TaskManager, include_defaults=False, include_path=str(tmp_path))
    monkeypatch.setattr(harness, "TaskManager", made)
    model = tiny_teacher("qwen3", vocab_size=300)
    (score,) = run_tasks(model, TOKENIZER, ["mine"], cases=4)
    assert (score.task, score.form, score.length, score.count) == ("mine", "acc", None, 4)
    assert score.mean == sum(score.scores) / 4 and score.sem == pytest.approx(standard_error(score.scores))
    with pytest.raises(ValueError, match="there is no task 'needle'; see hf-hybrid evaluate --tasks list"):
        run_tasks(model, TOKENIZER, ["mine", "needle"])


def test_free_generation_beside_the_teacher(tmp_path: Path) -> None:
    teacher = tiny_teacher("qwen3", vocab_size=300)
    prompts = ["def function_1(x, y):", "step 3", "return"]
    same = free_generation(hh.convert(teacher, range(4)), TOKENIZER, teacher, prompts=prompts, new_tokens=12)
    assert same.agreement == Figure(1.0, 0.0) and same.common_prefix.mean > 0
    assert same.repetition == same.teacher_repetition and same.looping == same.teacher_looping
    assert all(sample.text == sample.teacher_text for sample in same.samples)
    # One row at a time, by the library's own call.
    plain = teacher.generate(**TOKENIZER("step 3", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert same.samples[1].text == TOKENIZER.decode(plain[0, len(TOKENIZER("step 3")["input_ids"]) :], True)

    silent = free_generation(lookup_model(300, constant=7), TOKENIZER, teacher, prompts=prompts, new_tokens=12)
    assert silent.agreement.mean < 0.5 and silent.looping.mean == 1 and silent.repetition.mean == pytest.approx(8 / 9)
    alone = free_generation(lookup_model(300, constant=7), TOKENIZER, prompts=prompts, new_tokens=12)
    assert alone.agreement is None and alone.samples[0].teacher_text is None
    evaluation = Evaluation(generation=silent)
    evaluation.save(tmp_path / "evaluation.json")
    assert read_record(Evaluation, tmp_path / "evaluation.json") == evaluation
    with pytest.raises(ValueError, match="0 prompts and new_tokens=128"):
        free_generation(teacher, TOKENIZER, prompts=[])


def test_agreement_and_common_prefix_by_hand() -> None:
    assert agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75 and common_prefix([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert agreement([1, 2], [1, 2, 3, 4]) == 0.5 and common_prefix([1, 2], [1, 2, 3, 4]) == 2
    assert agreement([5], [6]) == 0 and common_prefix([5], [6]) == 0 and agreement([], []) == 1

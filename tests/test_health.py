"""What ends a run with exit code 3, and what it says on the way: by hand, and with faults in the program."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, lines_of, program

from distributed import checkpoint
from report import health, metrics
from support.config import Config

EVALUATED = {"no_answer": 0.2, "truncated": 0.2, "pass@1": 0.3}


@pytest.mark.parametrize("changes, starts, names", [
    ({}, [], []),
    ({"pass@1": 0.0}, ["no response to any question with a known answer is right"], ["none right"]),
    ({"no_answer": 0.9, "truncated": 0.9}, ["90% of the responses were truncated at --max-new-tokens"],
     ["no answer"]),
    ({"no_answer": 1.0, "pass@1": 0.0}, ["no answer was found in 100%"], ["no answer"]),
])  # fmt: skip
def test_the_first_evaluation_says_what_speaks_against_training(changes, starts, names):
    state = {"before": {"metrics": {**EVALUATED, **changes}}}
    said = health.warnings({"step": 0}, state, C)
    assert len(said) == len(starts) and all(map(str.startswith, said, starts))
    assert state["warned"] == names  # the first step does not say it again, but may say others


def test_without_true_answers_nothing_is_said_about_right_ones():
    metrics = {name: value for name, value in EVALUATED.items() if name != "pass@1"}
    assert health.first_doubts(metrics, Config()) == {}


@pytest.fixture
def watch(monkeypatch):
    """A Health; where it ends the run, ValueError is raised instead."""

    def end(why, saved):
        raise ValueError(f"{why}; {saved}")

    monkeypatch.setattr(health, "end", end)
    monkeypatch.setattr(health, "all_reduce", lambda values, op: values)
    return health.Health()


def doubts(watch, weight=0.5):
    said, policy = [], torch.nn.Linear(1, 1)
    policy.weight.data.fill_(weight)
    assert watch.may_save(policy, 1, said.append) == (not said)
    return said


def test_weights_that_are_not_finite_are_not_saved(watch):
    said = ["step 1: no checkpoint, because weights are not finite"]
    assert doubts(watch, float("nan")) == doubts(watch, float("inf")) == said and not doubts(watch)


def test_five_skipped_updates_in_a_row_end_a_run(watch):
    assert not doubts(watch) and watch.may_update(1.0, 1, None)
    for norm in (float("inf"), float("nan")) * 2:
        assert not watch.may_update(norm, 2, None)
    assert not doubts(watch)  # what is skipped moves no weight
    assert watch.may_update(3.0, 3, None)  # one that is made begins anew
    for step in (3, 4, 4, 5):
        assert not watch.may_update(float("nan"), step, None)
    with pytest.raises(ValueError, match=r"5 updates in a row, up to step 6.*; 2$"):
        watch.may_update(float("nan"), 6, 2)


@pytest.mark.parametrize("dtype, good, bad", [(torch.float32, 9e-4, 2e-3), (torch.bfloat16, 0.04, 0.06)])
def test_two_steps_in_which_sampler_and_learner_differ_end_a_run(watch, dtype, good, bad):
    for gap in (good, bad, good):
        watch.compare(gap, 1, dtype, None)
        assert bool(doubts(watch)) == (gap == bad)
    watch.compare(bad, 2, dtype, None)
    watch.compare(None, 3, dtype, None)  # learned nothing, so nothing is known
    assert doubts(watch)
    words = f"{bad:.1e} and {bad:.1e} in the last two steps, up to step 4"
    with pytest.raises(ValueError, match=words):
        watch.compare(bad, 4, dtype, None)


@pytest.mark.parametrize("fault", ["position", "slot"])
def test_a_sampler_that_computes_something_else_ends_the_run(few_questions, tmp_path, monkeypatch, fault):
    """An off-by-one in the positions that decoding hands to RoPE, or to the KV cache, from step 2 on."""
    monkeypatch.setenv("BROKEN", fault)
    monkeypatch.setenv("FROM_STEP", "2")
    flags = ["--data", few_questions, "--out", tmp_path / "run", *SMALL, "--eval-samples", "2"]
    done = program(tmp_path, *flags, script="tests/broken_run.py", code=3)
    said = re.findall(
        r"ttrl.py: sampler and learner .* was (.*) and (.*) in the last two steps, up to step 3,"
        r" and should be below 0.001 \(float32\);.*the checkpoint of step 1 is kept\n",
        done.stderr,
    )
    assert len(said) == 1 and all(float(gap) > 5e-3 for gap in said[0])
    assert "step 2: no checkpoint, because sampler and learner do not agree" in done.stdout
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["step-000001"]


def test_a_sampler_in_bf16_is_no_fault(few_questions, tmp_path, monkeypatch):
    """Its gap is above the limit of fp32, far below its own."""
    monkeypatch.setenv("BROKEN", "half")
    flags = ["--data", few_questions, "--out", tmp_path / "run", *SMALL, "--eval-samples", "2"]
    program(tmp_path, *flags, script="tests/broken_run.py")
    gaps = [line["train/logprob_gap"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")[1:]]
    assert len(gaps) == 4 and min(gaps) > 1e-4 and 5e-4 < max(gaps) < 1e-2


# ----------------------------------------------------------------------------------------------------------
# a collapse

HEALTHY = {"step": 3, "train/skipped_updates": 0, "train/zero_variance_groups": 0.5, "train/entropy": 0.06,
           "train/majority_ratio": 0.8, "train/no_answer": 0.1, "train/truncated": 0.1}  # fmt: skip
SIGNS = {
    "one label": (
        {"majority_ratio": 0.95},
        "95% of the samples agree, and 62% of the questions have the same",
    ),
    "entropy": ({"entropy": 0.0059}, "the entropy fell from 0.06 to 0.0059 nats per token"),
    "no answer": ({"no_answer": 0.51}, "no answer was found in 51% of the responses"),
    "truncated": ({"truncated": 0.51}, "51% of the responses were truncated at --max-new-tokens 3072"),
    "both": ({"no_answer": 0.8, "truncated": 0.7}, "70% of the responses were truncated"),
}


C = Config(epochs=20)  # the program decides it


def a_state(count=8, same=5):
    """After the first step: of the newest labels `same` are 7, one is missing."""
    labels = {str(i): "7" if i < same else str(100 + i) for i in range(count - 1)}
    state = {"empty_steps": 0, "agreement": {}, "labels": {**labels, "none": None}}
    assert health.warnings({**HEALTHY, "step": 1}, state, C) == []
    return state


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_of_collapse_is_said_once_in_a_run(name):
    change, words = SIGNS[name]
    line, state = {**HEALTHY, **{f"train/{key}": value for key, value in change.items()}}, a_state()
    [said] = health.warnings(line, state, C)
    assert said.startswith(f"step 3: {words}")
    resumed = json.loads(json.dumps(state))  # as in a checkpoint
    assert health.warnings(line, resumed, C) == []


@pytest.mark.parametrize("change, count, same", [
    ({"majority_ratio": 0.9}, 8, 5),
    ({"majority_ratio": 0.95}, 8, 4),  # half of the questions
    ({"majority_ratio": 0.95}, 7, 6),  # few questions
    ({"entropy": 0.0061}, 8, 5),
    ({"entropy": float("nan")}, 8, 5),
    ({"no_answer": 0.5, "truncated": 0.5}, 8, 5),
])  # fmt: skip
def test_what_is_no_sign_is_not_said(change, count, same):
    line = {**HEALTHY, **{f"train/{key}": value for key, value in change.items()}}
    assert health.warnings(line, a_state(count, same), C) == []


def test_a_reason_is_not_said_twice():
    """A step that taught nothing says why; skipped updates are said each time."""
    line, state = {**HEALTHY, "train/zero_variance_groups": 1, "train/no_answer": 1.0}, a_state()
    [said] = health.warnings(line, state, C)
    assert said.startswith("step 3 taught nothing: no answer was found in 100%")
    assert health.warnings({**line, "train/zero_variance_groups": 0}, state, C) == []
    for step in (4, 5):
        [said] = health.warnings({**HEALTHY, "step": step, "train/skipped_updates": 2}, state, C)
        assert said == f"step {step}: 2 updates skipped because their gradient was not finite"


@pytest.mark.parametrize("means, settled", [
    ([0.5, 0.6, 0.7, 0.8], False),
    ([0.5, 0.6, 0.5, 0.6], True),  # no more is not more
    ([0.5, 0.7, 0.6, 0.5], True),
    ([0.5, 0.7, 0.6, 0.61], False),  # one is less, and both together are more
    ([0.9, 0.9, 0.1, 0.1, 0.2, 0.3], False),  # what was long ago does not count
    ([0.9, 0.9, 0.1], False), ([], False),
])  # fmt: skip
def test_votes_have_settled_after_two_passes_without_more_agreement(means, settled):
    assert health.have_settled(means, 2) == settled
    agreement = {str(epoch): [8 * ratio, 8] for epoch, ratio in enumerate(means, 1)}
    state = {**a_state(), "agreement": agreement}
    for c, said in ((Config(epochs=20), settled), (Config(epochs=20, stop_when_settled=2), False)):
        found = health.warnings({**HEALTHY, "step": 7}, {**state, "warned": []}, c)
        assert len(found) == said and all("--stop-when-settled 2 would end the run" in text for text in found)


def test_agreement_is_a_mean_over_questions_of_whole_passes():
    """Eight questions and one; then a pass that is not over. A resumed run may have begun in mid-pass."""
    state = {"agreement": {"1": [0.3, 1]}}
    for epoch, ratio, questions in ((2, 0.5, 8), (2, 0.95, 1), (3, 0.7, 8), (3, 0.7, 1), (4, 0.1, 8)):
        health.note_agreement(state["agreement"], epoch, ratio, questions)
    assert health.means_of_passes(json.loads(json.dumps(state))) == pytest.approx([0.55, 0.7])
    assert health.means_of_passes({"agreement": {}}) == []
    health.note_agreement(state["agreement"], 5, 0, 0)  # of a rank that sees no votes


@pytest.mark.parametrize("passes, step, unlogged, decided, ends", [
    (1, 4, {}, False, True),
    (None, 4, {}, False, False),
    (1, 3, {}, False, False),  # in mid-pass
    (1, 4, None, False, False),  # logged without its last evaluation, before the flag was given
    (1, 4, None, True, True),  # a run that has ended so
    (2, 4, {}, True, False),  # another number of passes
])  # fmt: skip
def test_a_settled_run_ends_after_a_pass_and_once_for_all(passes, step, unlogged, decided, ends):
    agreement = {"1": [4.0, 6], "2": [3.0, 6]}
    state = {"step": step, "unlogged": unlogged, "settled": decided, "agreement": agreement}
    schedule, said = SimpleNamespace(config=Config(stop_when_settled=passes), steps_per_epoch=2), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(health, "on_rank0", lambda action: action())
        assert health.Health().has_settled(state, schedule, said.append) == ends
    assert len(said) == ends


def test_labels_of_no_question():
    assert metrics.most_common_label({}) == metrics.most_common_label({"a": None}) == (None, 0)


def test_a_run_that_gives_one_answer_to_every_question_says_so(tmp_path, monkeypatch):
    """From the second step on eight questions were asked; no answer of any question is read for it."""
    questions = json.loads((ROOT / "tiny" / "questions.json").read_text())[:8]
    (tmp_path / "eight.json").write_text(
        json.dumps([{"prompt": question["prompt"]} for question in questions])
    )
    monkeypatch.setenv("BROKEN", "one_answer")
    out = tmp_path / "run"
    flags = ["--data", tmp_path / "eight.json", "--out", out, *SMALL, "--questions-per-step", "4"]
    done = program(tmp_path, *flags, "--eval-samples", "1", script="tests/broken_run.py")
    said = re.findall(r"^step \d: 100% of the samples agree, and 100% .* label, '7': .*$", done.stdout, re.M)
    assert len(said) == 1 and said[0].startswith("step 2")
    assert all(line["train/most_common_label"] == 1 for line in lines_of(out / "metrics.jsonl")[1:])
    assert "one label" in checkpoint.read_state(out / "checkpoint" / "step-000004")["warned"]

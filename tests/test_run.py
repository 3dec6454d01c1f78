"""The real program as a subprocess: its files, the answers it never reads, ranks, resuming, errors."""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, command, environment, lines_of, program
from safetensors.torch import load_file, save_file
from test_nodes import lose

import ttrl
from distributed import checkpoint, machine
from report import health, screen
from support import config, inputs, run

TINY = ROOT / "tiny" / "model"


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def moved(out):
    """The largest change of a weight since the base model: equal runs prove nothing if neither moved."""
    return largest_difference(load_file(TINY / "model.safetensors"), weights(out))


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(data, out, *more, **options):
    """What a run with small settings printed."""
    return program("--data", data, "--out", out, *SMALL, *more, **options).stdout


def refused(*arguments):
    """The one line of stderr with which the program refuses `arguments`."""
    error = program(*arguments, code=2).stderr
    assert error.count("\n") == 1
    return error


def leave_in_the_middle(line, out):
    """Start the program, kill its processes once a step before the last is saved, and return that step."""
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoint/step-00000[1-3]")) and time.monotonic() < deadline:
        time.sleep(0.02)
    lose(process)
    assert process.wait() == -signal.SIGKILL
    step = list(checkpoint.folders(out / "checkpoint").values())[-1]
    assert 1 <= step < 4
    return step


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few_questions):
    """A short run of the real program to its end, and what it printed: two epochs of two steps."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, train(few_questions, out)


# ----------------------------------------------------------------------------------------------------------
# what a run leaves


def test_a_run_leaves_every_file(finished):
    out, _ = finished
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "rollouts.jsonl", "votes.jsonl", "curves.png", "report.html",
        "summary.json", "checkpoint", "model", ".lock", ".owner"}  # fmt: skip
    picture = (out / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    assert json.loads((out / "config.json").read_text())["votes"] == 8
    assert {path.name for path in (out / "checkpoint").iterdir()} == {"step-000003", "step-000004"}


def test_the_page_of_a_run_shows_what_its_files_hold(finished):
    out, printed = finished
    page = (out / "report.html").read_text(encoding="utf-8")
    summary = json.loads((out / "summary.json").read_text())
    assert f"{summary['before']['pass@1']:.3f} → {summary['after']['pass@1']:.3f}" in page
    assert "4 of 4" in page and "report.html" in printed and summary["environment"]["torch"] in page
    for row in summary["questions"]:
        assert f"<code>{row['id']}</code>" in page
    assert page.count('<g id="v') == 6 and page.count("step 1 → ") + page.count("step 2 → ") == 6


def test_metrics_have_a_line_a_step_with_every_name(finished):
    out, _ = finished
    lines = lines_of(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["epoch"] for line in lines] == [0, 1, 1, 2, 2]
    train = """label_accuracy reward_accuracy majority_ratio ground_truth_ratio reward entropy clip_fraction
        kl_old_new logprob_gap logprob_gap_max grading_timeouts grad_norm lr response_tokens truncated
        no_answer zero_variance_groups rollout_tokens_per_s train_tokens_per_s peak_memory_gb pass@8"""
    for line in lines[1:]:
        assert {f"train/{name}" for name in train.split()} <= line.keys()
    evaluation = {"eval/pass@1", "eval/pass@1_se", "eval/maj@4", "eval/pass@4", "eval/majority_ratio"}
    assert [evaluation <= line.keys() for line in lines] == [True, False, True, False, True]
    assert {"eval/greedy", "eval/pass@1 at 0.6/0.95"} <= lines[0].keys() & lines[-1].keys()
    # the sampler and the learner compute the same log-probability in two ways
    assert all(0 < line["train/logprob_gap"] < 1e-5 and line["train/logprob_gap_max"] < 1e-3
               for line in lines[1:])  # fmt: skip


def test_the_votes_of_every_step_add_up(finished):
    lines = lines_of(finished[0] / "votes.jsonl")
    assert [line["step"] for line in lines] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert len({line["question"] for line in lines}) == 6
    measured = lines_of(finished[0] / "metrics.jsonl")
    labels = {}
    for step in range(1, 5):
        votes = [line for line in lines if line["step"] == step]
        for line in votes:
            counts = list(line["votes"].values())
            assert sum(counts) + line["none"] + line.get("other", 0) == 8
            assert counts == sorted(counts, reverse=True) and next(iter(line["votes"]), None) == line["label"]
        largest = [max(line["votes"].values(), default=0) / 8 for line in votes]
        assert measured[step]["train/majority_ratio"] == pytest.approx(sum(largest) / 3)
        assert measured[step]["train/distinct_answers"] == sum(len(line["votes"]) for line in votes) / 3
        flips = [labels[line["question"]] != line["label"] for line in votes if line["question"] in labels]
        assert measured[step].get("train/flip_rate") == (sum(flips) / 3 if flips else None)
        assert ("train/locked_wrong" in measured[step]) == (step > 2) == bool(flips)
        labels.update({line["question"]: line["label"] for line in votes})


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_run_ends_when_its_votes_have_settled(few_questions, tmp_path, ranks):
    """At the end of the first pass without more agreement; the same command finds the run at its end."""
    flags = ["--epochs", "12", "--stop-when-settled", "1", "--lr", "1e-9"]  # agreement goes up and down
    printed = train(few_questions, tmp_path, *flags, ranks=ranks)
    lines = lines_of(tmp_path / "metrics.jsonl")
    ratios = [line["train/majority_ratio"] for line in lines[1:]]
    means = [sum(ratios[start : start + 2]) / 2 for start in range(0, len(ratios), 2)]
    assert 4 <= len(ratios) < 24 and len(ratios) % 2 == 0
    falls = [later <= earlier for earlier, later in itertools.pairwise(means)]
    assert falls == [False] * (len(means) - 2) + [True]
    assert f"step {len(ratios)}: the votes have settled (--stop-when-settled 1): the end" in printed
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == len(ratios)
    files = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "model/model.safetensors")}
    train(few_questions, tmp_path, *flags)  # on one rank: the weights are read, and nothing is computed
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())


def test_rollouts_show_answer_label_and_reward(finished):
    rows = lines_of(finished[0] / "rollouts.jsonl")
    assert {row["step"] for row in rows} == {1, 2, 3, 4}
    assert all({"id", "prompt", "response", "answer", "label", "reward"} <= row.keys() for row in rows)
    assert all(row["reward"] == 1.0 for row in rows if row["answer"] == row["label"] is not None)
    assert all(row["reward"] == 0.0 for row in rows if row["answer"] is None)
    assert not any("<|" in row["response"] for row in rows)  # special tokens do not reach the grader


def test_summary_and_ledger(finished):
    out, printed = finished
    summary = json.loads((out / "summary.json").read_text())
    names = "before after best ledger questions seconds environment peak_memory_gb"
    assert set(names.split()) <= summary.keys()
    assert sum(summary["ledger"].values()) == 6 == len(summary["questions"])
    for word in ("before", "after", "pass@1", "maj@4", "learned", "corrupted", "±", "truth"):
        assert word in printed, word
    assert "taught nothing" not in printed


def test_the_model_loads_in_transformers_with_equal_logits(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model import Transformer

    out, _ = finished
    tokens = torch.tensor([AutoTokenizer.from_pretrained(out / "model")("What is 7+5+9?").input_ids])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out / "model").eval()(tokens).logits
        ours = Transformer.from_pretrained(out / "model").logits(tokens)
    assert theirs.std() > 1 and (theirs - ours).abs().max() < 1e-4
    assert moved(out) > 1e-3


def test_a_finished_run_is_not_made_again(finished, few_questions):
    out, _ = finished
    before = (out / "metrics.jsonl").read_text()
    again = train(few_questions, out)
    assert "has all its 4 steps: nothing is trained" in again and "resume" not in again
    assert "pass@1" in again and (out / "metrics.jsonl").read_text() == before


# ----------------------------------------------------------------------------------------------------------
# the answers are never read by training


@pytest.mark.parametrize("change", ["removed", "shuffled"])
def test_weights_do_not_depend_on_the_answers(finished, few_questions, tmp_path, change):
    asked = json.loads(few_questions.read_text())
    answers = [q.pop("answer") for q in asked]
    if change == "shuffled":
        asked = [{**q, "answer": a} for q, a in zip(asked, answers[1:] + answers[:1], strict=True)]
    (tmp_path / "changed.json").write_text(json.dumps(asked))
    printed = train(tmp_path / "changed.json", tmp_path / "run")
    assert same_weights(finished[0], tmp_path / "run") and moved(tmp_path / "run") > 1e-3
    names = {name for line in lines_of(tmp_path / "run" / "metrics.jsonl") for name in line}
    known = [name for name in names if "accuracy" in name or "pass@" in name]
    assert bool(known) == (change == "shuffled") and "majority_ratio" in printed


def test_gold_does_read_them(finished, few_questions, tmp_path):
    train(few_questions, tmp_path / "gold", "--reward", "gold")
    assert not same_weights(finished[0], tmp_path / "gold")
    lines = lines_of(tmp_path / "gold" / "metrics.jsonl")[1:]
    assert all(line["train/reward"] == line["train/ground_truth_ratio"] for line in lines)


# ----------------------------------------------------------------------------------------------------------
# ranks


RANKS = """--votes 9 --samples 7 --questions-per-step 3 --questions-per-update 2 --epochs 2 --eval-samples 2
    --lr 1e-3 --max-new-tokens 48 --micro-batch-tokens 200 --kl 0.01""".split()


def test_two_ranks_are_one(few_questions, tmp_path):
    """9 votes and 7 samples do not divide by 2, and micro-batches are small: the ranks' numbers differ."""
    recorded = {}
    for ranks in (None, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        flags = ["--data", few_questions, "--out", folder / "run", *RANKS]
        program(folder, *flags, ranks=ranks, script="tests/recorded_run.py")
        recorded[ranks] = [torch.load(path) for path in sorted(folder.glob("rank-*.pt"))]
    alone, (first, second) = recorded[None][0], recorded[2]
    assert {**first["first"], **second["first"]} == alone["first"] and len(alone["first"]) == 27
    assert abs(len(first["first"]) - len(second["first"])) == 1
    assert len(alone["norms"]) >= 4 and torch.equal(first["norms"], second["norms"])
    torch.testing.assert_close(first["norms"], alone["norms"], rtol=1e-4, atol=0)
    change = moved(tmp_path / "None" / "run")
    assert change > 1e-3
    # Adam divides a gradient near 0 by itself: with torch 2.11 two weights are off by 1.1 and 1.5 %
    assert largest_difference(*(weights(tmp_path / name / "run") for name in ("None", "2"))) < 0.03 * change


# ----------------------------------------------------------------------------------------------------------
# killed and resumed


def test_a_killed_run_goes_on_bitwise(finished, few_questions, tmp_path):
    out = tmp_path / "run"
    step = leave_in_the_middle(command("--data", few_questions, "--out", out, *SMALL), out)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    done = [line for line in lines if json.loads(line)["step"] <= step]
    assert f"resume   from step {step}" in train(few_questions, out)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    # no step is made twice
    assert lines[: step + 1] == done and [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert same_weights(finished[0], out) and moved(out) > 1e-3


def measured(out):
    """The lines of metrics.jsonl without what depends on the clock and the machine."""
    lines = lines_of(out / "metrics.jsonl")
    varying = ("train/seconds_", "train/rollout_tokens_", "train/train_tokens_", "train/peak_memory_")
    return [{name: line[name] for name in line if not name.startswith(varying)} for line in lines]


ONE_STEP = ["--max-minutes", "0.001"]


def test_a_stopped_run_goes_on_bitwise_without_any_of_its_leftovers(finished, few_questions, tmp_path):
    """--max-minutes stops after a step; half-written files beside the checkpoint are not taken for one."""
    out = tmp_path / "run"
    assert "rerun the same command to resume" in train(few_questions, out, *ONE_STEP)
    shutil.copytree(out / "checkpoint" / "step-000001", out / "checkpoint" / "step-000003.tmp")
    (out / "checkpoint" / "step-000003.tmp" / "weights-1-of-1.safetensors").write_bytes(b"half")
    halves = {"metrics": '{"step": 2, "train/rew', "votes": '{"step": 2, "question": "gone"}\n'}
    for name, rest in halves.items():
        with open(out / f"{name}.jsonl", "a") as file:
            file.write(rest)
    train(few_questions, out)
    assert same_weights(finished[0], out) and measured(out) == measured(finished[0])
    assert [line["step"] for line in measured(out)] == [0, 1, 2, 3, 4]
    assert (out / "votes.jsonl").read_bytes() == (finished[0] / "votes.jsonl").read_bytes()


def test_another_number_of_ranks_goes_on(finished, few_questions, tmp_path):
    """What memory allows a rank is no flag: two ranks resume a run of one, say so and agree to rounding."""
    out = tmp_path / "run"
    train(few_questions, out, *ONE_STEP)
    printed = train(few_questions, out, ranks=2)
    assert "resume   from step 1" in printed
    assert "ranks was 1 and is 2: the run goes on, but not bitwise the same" in printed
    assert largest_difference(weights(finished[0]), weights(out)) < 0.01 * moved(out)


def test_other_flags_are_not_resumed(finished, few_questions):
    error = refused("--data", few_questions, "--out", finished[0], *SMALL, "--lr", "1e-4")
    assert "--lr was 0.001 and is 0.0001" in error and "--allow-changed-flags" in error


def test_the_checkpoint_of_another_model_is_one_sentence(finished, few_questions, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    path = out / "checkpoint" / "step-000004" / "weights-1-of-1.safetensors"
    sums, before = path.with_name("SHA256SUMS"), checkpoint.sha256(path)
    save_file({f"old.{name}": tensor.clone() for name, tensor in load_file(path).items()}, path)
    sums.write_text(sums.read_text().replace(before, checkpoint.sha256(path)))
    error = refused("--data", few_questions, "--out", out, *SMALL, "--allow-changed-flags")
    assert "step-000004: holds the parameters of another model" in error


def test_changed_questions_are_not_resumed(finished, few_questions, tmp_path):
    """The same file name with another question, another answer, or one question less."""
    asked = json.loads(few_questions.read_text())
    path, out = tmp_path / "mine.json", tmp_path / "run"
    path.write_text(json.dumps(asked))
    train(path, out, *ONE_STEP)
    for first in [], [{**asked[0], "prompt": "1+1=?"}], [{**asked[0], "answer": "1"}]:
        path.write_text(json.dumps([*first, *asked[1:]]))
        error = refused("--data", path, "--out", out, *SMALL, "--allow-changed-flags")
        assert "holds a run on other questions" in error and str(path) in error
    path.write_text(json.dumps(asked))
    assert "resume   from step 1" in train(path, out) and same_weights(finished[0], out)


def test_edited_sources_are_not_resumed_silently(few_questions, tmp_path, monkeypatch):
    """The same command after an edit of the reward: a sentence names the file; with the flag it goes on."""
    monkeypatch.delenv("EXERCISES", raising=False)
    copy = tmp_path / "program"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "tests", "bench"))
    arguments = ["--data", few_questions, "--out", tmp_path / "run", *SMALL, *ONE_STEP]
    program(*arguments, script=copy / "ttrl.py")
    source = (copy / "ttrl.py").read_text()
    (copy / "ttrl.py").write_text(source.replace("float(index in majority)", "0.5"))
    error = program(*arguments, script=copy / "ttrl.py", code=2).stderr
    assert error.count("\n") == 1 and "holds a run with other sources (ttrl.py)" in error
    again = program(*arguments, "--allow-changed-flags", script=copy / "ttrl.py").stdout
    assert "resume   from step 1" in again


def test_stray_files_do_not_end_training(few_questions, tmp_path):
    folder = tmp_path / "run" / "checkpoint"
    (folder / "step-mine").mkdir(parents=True)
    stray = [".DS_Store", ".nfs0001", "step-9", "notes.txt"]
    for name in stray:
        (folder / name).write_text("not ours")
    train(few_questions, tmp_path / "run")
    assert {path.name for path in folder.iterdir()} == {*stray, "step-mine", "step-000003", "step-000004"}


def test_separators_inside_a_line_survive(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    lines = [{"step": 1, "response": "one\u2028two\u0085three"}, {"step": 2}]
    checkpoint.append(path, lines)
    assert screen.read_lines(path) == lines


# ----------------------------------------------------------------------------------------------------------
# bad input, and the other ways in


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "nowhere.json"),
        ('[{"prompt": "1+1=?"}, {"Query": "2+2=?"}]', "Query"),
        ('[{"prompt": "1+1=?"}]', "--reward gold"),
    ],
)
def test_bad_questions_are_one_sentence(tmp_path, content, words):
    path = tmp_path / "nowhere.json"
    if content:
        path.write_text(content)
    error = refused("--data", path, "--out", tmp_path / "run", "--reward", "gold")
    assert words in error and "Traceback" not in error


def test_eval_only_on_other_questions(few_questions, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "1+2=?", "answer": "3"}\n')
    printed = program("--eval-only", "--eval-data", tmp_path / "one.jsonl", "--data", few_questions, "--out",
                      tmp_path / "run", "--eval-samples", "4", "--eval-temperature", "0.6", "--eval-top-p",
                      "0.95", ranks=2).stdout  # fmt: skip
    assert "pass@1" in printed and "maj@4" in printed
    assert "plan     evaluation only: 1 questions x 4 responses = 4, " in printed and "greedy" not in printed
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"evaluation.json"}


def test_a_dry_run_prints_the_plan_and_the_prompts_left_out_and_writes_nothing(tmp_path):
    questions = [{"prompt": "1+2=?"}, {"prompt": "1+" * 60 + "1=?", "id": "long-one"}]
    (tmp_path / "two.json").write_text(json.dumps(questions))
    flags = ["--dry-run", "--data", tmp_path / "two.json", "--max-prompt-tokens", "60"]
    printed = program(*flags, "--out", tmp_path / "run").stdout
    assert "1 prompts over --max-prompt-tokens 60: long-one" in printed and "1 questions" in printed
    assert "plan " in printed and "memory " in printed and not (tmp_path / "run").exists()


def test_an_unknown_model_is_one_sentence_on_every_rank(tmp_path):
    """Rank 0 looks it up and fails; the other must not wait for it."""
    flags = ["--model", tmp_path / "nowhere", "--data", "tiny", "--out", tmp_path / "run"]
    assert "nowhere" in refused(*flags)
    assert program(*flags, ranks=2, code=1).stderr.count("ttrl.py: ") == 1


# ----------------------------------------------------------------------------------------------------------
# what must not stay silent


def test_updates_that_are_never_finite_do_not_end_as_if_all_were_well(few_questions, tmp_path):
    """Too few to end a run early: a line for each step, then a sentence and no model."""
    out = tmp_path / "run"
    flags = ["--data", few_questions, "--out", out, *SMALL, "--epochs", "1"]
    done = program(tmp_path, *flags, script="tests/broken_run.py", code=3)
    assert re.search(r"step 1: \d updates skipped because their gradient", done.stdout + done.stderr)
    nothing = r"ttrl.py: the gradient of all \d updates was not finite, nothing was learned; the checkpoint"
    assert re.search(nothing, done.stderr)
    assert "What became of" not in done.stdout and not (out / "summary.json").exists()
    assert not (out / "model").exists()


FAULTS = ("norm", "weight", "sampled", "learned", "loss", "gradient")


@pytest.mark.parametrize(
    "ranks, fault", [*((None, fault) for fault in FAULTS), (2, "sampled"), (2, "gradient")]
)
def test_numbers_that_go_bad_move_no_weight_and_end_the_run(
    few_questions, tmp_path, monkeypatch, ranks, fault
):
    """From step 2 on something is not finite (tests/broken_run.py): the weights are those of step 1."""
    monkeypatch.setenv("BROKEN", fault)
    monkeypatch.setenv("FROM_STEP", "2")
    out = tmp_path / "run"
    flags = ["--data", few_questions, "--out", out, *SMALL, "--eval-samples", "2"]
    code = 3 if ranks is None else 1  # of torchrun
    done = program(tmp_path, *flags, ranks=ranks, script="tests/broken_run.py", code=code)
    assert ranks is None or "exitcode  : 3 " in done.stderr
    why = r"ttrl.py: the gradients of 5 updates in a row, up to step 4, were not finite: .*\n"
    [said] = re.findall(why, done.stderr)
    saved = 1 if fault == "weight" else 3  # skipped updates leave the weights as they are
    assert said.endswith(f"; the checkpoint of step {saved} is kept\n")
    assert ("step 3: no checkpoint, because weights are not finite" in done.stdout) == (fault == "weight")
    assert list(checkpoint.folders(out / "checkpoint").values()) == ([1] if saved == 1 else [2, 3])
    kept = load_file(out / "checkpoint" / f"step-00000{saved}" / "weights-1-of-1.safetensors")
    last_weights = [torch.load(path) for path in tmp_path.glob("rank-*.pt")]  # torchrun may kill the others
    assert last_weights
    for last in last_weights:
        moved = {name for name in kept if not kept[name].equal(last[name])}
        assert moved == ({"norm.weight"} if fault == "weight" else set())


CUT = "taught nothing: 100% of the responses were truncated at --max-new-tokens 3; try a larger limit"


def test_a_run_that_learns_nothing_says_so(few_questions, tmp_path):
    """At the 1st and the 10th such step and at the end; with KL, whose updates move weights all the same."""
    flags = ["--data", few_questions, *SMALL, "--max-new-tokens", "3", "--eval-samples", "2"]
    printed = program(*flags, "--epochs", "6", "--kl", "0.001", "--out", tmp_path / "run").stdout
    said = re.findall(r"^.* taught nothing.*$", printed, re.MULTILINE)
    assert said == [f"step 1 {CUT}", f"step 10 {CUT}", f"12 of 12 steps {CUT}"]
    assert all(line["train/updates"] == 2 for line in lines_of(tmp_path / "run" / "metrics.jsonl")[1:])
    printed = program(*flags, "--eval-only", "--out", tmp_path / "run").stdout
    advice = CUT.removeprefix("taught nothing: ")
    assert printed.endswith(f"\n\n{advice}\n")


@pytest.mark.parametrize(
    "no_answer, truncated, why",
    [
        (1.0, 0.2, "no answer was found in 100% of the responses; the prompt in the plan should ask for"),
        (0.2, 0.2, "all samples of a question have the same reward; try other questions"),
        (0.6, 0.9, "90% of the responses were truncated at --max-new-tokens 3072"),
    ],
)
def test_why_a_step_taught_nothing(no_answer, truncated, why):
    line = {"step": 7, "train/no_answer": no_answer, "train/truncated": truncated}
    taught, nothing = ({**line, "train/zero_variance_groups": share} for share in (0.9, 1.0))
    c = config.Config()
    assert f"step 7 taught nothing: {why}" in health.taught_nothing([nothing], c)
    assert f"2 of 3 steps taught nothing: {why}" in health.taught_nothing([nothing, taught, nothing], c)
    assert health.taught_nothing([taught, nothing], c) is health.taught_nothing([taught], c) is None


@pytest.mark.parametrize("failing", ["1", "0 1"])
def test_an_error_on_any_rank_is_said(few_questions, tmp_path, monkeypatch, failing):
    """A rank that fails says its number and why, and none waits for it. Of several the first is named."""
    monkeypatch.setenv("RANKS_THAT_CANNOT_READ", failing)
    flags = ["--data", few_questions, "--out", tmp_path / "run", *SMALL]
    error = program(tmp_path, *flags, ranks=2, script="tests/broken_run.py", code=1).stderr
    assert "Connection closed" not in error
    [line] = [line for line in error.splitlines() if "ttrl.py: " in line and "disk" in line]
    assert line == f"ttrl.py: rank {failing[0]}: the disk is gone"


def test_the_plan_comes_before_the_weights(few_questions, tmp_path, monkeypatch, capsys):
    """From config.json and the tokenizer alone: neither --dry-run nor what cannot fit fetches weights."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    fetched = []
    monkeypatch.setattr(inputs, "fetch_config", lambda name: folder)
    monkeypatch.setattr(run, "fetch_weights", lambda name: fetched.append(name) or folder)
    arguments = ["--model", "Qwen2.5-Math-1.5B", "--data", str(few_questions), "--max-new-tokens", "48"]
    arguments += ["--out", str(tmp_path / "run")]
    endings = []
    for more in (["--dry-run"], [], []):
        try:
            endings.append(ttrl.main([*arguments, *more]))
        except SystemExit as stopped:
            endings.append(stopped.code)
        finally:
            torch.distributed.destroy_process_group()
        monkeypatch.setattr(machine, "physical_memory", lambda: 10**7)  # from the second on nothing fits
    printed = capsys.readouterr()
    assert endings == [0, 2, 2] and fetched == []
    assert "plan " in printed.out and printed.err.count("Qwen2.5-Math-1.5B does not fit") == 2


ENDING = """
import gc, time, weakref
from distributed import ranks

class Graph:
    def __init__(self):
        self.cycle = self

def main():
    global graph
    held = Graph()
    graph = weakref.ref(held)
    ranks.start_processes("cpu")
    ENDS

def destroy():
    assert graph() is None, "a graph is alive"
    print("left the group", flush=True)
    leave()

gc.disable()
leave, ranks.dist.destroy_process_group = ranks.dist.destroy_process_group, destroy
ranks.run_and_leave(main)
"""


@pytest.mark.parametrize(
    ("ends", "code", "printed", "complaint"),
    [
        ("raise RuntimeError('out of memory')", 1, "", "RuntimeError: out of memory\n"),
        ("raise SystemExit('nothing was learned')", 1, "left the group\n", "nothing was learned\n"),
        ("pass", 0, "left the group\n", ""),
    ],
)
def test_a_rank_leaves_the_group_only_with_the_others(ends, code, printed, complaint):
    """One that fails would wait for them as its NCCL group ends. Nor may CUDA graphs live then."""
    script = ENDING.replace("ENDS", ends)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=99
    )
    said = re.sub(r"\[Gloo\].*\n", "", done.stdout)  # torch 2.8 counts its peers
    assert (done.returncode, said) == (code, printed)
    assert done.stderr.endswith(complaint)

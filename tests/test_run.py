"""The real program as a subprocess: what it leaves, that it never reads the answers, ranks, being killed."""

import dataclasses
import hashlib
import io
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ttrl
from distributed import memory
from report import screen
from support import config, questions, run

TINY = ROOT / "tiny" / "model"


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def moved(out):
    """The largest change of a weight since the base model: equal runs prove nothing if neither moved."""
    base = load_file(TINY / "model.safetensors")
    return max((tensor - base[name]).abs().max().item() for name, tensor in weights(out).items())


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few_questions):
    """A short run of the real program to its end, and what it printed: two epochs of two steps."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, program("--data", few_questions, "--out", out, *SMALL).stdout


# ----------------------------------------------------------------------------------------------------------
# what a run leaves


def test_a_run_leaves_every_file(finished):
    out, _ = finished
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "rollouts.jsonl", "votes.jsonl", "curves.png", "report.html",
        "summary.json", "checkpoint", "model"}  # fmt: skip
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG") and (
        out / "curves.png"
    ).stat().st_size > 20_000
    assert json.loads((out / "config.json").read_text())["votes"] == 8
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["step-000004"]


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


def test_sampler_and_learner_agree(finished):
    lines = lines_of(finished[0] / "metrics.jsonl")[1:]
    assert all(line["train/logprob_gap"] < 1e-5 and line["train/logprob_gap_max"] < 1e-3 for line in lines)
    assert all(line["train/logprob_gap"] > 0 for line in lines)  # two ways of computing the same number


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
    assert {
        "before",
        "after",
        "best",
        "ledger",
        "questions",
        "seconds",
        "environment",
        "peak_memory_gb",
    } <= summary.keys()
    assert sum(summary["ledger"].values()) == 6 == len(summary["questions"])
    for word in ("before", "after", "pass@1", "maj@4", "learned", "corrupted", "±", "truth"):
        assert word in printed, word


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
    again = program("--data", few_questions, "--out", out, *SMALL).stdout
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
    printed = program("--data", tmp_path / "changed.json", "--out", tmp_path / "run", *SMALL).stdout
    assert same_weights(finished[0], tmp_path / "run") and moved(tmp_path / "run") > 1e-3
    known = [
        name
        for line in lines_of(tmp_path / "run" / "metrics.jsonl")
        for name in line
        if "accuracy" in name or "pass@" in name
    ]
    assert bool(known) == (change == "shuffled") and "majority_ratio" in printed


def test_gold_does_read_them(finished, few_questions, tmp_path):
    program("--data", few_questions, "--reward", "gold", "--out", tmp_path / "gold", *SMALL)
    assert not same_weights(finished[0], tmp_path / "gold")
    lines = lines_of(tmp_path / "gold" / "metrics.jsonl")[1:]
    assert all(line["train/reward"] == line["train/ground_truth_ratio"] for line in lines)


# ----------------------------------------------------------------------------------------------------------
# ranks


RANKS = """--votes 9 --samples 7 --questions-per-step 3 --questions-per-update 2 --epochs 2 --eval-samples 2
    --lr 1e-3 --max-new-tokens 48 --micro-batch-tokens 200 --kl 0.01""".split()


def test_two_ranks_are_one(few_questions, tmp_path):
    """9 votes and 7 samples are not shared evenly, and micro-batches are small.

    So the ranks have different numbers of micro-batches.
    """
    recorded = {}
    for ranks in (None, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        program(
            folder,
            "--data",
            few_questions,
            "--out",
            folder / "run",
            *RANKS,
            ranks=ranks,
            script="tests/recorded_run.py",
        )
        recorded[ranks] = [torch.load(path) for path in sorted(folder.glob("rank-*.pt"))]
    alone, (first, second) = recorded[None][0], recorded[2]
    together = {**first["first"], **second["first"]}
    assert (
        together == alone["first"]
        and len(alone["first"]) == 27
        and abs(len(first["first"]) - len(second["first"])) == 1
    )
    assert len(alone["norms"]) >= 4 and torch.equal(first["norms"], second["norms"])
    torch.testing.assert_close(first["norms"], alone["norms"], rtol=1e-4, atol=0)
    change = moved(tmp_path / "None" / "run")
    one, two = (weights(tmp_path / which / "run") for which in ("None", "2"))
    assert change > 1e-3
    # Adam divides a gradient near 0 by itself: with torch 2.11 two weights are off by 1.1 and 1.5 %
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 0.03 * change


# ----------------------------------------------------------------------------------------------------------
# killed and resumed


def test_a_killed_run_goes_on_bitwise(finished, few_questions, tmp_path):
    out = tmp_path / "run"
    arguments = ["--data", few_questions, "--out", out, *SMALL]
    process = subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoint/step-00000[1-3]")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    step = int(
        next(p for p in sorted(out.glob("checkpoint/step-??????"), reverse=True)).name.removeprefix("step-")
    )
    assert 1 <= step < 4
    done = [
        line for line in (out / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= step
    ]
    printed = program(*arguments).stdout
    assert f"resume   from step {step}" in printed
    lines = (out / "metrics.jsonl").read_text().splitlines()
    # no step is made twice
    assert lines[: step + 1] == done and [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert same_weights(finished[0], out) and moved(out) > 1e-3


def measured(out):
    """The lines of metrics.jsonl without what depends on the clock and the machine."""
    lines = lines_of(out / "metrics.jsonl")
    varying = ("train/seconds_", "train/rollout_tokens_", "train/train_tokens_", "train/peak_memory_")
    return [{name: line[name] for name in line if not name.startswith(varying)} for line in lines]


def test_a_stopped_run_goes_on_bitwise_without_any_of_its_leftovers(finished, few_questions, tmp_path):
    """--max-minutes stops after a step; half-written files beside the checkpoint are not taken for one."""
    out = tmp_path / "run"
    arguments = ["--data", few_questions, "--out", out, *SMALL]
    assert "the same command goes on" in program(*arguments, "--max-minutes", "0.001").stdout
    shutil.copytree(out / "checkpoint" / "step-000001", out / "checkpoint" / "step-000003.tmp")
    (out / "checkpoint" / "step-000003.tmp" / "weights-1-of-1.safetensors").write_bytes(b"half")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/rew')
    with open(out / "votes.jsonl", "a") as file:
        file.write('{"step": 2, "question": "gone"}\n')
    program(*arguments)
    assert same_weights(finished[0], out) and measured(out) == measured(finished[0])
    assert [line["step"] for line in measured(out)] == [0, 1, 2, 3, 4]
    assert (out / "votes.jsonl").read_bytes() == (finished[0] / "votes.jsonl").read_bytes()


def test_another_number_of_ranks_goes_on(finished, few_questions, tmp_path):
    """What memory allows a rank is no flag: two ranks resume a run of one, say so and agree to rounding."""
    out = tmp_path / "run"
    arguments = ["--data", few_questions, "--out", out, *SMALL]
    program(*arguments, "--max-minutes", "0.001")
    printed = program(*arguments, ranks=2).stdout
    assert (
        "resume   from step 1" in printed
        and "ranks was 1 and is 2: the run goes on, but not bitwise the same" in printed
    )
    one, two = weights(finished[0]), weights(out)
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 0.01 * moved(out)


def test_other_flags_are_not_resumed(finished, few_questions):
    out, _ = finished
    error = program("--data", few_questions, "--out", out, *SMALL, "--lr", "1e-4", code=2).stderr
    assert (
        error.count("\n") == 1
        and "--lr was 0.001 and is 0.0001" in error
        and "--allow-changed-flags" in error
    )


def test_the_checkpoint_of_another_model_is_one_sentence(finished, few_questions, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    path = out / "checkpoint" / "step-000004" / "weights-1-of-1.safetensors"
    save_file({f"old.{name}": tensor.clone() for name, tensor in load_file(path).items()}, path)
    error = program("--data", few_questions, "--out", out, *SMALL, "--allow-changed-flags", code=2).stderr
    assert error.count("\n") == 1 and "step-000004: holds the parameters of another model" in error


# ----------------------------------------------------------------------------------------------------------
# the door, and the other ways in


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
    error = program("--data", path, "--out", tmp_path / "run", "--reward", "gold", code=2).stderr
    assert error.count("\n") == 1 and words in error and "Traceback" not in error


def test_eval_only_on_other_questions(few_questions, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "1+2=?", "answer": "3"}\n')
    printed = program("--eval-only", "--eval-data", tmp_path / "one.jsonl", "--data", few_questions, "--out",
                      tmp_path / "run", "--eval-samples", "4", "--eval-temperature", "0.6", "--eval-top-p",
                      "0.95", ranks=2).stdout  # fmt: skip
    assert "pass@1" in printed and "maj@4" in printed
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"evaluation.json"}


def test_long_prompts_are_listed_and_left_out(tmp_path):
    (tmp_path / "two.jsonl").write_text(
        '{"prompt": "1+2=?"}\n{"prompt": "' + "1+" * 60 + '1=?", "id": "long-one"}\n'
    )
    printed = program(
        "--dry-run", "--data", tmp_path / "two.jsonl", "--max-prompt-tokens", "60", "--out", tmp_path / "run"
    ).stdout
    assert "1 prompts over --max-prompt-tokens 60: long-one" in printed and "1 questions" in printed


def test_an_unknown_model_is_one_sentence_on_every_rank(tmp_path):
    """Rank 0 looks it up and fails; the other must not wait for it."""
    error = program(
        "--model", tmp_path / "nowhere", "--data", "tiny", "--out", tmp_path / "run", code=2
    ).stderr
    assert error.count("\n") == 1 and "nowhere" in error
    error = program(
        "--model", tmp_path / "nowhere", "--data", "tiny", "--out", tmp_path / "run", ranks=2, code=1
    ).stderr
    assert error.count("ttrl.py: ") == 1


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    printed = program("--dry-run", "--out", tmp_path / "run").stdout
    assert "plan " in printed and "memory " in printed and not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------
# what used to be silent


def test_changed_questions_are_not_resumed(finished, few_questions, tmp_path):
    """The same file name with another question, another answer, or one question less."""
    asked = json.loads(few_questions.read_text())
    path, out = tmp_path / "mine.json", tmp_path / "run"
    path.write_text(json.dumps(asked))
    arguments = ["--data", path, "--out", out, *SMALL]
    program(*arguments, "--max-minutes", "0.001")
    changes = [
        asked[1:],
        [{**asked[0], "prompt": "1+1=?"}, *asked[1:]],
        [{**asked[0], "answer": "1"}, *asked[1:]],
    ]
    for changed in changes:
        path.write_text(json.dumps(changed))
        error = program(*arguments, "--allow-changed-flags", code=2).stderr
        assert error.count("\n") == 1 and "holds a run on other questions" in error and str(path) in error
    path.write_text(json.dumps(asked))
    assert "resume   from step 1" in program(*arguments).stdout and same_weights(finished[0], out)


def test_stray_files_do_not_end_training(few_questions, tmp_path):
    folder = tmp_path / "run" / "checkpoint"
    (folder / "step-mine").mkdir(parents=True)
    for name in (".DS_Store", ".nfs0001", "step-9", "notes.txt"):
        (folder / name).write_text("not ours")
    program("--data", few_questions, "--out", tmp_path / "run", *SMALL)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".DS_Store",
        ".nfs0001",
        "notes.txt",
        "step-000004",
        "step-9",
        "step-mine",
    ]


def test_separators_inside_a_line_survive_a_resume(tmp_path):
    from distributed import checkpoint

    path = tmp_path / "rollouts.jsonl"
    lines = [{"step": 1, "response": "one\u2028two\u0085three"}, {"step": 2, "response": "gone"}]
    checkpoint.append(path, lines)
    checkpoint.forget_after(path, 1)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] == lines[:1]


def test_updates_that_are_never_finite_do_not_end_as_if_all_were_well(few_questions, tmp_path):
    """The real program with a gradient norm that is always nan.

    It prints a line for each step, and at the end a sentence and no table.
    """
    out = tmp_path / "run"
    done = program(
        tmp_path, "--data", few_questions, "--out", out, *SMALL, script="tests/broken_run.py", code=1
    )
    assert re.search(r"step 1: \d updates skipped, their gradient was not finite", done.stdout + done.stderr)
    assert re.search(
        r"ttrl.py: the gradient of all \d updates was not finite, nothing was learned\n", done.stderr
    )
    assert "What became of" not in done.stdout and not (out / "summary.json").exists() and moved_nowhere(out)


CUT = "taught nothing: 100% of the responses were cut at --max-new-tokens 3; try a larger one"


def test_a_run_that_learns_nothing_says_so(few_questions, tmp_path):
    """At the 1st and the 10th such step and at the end; with KL, whose updates move weights all the same."""
    flags = ["--data", few_questions, *SMALL, "--max-new-tokens", "3", "--eval-samples", "2"]
    printed = program(*flags, "--epochs", "6", "--kl", "0.001", "--out", tmp_path / "run").stdout
    said = re.findall(r"^.* taught nothing.*$", printed, re.MULTILINE)
    assert said == [f"step 1 {CUT}", f"step 10 {CUT}", f"12 of 12 steps {CUT}"]
    assert all(line["train/updates"] == 2 for line in lines_of(tmp_path / "run" / "metrics.jsonl")[1:])
    printed = program(*flags, "--eval-only", "--out", tmp_path / "run").stdout
    assert printed.endswith("\n\n100% of the responses were cut at --max-new-tokens 3; try a larger one\n")


def test_a_run_that_learns_does_not_say_so(finished):
    assert "taught nothing" not in finished[1]


@pytest.mark.parametrize(
    "no_answer, truncated, why",
    [
        (1.0, 0.2, "no answer was found in 100% of the responses; the prompt in the plan should ask for"),
        (0.2, 0.2, "all samples of a question have the same reward; try other questions"),
        (0.6, 0.9, "90% of the responses were cut at --max-new-tokens 3072"),
    ],
)
def test_why_a_step_taught_nothing(no_answer, truncated, why):
    line = {"step": 7, "train/no_answer": no_answer, "train/truncated": truncated}
    taught, nothing = ({**line, "train/zero_variance_groups": share} for share in (0.9, 1.0))
    c = config.Config()
    assert f"step 7 taught nothing: {why}" in screen.taught_nothing([nothing], c)
    assert f"2 of 3 steps taught nothing: {why}" in screen.taught_nothing([nothing, taught, nothing], c)
    assert screen.taught_nothing([taught, nothing], c) is screen.taught_nothing([taught], c) is None


def moved_nowhere(out):
    base = load_file(TINY / "model.safetensors")
    with safe_open(out / "checkpoint" / "step-000004" / "weights-1-of-1.safetensors", "pt") as file:
        return torch.equal(file.get_tensor("embed_tokens.weight"), base["model.embed_tokens.weight"])


@pytest.mark.parametrize("failing", ["1", "0 1"])
def test_an_error_on_any_rank_is_said(few_questions, tmp_path, failing):
    """A rank that cannot read the questions says its number and why, and no rank waits for it.

    An error that all ranks share is said once.
    """
    done = subprocess.run(
        command(tmp_path, "--data", few_questions, "--out", tmp_path / "run", *SMALL, ranks=2,
                script="tests/broken_run.py"),
        env={**environment(), "RANKS_THAT_CANNOT_READ": failing}, capture_output=True, text=True, timeout=120,
        cwd="/",
    )  # fmt: skip
    assert done.returncode == 1 and "Connection closed" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if "ttrl.py: " in line and "disk" in line]
    assert line == "ttrl.py: rank 1: the disk is gone" if failing == "1" else "ttrl.py: the disk is gone"


def test_edited_sources_are_not_resumed_silently(few_questions, tmp_path):
    """The same command after an edit of the reward: a sentence names the file; with the flag it goes on."""
    program_folder = tmp_path / "program"
    shutil.copytree(ROOT, program_folder, ignore=shutil.ignore_patterns(".*", "runs", "tests", "bench"))
    arguments = ["--data", few_questions, "--out", tmp_path / "run", *SMALL, "--max-minutes", "0.001"]

    def again(*more):
        line = [sys.executable, str(program_folder / "ttrl.py"), *map(str, [*arguments, *more])]
        return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300, cwd="/")

    assert again().returncode == 0
    source = (program_folder / "rewards.py").read_text()
    (program_folder / "rewards.py").write_text(source.replace("float(index in agreeing)", "0.5"))
    refused = again()
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "holds a run with other sources (rewards.py)" in refused.stderr
    assert "resume   from step 1" in again("--allow-changed-flags").stdout


def test_the_plan_comes_before_the_weights(few_questions, tmp_path, monkeypatch, capsys):
    """From config.json and the tokenizer alone: neither --dry-run nor what cannot fit fetches weights."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    fetched = []
    monkeypatch.setattr(run, "fetch_config", lambda name: folder)
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
        monkeypatch.setattr(memory, "physical_memory", lambda: 10**7)  # from the second on nothing fits
    printed = capsys.readouterr()
    assert endings == [None, 2, 2] and fetched == []
    assert "plan " in printed.out and printed.err.count("Qwen2.5-Math-1.5B does not fit") == 2


def test_questions_that_cannot_be_cached_say_where(tmp_path, monkeypatch):
    """The network answers, the disk does not."""
    data = b'[{"prompt": "1+1=?"}]'
    aime = dataclasses.replace(questions.BENCHMARKS["aime"], sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(questions.BENCHMARKS, "aime", aime)
    monkeypatch.setattr(questions.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(data))
    (tmp_path / "ttrl").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"aime: cannot write to .*ttrl .*set XDG_CACHE_HOME"):
        questions.load("aime")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "true", "[1]"])
@pytest.mark.parametrize("key", ["answer", "id"])
def test_answers_and_ids_are_texts_or_finite_numbers(tmp_path, key, value):
    path = tmp_path / "odd.jsonl"
    path.write_text(f'{{"prompt": "1+1=?", "{key}": {value}}}\n')
    with pytest.raises(ValueError, match=f'odd.jsonl, line 1: "{key}" must be a text or a finite number'):
        questions.load(str(path))


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
        ("raise KeyboardInterrupt", 1, "", "goes on from the last checkpoint\n"),
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

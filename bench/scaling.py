"""How cost grows: seconds and bytes of sampling and of learning over rows, response length and vocabulary.

    python bench/scaling.py                     # all three; ten CPU-minutes at most
    python bench/scaling.py --axes vocabulary
    python bench/scaling.py --axes ranks        # SmolLM2-135M on two processes: three CPU-minutes, 6 GB

A random Qwen2 of 4 layers and width 128 (heads of width 256 for the vocabulary), fp32, one value of one axis
in a process of its own. Sampling is `rollout.generate` to the full length, all rows at once; learning is
forward, loss and backward over all these rows as a single micro-batch, which nothing but this bench wants:
ttrl.py cuts them to --micro-batch-tokens, and its bytes stop growing there. Seconds are CPU-seconds, the
lower of two runs; bytes are what was resident at most, less what was before.

Beside each number stands the exponent between it and the one above, log(cost ratio) / log(size ratio): 1 is
linear. Beside the axis stands what the arithmetic says: the exponent of the floating-point operations of
sampling, attention included.

The axis `ranks` is a table of its own: two processes that hold a model as DDP does, in shards, or in shards
in host memory (here the same memory: it shows the mechanism, and no gain). A step samples 8 responses of 16
tokens to two questions and learns from them in two updates. Bytes are a rank's own memory: pages of the file
that is read are not counted, those that gloo exchanges are. Seconds are by the clock, CPU-seconds those of a
rank. Weights and moments are saved and loaded by distributed/checkpoint.py, and by torch's own
distributed.checkpoint.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from common import clocked, forget_peak, last_line, memory, model_folder, peak_memory, say, status, table

import torch  # isort: skip
import torch.distributed as dist  # isort: skip
import torch.distributed.checkpoint as dcp  # isort: skip

import ttrl  # isort: skip
from distributed.memory import Split  # isort: skip
from model import ModelConfig, Transformer  # isort: skip
from rollout import generate  # isort: skip
from support.run import Run, build_models  # isort: skip
from distributed import checkpoint, ranks  # isort: skip
from support.config import configure  # isort: skip

PROMPT = 16  # tokens
BASE = {"rows": 64, "length": 64, "vocabulary": 4096, "width": 128}
AXES = {  # the values of an axis, and what differs from BASE meanwhile
    "rows": ([16, 32, 64, 128, 256, 512], {}),
    "length": ([32, 64, 128, 256, 512, 1024], {"rows": 32}),
    "vocabulary": ([4096, 16384, 49152, 151936], {"rows": 32, "length": 32, "width": 256}),
}
MEASURES = {"sampling s": "seconds", "sampling MB": "bytes", "learning s": "seconds", "learning MB": "bytes"}


def random_model(vocabulary, width, folder):
    config = {
        "model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": 4, "num_attention_heads": width // 32, "num_key_value_heads": width // 64,
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_pretrained(folder))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def operations(model, size):
    """FLOPs of sampling: for each token 2 a weight of the matrices, and attention to what lies before."""
    config, weights = (
        model.config,
        sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)),
    )
    attention = 4 * config.layers * config.heads * config.head_dim * (PROMPT + size["length"] / 2)
    tokens = size["rows"] * size["length"]
    return {
        "operations": tokens * (2 * weights + attention),
        "attention share": attention / (2 * weights + attention),
    }


def measure(size):
    """Sample and learn once at this size: seconds (CPU) and bytes of both."""
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(size["vocabulary"], size["width"], Path(folder))
    prompts = torch.randint(
        0, size["vocabulary"], (4, PROMPT), generator=torch.Generator().manual_seed(0)
    ).tolist()
    options = dict(eos_ids=[-1], seed=0, stream="train", step=1)
    learn(model, generate(model, prompts, 1, max_new_tokens=4, **options))  # warm
    rows, length = size["rows"], size["length"]
    rollout, sampling = watched(lambda: generate(model, prompts, rows // 4, max_new_tokens=length, **options))
    logprob, learning = watched(lambda: learn(model, rollout))
    gap = (logprob - rollout.logprob)[rollout.mask()].abs().max().item()
    assert gap < 1e-3, f"the learner's log-probabilities differ from the sampler's by {gap}"
    config = model.config
    cache = 2 * 4 * config.layers * config.kv_heads * config.head_dim * rows * (PROMPT + length)
    result = {f"sampling {name}": value for name, value in sampling.items()}
    result.update({f"learning {name}": value for name, value in learning.items()})
    return {**result, "cache MB": cache / 1e6, **operations(model, size)}


def watched(action):
    """What an action returns; the CPU-seconds of the faster of two runs, and the peak memory of the first."""
    before = memory()
    forget_peak()
    _, _, first = clocked(action)
    peak = peak_memory()
    value, _, second = clocked(action)
    return value, {"s": min(first, second), "MB": (peak - before) / 1e6}


def learn(model, rollout):
    """Forward, GRPO loss and backward of all rows at once; returns their log-probabilities [B, R]."""
    logprob, _ = model(rollout, 1.0)
    advantage = torch.tensor([1.0, -1.0]).repeat(len(rollout) // 2)[:, None]
    loss, _ = ttrl.grpo_loss(logprob, rollout.logprob, advantage, rollout.mask())
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return logprob.detach()


# ----------------------------------------------------------------------------------------------------------
# the axis `ranks`

SPLITS = {"DDP": Split(), "shards": Split(2), "shards in host memory": Split(2, 1, True)}


class OwnMemory:
    """With it: the most memory of this process's own, in bytes, looked at every 5 ms; what it began with."""

    def __enter__(self):
        self.before = self.peak = status("RssAnon")
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.ended.wait(0.005):
            self.peak = max(self.peak, status("RssAnon"))

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()


def open_spread(folder, split, device):
    """A Run of two questions on random prompts, its models not built."""
    prompts = torch.randint(100, 1000, (2, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    flags = dict(votes=4, samples=4, questions_per_step=2, max_new_tokens=16, temperature=1.0, kl=0.0)
    c = configure(dict(model=str(folder), data="amc", device="cpu", **flags))
    data = ([SimpleNamespace(id="a"), SimpleNamespace(id="b")], prompts) * 2
    return Run(c, device, folder, None, [-1], *data, PROMPT + 16, 4 * (PROMPT + 16), 512, False, split)


def one_step(run):
    rollout = ttrl.sample(run, run.train_prompts, 4, stream="train", step=1, temperature=1.0)
    ttrl.learn(run, rollout, torch.tensor([1.0, -1.0]).repeat(2, 2), 1)


def measure_spread(folder, name, out):
    """A rank's figures of one split: bytes and seconds of loading, of a step, and of two ways to save."""
    run = open_spread(folder, SPLITS[name], ranks.start_processes("cpu"))
    with OwnMemory() as loading:
        _, load, _ = clocked(build_models, run, run.device)
    own = status("RssAnon") - loading.before
    one_step(run)  # makes the moments
    with OwnMemory() as training:
        _, step, cpu = clocked(one_step, run)
    parameters = dict(run.policy.named_parameters())
    tensors = {
        f"{key} {name}": tensor
        for name, p in parameters.items()
        for key, tensor in [("weight", p.detach()), *run.optimizer.state[p].items()]
    }
    ours, theirs = out / "ours", out / "dcp"
    figures = {
        "load s": load,
        "load peak GB": (loading.peak - loading.before) / 1e9,
        "loaded GB": own / 1e9,
        "step s": step,
        "step CPU s": cpu,
        "step peak GB": (training.peak - loading.before) / 1e9,
        "saved GB": sum(tensor.numel() * 4 for tensor in tensors.values()) / 1e9,
        "save s": together(checkpoint.save, ours, run.policy, run.optimizer, {"step": 1}),
        "restore s": together(checkpoint.restore, ours / "step-000001", run.policy, run.optimizer),
        "dcp save s": together(dcp.save, tensors, checkpoint_id=theirs),
        "dcp load s": together(dcp.load, tensors, checkpoint_id=theirs),
    }
    dist.barrier()
    dist.destroy_process_group()
    return figures


def together(action, *arguments, **options):
    """Seconds until all ranks are through."""
    dist.barrier()
    return clocked(lambda: (action(*arguments, **options), dist.barrier()))[1]


def ranks_table(model, threads):
    """Start two processes for each split; print what rank 0 measured, and return it."""
    points = []
    for name in SPLITS:
        with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as stack:
            started = []
            for rank in range(2):
                size = {"model": str(model), "split": name, "out": out}
                command = [sys.executable, __file__, "--child", json.dumps(size), "--threads", str(threads)]
                where = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2)
                where.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=29400 + os.getpid() % 500)
                variables = {**os.environ, **{key: str(value) for key, value in where.items()}}
                process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
                started.append(stack.enter_context(process))
            printed = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise SystemExit(f"scaling.py: {name} failed")
        points.append({"split": name, **json.loads(printed[0].splitlines()[-1])})
        say("  " + ", ".join(f"{key} {v if key == 'split' else f'{v:.2f}'}" for key, v in points[-1].items()))
    names = [key for key in points[0] if key != "split"]
    say(table(["on two ranks", *names], [[p["split"], *(f"{p[n]:.2f}" for n in names)] for p in points]))
    return points


# ----------------------------------------------------------------------------------------------------------
# the tables


def in_a_process(size, threads):
    command = [sys.executable, __file__, "--child", json.dumps(size), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"scaling.py: {size} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def exponent(points, name, index, axis):
    """Between point index - 1 and point index; None at the first."""
    if index == 0:
        return None
    before, here = points[index - 1], points[index]
    return math.log(max(here[name], 1e-9) / max(before[name], 1e-9)) / math.log(here[axis] / before[axis])


def shown(points, name, index, axis):
    power = exponent(points, name, index, axis)
    digits = 2 if points[index][name] < 10 else 1
    return f"{points[index][name]:.{digits}f}" + (" " * 7 if power is None else f"  ^{power:.2f}".rjust(7))


def render(axis, points):
    names = [*MEASURES, "cache MB"]
    rows = []
    for index, point in enumerate(points):
        power = exponent(points, "operations", index, axis)
        arithmetic = "" if power is None else f"^{power:.2f}"
        rows.append([point[axis], arithmetic, *(shown(points, name, index, axis) for name in names)])
    return table([axis, "arithmetic", *(f"{name}  ^" + " " * 4 for name in names)], rows)


WHY = {
    "rows": "A step of decoding calls torch as often for few rows as for many: "
            "below linear until the rows outweigh that.",
    "length": "A token attends to all before it: above linear as attention's share of the arithmetic grows. "
              "The prompt, {prompt} tokens of each row, keeps the bytes below linear at first.",
    "vocabulary": "Only the head and the draw grow with it, the layers do not: "
                  "below linear until they outweigh the layers. "
                  "Learning holds the head's gradient and a tile of logits, never all of them.",
}  # fmt: skip


def why(axis, points):
    """What keeps an axis from being linear, and how much of it, by a line through the two largest points."""
    before, last = points[-2:]
    lines = [WHY[axis].format(prompt=PROMPT)]
    if axis == "length":
        shares = ", ".join(f"{point[axis]}: {point['attention share']:.0%}" for point in points)
        return f"{lines[0]} Share of attention: {shares}."
    for name in ("sampling s", "learning s"):
        slope = (last[name] - before[name]) / (last[axis] - before[axis])
        fixed = last[name] - slope * last[axis]
        lines.append(
            f"{name.split()[0]}: about {max(fixed, 0):.2f} s that do not grow, "
            f"and {1000 * slope:.3g} ms a unit."
        )
    return " ".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    choices = [*AXES, "ranks"]
    parser.add_argument("--axes", nargs="+", choices=choices, default=list(AXES), help="[all but ranks]")
    parser.add_argument("--model", type=Path, help="of the axis ranks [SmolLM2-135M-Instruct]")
    parser.add_argument("--threads", type=int, default=1, help="[1]")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        size = json.loads(args.child)
        if "split" in size:
            print(json.dumps(measure_spread(Path(size["model"]), size["split"], Path(size["out"]))))
        else:
            print(json.dumps(measure(size)))
        return
    began, results = time.monotonic(), {}
    for axis in args.axes:
        if axis == "ranks":
            say("\nranks")
            results[axis] = ranks_table(model_folder(args.model), args.threads)
            continue
        values, changes = AXES[axis]
        fixed = {name: value for name, value in {**BASE, **changes}.items() if name != axis}
        say(f"\n{axis}, with " + ", ".join(f"{name} {value}" for name, value in fixed.items()))
        points = results[axis] = []
        for value in values:
            points.append({axis: value, **in_a_process({**fixed, axis: value}, args.threads)})
            say(f"  {axis} {value}: " + ", ".join(f"{name} {points[-1][name]:.2f}" for name in MEASURES))
        say(render(axis, points))
        say(why(axis, points))
    last_line("scaling", threads=args.threads, seconds=time.monotonic() - began, points=results)


if __name__ == "__main__":
    main()

"""How cost grows: seconds and bytes of sampling and of learning over rows, response length and vocabulary.

    python bench/scaling.py                     # all three; ten CPU-minutes at most
    python bench/scaling.py --axes vocabulary
    python bench/scaling.py --axes ranks        # SmolLM2-135M on two processes: three CPU-minutes, 6 GB
    python bench/scaling.py --axes ranks --model tiny/model        # does it run?

A random Qwen2 of 4 layers and width 128 (heads of width 256 for the vocabulary), fp32, one value of one axis
in a process of its own. Sampling is `rollout.generate` to the full length, all rows at once; learning is
forward, loss and backward over all these rows as a single micro-batch, which nothing but this bench wants:
ttrl.py cuts them to --micro-batch-tokens, and its bytes stop growing there. Seconds are CPU-seconds, the
lower of two runs; bytes are what was resident at most, less what was before.

Beside each number stands the exponent between it and the one above, log(cost ratio) / log(size ratio): 1 is
linear. Beside the axis stands what the arithmetic says: the exponent of the floating-point operations of
sampling, attention included. A token attends to all before it, so length grows faster than linearly; a step
of decoding calls torch as often for few rows as for many, and the layers do not grow with the vocabulary.

The axis `ranks` is a table of its own: two processes that hold a model as DDP does, in shards, or in shards
in host memory (here the same memory: it shows the mechanism, and no gain). A step samples 8 responses of 16
tokens to two questions and learns from them in two updates. Bytes are a rank's own memory: pages of the file
that is read are not counted, those that gloo exchanges are. Seconds are by the clock, CPU-seconds those of a
rank. Weights and moments are saved and loaded by distributed/checkpoint.py, and by torch's own
distributed.checkpoint.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from common import (
    arguments,
    clocked,
    forget_peak,
    in_a_process,
    last_line,
    model_folder,
    open_run,
    random_model,
    say,
    status,
    table,
)

import torch  # isort: skip
import torch.distributed as dist  # isort: skip
import torch.distributed.checkpoint as dcp  # isort: skip

import ttrl  # isort: skip
from distributed import checkpoint  # isort: skip
from rollout import generate  # isort: skip

PROMPT = 16  # tokens
BASE = {"rows": 64, "length": 64, "vocabulary": 4096, "width": 128}
AXES = {  # the values of an axis, and what differs from BASE meanwhile
    "rows": ([16, 32, 64, 128, 256, 512], {}),
    "length": ([32, 64, 128, 256, 512, 1024], {"rows": 32}),
    "vocabulary": ([4096, 16384, 49152, 151936], {"rows": 32, "length": 32, "width": 256}),
}
MEASURES = ("sampling s", "sampling MB", "learning s", "learning MB", "cache MB")


def qwen(folder, vocabulary, width):
    torch.manual_seed(0)
    return random_model(
        folder, model_type="qwen2", vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=4, num_attention_heads=width // 32, num_key_value_heads=width // 64,
        max_position_embeddings=2048, rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=False,
    )  # fmt: skip


def measure(rows, length, vocabulary, width):
    """Sample and learn once at this size: seconds (CPU) and bytes of both, and operations of sampling."""
    with tempfile.TemporaryDirectory() as folder:
        model = qwen(Path(folder), vocabulary, width)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, vocabulary, (4, PROMPT), generator=generator).tolist()
    options = dict(eos_ids=[-1], seed=0, stream="train", step=1)
    learn(model, generate(model, prompts, 1, max_new_tokens=4, **options))  # warm
    rollout, sampling = watched(lambda: generate(model, prompts, rows // 4, max_new_tokens=length, **options))
    logprob, learning = watched(lambda: learn(model, rollout))
    gap = (logprob - rollout.logprob)[rollout.mask()].abs().max().item()
    assert gap < 1e-3, f"the learner's log-probabilities differ from the sampler's by {gap}"
    config, a_token = model.config, sum(2 * p.numel() for p in model.parameters() if p.dim() == 2)
    a_token -= 2 * vocabulary * width  # the embedding is no product
    a_token += 4 * config.layers * config.heads * config.head_dim * (PROMPT + length / 2)  # attention
    cache = 2 * 4 * config.layers * config.kv_heads * config.head_dim * rows * (PROMPT + length)
    sizes = dict(zip(MEASURES, (*sampling, *learning, cache / 1e6), strict=True))
    return {**sizes, "operations": rows * length * a_token}


def watched(action):
    """(what an action returns, (CPU-seconds of the faster of two runs, peak memory of the first in MB))."""
    before = status("VmRSS")
    forget_peak()
    _, _, first = clocked(action)
    peak = status("VmHWM")
    value, _, second = clocked(action)
    return value, (min(first, second), (peak - before) / 1e6)


def learn(model, rollout):
    """Forward, GRPO loss and backward of all rows at once; returns their log-probabilities [B, R]."""
    logprob, _ = model(rollout, 1.0)
    advantage = torch.tensor([1.0, -1.0]).repeat(len(rollout) // 2)[:, None]
    loss, _ = ttrl.grpo_loss(logprob, rollout.logprob, advantage, rollout.mask())
    loss.backward()
    model.zero_grad()
    return logprob.detach()


def render(axis, points):
    """The table of an axis, with the exponent of each number."""

    def exponent(name, index):
        if index == 0:
            return ""
        before, here = points[index - 1], points[index]
        ratio = max(here[name], 1e-9) / max(before[name], 1e-9)
        return f"^{math.log(ratio) / math.log(here[axis] / before[axis]):.2f}"

    rows = []
    for index, point in enumerate(points):
        cells = [f"{point[name]:.2f} {exponent(name, index):>6}" for name in MEASURES]
        rows.append([point[axis], exponent("operations", index), *cells])
    return table([axis, "arithmetic", *(f"{name}  ^    " for name in MEASURES)], rows)


# ----------------------------------------------------------------------------------------------------------
# the axis `ranks`

SPLITS = {  # flags of ttrl.py
    "DDP": {"shard": 1},
    "shards": {"shard": 2},
    "shards in host memory": {"shard": 2, "offload": True},
}


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


def open_spread(folder, split, out):
    """A Run of two questions, spread over the ranks as the flags of `split` say."""
    data = out / "questions.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("1+2=?", "3+4+5=?")))
    run, _ = open_run(model=folder, data=str(data), out=str(out / "run"), template="none", votes=4, samples=4,
                      questions_per_step=2, questions_per_update=1, max_new_tokens=16, temperature=1.0,
                      kl=0.0, **SPLITS[split])  # fmt: skip
    return run


def one_step(run):
    rollout = ttrl.sample(run, run.train_prompts, 4, stream="train", step=1, temperature=1.0)
    ttrl.learn(run, rollout, torch.tensor([1.0, -1.0]).repeat(2, 2), 1)


def measure_spread(folder, split, out):
    """A rank's figures of one split: bytes and seconds of loading, of a step, and of two ways to save."""
    with OwnMemory() as loading:
        run, load, _ = clocked(open_spread, folder, split, out)
    own = status("RssAnon") - loading.before
    one_step(run)  # makes the moments
    with OwnMemory() as training:
        _, step, cpu = clocked(one_step, run)
    tensors = {}
    for name, p in run.policy.named_parameters():
        tensors[f"{name} weight"] = p.detach()
        tensors.update({f"{name} {key}": tensor for key, tensor in run.optimizer.state[p].items()})
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


def on_two_ranks(model, split):
    """Start two processes for a split: what rank 0 measured."""
    torchrun = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2".split()
    with tempfile.TemporaryDirectory() as out:
        work = json.dumps({"folder": str(model), "split": split, "out": out})
        command = [sys.executable, *torchrun, __file__, "--child", work]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(f"scaling: {split} failed")
        return {"split": split, **json.loads((Path(out) / "figures.json").read_text())}


def child(work):
    torch.set_num_threads(1)
    if "split" not in work:
        return print(json.dumps(measure(**work)))
    out = Path(work["out"])
    figures = measure_spread(work["folder"], work["split"], out)
    if os.environ["RANK"] == "0":
        (out / "figures.json").write_text(json.dumps(figures))


def main():
    parser = arguments(__doc__, model=None)
    choices = [*AXES, "ranks"]
    parser.add_argument("--axes", nargs="+", choices=choices, default=list(AXES), help="[all but ranks]")
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    results = {}
    for axis in args.axes:
        if axis == "ranks":
            points = [on_two_ranks(model_folder(args.model), split) for split in SPLITS]
            names = [key for key in points[0] if key != "split"]
            rows = [[point["split"], *(f"{point[name]:.2f}" for name in names)] for point in points]
            say(table(["on two ranks", *names], rows))
        else:
            values, changes = AXES[axis]
            fixed = {name: value for name, value in {**BASE, **changes}.items() if name != axis}
            say(f"\n{axis}, with " + ", ".join(f"{name} {value}" for name, value in fixed.items()))
            points = [{axis: value, **in_a_process(**fixed, **{axis: value})} for value in values]
            say(render(axis, points))
        results[axis] = points
    last_line(points=results)


if __name__ == "__main__":
    main()

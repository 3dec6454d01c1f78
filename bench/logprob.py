r"""Time and memory of linear_logprob beside the plain formula, forward and backward.

The loss is the sum of the log-probabilities alone.

    # SmolLM2-135M's head, 2,048 tokens; 3 minutes
    python bench/logprob.py
    python bench/logprob.py --tokens 8192 --width 3584 --vocabulary 151936   # a 7B model's head, for a GPU

naive     log_softmax of all logits, which also returns the entropy, for the metrics, as linear_logprob does
logprob   the same without the entropy
chunked   linear_logprob in torch
fused     linear_logprob with its Triton kernels (on a GPU)

Every measurement is a process of its own, and the variants take turns, so that a busy machine slows all of
them. The first step gives the memory, the second the time; of the rounds the least is shown, the one least
disturbed; beside the time on the clock there is the processor's, which leaves out waiting for other programs.
Peak is the most memory held above what was there before the step (the inputs), with the gradients that the
step returns; above is the peak without these. On a GPU it comes from torch's allocator; on a CPU it is the
high-water mark of the resident set, which Linux resets on request, so that whatever the libraries allocate is
in it. At the end a table, and one line of JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels import logprob  # noqa: E402

MB = 1e6


def naive(hidden, weight, targets):
    logp = (hidden @ weight.to(hidden.dtype).T).float().log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def logprob_alone(hidden, weight, targets):
    return (hidden @ weight.to(hidden.dtype).T).float().log_softmax(-1).gather(1, targets[:, None])[
        :, 0
    ], None


VARIANTS = {
    "naive": naive,
    "logprob": logprob_alone,
    "chunked": logprob.linear_logprob,
    "fused": logprob.linear_logprob,
}


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def resident(field):
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def held(device):
    return torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")


def reset_peak(device):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device):
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def measure(variant, args):
    """One process's work: {peak, above} in bytes, {forward, backward, both, processor} in seconds."""
    torch.set_num_threads(args.threads)
    device = args.device
    if variant == "chunked":
        logprob.on_gpu = lambda x: False
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(args.tokens, args.width, generator=generator).to(device, dtype)
    weight = torch.randn(args.vocabulary, args.width, generator=generator).mul_(args.width**-0.5).to(device)
    targets = torch.randint(args.vocabulary, (args.tokens,), generator=generator).to(device)

    def step(hidden, weight, targets):
        synchronize(device)
        began, of_processor = time.perf_counter(), time.process_time()
        logp, _ = VARIANTS[variant](hidden, weight, targets)
        synchronize(device)
        between = time.perf_counter()
        logp.sum().backward()
        synchronize(device)
        return between - began, time.perf_counter() - between, time.process_time() - of_processor

    step(
        *(x[:64].clone().requires_grad_() for x in (hidden, weight)), targets[:64] % 64
    )  # load the libraries
    hidden.requires_grad_(), weight.requires_grad_()
    before = held(device)
    reset_peak(device)
    step(hidden, weight, targets)
    highest = peak(device) - before
    gradients = hidden.grad.nbytes + weight.grad.nbytes
    hidden.grad = weight.grad = None
    forward, backward, processor = step(hidden, weight, targets)
    return {"peak": highest, "above": highest - gradients, "forward": forward, "backward": backward,
            "both": forward + backward, "processor": processor}  # fmt: skip


def least(rows):
    return {name: min(row[name] for row in rows) for name in rows[0]}


def table(results):
    base = results["naive"]
    heads = (
        "forward s",
        "backward s",
        "both s",
        "/ naive",
        "CPU s",
        "/ naive",
        "peak MB",
        "above MB",
        "/ naive",
    )
    lines = [" " * 9 + "".join(f"{head:>11}" for head in heads)]
    for name, row in results.items():
        seconds = [row["forward"], row["backward"], row["both"], row["both"] / base["both"]]
        seconds += [row["processor"], row["processor"] / base["processor"]]
        memory = f"{row['peak'] / MB:>11.1f}{row['above'] / MB:>11.1f}{row['above'] / base['above']:>11.4f}"
        lines.append(f"{name:<9}" + "".join(f"{x:>11.3f}" for x in seconds) + memory)
    return "\n".join(lines)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048, help="[%(default)s]")
    parser.add_argument("--width", type=int, default=576, help="[%(default)s]")
    parser.add_argument("--vocabulary", type=int, default=49152, help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    only = "measure one in this process: what the program calls itself with"
    parser.add_argument("--variant", choices=VARIANTS, help=only)
    return parser.parse_args()


def measure_all(args):
    """Every variant in turn, each time in a process of its own: the least of each number."""
    variants = [name for name in VARIANTS if name != "fused" or args.device == "cuda"]
    command = [sys.executable, __file__, *sys.argv[1:], "--variant"]
    options = dict(env={**os.environ, "OMP_NUM_THREADS": str(args.threads)}, text=True, check=True)
    rounds = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name in variants:
            done = subprocess.run([*command, name], stdout=subprocess.PIPE, **options)
            rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {name: least(rows) for name, rows in rounds.items()}


def last_line(args, results):
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True)
    on_cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    machine = torch.cuda.get_device_name() if args.device == "cuda" else on_cpu
    print(json.dumps({
        "bench": "logprob", "machine": machine, "device": args.device, "threads": args.threads,
        "python": platform.python_version(), "torch": torch.__version__,
        "triton": logprob.logprob_triton and logprob.logprob_triton.triton.__version__,
        "commit": commit.stdout.strip(),
        "tokens": args.tokens, "width": args.width, "vocabulary": args.vocabulary, "rounds": args.rounds,
        "results": results,
    }))  # fmt: skip


def main():
    args = parse()
    if args.variant:
        return print(json.dumps(measure(args.variant, args)))
    results = measure_all(args)
    size = f"{args.tokens} tokens, width {args.width}, vocabulary {args.vocabulary}"
    print(f"{size}, {args.device}, {args.threads} threads")
    print(table(results))
    last_line(args, results)


if __name__ == "__main__":
    main()

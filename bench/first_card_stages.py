"""The stages of bench/first_card.py, which starts this file: what is checked and timed on a first GPU.

A stage is a dict of parts {function: limit in seconds}; a part is a function of the Recorder `card`, into
which it writes what it sees. The most valuable parts and numbers come first, as a stage may be cut off. With
--dry everything runs on the CPU with toy widths, to show that it runs.
"""

import functools
import gc
import heapq
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT
from first_card import Recorder
from first_card_checks import (
    DEVICE,
    DRY,
    DTYPE,
    HEADS,
    KV_HEADS,
    LAYERS,
    SHAPE,
    SMOKE,
    D,
    E,
    V,
    causal_mask,
    healthy,
    made_up_rollout,
    normal,
    random_model,
    random_prompt,
)

import rollout
from kernels import logprob, sampler
from kernels.cuda_graph import capture
from rollout import Engine, prefill

# Expected of an H100: the ceilings were seen on one, the others are counts of kernels and bytes (NOTES.md)
COPY, PRODUCT = 3.0, 798.0  # TB/s, bytes read and written; TFLOP/s of bf16
DECODE_SHARE = 0.64  # of the rate at which weights, keys and values could be read
LEARNING, MFU = 32.0, 39.0  # us a token without checkpointing; % of PRODUCT
TOP_P_COST = 1.15  # times a decode step without
PASS_AT_1 = {0: 0.405, 16: 0.716, 32: 0.849, 48: 0.887, 64: 0.901, 80: 0.904}  # by step, on a CPU

# ----------------------------------------------------------------------------------------------------------
# clocks


def clocked(action):
    """(result, seconds) of a call, up to the end of what it queued on the device."""
    wait()
    began = time.perf_counter()
    result = action()
    wait()
    return result, time.perf_counter() - began


def wait():
    if not DRY:
        torch.cuda.synchronize()


def seconds(action, repeats=10):
    """Median seconds of a call, after one to warm up; short calls are queued, 5 ms of them at a time."""
    action()
    calls = max(1, int(5e-3 / clocked(action)[1]))
    times = [
        clocked(lambda: [action() for _ in range(calls)])[1] / calls for _ in range(1 if DRY else repeats)
    ]
    return statistics.median(times)


def replayed(action):
    """The same kernels as a CUDA graph, as decoding runs them: without what it takes to launch them."""
    if DRY:
        return action
    action()  # compiles what is to be compiled
    return capture(action, torch.cuda.graph_pool_handle())


def copy_rate():
    """TB/s, bytes read and written."""
    x = torch.randint(255, (1 << (22 if DRY else 31),), dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * len(x) / seconds(lambda: y.copy_(x)) / 1e12


def product_rate(size=256 if DRY else 8192):
    """TFLOP/s of one large product."""
    a, b = normal(size, size), normal(size, size)
    return 2 * size**3 / seconds(lambda: a @ b) / 1e12


@functools.cache
def bandwidth(card):
    """Bytes a second that a copy moves, by stage env."""
    return 1e12 * (card.earlier("env", "copy") or copy_rate())


@functools.cache
def peak_flops(card):
    """FLOP/s of a large product, by stage env."""
    return 1e12 * (card.earlier("env", "product in bf16") or product_rate())


# ----------------------------------------------------------------------------------------------------------
# env: the machine, and its roofline


def versions(card):
    for name in ("torch", "triton", "transformers", "flash_attn"):
        found = importlib.util.find_spec(name)
        version = getattr(importlib.import_module(name), "__version__", "?") if found else "not installed"
        card.record(name, version)
    card.record("python", platform.python_version())
    card.record("cuda, cudnn", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    if not DRY:
        device = torch.cuda.get_device_properties(0)
        card.record("device", device.name, note=f"sm_{device.major}{device.minor}")
        card.record("memory", device.total_memory / 1e9, unit="GB")
        card.record("multiprocessors", device.multi_processor_count)


def ceilings(card):
    card.record("copy", copy_rate(), COPY, "TB/s")
    card.record("product in bf16", product_rate(), PRODUCT, "TFLOP/s")


def launches(card):
    x, many = torch.zeros(1, device=DEVICE), 200
    card.record("a launch", seconds(lambda: [x.add_(1) for _ in range(many)]) / many * 1e6, unit="us")


def backends_of_sdpa(card):
    """Which kernel torch's attention takes for padded rows: cuDNN's can give NaN gradients (nan_probe)."""
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "override"}
    if hasattr(torch._C, "_get_sdp_priority_order"):
        order = [names.get(int(backend), "?") for backend in torch._C._get_sdp_priority_order()]
        card.record("order of SDPA's backends", " ".join(order))
    q = normal(2, 12, 100, 128).requires_grad_()
    chosen = names.get(torch._fused_sdp_choice(q, q, q, causal_mask(100, 100)), "?")
    card.record("SDPA with a mask goes to", chosen, "efficient", ok=chosen != "cudnn")


# ----------------------------------------------------------------------------------------------------------
# correct: the tests for a GPU, and beside them the embedded pair


def run_pytest(card, expression, spare, *flags):
    """tests/test_gpu.py -k expression; failures are recorded as they come, by the hooks of first_card.py."""
    if importlib.util.find_spec("xdist") and not DRY and "-s" not in flags:
        flags += ("-n", "8")
    if importlib.util.find_spec("pytest_timeout"):  # a thread: a signal does not end a wait for the GPU
        flags += ("--timeout", "100", "--timeout-method", "thread")
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-p", "first_card", "-k", expression]
    place = {"path": str(card.path), "stage": card.stage, "part": card.part}
    settings = dict(PYTHONPATH=f"{ROOT}:{ROOT / 'bench'}", FIRST_CARD=json.dumps(place))
    environment, limit = {**os.environ, **settings}, card.left() - spare
    done = subprocess.run([*command, *flags], cwd=ROOT, env=environment, timeout=limit)
    assert done.returncode == 0, f"pytest ended with {done.returncode}"


@functools.cache
def embedded_run(card):
    """Start ttrl.py with its defaults, for 1.8 minutes or what the stage has left: (process, folder)."""
    out = Path(tempfile.mkdtemp()) / "run"
    minutes = max(0.1, min(1.8, (card.left() - 25) / 60))
    flags = ["--out", out, "--device", DEVICE.type, "--max-minutes", f"{minutes:.2f}"]
    if DRY:
        few = json.loads((ROOT / "tiny" / "questions.json").read_text())[:6]
        (out.parent / "few.json").write_text(json.dumps(few))
        flags += ["--data", out.parent / "few.json", "--max-minutes", "0.001", "--eval-samples", "2"]
        flags += "--questions-per-step 3 --votes 8 --samples 8 --max-new-tokens 48".split()
    with open(out.parent / "log", "w") as log:
        return subprocess.Popen([sys.executable, ROOT / "ttrl.py", *flags], stdout=log, stderr=log), out


def start_of_the_embedded_pair(card):
    embedded_run(card)


def tests(card):
    run_pytest(card, "cpu and drawing" if DRY else "not speed", 15)


def the_embedded_pair(card):
    """pass@1 by step, beside the CPU's with the same random numbers; training parts them by and by."""
    process, out = embedded_run(card)
    try:
        code = process.wait(max(1, card.left() - 3))
    except subprocess.TimeoutExpired:
        code = "still running"
    print((out.parent / "log").read_text()[-3000:])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval/pass@1" in line:
            seen, expected = line["eval/pass@1"], PASS_AT_1.get(line["step"])
            near = DRY or expected is None or abs(seen - expected) < (0.08 if line["step"] else 0.03)
            card.record(f"pass@1 after {line['step']} steps", seen, expected, ok=near)
    learned = [line for line in lines if "train/logprob_gap" in line]
    card.record("steps", lines[-1]["step"])
    card.check("largest logprob_gap", max(line["train/logprob_gap"] for line in learned), 0.02)
    skipped = sum(line["train/skipped_updates"] for line in learned)
    card.record("skipped updates", skipped, "0", ok=skipped == 0)
    assert code == 0, f"ttrl.py: {code}"


# ----------------------------------------------------------------------------------------------------------
# decode

BYTES_OF_A_TOKEN = 2 * LAYERS * KV_HEADS * E * DTYPE.itemsize  # its keys and values
ON_CARD = [(335, 1686), (256, 1024), (64, 1024), (512, 1024), (512, 2048), (64, 2048), (256, 2048), (64, 256),
           (256, 256), (512, 256)]  # fmt: skip
ROWS, CONTEXT = (3, 40) if DRY else (256, 1024)  # of the shape at which variants are compared


@functools.cache
def decoder():
    torch.manual_seed(0)
    return random_model()


@functools.cache
def bytes_of_weights():
    return sum(p.numel() for p in decoder().parameters()) * DTYPE.itemsize


def floor(card, tokens):
    """Least seconds of a decode step whose rows hold so many tokens: weights, keys and values read once."""
    return (bytes_of_weights() + tokens * BYTES_OF_A_TOKEN) / bandwidth(card)


@torch.no_grad()
def filled_engine(rows, context, steps):
    """An Engine of `rows` rows of `context` tokens that has room for `steps` more."""
    (prompt,) = prefill(decoder(), [random_prompt(context)])
    engine = Engine(decoder(), rows, context + steps + 1, steps + 1, [V - 1])
    engine.insert(0, [prompt] * rows, torch.arange(rows, device=DEVICE), 1.0, 1.0)
    return engine


def step_seconds(rows, context, sampling=(1.0, 1.0), graphs=True):
    """Seconds of a decode step of rows of `context` tokens on average; sampling: temperature and top-p."""
    steps = 2 if DRY else 8
    engine = filled_engine(rows, context - 3 * steps, 8 * steps)  # two calls to warm up, and three that count
    engine.graphs = engine.graphs if graphs else None
    with torch.no_grad():
        return seconds(lambda: engine.decode_steps(steps, rows, engine.capacity, *sampling), 3) / steps


def steps_of_decoding(card):
    room = 1e9 if DRY else torch.cuda.get_device_properties(0).total_memory * 0.6
    for rows, context in [(ROWS, CONTEXT)] if DRY else ON_CARD:
        if rows * context * BYTES_OF_A_TOKEN > room:
            card.record(f"{rows} rows x {context}", "does not fit")
            continue
        each, least = step_seconds(rows, context), floor(card, rows * context)
        note = f"{least / each:.0%} of the floor's rate, {rows / each:,.0f} tokens/s"
        card.record(f"{rows} rows x {context}", 1e3 * each, 1e3 * least / DECODE_SHARE, "ms", note=note)
        gc.collect()  # graphs and keys, before the next are made


def top_p(card):
    without, with_it = (step_seconds(ROWS, CONTEXT, (0.6, top_p)) for top_p in (1.0, 0.95))
    card.record("top-p 1", 1e3 * without, unit="ms")
    card.record("top-p 0.95", 1e3 * with_it, 1e3 * without * TOP_P_COST, "ms")


def without_graphs(card):
    rows = min(ROWS, 64)
    card.record(f"{rows} rows x {CONTEXT}", 1e3 * step_seconds(rows, CONTEXT, graphs=False), unit="ms")


def a_rollout(card):
    """rollout.generate of twice as many responses as slots, which end at random: 300 tokens on average."""
    slots, longest, prompt_tokens = (4, 16, 5) if DRY else (512, 512, 128)
    prompts, ends = [random_prompt(prompt_tokens) for _ in range(8)], torch.randperm(V)[: V // 300].tolist()
    engine = Engine(decoder(), slots, prompt_tokens + longest, longest, ends)
    options = dict(max_new_tokens=longest, eos_ids=ends, seed=0, stream="train", engine=engine)
    for step, name in enumerate(("with the capture of graphs", "again")):
        generate = functools.partial(rollout.generate, decoder(), prompts, slots // 4, step=step, **options)
        made, took = clocked(generate)
        lengths = made.response_length.tolist()
        least = floor_of_rollout(card, lengths, slots, prompt_tokens)
        graphs = f", {len(engine.graphs.graphs)} graphs" if engine.graphs else ""
        note = f"{sum(lengths)} tokens in {took:.1f} s{graphs}, {least / took:.0%} of the floor's rate"
        expected = sum(lengths) / least * DECODE_SHARE
        card.record(f"{slots} slots, {name}", sum(lengths) / took, expected, "tokens/s", note=note)


def floor_of_rollout(card, lengths, slots, prompt_tokens):
    """Least seconds of the decode steps of a rollout in which every slot is refilled at once."""
    free, spans = [0] * slots, []  # when each slot becomes free, counted in steps
    for length in lengths:
        begin = heapq.heappop(free)
        heapq.heappush(free, begin + length)
        spans.append((begin, begin + length))
    tokens = [0] * max(free)  # that are held in each step
    for begin, end in spans:
        for step in range(begin, end):
            tokens[step] += prompt_tokens + step - begin
    return sum(floor(card, held) for held in tokens)


@torch.no_grad()
def generate_of_transformers(card):
    """A model of the same shape, rows of one length and no refills, which suits it best."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    rows, prompt_tokens, new = (2, 5, 4) if DRY else (512, 128, 128)
    config = Qwen2Config(**{name: value for name, value in SHAPE.items() if name != "model_type"})
    config._attn_implementation = "sdpa"
    with torch.device(DEVICE):
        model = Qwen2ForCausalLM(config).to(DTYPE).eval()
    tokens = torch.randint(V, (rows, prompt_tokens), device=DEVICE)

    def generate(new):
        options = dict(
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0, eos_token_id=V - 1
        )
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), min_new_tokens=new,
                              max_new_tokens=new, **options)  # fmt: skip

    generate(4)
    _, took = clocked(lambda: generate(new))
    card.record(f"{rows} rows x {new} tokens", rows * new / took, unit="tokens/s", note=f"{took:.1f} s")


# ----------------------------------------------------------------------------------------------------------
# learn: the real open_run and learn, on made-up responses


@functools.cache
def opened():
    """A Run of a random model in a folder of its own, with the embedded tokenizer; and the plan's Layout."""
    from distributed.ranks import start_processes
    from support import run as run_module
    from support.config import configure

    folder, plans, choose = Path(tempfile.mkdtemp()), [], run_module.choose_layout
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "tiny" / "model" / name, folder)
    random_model().save_pretrained(folder)
    run_module.choose_layout = lambda *args: plans.append(choose(*args)) or plans[-1]
    longest = 48 if DRY else 3072
    flags = dict(model=str(folder), data="tiny", device=DEVICE.type, out=str(folder / "out"), votes=32,
                 samples=32, questions_per_step=2, temperature=1.0, kl=0.0, max_new_tokens=longest,
                 rollout_tokens=64 * (longest + 200))  # fmt: skip
    return run_module.open_run(configure(flags), start_processes(DEVICE.type), flags), plans[-1]


def agreement_of_sampler_and_learner(card):
    import ttrl

    run, _ = opened()
    options = dict(max_new_tokens=8 if DRY else 256, eos_ids=run.eos_ids, seed=0, stream="train", step=1)
    sampled = rollout.generate(run.sampler, run.train_prompts[:2], 8, **options)
    seen = ttrl.learn(run, sampled, ttrl.advantages(torch.rand(2, 8)), 1)
    card.check("logprob_gap", seen["logprob_gap"], 0.02)
    card.record("logprob_gap_max", seen["logprob_gap_max"])
    card.record("grad_norm", seen.get("grad_norm", "none"))
    card.record("skipped updates", seen["skipped_updates"], "0", ok=seen["skipped_updates"] == 0)


def learn_once(card, checkpointing, budget):
    """Two calls of ttrl.learn, of which the second counts: time, MFU and peak of memory."""
    import ttrl

    run, plan = opened()
    before = run.policy.checkpointing, run.micro_batch_tokens
    run.policy.checkpointing, run.micro_batch_tokens = checkpointing, budget
    lengths = [1 + sample * (run.config.max_new_tokens - 1) // 31 for sample in range(32)]
    made, advantage = made_up_rollout([40, 90], lengths), torch.randn(2, 32)
    tokens, how = 2 * sum(lengths), "with checkpointing" if checkpointing else "without checkpointing"
    if healthy() and not DRY:
        torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(2):
            seen, took = clocked(lambda: ttrl.learn(run, made, advantage, 1))
            note = f"{tokens} tokens in micro-batches of {budget}, {tokens / took:,.0f} tokens/s"
            card.record(how, 1e6 * took / tokens, None if checkpointing else LEARNING, "us/token", note=note)
            mfu = flops_of_a_token(lengths) * tokens / took / peak_flops(card)
            card.record(f"MFU {how}", 100 * mfu, None if checkpointing else MFU, "% MFU")
            skipped = seen["skipped_updates"]
            card.record(f"skipped updates {how}", skipped, "0", ok=skipped == 0)
    finally:
        run.policy.checkpointing, run.micro_batch_tokens = before
        run.optimizer.zero_grad(set_to_none=False)
    planned = sum(plan.parts.values()) + plan.rows * sum(plan.row.values())
    peak = planned if DRY else torch.cuda.max_memory_allocated()
    card.record(f"peak {how}", peak / 1e9, planned / 1e9, "GB", note="expected: the plan")


def flops_of_a_token(lengths):
    """Of forward and backward: 6 for each weight, and attention over half of the response on average."""
    weights = sum(p.numel() for p in opened()[0].policy.parameters())
    context = sum(length**2 for length in lengths) / sum(lengths) / 2
    return 6 * weights + 12 * LAYERS * HEADS * E * context


def learning_as_planned(card):
    run, _ = opened()
    learn_once(card, run.policy.checkpointing, run.micro_batch_tokens)


def learning_the_other_way(card):
    """With checkpointing if the plan chose none, else without, in micro-batches that fit."""
    run, _ = opened()
    learn_once(card, not run.policy.checkpointing, min(run.micro_batch_tokens, 8192))


def optimizer_and_refresh(card):
    from support.run import refresh_sampler

    run, _ = opened()
    parameters = [*run.policy.parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    actions = {  # and the bytes that each moves for a weight
        "AdamW": (run.optimizer.step, 28),  # reads four numbers of fp32 and writes three
        "clipping": (lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0), 12),
        "refresh of the sampler": (lambda: refresh_sampler(run), 6),
    }
    for name, (action, moved) in actions.items():
        least = moved * sum(p.numel() for p in parameters) / bandwidth(card)
        card.record(name, 1e3 * seconds(action, 5), 1e3 * least / 0.8, "ms")


# ----------------------------------------------------------------------------------------------------------
# profile


def profile(card, name, action):
    """The kernels of a call: a table in the log, the largest in the results, and a trace beside them."""
    from torch.autograd import DeviceType

    kinds = torch.profiler.ProfilerActivity
    action()
    with torch.profiler.profile(activities=[kinds.CPU] if DRY else [kinds.CPU, kinds.CUDA]) as profiler:
        action()
        wait()
    sums = profiler.key_averages()
    print(sums.table(sort_by="self_cpu_time_total" if DRY else "self_device_time_total", row_limit=25))
    kernels = [x for x in sums if x.device_type == DeviceType.CUDA and x.self_device_time_total > 0]
    kernels.sort(key=lambda x: -x.self_device_time_total)
    total = sum(x.self_device_time_total for x in kernels)
    card.record(f"{name}: launches", sum(x.count for x in kernels))
    card.record(f"{name}: time of kernels", total / 1e3, unit="ms")
    for rank, x in enumerate(kernels[:8], start=1):
        share = f"{x.self_device_time_total / total:.1%}"
        card.record(f"{name}: kernel {rank}", share, note=f"{x.count} launches of {x.key[:90]}")
    trace = card.out / f"{name.replace(' ', '-')}.json.gz"
    profiler.export_chrome_trace(str(trace))
    if trace.stat().st_size > 15 << 20:
        trace.unlink()
        card.record(f"{name}: trace", "too large to keep")


def a_decode_step(card):
    engine = filled_engine(ROWS, CONTEXT, 8)
    engine.graphs = None  # so that each kernel is seen with what launched it
    with torch.no_grad():
        profile(card, "decode step", lambda: engine.decode_steps(1, ROWS, engine.capacity, 1.0, 1.0))


def a_micro_batch(card):
    model = random_model(dtype=torch.float32)
    made = made_up_rollout([9] if DRY else [90], [4, 5] if DRY else [1024, 1500, 2048, 2400])

    def learn():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not DRY, cache_enabled=False):
            logp, _ = model(made)
        logp.sum().backward()

    profile(card, "micro-batch", learn)


# ----------------------------------------------------------------------------------------------------------
# kernels


def speed_of_log_probabilities(card):
    """Beside log_softmax and the bound: one product forward, and backward the logits again and two more."""
    weight, on_gpu = normal(V, D, scale=D**-0.5).requires_grad_(), logprob.on_gpu

    def plain(hidden, weight, targets):
        return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def ours(*inputs):
        return logprob.linear_logprob(*inputs)[0]

    def measure(name, function, inputs):
        def both_ways():
            torch.autograd.grad(function(*inputs).sum(), inputs[:2])

        with torch.no_grad():
            forward = seconds(lambda: function(*inputs), 3)
        bound = 8 * len(inputs[0]) * D * V / peak_flops(card)
        note = f"forward {1e3 * forward:.1f}, bound of both {1e3 * bound:.1f}"
        name = f"{len(inputs[0])} tokens, {name}"
        card.record(name, 1e3 * seconds(both_ways, 3), 1e3 * bound / 0.7, "ms", note=note)

    for tokens in (8, 16) if DRY else (8192, 4096, 32768):
        inputs = normal(tokens, D).requires_grad_(), weight, torch.randint(V, (tokens,), device=DEVICE)
        measure("ours", ours, inputs)
        if tokens < 32768:  # its logits would take 20 GB, several times
            measure("log_softmax", plain, inputs)
        logprob.on_gpu = lambda x: False
        try:
            measure("the twin in torch", ours, inputs)
        finally:
            logprob.on_gpu = on_gpu


def speed_of_sampling(card):
    """Beside the time that the logits take to be read once, or for top-p four times."""
    logits, key = normal(ROWS, V, dtype=torch.float32), torch.arange(ROWS, device=DEVICE)
    hidden, head = normal(ROWS, D), normal(V, D).T
    actions = {
        "top-p 1": (lambda: sampler.sample_tokens(logits, key, key, 1.0, 1.0), logits.nbytes),
        "top-p 0.95": (lambda: sampler.sample_tokens(logits, key, key, 1.0, 0.95), 4 * logits.nbytes),
        "head": (lambda: logprob.product(hidden, head), logits.nbytes + head.nbytes),
    }
    for name, (action, moved) in actions.items():
        took, least = seconds(replayed(action)), moved / bandwidth(card)
        card.record(f"{ROWS} rows, {name}", 1e6 * took, 1e6 * least / 0.7, "us")


def speed_of_decoding_attention(card):
    """A layer of 256 rows x 1,024 tokens: 268 MB, more than the cache of the chip holds."""
    if DRY:
        return card.record("triton", "not on a CPU")
    from kernels.attention_triton import attend_cached_triton

    q, (k, v) = normal(ROWS, HEADS, E), normal(2, ROWS, KV_HEADS, E)
    keys, values = normal(2, ROWS, KV_HEADS, CONTEXT + 64, E)
    length = torch.full((ROWS,), CONTEXT, device=DEVICE, dtype=torch.int32)
    took = seconds(replayed(lambda: attend_cached_triton(q, k, v, keys, values, length)))
    least = ROWS * CONTEXT * BYTES_OF_A_TOKEN / LAYERS / bandwidth(card)
    card.record(f"{ROWS} rows x {CONTEXT}", 1e6 * took, 1e6 * least / 0.8, "us")


# ----------------------------------------------------------------------------------------------------------
# speed


def speeds_of_the_tests(card):
    run_pytest(card, "speed and cpu" if DRY else "speed and cuda", 2, "-s")


STAGES = {
    "env": {versions: 30, ceilings: 10, backends_of_sdpa: 5, launches: 5},
    "smoke": SMOKE,
    "correct": {start_of_the_embedded_pair: 5, tests: 130, the_embedded_pair: 130},
    "decode": {
        steps_of_decoding: 60, top_p: 20, a_rollout: 40, without_graphs: 20, generate_of_transformers: 40,
    },
    "learn": {
        agreement_of_sampler_and_learner: 60, learning_as_planned: 40, learning_the_other_way: 40,
        optimizer_and_refresh: 20,
    },
    "profile": {a_decode_step: 25, a_micro_batch: 30},
    "kernels": {speed_of_log_probabilities: 30, speed_of_sampling: 10, speed_of_decoding_attention: 10},
    "speed": {speeds_of_the_tests: 60},
}  # fmt: skip

if __name__ == "__main__":
    if not DRY and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here; --dry runs on the CPU")
    card = Recorder(None, STAGES)
    card.run(STAGES[card.stage], healthy)

"""The parts of bench/first_card.py, which starts this file: what is checked and timed on a first GPU.

    python bench/first_card_parts.py decode "a rollout" --out card      # one part, in the foreground

A part is a function of the Recorder `card`, into which it writes what it sees, the most valuable numbers
first. With --dry everything runs on the CPU with toy widths, to show that it runs. Letters in shape comments:
B rows, T tokens, D width, V vocabulary, H heads, K key/value heads, E head width.
"""

import functools
import heapq
import importlib.util
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import first_card
import torch
import torch.nn.functional as F
from common import ROOT, clocked, forget_peak, open_run, random_model
from tasks import word_problems, write_questions
from wheels import CACHE, MODELS

import rollout
from distributed.memory import kv_bytes
from kernels import cuda_graph, logprob, sampler
from kernels.linear import TiedWeight
from kernels.packing import pack_responses
from rollout import Engine
from support import questions

DRY = "--dry" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
DTYPE = torch.float32 if DRY else torch.bfloat16

QWEN = dict(model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960,
            num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, rope_theta=10000.0,
            max_position_embeddings=4096, rms_norm_eps=1e-6, tie_word_embeddings=True)  # fmt: skip
TOY = dict(QWEN, vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
           num_attention_heads=4)  # fmt: skip
SHAPE = TOY if DRY else QWEN  # Qwen2.5-Math-1.5B's
V, D = SHAPE["vocab_size"], SHAPE["hidden_size"]
HEADS, KV_HEADS = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
E = D // HEADS

# Expected of an H100: the ceilings were seen on one, the others are counts of kernels and bytes (NOTES.md)
COPY, PRODUCT = 3.0, 798.0  # TB/s, bytes read and written; TFLOP/s of bf16
DECODE_SHARE = 0.64  # of the rate at which weights, keys and values could be read
LEARNING, MFU = 32.0, 39.0  # us a token without checkpointing; % of PRODUCT
LEARN_SECONDS = 0 if DRY else 120  # of the public model
TOP_P_COST = 1.15  # times a decode step without
PASS_AT_1 = {0: 0.405, 16: 0.716, 32: 0.849, 48: 0.887, 64: 0.901, 80: 0.904}  # by step, on a CPU

# ----------------------------------------------------------------------------------------------------------
# what the parts share


def normal(*shape, dtype=DTYPE, scale=1.0):
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype)


def random_prompt(length, vocabulary=V):
    return torch.randint(vocabulary, (length,)).tolist()


def qwen(dtype=DTYPE, **changes):
    """A model of SHAPE with random weights, but for some changes of its config."""
    torch.manual_seed(0)
    return random_model(Path(tempfile.mkdtemp()), DEVICE, dtype, **{**SHAPE, **changes})


def made_up_rollout(prompt_lengths, lengths):
    """Responses of random tokens, `lengths` to each prompt, about as likely as under a random model."""
    pairs = [(question, sample) for question in range(len(prompt_lengths)) for sample in range(len(lengths))]
    made = rollout.empty_rollout([*map(random_prompt, prompt_lengths)], pairs, max(lengths))
    for row, (_, sample) in enumerate(pairs):
        tokens = torch.tensor(random_prompt(lengths[sample]))
        made.fill(row, tokens, -math.log(V) - 0.5 * torch.rand(len(tokens)), [])
    return made.trim()


def distance(seen, exact):
    """How far two tensors are from each other, as a share of the second's norm. NaN stays NaN."""
    exact = exact.double()
    return ((seen.to(exact) - exact).norm() / exact.norm()).item()


def seconds(action, repeats=10):
    """Median seconds of a call, after one to warm up; short calls are queued, 5 ms of them at a time."""
    action()
    calls = max(1, int(5e-3 / clocked(action)[1]))
    runs = [clocked(lambda: [action() for _ in range(calls)])[1] for _ in range(1 if DRY else repeats)]
    return statistics.median(runs) / calls


def replayed(action):
    """The same kernels as a CUDA graph, as decoding runs them: without what it takes to launch them."""
    if DRY:
        return action
    action()  # compiles what is to be compiled
    return cuda_graph.capture(action, torch.cuda.graph_pool_handle())


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
    return 1e12 * (card.earlier("copy") or copy_rate())


@functools.cache
def peak_flops(card):
    """FLOP/s of a large product, by stage env."""
    return 1e12 * (card.earlier("product in bf16") or product_rate())


# ----------------------------------------------------------------------------------------------------------
# env: the machine, and its roofline


def the_machine(card):
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
    card.record("copy", copy_rate(), COPY, "TB/s")
    card.record("product in bf16", product_rate(), PRODUCT, "TFLOP/s")
    x, many = torch.zeros(1, device=DEVICE), 200
    card.record("a launch", seconds(lambda: [x.add_(1) for _ in range(many)]) / many * 1e6, unit="us")


# ----------------------------------------------------------------------------------------------------------
# smoke and correct: the tests for a GPU, what they leave out, and the embedded pair

KERNELS = "(log_probabilities or drawing or rotation or the_head or flash or gradients_at or cache)"
NOT_SPEED = "not speed and not signature"


def run_tests(card, expression, parallel=True):
    """tests/test_gpu.py -k expression, with eight processes where pytest-xdist is installed."""
    at_once = ["-n", "8"] if parallel and importlib.util.find_spec("xdist") and not DRY else []
    card.run_pytest("tests/test_gpu.py", "-k", expression, *at_once)


def tests_of_the_kernels(card):
    run_tests(card, "cpu and drawing" if DRY else f"{KERNELS} and {NOT_SPEED}")


def tests(card):
    run_tests(card, "cpu and graphs" if DRY else f"not {KERNELS} and {NOT_SPEED}")


def a_small_model(card):
    """Two layers with the real widths: sampler, learner and gradient against float64 on the CPU.

    What is fused on a GPU is plain on a CPU, so this checks all of it at once.
    """
    model = qwen(vocab_size=400, num_hidden_layers=2)
    prompts = [random_prompt(length, 400) for length in (30, 70)]
    options = dict(max_new_tokens=16 if DRY else 60, eos_ids=[1], seed=0, stream="train", step=0)
    sampled = rollout.generate(model, prompts, 4, **options)
    weights, model = torch.randn(sampled.logprob.shape), model.float()  # the learner's weights
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not DRY):
        learned, _ = model(sampled)
    (learned * weights.to(DEVICE)).sum().backward()
    seen = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model.to("cpu", torch.float64)
    batch = pack_responses(sampled, model.config.windows)
    hidden = model.backbone(batch.tokens, batch.positions, batch.attend_packed)
    logp = (hidden[batch.logit_positions] @ model.lm_head.weight.T).log_softmax(-1)
    exact = batch.unpack(logp.gather(1, batch.targets[:, None])[:, 0])
    (exact * weights).sum().backward()
    card.check("log-probabilities of the sampler", distance(sampled.logprob, exact.detach()), 1e-2)
    card.check("log-probabilities of the learner", distance(learned.detach(), exact.detach()), 1e-2)
    errors = {name: distance(a, p.grad) for a, (name, p) in zip(seen, model.named_parameters(), strict=True)}
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    card.check("gradients", errors[worst], 5e-2, note=f"the largest of {worst}")


def nan_probe(card):
    """704 keys and scores far below 0: cuDNN's gradient under a mask is NaN there (pytorch issue 196678).

    tests/test_gpu.py shows that ours is finite. Here: would torch take cuDNN, and is the hazard real?
    """
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "override"}
    if hasattr(torch._C, "_get_sdp_priority_order"):
        order = [names.get(int(backend), "?") for backend in torch._C._get_sdp_priority_order()]
        card.record("order of SDPA's backends", " ".join(order))
    tokens = 20 if DRY else 704
    mask = torch.ones(tokens, tokens, device=DEVICE, dtype=torch.bool).tril()[None, None]
    q, k, v = (at + normal(1, HEADS, tokens, E, scale=0.1) for at in (3, -3, 0))
    q, k, v = (x.to(DTYPE).requires_grad_() for x in (q, k, v))
    chosen = names.get(torch._fused_sdp_choice(q, k, v, mask), "?")
    card.record("SDPA with a mask goes to", chosen, "efficient", ok=chosen != "cudnn")
    if not DRY:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, mask)
            gradients = torch.autograd.grad(out.sum(), (q, k, v))
        card.record("NaN by cuDNN, which is not used", sum(int(x.isnan().sum()) for x in gradients))


def tied_gradient(card):
    """The gradient of a weight that is embedding and head, with a token that comes thousands of times."""
    tokens = torch.randint(V, (64 if DRY else 8192,), device=DEVICE)
    tokens[::2] = 7
    for dtype, allowed in ((torch.float32, 1e-5), (DTYPE, 1e-2)):
        of_tokens, of_head = (normal(n, D, dtype=dtype, scale=0.01) for n in (len(tokens), V))
        weight = normal(V, D, dtype=dtype).requires_grad_()
        embedding, head = TiedWeight.apply(weight)
        embedded = F.embedding(tokens, embedding, sparse=True)
        ((embedded * of_tokens).sum() + (head * of_head).sum()).backward()
        exact = of_head.double().index_add_(0, tokens, of_tokens.double())
        card.check(f"all rows, {dtype}", distance(weight.grad, exact), allowed)
        card.check(f"the row of a frequent token, {dtype}", distance(weight.grad[7], exact[7]), allowed)


def the_embedded_pair(card):
    """ttrl.py with its defaults: pass@1 by step beside the CPU's. In training they part by and by."""
    out = Path(tempfile.mkdtemp()) / "run"
    flags = ["--out", out, "--device", DEVICE.type, "--max-minutes", "1.6"]
    if DRY:
        few = json.loads((ROOT / "tiny" / "questions.json").read_text())[:6]
        (out.parent / "few.json").write_text(json.dumps(few))
        flags += ["--data", out.parent / "few.json", "--max-minutes", "0.001", "--eval-samples", "2"]
        flags += "--questions-per-step 3 --votes 8 --samples 8 --max-new-tokens 48".split()
    subprocess.run([sys.executable, ROOT / "ttrl.py", *flags], check=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval/pass@1" in line:
            seen, expected = line["eval/pass@1"], PASS_AT_1.get(line["step"])
            near = DRY or expected is None or abs(seen - expected) < (0.08 if line["step"] else 0.03)
            card.record(f"pass@1 after {line['step']} steps", seen, expected, ok=near)
    learned = [line for line in lines if "train/logprob_gap" in line]
    card.record("steps", lines[-1]["step"])
    card.check("largest logprob_gap", max(line["train/logprob_gap"] for line in learned), 0.02)
    no_skipped(card, "", sum(line["train/skipped_updates"] for line in learned))


def no_skipped(card, how, skipped):
    card.record(f"skipped updates{how}", skipped, "0", ok=skipped == 0)


# ----------------------------------------------------------------------------------------------------------
# decode

ON_CARD = [(335, 1686), (256, 1024), (64, 1024), (512, 1024), (512, 2048), (64, 2048), (256, 2048), (64, 256),
           (256, 256), (512, 256)]  # fmt: skip
ROWS, CONTEXT = (3, 40) if DRY else (256, 1024)  # of the shape at which variants are compared


@functools.cache
def decoder():
    return qwen()


def generate(prompts, samples, new_tokens, engine, top_p=1.0, step=0):
    return rollout.generate(decoder(), prompts, samples, max_new_tokens=new_tokens, eos_ids=engine.eos_ids,
                            top_p=top_p, seed=0, stream="eval", step=step, engine=engine)  # fmt: skip


def run_seconds(rows, prompt, new_tokens, top_p, graphs):
    """Seconds of one rollout of rows of the same prompt to their full length, after one to warm up."""
    engine = Engine(decoder(), rows, len(prompt) + new_tokens, new_tokens, [-1])  # -1 never comes
    engine.graphs = engine.graphs if graphs else None
    return seconds(lambda: generate([prompt], rows, new_tokens, engine, top_p), 3)


def step_seconds(rows, context, top_p=1.0, graphs=True):
    """Seconds of a decode step of rows of `context` tokens on average: a long run less a short one."""
    short, long = (2, 8) if DRY else (8, 72)
    prompt = random_prompt(context - (short + long) // 2)
    times = [run_seconds(rows, prompt, new_tokens, top_p, graphs) for new_tokens in (short, long)]
    return (times[1] - times[0]) / (long - short)


def floor(card, model, tokens):
    """Least seconds of a decode step whose rows hold so many tokens: weights, keys and values read once."""
    weights = sum(p.numel() for p in model.parameters()) * DTYPE.itemsize
    return (weights + tokens * kv_bytes(model.config, not DRY)) / bandwidth(card)


def steps_of_decoding(card):
    for rows, context in [(ROWS, CONTEXT)] if DRY else ON_CARD:
        try:
            each, least = step_seconds(rows, context), floor(card, decoder(), rows * context)
        except torch.OutOfMemoryError:
            card.record(f"{rows} rows x {context}", "does not fit")
            continue
        note = f"{least / each:.0%} of the floor's rate, {rows / each:,.0f} tokens/s"
        card.record(f"{rows} rows x {context}", 1e3 * each, 1e3 * least / DECODE_SHARE, "ms", note=note)
    without, with_it = (step_seconds(ROWS, CONTEXT, top_p) for top_p in (1.0, 0.95))
    card.record("top-p 1", 1e3 * without, unit="ms")
    card.record("top-p 0.95", 1e3 * with_it, 1e3 * without * TOP_P_COST, "ms")
    rows = min(ROWS, 64)
    without = step_seconds(rows, CONTEXT, graphs=False)
    card.record(f"{rows} rows x {CONTEXT} without graphs", 1e3 * without, unit="ms")


def a_rollout(card):
    """rollout.generate of twice as many responses as slots, which end at random: 300 tokens on average."""
    slots, longest, prompt_tokens = (4, 16, 5) if DRY else (512, 512, 128)
    prompts, ends = [random_prompt(prompt_tokens) for _ in range(8)], torch.randperm(V)[: V // 300].tolist()
    engine = Engine(decoder(), slots, prompt_tokens + longest, longest, ends)
    for step, name in enumerate(("with the capture of graphs", "again")):
        made, took, _ = clocked(generate, prompts, slots // 4, longest, engine, step=step)
        lengths = made.response_length.tolist()
        least = floor_of_rollout(card, decoder(), lengths, slots, prompt_tokens)
        note = f"{sum(lengths)} tokens in {took:.1f} s, {least / took:.0%} of the floor's rate"
        expected = sum(lengths) / least * DECODE_SHARE
        card.record(f"{slots} slots, {name}", sum(lengths) / took, expected, "tokens/s", note=note)


def floor_of_rollout(card, model, lengths, slots, prompt_tokens):
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
    return len(tokens) * floor(card, model, statistics.mean(tokens))


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
    options = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0, eos_token_id=V - 1,
                   attention_mask=torch.ones_like(tokens))  # fmt: skip
    model.generate(tokens, max_new_tokens=4, **options)
    _, took, _ = clocked(lambda: model.generate(tokens, min_new_tokens=new, max_new_tokens=new, **options))
    card.record(f"{rows} rows x {new} tokens", rows * new / took, unit="tokens/s", note=f"{took:.1f} s")


# ----------------------------------------------------------------------------------------------------------
# learn: the real open_run and learn, on made-up responses


def open_qwen(**flags):
    """(a Run of a random model in a folder of its own, with the embedded tokenizer; the plan's Layout)."""
    folder, longest = Path(tempfile.mkdtemp()), 48 if DRY else 3072
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "tiny" / "model" / name, folder)
    qwen().save_pretrained(folder)
    return open_run(DEVICE.type, model=str(folder), data="tiny", out=str(folder / "out"), votes=32,
                    samples=32, questions_per_step=2, temperature=1.0, kl=0.0, max_new_tokens=longest,
                    rollout_tokens=64 * (longest + 200), **flags)  # fmt: skip


def learning(card):
    """Sampler against learner; learning without checkpointing; the optimizer."""
    import ttrl

    run, plan = open_qwen(checkpointing=False)
    options = dict(max_new_tokens=8 if DRY else 256, eos_ids=run.eos_ids, seed=0, stream="train", step=1)
    sampled = rollout.generate(run.sampler, run.train_prompts[:2], 8, **options)
    seen = ttrl.learn(run, sampled, ttrl.advantages(torch.rand(2, 8)), 1)
    card.check("logprob_gap", seen["logprob_gap"], 0.02)
    card.record("logprob_gap_max", seen["logprob_gap_max"])
    card.record("grad_norm", seen.get("grad_norm", "none"))
    no_skipped(card, "", seen["skipped_updates"])
    learn_twice(card, run, plan, "without checkpointing", LEARNING, MFU)
    time_the_optimizer(card, run)


def learning_with_checkpointing(card):
    run, plan = open_qwen(checkpointing=True, micro_batch_tokens=8192)
    learn_twice(card, run, plan, "with checkpointing")


def learn_twice(card, run, plan, how, expected=None, expected_mfu=None):
    """Two calls of ttrl.learn, of which the second counts: time, MFU and peak of memory."""
    import ttrl

    lengths = [1 + sample * (run.config.max_new_tokens - 1) // 31 for sample in range(32)]
    made, advantage, tokens = made_up_rollout([40, 90], lengths), torch.randn(2, 32), 2 * sum(lengths)
    forget_peak()
    for _ in range(2):
        seen, took, _ = clocked(lambda: ttrl.learn(run, made, advantage, 1))
    note = f"{tokens} tokens, {tokens / took:,.0f} tokens/s"
    card.record(how, 1e6 * took / tokens, expected, "us/token", note=note)
    card.record(f"MFU {how}", mfu(card, run, 2 * [(0, lengths)], took), expected_mfu, "% MFU")
    no_skipped(card, f" {how}", seen["skipped_updates"])
    planned = sum(plan.parts.values()) + plan.rows * sum(plan.row.values())
    peak = planned if DRY else torch.cuda.max_memory_allocated()
    card.record(f"peak {how}", peak / 1e9, planned / 1e9, "GB", note="expected: the plan")


def mfu(card, run, groups, took):
    """Model FLOPs utilisation in percent, of learning in `took` seconds.

    groups: (length of a prompt, which is computed once, [lengths of the responses to it]).
    """
    config, weights = run.policy.config, sum(p.numel() for p in run.policy.parameters())
    tokens = sum(prompt + sum(lengths) for prompt, lengths in groups)
    pairs = sum(p * p / 2 + sum(r * (p + r / 2) for r in lengths) for p, lengths in groups)  # query and key
    flops = 6 * weights * tokens + 12 * config.layers * config.heads * config.head_dim * pairs
    return 100 * flops / took / peak_flops(card)


def time_the_optimizer(card, run):
    parameters = [*run.policy.parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    actions = {  # and the bytes that each moves for a weight
        "AdamW": (run.optimizer.step, 28),  # reads four numbers of fp32 and writes three
        "clipping": (lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0), 12),
        "refresh of the sampler": (run.refresh_sampler, 6),
    }
    for name, (action, moved) in actions.items():
        least = moved * sum(p.numel() for p in parameters) / bandwidth(card)
        card.record(name, 1e3 * seconds(action, 5), 1e3 * least / 0.8, "ms")


# ----------------------------------------------------------------------------------------------------------
# profile


def profile(card, name, action, times=1):
    """The kernels of a call: a table in the log, the largest in the results, and a trace beside them.

    times: what the call repeats, by which the sums are divided.
    """
    from torch.autograd import DeviceType

    kinds = torch.profiler.ProfilerActivity
    action()
    with torch.profiler.profile(activities=[kinds.CPU] if DRY else [kinds.CPU, kinds.CUDA]) as profiler:
        clocked(action)
    sums = profiler.key_averages()
    print(sums.table(sort_by="self_cpu_time_total" if DRY else "self_device_time_total", row_limit=25))
    kernels = [x for x in sums if x.device_type == DeviceType.CUDA and x.self_device_time_total > 0]
    kernels.sort(key=lambda x: -x.self_device_time_total)
    total = sum(x.self_device_time_total for x in kernels)
    card.record(f"{name}: launches", round(sum(x.count for x in kernels) / times))
    card.record(f"{name}: time of kernels", total / times / 1e3, unit="ms")
    for rank, x in enumerate(kernels[:8], start=1):
        share, note = f"{x.self_device_time_total / total:.1%}", f"{x.count} launches of {x.key[:90]}"
        card.record(f"{name}: kernel {rank}", share, note=note)
    trace = card.out / f"{name.replace(' ', '-')}.json.gz"
    profiler.export_chrome_trace(str(trace))
    if trace.stat().st_size > 15 << 20:
        trace.unlink()
        card.record(f"{name}: trace", "too large to keep")


def kernels_of_decoding_and_learning(card):
    """A decode step, of a rollout whose few other kernels are counted with it; and a micro-batch."""
    new_tokens = 3 if DRY else 33
    engine, prompt = Engine(decoder(), ROWS, CONTEXT + 33, new_tokens, [-1]), random_prompt(CONTEXT)
    profile(card, "decode step", lambda: generate([prompt], ROWS, new_tokens, engine), new_tokens - 1)

    model = qwen(torch.float32)
    made = made_up_rollout([9] if DRY else [90], [4, 5] if DRY else [1024, 1500, 2048, 2400])

    def learn():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not DRY, cache_enabled=False):
            logp, _ = model(made)
        logp.sum().backward()

    profile(card, "micro-batch", learn)


# ----------------------------------------------------------------------------------------------------------
# kernels, and the speeds that the tests print


def kernels_beside_their_bounds(card):
    time_sampling(card)
    time_decoding_attention(card)
    time_log_probabilities(card)


def time_log_probabilities(card):
    """Beside log_softmax and the bound: one product forward, and backward the logits again and two more."""
    weight, on_gpu = normal(V, D, scale=D**-0.5).requires_grad_(), logprob.on_gpu

    def plain(hidden, weight, targets):
        return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def ours(*inputs):
        return logprob.linear_logprob(*inputs)[0]

    def measure(name, function, inputs):
        with torch.no_grad():
            forward = seconds(lambda: function(*inputs), 3)
        both = seconds(lambda: torch.autograd.grad(function(*inputs).sum(), inputs[:2]), 3)
        bound = 8 * len(inputs[0]) * D * V / peak_flops(card)
        note = f"forward {1e3 * forward:.1f}, bound of both {1e3 * bound:.1f}"
        card.record(f"{len(inputs[0])} tokens, {name}", 1e3 * both, 1e3 * bound / 0.7, "ms", note=note)

    for tokens in (8, 16) if DRY else (8192, 4096, 32768):
        inputs = normal(tokens, D).requires_grad_(), weight, torch.randint(V, (tokens,), device=DEVICE)
        measure("ours", ours, inputs)
        if tokens < 32768:  # its logits would take 20 GB, several times
            measure("log_softmax", plain, inputs)
        logprob.on_gpu = lambda x: False
        measure("the twin in torch", ours, inputs)
        logprob.on_gpu = on_gpu


def time_sampling(card):
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
        card.record(f"sampling {ROWS} rows, {name}", 1e6 * took, 1e6 * least / 0.7, "us")


def time_decoding_attention(card):
    """A layer of 256 rows x 1,024 tokens: 268 MB, more than the cache of the chip holds."""
    if DRY:
        return
    from kernels.attention import attend_cached_triton

    q, (k, v) = normal(ROWS, HEADS, E), normal(2, ROWS, KV_HEADS, E)
    keys, values = normal(2, ROWS, KV_HEADS, CONTEXT + 64, E)
    length = torch.full((ROWS,), CONTEXT, device=DEVICE, dtype=torch.int32)
    took = seconds(replayed(lambda: attend_cached_triton(q, k, v, keys, values, length)))
    least = ROWS * CONTEXT * 2 * KV_HEADS * E * DTYPE.itemsize / bandwidth(card)
    card.record(f"attention of {ROWS} rows x {CONTEXT}", 1e6 * took, 1e6 * least / 0.8, "us")


def speeds_of_the_tests(card):
    run_tests(card, "speed and cpu" if DRY else "speed and cuda", parallel=False)


# ----------------------------------------------------------------------------------------------------------
# real: a public checkpoint


def a_public_model(card):
    """TTRL on Qwen2.5-Coder-0.5B-Instruct, evaluated before and after, and its speeds beside their bounds."""
    import ttrl

    folder = ROOT / "tiny" / "model" if DRY else CACHE / MODELS["qwen2.5-coder-0.5b"].folder
    if not folder.exists():
        return card.record("the model", "not here", note=f"{folder} is missing: docs/gpu.md")
    flags = dict(votes=64, samples=32, questions_per_step=8, max_new_tokens=1024, temperature=0.6)
    if DRY:
        flags = dict(votes=8, samples=4, questions_per_step=3, max_new_tokens=48, temperature=1.0)
    run, _ = open_run(DEVICE.type, model=str(folder), out=tempfile.mkdtemp(), epochs=5, lr=2e-6, kl=0.0,
                      **flags, **real_questions(card))  # fmt: skip
    record_an_evaluation(card, "before", ttrl.evaluate(run)[0])
    begin, step, labels = time.monotonic(), 0, {}
    while not step or (time.monotonic() - begin < LEARN_SECONDS and step < run.schedule.steps):
        step += 1
        record_a_step(card, run, step, *ttrl.train_step(run, step, labels))
    record_an_evaluation(card, f"after {step} steps", ttrl.evaluate(run)[0])


def real_questions(card):
    """The flags for 32 questions: of MATH-500 if it is in the cache, else word problems."""
    path, math500 = Path(tempfile.mkdtemp()) / "questions.jsonl", CACHE.parent / "math.json"
    if math500.exists() and not DRY:
        asked = [(q.id, q.prompt, q.answer) for q in questions.load(str(math500))[::15][:32]]
        template = "auto"
    else:
        asked, template = word_problems(0, 6 if DRY else 32), "none"  # they are in the chat format already
        card.record("questions", "word problems", note=f"{math500} is missing")
    return dict(data=str(write_questions(asked, path)), template=template)


def record_an_evaluation(card, when, seen):
    for name in ("pass@1", "pass@1_se", "maj@16", "no_answer", "truncated", "response_tokens"):
        card.record(f"{name} {when}", seen[name])


def record_a_step(card, run, step, seen, groups, rewards):
    lengths, trained, prompt = [], [], statistics.mean(map(len, run.train_prompts))
    for group, reward in zip(groups, rewards, strict=True):
        own = [len(response.tokens) for response in group.responses]
        lengths += own
        if len(set(reward[: run.config.samples])) > 1:  # without advantages nothing is learned
            trained.append((prompt, own[: run.config.samples]))
    took, slots = seen["seconds_sampling"], run.engine.slots if run.engine else len(lengths)
    least = floor_of_rollout(card, run.sampler, lengths, slots, prompt)
    note = f"{least / took:.0%} of the floor's rate"
    card.record(f"step {step}: sampling", sum(lengths) / took, unit="tokens/s", note=note)
    took = seen["seconds_learning"]
    note, tokens = f"{mfu(card, run, trained, took):.0f} % MFU", sum(sum(own) for _, own in trained)
    card.record(f"step {step}: learning", tokens / took, unit="tokens/s", note=note)
    if "logprob_gap" in seen:
        card.check(f"step {step}: logprob_gap", seen["logprob_gap"], 0.02)
    right = f"{seen['ground_truth_ratio']:.3f} right, labels {seen['label_accuracy']:.3f}"
    card.record(f"step {step}: votes", right, note=f"{seen['no_answer']:.3f} without an answer")
    no_skipped(card, f" in step {step}", seen["skipped_updates"])


if __name__ == "__main__":
    if not DRY and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here; --dry runs on the CPU")
    first_card.run_here(globals())

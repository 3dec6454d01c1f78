"""Tokens a second: our sampler against transformers' generate and vLLM, by the same model, prompts, threads.

    python bench/rollout.py                             # SmolLM2-135M-Instruct, all cases; hours on one core
    python bench/rollout.py --cases a b --threads 1     # minutes
    python bench/rollout.py --peers vllm --neighbour    # and what a busy neighbour takes
    python bench/rollout.py --model tiny/model --cases a --repeats 1 --no-bounds      # does it run?

    (a) 1 row, a prompt of 64 tokens and 64 new ones
    (b) 4 questions x 16 samples, prompts of 64 tokens, 64 new ones, every row to its full length
    (b-top-p) as (b), sampled with top-p 0.95, and beside it (b) once more: what top-p costs
    (c) 8 questions x 64 samples in the chat template, up to 128 tokens, as long as the model makes them
    (d) 4 questions x 64 samples, prompts of 256 tokens, 256 new ones, every row to its full length

transformers is first screened: attention, cache, the way rows are repeated, rows a call, threads. Of what was
tried the best takes part, twice: as `generate` alone, and as `generate` behind a prompt cache filled by hand
(transformers' recipe for shared prompts), for which the caller has to write what we call prefill. Threads are
those that suit it best; where vLLM takes part, the most that are asked for.

vLLM takes part eager and compiled, each in a process of its own that holds about 6 GB and, idle, takes 2 % of
a core; the faster one counts. It lives in a virtual environment, --vllm, which pip makes on first use (3.4
GB). Compiling takes minutes, once.

Only tokens up to and including a row's end count, on all sides. With --neighbour all sides then run again
beside a process that spins. Last, with the same threads, what bounds us (with an empty --cases nothing else):
the machine's largest product and its memory bandwidth, and what the model's own matrices reach at 64 rows and
at 1.
"""

import os
import statistics
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import common
from common import ROOT, arguments, clocked, in_turn, model_folder, over, say, seconds_of, table
from vllm_peer import ENVIRONMENT, VllmPeer

import torch  # isort: skip
import transformers  # isort: skip

from kernels import native  # isort: skip
from model import Transformer  # isort: skip
from rollout import generate  # isort: skip
from support.prompts import encode_prompt, load_tokenizer  # isort: skip

ASKED = (
    "What is the capital of France?",
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "Name three colours of the rainbow.",
    "A train goes 60 miles an hour for 2 hours. How far does it go?",
    "What do bees make?",
    "Write one sentence about the sea.",
    "Anna reads 5 pages a day. How many pages does she read in 6 days?",
    "Is the sun a star or a planet?",
)
CASES = ("a", "b", "b-top-p", "c", "d")
AIMS = {"a": 1.5, "b": 2.0, "b-top-p": 2.0, "c": 4.0}  # times transformers' tokens a second
AIMS_VLLM = {"a": 1.3, "b": 1.4, "b-top-p": 1.3, "c": 1.15, "d": 1.15}  # a second, and a CPU-second
AIM_KEPT = 0.55  # of our quiet speed, beside a neighbour
AIM_BANDWIDTH, AIM_GEMM = 0.8, 0.6
TOP_P_COST = 0.15  # of the time without it, at most
WITHOUT_TOP_P = "ours without top-p"


@dataclass(frozen=True)
class Case:
    name: str
    prompts: list  # of token ids
    samples: int
    new_tokens: int
    eos_ids: tuple  # () where every row has to reach its full length
    repeats: int
    top_p: float = 1.0

    @property
    def rows(self):
        return len(self.prompts) * self.samples

    def check(self, lengths):
        """lengths: of the responses that a peer gave."""
        complete = self.eos_ids or set(lengths) == {self.new_tokens}
        assert len(lengths) == self.rows and complete, "rows or tokens are missing"

    def __str__(self):
        end = "until the model ends" if self.eos_ids else "full length"
        lengths = "/".join(str(n) for n in sorted({len(prompt) for prompt in self.prompts}))
        return (f"({self.name}) {len(self.prompts)} x {self.samples} rows, prompts of {lengths} tokens, "
                f"{self.new_tokens} new ones, {end}, top-p {self.top_p:g}")  # fmt: skip


def make_cases(folder):
    tokenizer, eos_ids = load_tokenizer(folder)
    text = tokenizer.encode((ROOT / "README.md").read_text(encoding="utf-8"), add_special_tokens=False)
    short, long = ([text[start : start + n] for start in (0, 500, 1000, 1500)] for n in (64, 256))
    asked = [encode_prompt(tokenizer, question, suffix="none") for question in ASKED]
    return {
        "a": Case("a", short[:1], 1, 64, (), 5),
        "b": Case("b", short, 16, 64, (), 3),
        "b-top-p": Case("b-top-p", short, 16, 64, (), 3, top_p=0.95),
        "c": Case("c", asked, 64, 128, tuple(eos_ids), 1),
        "d": Case("d", long, 64, 256, (), 1),
    }


def figures(lengths, wall, cpu):
    """What one rollout of a case is worth; lengths: of the responses, in tokens."""
    return {"tokens/s": sum(lengths) / wall, "tokens/CPU s": sum(lengths) / cpu, "s": wall,
            "length": statistics.mean(lengths)}  # fmt: skip


def ours(model, case, step=1):
    """(response lengths, seconds, CPU-seconds) of a case."""
    options = dict(max_new_tokens=case.new_tokens, top_p=case.top_p, eos_ids=case.eos_ids or [-1], seed=0,
                   stream="eval", step=step)  # fmt: skip
    rollout, wall, cpu = clocked(generate, model, case.prompts, case.samples, **options)
    return rollout.response_length.tolist(), wall, cpu


# ----------------------------------------------------------------------------------------------------------
# transformers


@dataclass(frozen=True)
class Setting:
    """How transformers' generate is called."""

    attention: str = "sdpa"  # or eager
    cache: str = "dynamic"  # or static
    # or rows: prompts repeated by us; or prefix: a prompt cache filled once, then repeated
    repeat: str = "num_return_sequences"
    rows: int | None = None  # a call; None: all
    threads: int = 1

    def __str__(self):
        rows = self.rows or "all"
        return f"{self.attention}, {self.cache}, {self.repeat}, {rows} rows a call, {self.threads} threads"


class TransformersPeer:
    """transformers' model, and the one way in which we call it."""

    def __init__(self, folder):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.folder, self.models = folder, {}

    def model(self, attention):
        if attention not in self.models:
            load = transformers.AutoModelForCausalLM.from_pretrained
            model = load(self.folder, dtype=torch.float32, attn_implementation=attention).eval()
            model.generation_config = transformers.GenerationConfig()  # no end that we did not ask for
            model.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2, pad_token_id=0)  # warm
            self.models[attention] = model
        return self.models[attention]

    def calls(self, case, setting):
        """The calls that a case is cut into: (prompts, samples of each), all of setting.rows rows."""
        rows = min(setting.rows or case.rows, case.rows)
        if rows < case.samples:
            return [([prompt], rows) for prompt in case.prompts for _ in range(case.samples // rows)]
        count = rows // case.samples
        return [(case.prompts[i : i + count], case.samples) for i in range(0, len(case.prompts), count)]

    @torch.inference_mode()
    def call(self, case, setting, prompts, samples):
        """The response lengths of one call; self.stamps has the time after each token."""
        self.stamps = []
        options = dict(max_new_tokens=case.new_tokens, do_sample=True, temperature=1.0, top_p=case.top_p,
                       top_k=0, pad_token_id=0, eos_token_id=list(case.eos_ids) or None,
                       stopping_criteria=[self.stamp])  # fmt: skip
        if setting.cache == "static":
            options.update(cache_implementation="static", disable_compile=True)
        model, width = self.model(setting.attention), max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])  # [P, T], padded on the left
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        if setting.repeat == "num_return_sequences":
            options["num_return_sequences"] = samples
        if setting.repeat == "prefix":  # all but the last token of each prompt, once
            options["past_key_values"] = cache = transformers.DynamicCache(config=model.config)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
            model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions, past_key_values=cache,
                  logits_to_keep=1)  # fmt: skip
            cache.batch_repeat_interleave(samples)
        if setting.repeat in ("rows", "prefix"):
            ids, mask = ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
        out = model.generate(ids, attention_mask=mask, **options)[:, width:]  # [B, R]
        ended = torch.isin(out, torch.tensor(case.eos_ids, dtype=out.dtype))
        return torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1]).tolist()

    def run(self, case, setting):
        """(response lengths, seconds, CPU-seconds) of a case."""
        calls = self.calls(case, setting)
        lengths, wall, cpu = clocked(lambda: [n for call in calls for n in self.call(case, setting, *call)])
        case.check(lengths)
        return lengths, wall, cpu

    def stamp(self, ids, scores, **_):
        """A stopping criterion that stops nothing, but looks at the clock after every token."""
        self.stamps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    def estimate(self, case, setting, longest):
        """Seconds of the case, by its first call's time to the first token and the median of a few others.

        longest(prompts): the longest response to expect, which is when a call ends.
        """
        torch.set_num_threads(setting.threads)
        calls, tokens = self.calls(case, setting), 13 if case.name == "a" else 7
        began = time.perf_counter()
        self.call(replace(case, new_tokens=tokens, eos_ids=()), setting, *calls[0])
        pace = statistics.median(after - before for before, after in pairwise(self.stamps))
        return sum(self.stamps[0] - began + pace * (longest(prompts) - 1) for prompts, _ in calls)


# The first of a case is tried with every number of threads, the others with the number that was best.
# generate_batch, with its paged cache, was among those of b; on a CPU it does not run with transformers 5.20.
CANDIDATES = {
    "a": [Setting(), Setting(attention="eager"), Setting(cache="static")],
    "b": [Setting(), Setting(attention="eager"), Setting(cache="static"), Setting(repeat="rows"),
          Setting(repeat="prefix"), Setting(repeat="prefix", attention="eager")],
    "c": [Setting(repeat="prefix", rows=64), Setting(repeat="prefix", rows=64, attention="eager"),
          *(Setting(repeat=repeat, rows=rows) for repeat, rows in (("prefix", 128), ("prefix", None),
            ("num_return_sequences", 64), ("num_return_sequences", 128), ("num_return_sequences", None)))],
}  # fmt: skip
CANDIDATES["b-top-p"], CANDIDATES["d"] = CANDIDATES["b"], CANDIDATES["c"]


def screen(peer, case, threads, longest):
    """The fastest settings of the peer: of `generate` alone, and behind a prompt cache filled by hand."""
    tried = {}

    def attempt(setting):
        tried[setting] = peer.estimate(case, setting, longest)
        say(f"  tried  {setting}: {tried[setting]:.1f} s expected")

    first, *others = CANDIDATES[case.name]
    for number in threads:
        attempt(replace(first, threads=number))
    best = min(tried, key=tried.get).threads
    for setting in others:
        attempt(replace(setting, threads=best))
    names = {"generate": False, "generate behind a prefix": True}
    chosen = {}
    for name, prefix in names.items():
        fit = [setting for setting in tried if (setting.repeat == "prefix") == prefix]
        if fit:
            chosen[name] = replace(min(fit, key=tried.get), threads=best)
    return chosen


# ----------------------------------------------------------------------------------------------------------
# the comparison


def compare(case, model, peer, engines, threads, repeats, neighbour):
    """Screen transformers and run all sides in turn: what the table needs.

    peer: a TransformersPeer or None. engines: {name: VllmPeer}.
    """
    say(f"\n{case}")
    settings = screen(peer, case, threads, longest_responses(model, case, threads)) if peer else {}
    threads = settings["generate"].threads if settings else threads[-1]
    torch.set_num_threads(threads)
    sides = {"ours": partial(ours, model)}
    sides.update({name: partial(peer.run, setting=setting) for name, setting in settings.items()})
    sides.update({name: engine.run for name, engine in engines.items()})
    settings.update({name: engine.setting for name, engine in engines.items()})
    for name in ("ours", *engines):
        sides[name](replace(case, new_tokens=2, eos_ids=()))  # warm
    sides = {name: partial(side, case) for name, side in sides.items()}
    if case.top_p < 1:
        sides[WITHOUT_TOP_P] = partial(ours, model, replace(case, top_p=1.0))
    results = medians(sides, repeats)
    if neighbour:
        say("  beside a process that spins")
        with common.spinning():
            beside = medians(sides, repeats)
    for name, result in results.items():
        result["ours is x"] = results["ours"]["tokens/s"] / result["tokens/s"]
        # a shared machine shows in the other
        result["by CPU x"] = results["ours"]["tokens/CPU s"] / result["tokens/CPU s"]
        if neighbour:
            result["kept"] = beside[name]["tokens/s"] / result["tokens/s"]
        result["setting"] = str(settings.get(name, "rollout.generate"))
    return {"case": case.name, "what": str(case), "threads": threads, "sides": results}


def medians(sides, repeats):
    """{name: the median figures of a side} from runs in turn."""
    runs = in_turn({name: partial(shown, name, side) for name, side in sides.items()}, repeats)
    return {name: over(statistics.median, found) for name, found in runs.items()}


def shown(name, action):
    """The figures of a run, printed too."""
    found = figures(*action())
    say(f"  run    {name}: " + ", ".join(f"{value:.1f} {unit}" for unit, value in found.items()))
    return found


def longest_responses(model, case, threads):
    """A function of prompts: the longest response to expect, measured on a quarter of the samples."""
    if not case.eos_ids:
        return lambda prompts: case.new_tokens
    torch.set_num_threads(threads[0])
    lengths, _, _ = ours(model, replace(case, samples=-(-case.samples // 4)), step=2)
    longest = torch.tensor(lengths).view(len(case.prompts), -1).amax(1).tolist()
    say(f"  longest response by question: {longest}")
    by_prompt = dict(zip(map(tuple, case.prompts), longest, strict=True))
    return lambda prompts: max(by_prompt[tuple(prompt)] for prompt in prompts)


# ----------------------------------------------------------------------------------------------------------
# what bounds us


def gemm_peaks(size=2048):
    """FLOP/s of one large square product in fp32, by torch and by us: {name: FLOP/s}."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    products = {"torch.mm": lambda: a @ b}
    if native.can_multiply(a, b):
        products["kernels/cpu"] = lambda: native.product(a, b)
    return {name: 2 * size**3 / seconds_of(product, 1.5) for name, product in products.items()}


def memory_bandwidth(size=1 << 30):
    """Bytes/s of summing `size` bytes (read) and of copying them (read and written, each counted)."""
    source = torch.ones(size // 4)
    target = torch.empty_like(source)
    return size / seconds_of(source.sum, 1.0), 2 * size / seconds_of(lambda: target.copy_(source), 1.0)


def bounds(model, cases, threads, repeats):
    """Peaks of the machine, and what the model's matrices alone and decoding reach of them."""
    torch.set_num_threads(threads)
    say(f"\nbounds, {threads} threads")
    matrices = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(matrix.weight.numel() for matrix in matrices)  # a tied head counts, the embedding does not
    peaks, (read, copy) = gemm_peaks(), memory_bandwidth()
    flops, bandwidth = max(peaks.values()), max(read, copy)
    rows = [[f"2048 x 2048 by {name}", f"{p / 1e9:.1f} GFLOP/s", f"{p / flops:.0%}", ""]
            for name, p in peaks.items()]  # fmt: skip
    rows += [[f"{name} of 1 GiB", f"{rate / 1e9:.1f} GB/s", "", f"{rate / bandwidth:.0%}"]
             for name, rate in (("sum", read), ("copy", copy))]  # fmt: skip
    found = {}
    for count, case in ((64, cases["b"]), (1, cases["a"])):
        seconds = {"the matrices alone": matrices_seconds(matrices, count),
                   "decode": decode_seconds(model, case, repeats)}  # fmt: skip
        for name, each in seconds.items():
            of_product, of_bandwidth = 2 * weights * count / each / flops, 4 * weights / each / bandwidth
            rows.append([f"{name}, {count} rows", f"{1000 * each:.1f} ms", f"{of_product:.0%}",
                         f"{of_bandwidth:.0%}"])  # fmt: skip
        found[count] = {**seconds, "gemm share": of_product, "bandwidth share": of_bandwidth}
    say(table(["one token a row", "", "of the product", "of the bandwidth"], rows))
    say(f"Counted are the matrices, {2 * weights / 1e6:.1f} MFLOP a token and {4 * weights / 1e6:.1f} MB a "
        "step; attention is not. Decode is a long run less a short one.")  # fmt: skip
    return found


def matrices_seconds(matrices, count):
    """Seconds of the model's matrices by themselves, each on `count` rows."""
    inputs = {matrix.in_features: torch.randn(count, matrix.in_features) for matrix in matrices}
    with torch.no_grad():
        return seconds_of(lambda: [matrix(inputs[matrix.in_features]) for matrix in matrices], 3.0)


def decode_seconds(model, case, repeats):
    """Seconds of one decode step: a full run less a run of an eighth of it, by the tokens between."""
    short = replace(case, new_tokens=case.new_tokens // 8)
    sides = {"long": lambda: ours(model, case)[1], "short": lambda: ours(model, short)[1]}
    median = {name: statistics.median(runs) for name, runs in in_turn(sides, repeats).items()}
    return (median["long"] - median["short"]) / (case.new_tokens - short.new_tokens)


# ----------------------------------------------------------------------------------------------------------


def aims_of(result):
    """(what, reached, aim) of a case. Of vLLM's modes the faster counts."""
    case, sides = result["case"], result["sides"]
    engines = [name for name in sides if name.startswith("vllm")]
    best = max(engines, key=lambda name: sides[name]["tokens/s"], default=None)
    aims = []
    for name, found in sides.items():
        if name == "ours" and "kept" in found:
            aims.append(("of ours kept beside a neighbour", found["kept"], AIM_KEPT))
        elif name == WITHOUT_TOP_P:
            aims.append((f"times {name}", found["ours is x"], 1 / (1 + TOP_P_COST)))
        elif name.startswith("generate") and case in AIMS:
            aims.append((f"times {name}", found["ours is x"], AIMS[case]))
        elif name == best:
            aims.append((f"times {name}", found["ours is x"], AIMS_VLLM[case]))
            aims.append((f"times {name} by CPU-seconds", found["by CPU x"], AIMS_VLLM[case]))
    return [(f"({case}) {what}", reached, aim) for what, reached, aim in aims]


def verdicts(compared, bound):
    """Print the aims, and whether they were reached."""
    aims = [aim for result in compared for aim in aims_of(result)]
    if bound:
        aims.append(("bandwidth share at 1 row", bound[1]["bandwidth share"], AIM_BANDWIDTH))
        aims.append(("gemm share at 64 rows", bound[64]["gemm share"], AIM_GEMM))
    for name, reached, aim in aims:
        say(f"{name}: {reached:.2f}, aim {aim:.2f}: {'met' if reached >= aim else 'not met'}")


def compare_all(args, model, folder, cases, threads):
    """compare for every case that is asked for, with the peers that are."""
    peer, engines = TransformersPeer(folder) if "transformers" in args.peers else None, {}
    with ExitStack() as stack:
        if "vllm" in args.peers and args.cases:
            threads = threads[-1:]
            for mode in ("eager", "compiled"):
                engine = VllmPeer(args.vllm, mode, folder, cases.values(), *threads)
                stack.callback(engine.close)
                engines[f"vllm {mode}"] = engine
        return [compare(case, model, peer, engines, threads, args.repeats or case.repeats, args.neighbour)
                for name, case in cases.items() if name in args.cases]  # fmt: skip


def parsed():
    parser = arguments(__doc__, model=None)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=CASES, help=f"[{' '.join(CASES)}]")
    parser.add_argument("--peers", nargs="+", choices=("transformers", "vllm"), default=["transformers"],
                        help="[transformers]")  # fmt: skip
    parser.add_argument("--vllm", type=Path, default=ENVIRONMENT, help=f"environment of vLLM [{ENVIRONMENT}]")
    parser.add_argument("--threads", nargs="+", type=int, help="numbers of threads to try [1, and all cores]")
    parser.add_argument("--repeats", type=int, help="runs of each side [a 5, b 3, b-top-p 3, c 1, d 1]")
    parser.add_argument("--neighbour", action="store_true", help="all runs again beside a process that spins")
    parser.add_argument("--no-bounds", action="store_true", help="only the comparison")
    return parser.parse_args()


def main():
    args = parsed()
    threads = sorted(args.threads or {1, torch.get_num_threads(), len(os.sched_getaffinity(0))})
    folder = model_folder(args.model)
    model, cases = Transformer.from_pretrained(folder), make_cases(folder)
    compared = compare_all(args, model, folder, cases, threads)
    usual = Counter(result["threads"] for result in compared).most_common(1)
    bound = None
    if not args.no_bounds:
        bound = bounds(model, cases, usual[0][0] if usual else threads[0], args.repeats or 3)
    sides = [(result, name, side) for result in compared for name, side in result["sides"].items()]
    rows = [[f"({result['case']}) {name}", result["threads"],
             *(value if isinstance(value, str) else f"{value:.2f}" for value in side.values())]
            for result, name, side in sides]  # fmt: skip
    if rows:
        say("\n" + table(["", "threads", *sides[0][2]], rows))
    verdicts(compared, bound)
    common.last_line(model=folder.name, cases=compared, bounds=bound)


if __name__ == "__main__":
    main()

"""Tokens a second: our sampler against transformers' generate, with the same model, prompts and threads.

    python bench/rollout.py                          # SmolLM2-135M-Instruct, all cases; an hour on one core
    python bench/rollout.py --cases a b --threads 1  # minutes
    python bench/rollout.py --model tiny/model       # the embedded model

    (a) 1 row, a prompt of 64 tokens and 64 new ones
    (b) 4 questions x 16 samples, prompts of 64 tokens, 64 new ones, every row to its full length
    (c) 8 questions x 64 samples in the chat template, up to 128 tokens, as long as the model makes them
    (d) as (b), sampled with top-p 0.95, and beside it (b) once more: what top-p costs

The peer is first screened: attention, cache, the way rows are repeated, rows a call, threads. Of what was
tried the best takes part, twice: as `generate` alone, and as `generate` behind a prompt cache filled by hand
(transformers' recipe for shared prompts), for which the caller has to write what we call prefill. Threads are
those that suit the peer best. Only tokens up to and including a row's end count, on both sides. Then, with
the same threads, what bounds us: the machine's largest product and its memory bandwidth, and what the model's
own matrices reach at 64 rows and at 1.
"""

import argparse
import os
import statistics
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from common import (
    ROOT,
    clocked,
    gemm_peaks,
    in_turn,
    last_line,
    memory_bandwidth,
    model_folder,
    say,
    seconds_of,
    table,
)

import torch  # isort: skip

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
AIMS = {"a": 1.5, "b": 2.0, "c": 4.0, "d": 2.0}  # times the peer's tokens a second
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

    def __str__(self):
        end = "until the model ends" if self.eos_ids else "full length"
        lengths = sorted({len(prompt) for prompt in self.prompts})
        prompt = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else lengths[0]
        return (f"({self.name}) {len(self.prompts)} x {self.samples} rows, prompts of {prompt} tokens, "
                f"{self.new_tokens} new ones, {end}, top-p {self.top_p:g}")  # fmt: skip


def make_cases(folder):
    tokenizer, eos_ids = load_tokenizer(folder)
    text = tokenizer.encode((ROOT / "README.md").read_text(encoding="utf-8"), add_special_tokens=False)
    prompts = [text[start : start + 64] for start in (0, 500, 1000, 1500)]
    asked = [encode_prompt(tokenizer, question, suffix="none") for question in ASKED]
    return {
        "a": Case("a", prompts[:1], 1, 64, (), 5),
        "b": Case("b", prompts, 16, 64, (), 3),
        "c": Case("c", asked, 64, 128, tuple(eos_ids), 1),
        "d": Case("d", prompts, 16, 64, (), 3, top_p=0.95),
    }


@dataclass
class Sample:
    """One rollout of a case, by either side."""

    wall: float
    cpu: float
    lengths: list  # of the responses, in tokens

    @property
    def rate(self):
        return sum(self.lengths) / self.wall


# ----------------------------------------------------------------------------------------------------------
# our side


def ours(model, case, step=1):
    options = dict(
        max_new_tokens=case.new_tokens,
        top_p=case.top_p,
        eos_ids=case.eos_ids or [-1],
        seed=0,
        stream="eval",  # training refuses top-p
        step=step,
    )
    rollout, wall, cpu = clocked(generate, model, case.prompts, case.samples, **options)
    return Sample(wall, cpu, rollout.response_length.tolist())


# ----------------------------------------------------------------------------------------------------------
# the peer


@dataclass(frozen=True)
class Setting:
    """How transformers' generate is called."""

    attention: str = "sdpa"  # or eager
    cache: str = "dynamic"  # or static; paged is generate_batch, transformers' continuous batching
    # or rows: prompts repeated by us; or prefix: a prompt cache filled once, then repeated
    repeat: str = "num_return_sequences"
    rows: int | None = None  # a call; None: all
    threads: int = 1

    def __str__(self):
        rows = self.rows or "all"
        return f"{self.attention}, {self.cache}, {self.repeat}, {rows} rows a call, {self.threads} threads"


class Peer:
    """transformers' model, and the one way in which we call it."""

    def __init__(self, folder):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.library, self.folder, self.stamps, self.paged = transformers, folder, [], None
        self.models = {attention: self.load(attention) for attention in ("sdpa", "eager")}

    def load(self, attention):
        load = self.library.AutoModelForCausalLM.from_pretrained
        model = load(self.folder, dtype=torch.float32, attn_implementation=attention).eval()
        model.generation_config = self.library.GenerationConfig()  # no end that we did not ask for
        model.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2, pad_token_id=0)  # warm
        return model

    def calls(self, case, setting):
        """The calls that a case is cut into: (prompts, samples of each), all of setting.rows rows."""
        rows = min(setting.rows or case.rows, case.rows)
        if rows < case.samples:
            return [([prompt], rows) for prompt in case.prompts for _ in range(case.samples // rows)]
        count = rows // case.samples
        return [(case.prompts[i : i + count], case.samples) for i in range(0, len(case.prompts), count)]

    def call(self, case, setting, prompts, samples):
        """The response lengths of one call; self.stamps has the time after each token, unless paged."""
        self.stamps = []
        options = dict(
            max_new_tokens=case.new_tokens,
            do_sample=True,
            temperature=1.0,
            top_p=case.top_p,
            top_k=0,
            pad_token_id=0,
        )
        if setting.cache == "paged":
            return self.continuous_batching(
                case, [prompt for prompt in prompts for _ in range(samples)], options
            )
        options["eos_token_id"] = list(case.eos_ids) or None
        if setting.cache == "static":
            options.update(cache_implementation="static", disable_compile=True)
        return self.generate(case, setting, prompts, samples, options)

    def continuous_batching(self, case, prompts, options):
        if self.paged is None:  # a model of its own, for it changes the attention
            self.paged = self.load("sdpa")
        config = self.library.GenerationConfig(**options, eos_token_id=list(case.eos_ids) or -1)
        outputs = self.paged.generate_batch(prompts, generation_config=config, progress_bar=False)
        return [len(output.generated_tokens) for output in outputs.values()]

    @torch.inference_mode()
    def generate(self, case, setting, prompts, samples, options):
        model = self.models[setting.attention]
        width = max(map(len, prompts))
        ids = torch.tensor(
            [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        )  # [P, T], padded on the left
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        if setting.repeat == "num_return_sequences":
            options["num_return_sequences"] = samples
        if setting.repeat == "prefix":  # all but the last token of each prompt, once
            options["past_key_values"] = cache = self.library.DynamicCache(config=model.config)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
            model(
                ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            )
            cache.batch_repeat_interleave(samples)
        if setting.repeat in ("rows", "prefix"):
            ids, mask = ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
        out = model.generate(ids, attention_mask=mask, stopping_criteria=[self.stamp], **options)[
            :, width:
        ]  # [B, R]
        ended = torch.isin(out, torch.tensor(case.eos_ids, dtype=out.dtype))
        return torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1]).tolist()

    def stamp(self, ids, scores, **_):
        """A stopping criterion that stops nothing, but looks at the clock after every token."""
        self.stamps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    def run(self, case, setting):
        torch.set_num_threads(setting.threads)
        calls = self.calls(case, setting)
        lengths, wall, cpu = clocked(
            lambda: [length for call in calls for length in self.call(case, setting, *call)]
        )
        assert len(lengths) == case.rows and (case.eos_ids or set(lengths) == {case.new_tokens}), (
            "rows or tokens are missing"
        )
        return Sample(wall, cpu, lengths)

    def estimate(self, case, setting, longest, tokens):
        """Seconds of the case, from the first token's time in its first call and the median of a few others.

        longest(n): the longest response of n samples, which is when a call ends; one number a call.
        """
        torch.set_num_threads(setting.threads)
        calls = self.calls(case, setting)
        few = replace(case, new_tokens=tokens, eos_ids=())
        if (
            setting.cache == "paged"
        ):  # lets nobody look at a clock: the difference of two runs, behind one that warms
            _, short, long = (
                clocked(self.call, replace(few, new_tokens=n), setting, *calls[0])[1] for n in (2, 2, tokens)
            )
            first, pace = short, max(long - short, 0) / (tokens - 2)
        else:
            began = time.perf_counter()
            self.call(few, setting, *calls[0])
            first = self.stamps[0] - began
            pace = statistics.median(
                after - before for before, after in zip(self.stamps, self.stamps[1:], strict=False)
            )
        return sum(first + pace * (longest(prompts) - 1) for prompts, _ in calls)


# the first of a case is tried with every number of threads, the others with the number that was best
CANDIDATES = {
    "a": [Setting(), Setting(attention="eager"), Setting(cache="static")],
    "b": [Setting(), Setting(attention="eager"), Setting(cache="static"), Setting(repeat="rows"),
          Setting(cache="paged"), Setting(repeat="prefix"), Setting(repeat="prefix", attention="eager")],
    "c": [Setting(repeat="prefix", rows=64), Setting(repeat="prefix", rows=64, attention="eager"),
          *(Setting(repeat=repeat, rows=rows) for repeat, rows in (("prefix", 128), ("prefix", None),
            ("num_return_sequences", 64), ("num_return_sequences", 128), ("num_return_sequences", None)))],
}  # fmt: skip
CANDIDATES["d"] = CANDIDATES["b"]


def screen(peer, case, threads, longest):
    """Try the settings of a case on a few tokens and print each: [(setting, expected seconds)]."""

    def attempt(setting):
        seconds = peer.estimate(case, setting, longest, tokens=13 if case.name == "a" else 7)
        say(f"  tried  {setting}: {seconds:.1f} s expected")
        return setting, seconds

    first, *others = CANDIDATES[case.name]
    tried = [attempt(replace(first, threads=number)) for number in threads]
    number = min(tried, key=expected)[0].threads
    return tried + [attempt(replace(setting, threads=number)) for setting in others]


def expected(attempt):
    return attempt[1]


# ----------------------------------------------------------------------------------------------------------
# the comparison


def compare(case, model, peer, threads, repeats):
    """Screen the peer, run both sides in turn, and return what the table and the last line need."""
    say(f"\n{case}")
    tried = screen(peer, case, threads, longest_responses(model, case, threads))
    settings = best_settings(case, tried)
    threads = settings["generate"].threads

    def our_turn(case=case):
        torch.set_num_threads(threads)
        return ours(model, case)

    torch.set_num_threads(threads)
    ours(model, replace(case, new_tokens=2))  # warm
    sides = {"ours": shown("ours", our_turn)}
    if case.top_p < 1:
        sides[WITHOUT_TOP_P] = shown(WITHOUT_TOP_P, partial(our_turn, replace(case, top_p=1.0)))
    for name, setting in settings.items():
        sides[name] = shown(name, partial(peer.run, case, setting))
    runs = in_turn(sides, repeats or case.repeats)
    results = {name: summary(samples) for name, samples in runs.items()}
    for name, result in results.items():
        result["times_peer"] = results["ours"]["rate"] / result["rate"]
        # a shared machine shows in the other ratio
        result["times_peer_cpu"] = result["cpu_s"] / results["ours"]["cpu_s"]
        result["setting"] = str(settings.get(name, "rollout.generate"))
    screened = [{"setting": str(setting), "expected_s": seconds} for setting, seconds in tried]
    return {"case": case.name, "what": str(case), "threads": threads, "sides": results, "tried": screened}


def best_settings(case, tried):
    """The fastest settings of the peer: of `generate` alone, and behind a prompt cache filled by hand."""
    plain = min((attempt for attempt in tried if attempt[0].repeat != "prefix"), key=expected)[0]
    if case.name == "a":
        return {"generate": plain}
    prefix = min((attempt for attempt in tried if attempt[0].repeat == "prefix"), key=expected)[0]
    assert prefix.threads == plain.threads
    return {"generate": plain, "generate behind a prefix": prefix}


def shown(name, action):
    """The action of a side, which also prints its rate and times."""

    def run():
        sample = action()
        say(f"  run    {name}: {sample.rate:.1f} tokens/s, {sample.wall:.1f} s, {sample.cpu:.1f} CPU-seconds")
        return sample

    return run


def longest_responses(model, case, threads):
    """A function of prompts: the longest response to expect, measured on a quarter of the samples."""
    if not case.eos_ids:
        return lambda prompts: case.new_tokens
    torch.set_num_threads(threads[0])
    few = replace(case, samples=-(-case.samples // 4))
    lengths = torch.tensor(ours(model, few, step=2).lengths).view(len(case.prompts), -1)
    say(f"  lengths by question, mean {[round(x, 1) for x in lengths.float().mean(1).tolist()]}, "
        f"longest {lengths.amax(1).tolist()}")  # fmt: skip
    longest = dict(zip(map(tuple, case.prompts), lengths.amax(1).tolist(), strict=True))
    return lambda prompts: max(longest[tuple(prompt)] for prompt in prompts)


def summary(samples):
    lengths = [length for sample in samples for length in sample.lengths]
    return {
        "rate": statistics.median(sample.rate for sample in samples),
        "wall_s": statistics.median(sample.wall for sample in samples),
        "cpu_s": statistics.median(sample.cpu for sample in samples),
        "mean_length": statistics.mean(lengths),
        "runs": [sample.rate for sample in samples],
    }


# ----------------------------------------------------------------------------------------------------------
# what bounds us


def bounds(model, cases, threads, repeats):
    """Peaks of the machine, and what the model's matrices alone and decoding reach of them."""
    torch.set_num_threads(threads)
    say(f"\nbounds, {threads} threads")
    matrices = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(matrix.weight.numel() for matrix in matrices)  # a tied head counts, the embedding does not
    peaks, (read, copy) = gemm_peaks(), memory_bandwidth()
    flops, bandwidth = max(peaks.values()), max(read, copy)
    result = {"threads": threads, "gemm_flops": peaks, "read_bytes_s": read, "copy_bytes_s": copy,
              "matrix_weights": weights}  # fmt: skip
    rows = []
    for name, peak in peaks.items():
        rows.append([f"2048 x 2048 by {name}", f"{peak / 1e9:.1f} GFLOP/s", f"{peak / flops:.0%}", ""])
    rows.append(["sum of 1 GiB", f"{read / 1e9:.1f} GB/s", "", "100 %"])
    rows.append(["copy of 1 GiB", f"{copy / 1e9:.1f} GB/s", "", f"{copy / read:.0%}"])
    for count, case in ((64, cases["b"]), (1, cases["a"])):
        alone, decode = matrices_seconds(matrices, count), decode_seconds(model, case, repeats)
        for name, seconds in (("the matrices alone", alone), ("decode", decode)):
            of_product, of_bandwidth = (
                2 * weights * count / seconds / flops,
                4 * weights / seconds / bandwidth,
            )
            shares = [f"{of_product:.0%}", f"{of_bandwidth:.0%}"]
            rows.append([f"{name}, {count} rows", f"{1000 * seconds:.1f} ms", *shares])
        result[f"rows_{count}"] = {"matrices_s": alone, "decode_s": decode, "gemm_share": of_product,
                                   "bandwidth_share": of_bandwidth}  # fmt: skip
    say(table(["one token a row", "", "of the product", "of the bandwidth"], rows))
    result["attention_flops_a_token"] = uncounted(model.config, cases["b"], weights)
    return result


def matrices_seconds(matrices, count):
    """Seconds of the model's matrices by themselves, each on `count` rows."""
    inputs = {matrix.in_features: torch.randn(count, matrix.in_features) for matrix in matrices}
    with torch.no_grad():
        return seconds_of(lambda: [matrix(inputs[matrix.in_features]) for matrix in matrices], 3.0)


def uncounted(config, case, weights):
    """FLOPs a token of attention, which the shares leave out; a sentence says so."""
    context = len(case.prompts[0]) + case.new_tokens // 2
    attention = 4 * config.layers * config.heads * config.head_dim * context
    say(f"Counted are the matrices, {2 * weights / 1e6:.1f} MFLOP a token and {4 * weights / 1e6:.1f} MB a "
        f"step; attention is not, {attention / 1e6:.1f} MFLOP a token at {context} tokens. "
        "Decode is a long run less a short one.")  # fmt: skip
    return attention


def decode_seconds(model, case, repeats):
    """Seconds of one decode step: a full run less a run of an eighth of it, by the tokens between."""
    short = replace(case, new_tokens=case.new_tokens // 8)
    runs = in_turn(
        {"long": lambda: ours(model, case).wall, "short": lambda: ours(model, short).wall}, repeats or 3
    )
    long, short_s = statistics.median(runs["long"]), statistics.median(runs["short"])
    say(f"  run    decode of {case.rows} rows: {long:.2f} s less {short_s:.2f} s")
    return (long - short_s) / (case.new_tokens - short.new_tokens)


def verdicts(compared, bound):
    """The aims, and whether they were reached."""
    lines = []
    for result in compared:
        name, sides = result["case"], result["sides"]
        for side in list(sides)[1:]:
            reached, aim = sides[side]["times_peer"], AIMS[name]
            if side == WITHOUT_TOP_P:
                aim = 1 / (1 + TOP_P_COST)
            met = "met" if reached >= aim else "not met"
            lines.append(f"({name}) aim {aim:.2g} x {side}: {reached:.2f} x, {met}")
    if bound:
        for rows, share, aim in ((1, "bandwidth_share", AIM_BANDWIDTH), (64, "gemm_share", AIM_GEMM)):
            value = bound[f"rows_{rows}"][share]
            lines.append(f"aim {aim:.0%} {share.replace('_', ' ')} at {rows} rows: {value:.0%}, "
                         f"{'met' if value >= aim else 'not met'}")  # fmt: skip
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="*", choices=list("abcd"), default=list("abcd"), help="[a b c d]")
    parser.add_argument(
        "--model", type=Path, help="a folder in Hugging Face format [SmolLM2-135M-Instruct, fetched]"
    )
    parser.add_argument("--threads", nargs="+", type=int, help="numbers of threads to try [1, and all cores]")
    parser.add_argument("--repeats", type=int, help="runs of each side [a 5, b 3, c 1, d 3]")
    parser.add_argument("--no-bounds", action="store_true", help="only the comparison")
    args = parser.parse_args()
    threads = args.threads or sorted({1, torch.get_num_threads(), len(os.sched_getaffinity(0))})
    folder, began = model_folder(args.model), time.monotonic()
    model, peer, cases = Transformer.from_pretrained(folder), Peer(folder), make_cases(folder)
    say(f"model    {folder}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, fp32")

    compared = [compare(cases[name], model, peer, threads, args.repeats) for name in args.cases]
    usual = Counter(result["threads"] for result in compared).most_common(1)[0][0] if compared else threads[0]
    bound = None if args.no_bounds else bounds(model, cases, usual, args.repeats)
    rows = [[f"({result['case']}) {name}", result["threads"], f"{side['rate']:.1f}", f"{side['wall_s']:.1f}",
             f"{side['cpu_s']:.1f}", f"{side['mean_length']:.1f}", f"{side['times_peer']:.2f}",
             f"{side['times_peer_cpu']:.2f}", side["setting"]]
            for result in compared for name, side in result["sides"].items()]  # fmt: skip
    if rows:
        say(
            "\n"
            + table(
                ["", "threads", "tokens/s", "seconds", "CPU-s", "length", "ours is x", "by CPU x", "setting"],
                rows,
            )
        )
    say("\n" + verdicts(compared, bound))
    last_line("rollout", model=folder.name, seconds=time.monotonic() - began, cases=compared, bounds=bound)


if __name__ == "__main__":
    main()

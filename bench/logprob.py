"""Time and memory of linear_logprob beside the plain formula, forward and backward, on a CPU.

    python bench/logprob.py                    # SmolLM2-135M's head, 2,048 tokens; 3 minutes
    python bench/logprob.py --tokens 64 --vocabulary 1000 --rounds 1       # does it run?

naive     log_softmax of all logits, which also returns the entropy, for the metrics, as linear_logprob does
logprob   the same without the entropy
chunked   linear_logprob

The loss is the sum of the log-probabilities. Every measurement is a process of its own, and the variants take
turns, so that a busy machine slows all of them. The first step gives the memory, the second the time; of the
rounds the least is shown, the one least disturbed. Peak is the most memory held above what was there before
the step (the inputs), with the gradients that the step returns; above is the peak without these.
"""

import json

from common import arguments, clocked, forget_peak, in_a_process, in_turn, last_line, over, say, status, table

import torch  # isort: skip

from kernels import logprob  # isort: skip


def naive(hidden, weight, targets):
    logp = (hidden @ weight.T).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def logprob_alone(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0], None


VARIANTS = {"naive": naive, "logprob": logprob_alone, "chunked": logprob.linear_logprob}


def measure(variant, args):
    """One process's work: seconds of both kinds, bytes."""
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(args.tokens, args.width, generator=generator)
    weight = torch.randn(args.vocabulary, args.width, generator=generator).mul_(args.width**-0.5)
    targets = torch.randint(args.vocabulary, (args.tokens,), generator=generator)

    def step(hidden, weight, targets):
        VARIANTS[variant](hidden, weight, targets)[0].sum().backward()

    few = [x[:64].clone().requires_grad_() for x in (hidden, weight)]
    step(*few, targets[:64] % 64)  # loads the libraries
    hidden.requires_grad_(), weight.requires_grad_()
    before = status("VmRSS")
    forget_peak()
    step(hidden, weight, targets)
    peak = status("VmHWM") - before
    gradients = hidden.grad.nbytes + weight.grad.nbytes
    hidden.grad = weight.grad = None
    _, wall, cpu = clocked(step, hidden, weight, targets)
    return {"s": wall, "CPU s": cpu, "peak MB": peak / 1e6, "above MB": (peak - gradients) / 1e6}


def main():
    parser = arguments(__doc__, tokens=2048, width=576, vocabulary=49152, threads=1, rounds=3)
    args = parser.parse_args()
    if args.child:
        return print(json.dumps(measure(args.child["variant"], args)))
    turns = {name: lambda name=name: in_a_process(threads=args.threads, variant=name) for name in VARIANTS}
    results = {name: over(min, runs) for name, runs in in_turn(turns, args.rounds).items()}
    say(f"{args.tokens} tokens, width {args.width}, vocabulary {args.vocabulary}, {args.threads} threads")
    rows = []
    for name, row in results.items():
        pairs = [(f"{row[key]:.3f}", f"{row[key] / results['naive'][key]:.4f}") for key in row]
        rows.append([name, *(cell for pair in pairs for cell in pair)])
    say(table(["", *(cell for key in results["naive"] for cell in (key, "/ naive"))], rows))
    last_line(**{name: value for name, value in vars(args).items() if name != "child"}, results=results)


if __name__ == "__main__":
    main()

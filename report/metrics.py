"""What is measured: of responses, of votes and their truth, and of learning.

True answers are read here and nowhere else (but for --reward gold): training cannot look at them by accident.
"""

import math
import time
from collections import Counter

import torch
import torch.distributed as dist

import grading
from distributed.ranks import all_reduce

# -----------------------------------------------------------------------------------------------------------
# responses and votes


def standard_error(values):
    """The standard error of the mean of independent values, variance with ddof 1; 0 for a single value.

    >>> round(standard_error([0.0, 1.0, 1.0, 0.0]), 4)
    0.2887
    """
    if len(values) < 2:
        return 0.0
    center = mean(values)
    return math.sqrt(sum((v - center) ** 2 for v in values) / (len(values) - 1) / len(values))


def describe(groups):
    """Metrics of responses that need neither a vote nor a true answer."""
    flat = [response for group in groups for response in group]
    return {
        "response_tokens": mean(len(r.tokens) for r in flat),
        "truncated": mean(not r.finished for r in flat),
        "no_answer": mean(r.answer is None for r in flat),
    }


def reward_accuracy(right, agreeing):
    """The share of responses whose reward by the vote equals their reward by the true answer.

    It may be high under a wrong label, the paper's "lucky hit": a wrong answer that differs from the wrong
    label gets the 0 that it deserves.

    right: 1 or 0 for each response, its reward by the true answer. agreeing: the indices of the responses in
    the majority, which the vote rewards with 1, and all others with 0.

    >>> reward_accuracy([0.0, 0.0, 1.0, 0.0], agreeing=[0, 1])  # answers 4 4 7 9, truth 7: only the 9 agrees
    0.25
    """
    return mean((index in agreeing) == bool(r) for index, r in enumerate(right))


def is_right(question, answer):
    """Whether an answer equals the true one; None never does."""
    return answer is not None and grading.same_answer(question.answer, answer, question.kind)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def grade(question, responses, voted):
    """The record of one question, from its responses and their vote (label, classes).

    A response is "right" if it equals the true answer. Metrics describe the vote, whatever the reward is.
    """
    label, classes = voted
    agreeing = grading.majority(classes)
    typical = responses[agreeing[0] if agreeing else 0]
    record = {"id": question.id, "prompt": question.prompt, "kind": question.kind, "truth": question.answer}
    record.update(response=typical.text, answer=typical.answer)
    record.update(answers=[response.answer for response in responses], majority=label)
    record.update(majority_ratio=len(agreeing) / len(responses))
    record["distinct_answers"] = len(classes)
    if question.answer is not None:
        right = [float(is_right(question, response.answer)) for response in responses]
        record.update({"right": right, "pass@1": mean(right), "any_right": any(right)})
        record["majority_right"] = is_right(question, label)
        record["reward_accuracy"] = reward_accuracy(right, agreeing)
    return record


def of_votes(records):
    """Means of what a vote alone tells: how many agree with it, and how many different answers there are."""
    return {name: mean(record[name] for record in records) for name in ("majority_ratio", "distinct_answers")}


def training_metrics(records, votes):
    """Metrics of a step's vote from its records, by their names in training; see `evaluation_metrics`."""
    metrics = of_votes(records)
    known = [record for record in records if record["truth"] is not None]
    names = {"ground_truth_ratio": "pass@1", "label_accuracy": "majority_right",
             "reward_accuracy": "reward_accuracy", f"pass@{votes}": "any_right"}  # fmt: skip
    return {
        **metrics,
        **{name: mean(record[field] for record in known) for name, field in names.items() if known},
    }


def compared_with_last(records, last):
    """Metrics of the questions that were asked before, from a step's records; {} if there are none.

    last: {question id: label of its last vote}, brought up to date here. flip_rate is the share of questions
    whose label changed, by value and not by spelling. locked_wrong is the share of those with a known answer
    whose label is wrong, and the same wrong one as last time. To have no label is one value of a label, but
    never a wrong one.
    """
    again = [(record, unchanged(record, last[record["id"]])) for record in records if record["id"] in last]
    last.update({record["id"]: record["majority"] for record in records})
    metrics = {"flip_rate": mean(not same for _, same in again)} if again else {}
    known = [(record, same) for record, same in again if record["truth"] is not None]
    if known:
        metrics["locked_wrong"] = mean(
            same and record["majority"] is not None and not record["majority_right"] for record, same in known
        )
    return metrics


def unchanged(record, label):
    """Whether the majority of a record equals an earlier label of its question; None equals None alone."""
    if label is None or record["majority"] is None:
        return label is record["majority"]
    return grading.same_answer(label, record["majority"], record["kind"])


def evaluation_metrics(records, samples):
    """Metrics of an evaluation from its records. Those that need the truth count questions that have one.

    pass@1 is the mean over samples (the paper's avg@16). Its standard error is clustered by question, since
    the questions vary, not the samples of one question. maj@N is the plain vote over the N samples, pass@N
    whether any of them is right.
    """
    metrics = of_votes(records)
    known = [record for record in records if record["truth"] is not None]
    if known:
        each = [record["pass@1"] for record in known]
        metrics.update({"pass@1": mean(each), "pass@1_se": standard_error(each)})
    if known and samples > 1:
        metrics[f"maj@{samples}"] = mean(record["majority_right"] for record in known)
        metrics[f"pass@{samples}"] = mean(record["any_right"] for record in known)
    return metrics


# ----------------------------------------------------------------------------------------------------------
# learning


class Stopwatch:
    """Seconds that the stages of a step take: lap(name) ends a stage."""

    def __init__(self):
        self.last, self.seconds = time.perf_counter(), {}

    def lap(self, name):
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now

    def metrics(self):
        return {f"seconds_{name}": seconds for name, seconds in self.seconds.items()}


class Tally:
    """What the updates of a step report: sums over this rank's tokens, on the device until `metrics`."""

    def __init__(self, device):
        self.sums = Counter()  # over all micro-batches
        self.gaps = (
            Counter()
        )  # sampler against learner: over those before the first update, while both are one
        self.gap_max = torch.zeros((), device=device)
        self.norms, self.skipped = [], 0

    def add(self, sums, difference, entropy, mask):
        """Note a micro-batch: sums by grpo_loss, difference of log-probabilities and entropy [B, R]."""
        tokens = mask.sum()
        self.sums.update({**sums, "tokens": tokens, "entropy": torch.where(mask, entropy, 0.0).sum()})
        if not self.norms:
            gap = torch.where(mask, difference, 0.0).abs()
            self.gaps.update(gap=gap.sum(), tokens=tokens)
            self.gap_max = torch.maximum(self.gap_max, gap.max())

    def metrics(self):
        """Means over all ranks' tokens; only the counts of updates if no mini-batch had anything to learn."""
        counts = {"updates": len(self.norms), "skipped_updates": self.skipped}
        if not self.sums:
            return counts
        gap_max, gap, gap_tokens, *values = to_host(
            self.gap_max, self.gaps["gap"], self.gaps["tokens"], *self.sums.values()
        )
        sums = dict(zip(self.sums, values, strict=True))
        sums = all_reduce({**sums, "gap": gap, "gap_tokens": gap_tokens})
        tokens, gap_tokens = sums.pop("tokens"), sums.pop("gap_tokens")
        metrics = {"logprob_gap": sums.pop("gap") / gap_tokens}
        metrics["logprob_gap_max"] = all_reduce({"max": gap_max}, dist.ReduceOp.MAX)["max"]
        metrics.update({name: value / tokens for name, value in sums.items()})  # entropy, clip_fraction, ...
        if self.norms:
            metrics.update(grad_norm=mean(self.norms), grad_norm_max=max(self.norms))
        return {**metrics, **counts, "trained_tokens": tokens}


def to_host(*numbers):
    """Numbers on the device as floats: one wait for all of them."""
    return torch.stack([number.double() for number in numbers]).tolist()

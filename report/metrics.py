"""Metrics of votes, responses, training and the machine.

Except with --reward gold, no reward or gradient reads a true answer: they are graded here.
"""

import math
import platform
import resource
import time
from collections import Counter

import torch
import torch.distributed as dist

import grading
from distributed.ranks import all_reduce
from kernels.packing import to_host

# -----------------------------------------------------------------------------------------------------------
# responses and votes


def standard_error(values):
    """The standard error of the mean of independent values (ddof 1); 0 for a single value.

    >>> round(standard_error([0.0, 1.0, 1.0, 0.0]), 4)
    0.2887
    """
    if len(values) < 2:
        return 0.0
    center = mean(values)
    return math.sqrt(sum((v - center) ** 2 for v in values) / (len(values) - 1) / len(values))


def reward_accuracy(right, agreeing):
    """The share of responses whose reward by the vote equals their reward by the true answer.

    It can be high even if the label is wrong, the paper's "lucky hit": a wrong answer that differs from the
    label rightly gets 0.

    right: each response's reward by the true answer, 1 or 0. agreeing: indices of the responses in the
    majority, which the vote rewards with 1; the others get 0.

    >>> reward_accuracy([0.0, 0.0, 1.0, 0.0], agreeing=[0, 1])  # answers 4 4 7 9, truth 7: only the 9 agrees
    0.25
    """
    return mean((index in agreeing) == bool(r) for index, r in enumerate(right))


def reward_auc(right, rewards):
    """The probability that a right response has a higher reward than a wrong one, ties counting one half.

    right: each response's reward by the true answer, 1 or 0. 0.5 says that the reward cannot tell them apart.
    nan if all are right or all wrong, or if a reward is.

    >>> reward_auc([1.0, 1.0, 0.0], rewards=[-0.1, -0.3, -0.3])
    0.75
    """
    if not all(map(math.isfinite, rewards)):
        return math.nan
    above = [reward for r, reward in zip(right, rewards, strict=True) if r]
    below = [reward for r, reward in zip(right, rewards, strict=True) if not r]
    wins = sum((a > b) + (a == b) / 2 for a in above for b in below)
    return wins / (len(above) * len(below)) if above and below else math.nan


def is_right(question, answer):
    """Whether an answer equals the true one; None never does."""
    return answer is not None and grading.same_answer(question.answer, answer, question.kind)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def grade(group):
    """The record of one question, from its responses and their vote (a rewards.Group).

    A response is "right" if its answer equals the true one. The metrics describe the vote under any --reward.
    """
    question, majority = group.question, grading.majority(group.classes)
    typical = group.responses[majority[0] if majority else 0]
    record = {"id": question.id, "prompt": question.prompt, "kind": question.kind, "truth": question.answer,
              "response": typical.text, "answer": typical.answer, "answers": group.answers,
              "majority": group.label, "majority_ratio": len(majority) / len(group.answers),
              "distinct_answers": len(group.classes)}  # fmt: skip
    if question.answer is not None:
        right = [float(is_right(question, answer)) for answer in group.answers]
        record.update({"right": right, "pass@1": mean(right), "any_right": any(right)})
        record["majority_right"] = is_right(question, group.label)
        record["reward_accuracy"] = reward_accuracy(right, majority)
    return record


def means(records, fields):
    """{metric: mean over the records that have its field}, for fields {metric: field}."""
    values = {
        name: [record[field] for record in records if field in record] for name, field in fields.items()
    }
    return {name: mean(found) for name, found in values.items() if found}


OF_VOTES = {"majority_ratio": "majority_ratio", "distinct_answers": "distinct_answers"}


def of_responses(groups):
    """Metrics of responses that need no vote and no true answer."""
    flat = [response for group in groups for response in group.responses]
    return {
        "response_tokens": mean(len(response.tokens) for response in flat),
        "truncated": mean(not response.finished for response in flat),
        "no_answer": mean(response.answer is None for response in flat),
    }


def of_training(groups, rewards, trained, last_labels):
    """Metrics of a training step's votes and rewards [P][N]; {} without groups (on all ranks except 0).

    trained: M, the number of responses per group to train on. last_labels: see `compared_with_last`.
    """
    if not groups:
        return {}
    records = [grade(group) for group in groups]
    learned = torch.tensor(rewards).tolist()  # in fp32, where differences may vanish
    fields = {**OF_VOTES, "ground_truth_ratio": "pass@1", "label_accuracy": "majority_right",
              "reward_accuracy": "reward_accuracy", f"pass@{len(rewards[0])}": "any_right"}  # fmt: skip
    metrics = {**means(records, fields), **of_responses(groups), **compared_with_last(records, last_labels)}
    graded = [(r["right"], row) for r, row in zip(records, learned, strict=True) if "right" in r]
    told_apart = [auc for auc in (reward_auc(*pair) for pair in graded) if not math.isnan(auc)]
    metrics.update({"reward_auc": mean(told_apart)} if told_apart else {})
    metrics["most_common_label"] = most_common_label(last_labels)[1]
    metrics["reward"] = mean(map(mean, rewards))
    metrics["zero_variance_groups"] = mean(len(set(row[:trained])) == 1 for row in learned)
    return metrics


def compared_with_last(records, last):
    """Metrics of the questions that were asked before, from a step's records; {} if there are none.

    last: {question id: label of its last vote}, updated in place. flip_rate is the share of questions whose
    label changed in value, not only in spelling. locked_wrong is the share, among questions with a known
    answer, whose label is wrong and the same as last time. None is a label like any other, but never wrong.
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


def most_common_label(labels):
    """The label of most questions, by spelling, and the share of all that have it: {question id: label}.

    >>> most_common_label({"a": "7", "b": "7", "c": None, "d": "9"})
    ('7', 0.5)
    """
    counts = Counter(label for label in labels.values() if label is not None)
    label, count = max(counts.items(), key=lambda item: item[1], default=(None, 0))
    return label, count / max(1, len(labels))


def unchanged(record, label):
    """Whether the majority of a record equals an earlier label of its question; None equals only None."""
    if label is None or record["majority"] is None:
        return label is record["majority"]
    return grading.same_answer(label, record["majority"], record["kind"])


def of_evaluation(groups):
    """(metrics, a record per question) of an evaluation; ({}, []) on all ranks except 0.

    groups: {name: groups}; the first is the evaluation itself, the others, at other temperatures, report only
    pass@1. Metrics that need true answers average over the questions that have one. pass@1 is the mean over
    samples (the paper's avg@16); its standard error is clustered by question, since the samples of a question
    are not independent. maj@N is the vote over the N samples, pass@N whether any of them is right.
    """
    own = next(iter(groups.values()))
    records = [grade(group) for group in own]
    if not records:
        return {}, []
    metrics, n = means(records, OF_VOTES), len(records[0]["answers"])
    add_accuracy(metrics, records, "pass@1")
    if n > 1:
        metrics.update(means(records, {f"maj@{n}": "majority_right", f"pass@{n}": "any_right"}))
    metrics.update(of_responses(own))
    for name, other in list(groups.items())[1:]:
        for record, group in zip(records, other, strict=True):
            if record["truth"] is not None:
                record[name] = grade(group)["pass@1"]
        add_accuracy(metrics, records, name)
    return metrics, records


def add_accuracy(metrics, records, name):
    """Add the mean of a field of the records and its standard error, if any record has the field."""
    values = [record[name] for record in records if name in record]
    if values:
        metrics.update({name: mean(values), f"{name}_se": standard_error(values)})


# ----------------------------------------------------------------------------------------------------------
# learning


class Stopwatch:
    """Wall-clock seconds, total and by stage; lap(name) ends a stage. before: those of earlier processes."""

    def __init__(self, before=0.0):
        self.start = self.last = time.perf_counter()
        self.before, self.seconds = before, {}

    def lap(self, name):
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now

    def minutes(self):
        """Minutes since the start, without `before`."""
        return (time.perf_counter() - self.start) / 60

    def total(self):
        return self.before + time.perf_counter() - self.start


def of_machine(groups, watch, trained_tokens):
    """Speed and memory of a step, from the groups on rank 0 and the trained tokens of all ranks."""
    metrics = {f"seconds_{name}": seconds for name, seconds in watch.seconds.items()}
    metrics["peak_memory_gb"] = peak_memory_gb()
    metrics["grading_timeouts"] = grading.grading_timeouts
    metrics["train_tokens_per_s"] = trained_tokens / watch.seconds["learning"]
    sampled = sum(len(response.tokens) for group in groups for response in group.responses)
    metrics["rollout_tokens_per_s"] = sampled / watch.seconds["sampling"]
    return metrics


def peak_memory_gb():
    """Peak memory: allocated by torch on the GPU, or used by this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Tally:
    """Accumulates the metrics of a step's updates: sums over this rank's tokens, on the device until read."""

    def __init__(self, device):
        self.sums = Counter()  # over all micro-batches
        # Sampler against learner: only before the first update, while both have the same weights.
        self.gaps = Counter()
        self.gap_max = torch.zeros((), device=device)
        self.norms, self.learning_rate, self.skipped = [], None, 0

    def updated(self, norm, learning_rate):
        """Record an update of the weights."""
        self.norms.append(norm)
        self.learning_rate = learning_rate

    def add(self, sums, difference, entropy, mask):
        """Record a micro-batch: sums of grpo_loss, difference of log-probabilities and entropy [B, R]."""
        tokens = mask.sum()
        self.sums.update({**sums, "tokens": tokens, "entropy": torch.where(mask, entropy, 0.0).sum()})
        if not self.norms:
            gap = torch.where(mask, difference, 0.0).abs()
            self.gaps.update(gap=gap.sum(), tokens=tokens)
            self.gap_max = torch.maximum(self.gap_max, gap.max())

    def metrics(self):
        """Means over the tokens of all ranks; only the counts of updates if there was nothing to learn."""
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
            metrics.update(grad_norm=mean(self.norms), grad_norm_max=max(self.norms), lr=self.learning_rate)
        return {**metrics, **counts, "trained_tokens": tokens}

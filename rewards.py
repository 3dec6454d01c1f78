"""The rewards of TTRL's critics and successors, for --reward. TTRL's own is ttrl.vote_reward.

    soft                 the share of the votes that an answer has           EMPO, arXiv 2504.05812
    selective            the majority if it is clear, against rare answers   SCRL, arXiv 2603.19880
    novel                the majority, and in it what differs most           EVOL-RL, arXiv 2509.15194
    trajectory_entropy   the mean log-probability of the tokens              EM-RL, arXiv 2505.15134
    probability          the probability of the response                     RLSC, arXiv 2506.06395
    token_entropy        minus the mean entropy of the policy                EM-RL; RENT, arXiv 2505.22660
    self_certainty       the mean distance of the policy from uniform        Intuitor, arXiv 2505.19590

Each is that paper's method reduced to the reward; everything else in a step stays TTRL's, so a comparison
changes one thing. TTRL's sequel (arXiv 2603.08660) compares the last four. Its code, too, takes a mean over
the tokens of a response, and gives it to the last token; but there the trainer recomputes the
log-probabilities, and here the sampler's are used. To add a reward, write a function of a Group that returns
a number per answer, and name it in OTHER_REWARDS, which ttrl.REWARDS includes. A reward must not read the
true answer, question.answer. Metrics describe the hard vote whatever the reward is.

The advantage is computed from the rewards of the first M of the N responses (`advantages` in ttrl.py). The
examples give the advantages for N = M = 8.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distributed import parallel
from grading import majority
from kernels.packing import to_host
from report.metrics import mean
from support.questions import Question

# The thresholds of SCRL's code, as shares of the N votes; the script of its example lowers them.
CLEAR, MARGIN, RARE = 0.5, 0.15, 0.15


@dataclass(frozen=True, kw_only=True)
class Response:
    """A sampled response, as its rank reports it. The last four are sequences with a value per token.

    entropy and certainty are empty unless the reward is in NEED_POLICY.
    """

    answer: str | None
    text: str = ""
    finished: bool = True  # False: truncated at --max-new-tokens
    tokens: Sequence = ()  # ids, with the final EOS
    logprob: Sequence = ()  # under the distribution that the token was sampled from
    entropy: Sequence = ()  # of that distribution, in nats
    certainty: Sequence = ()  # its self-certainty, see kernels.logprob.self_certainty


@dataclass(frozen=True, kw_only=True)
class Group:
    """The N responses to one question and their vote. A reward takes what it needs, by name."""

    answers: list  # [N] of str or None
    classes: list  # lists of indices into answers, one for each class of equal answers
    label: str | None = None  # the pseudo-label
    question: Question | None = None  # its .answer is for gold and for metrics alone
    responses: Sequence = ()  # [N] of Response
    coins: Sequence = ()  # [N] uniform numbers in (0, 1), for random


def soft_reward(group):
    """The size of an answer's class over N, 0 for no answer: the likelihood reward of EMPO.

    A second opinion is punished less than a lone one. Advantages of 4 4 4 7 7 9 none 5: 0.9991 for each 4,
    0.1110 for each 7, -0.7771 for 9 and 5, -1.6652 for none. Of 4 4 4 4 4 7 7 7 they are those of the vote.
    Not EMPO: it also leaves out questions whose answers agree too much or too little.

    >>> soft_reward(Group(answers=["4", None, "7", "4"], classes=[[0, 3], [2]]))
    [0.5, 0.0, 0.25, 0.5]
    """
    rewards = [0.0] * len(group.answers)
    for members in group.classes:
        for index in members:
            rewards[index] = len(members) / len(rewards)
    return rewards


def selective_reward(group):
    """1 for a majority that is clear, -1 for rare answers and for no answer, 0 for what lies between. SCRL.

    A majority is clear with at least CLEAR of the votes and more than MARGIN ahead of the second; without one
    nothing is rewarded, and only what is rare is punished. Subtracting the mean turns the zeros of such a
    group into positive advantages: of 4 4 4 7 7 9 none 5, 0.7246 for each 4 and 7 alike, -1.2076 for the
    rest. Of 4 4 4 4 4 7 7 9: 0.6614, -0.6614 for each 7, -1.9843 for 9.
    Not SCRL: it punishes a rare answer only where the policy is unsure of it (the entropy gate).

    >>> selective_reward(Group(answers=list("44444779"), classes=[[0, 1, 2, 3, 4], [5, 6], [7]]))
    [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, -1.0]
    """
    count = len(group.answers)
    first, second = sorted([0, 0, *map(len, group.classes)], reverse=True)[:2]
    is_clear = first >= CLEAR * count and first - second > MARGIN * count
    rewards = [-1.0] * count
    for members in group.classes:
        is_label = is_clear and members == majority(group.classes)
        for index in members:
            rewards[index] = 1.0 if is_label else -1.0 if len(members) < RARE * count else 0.0
    return rewards


def novel_reward(group):
    """From 0.5 to 1 for the majority, from -1 to -0.5 for the others, more for what is novel. EVOL-RL.

    Not EVOL-RL: similarity is the cosine of counts of token trigrams, where the paper embeds the reasoning
    with a second model; a lone response with an answer gets 1 here, -1 there; and its clipping and entropy
    bonus are left out.

    >>> tokens = [[5, 5, 6, 7], [5, 5, 6, 7], [5, 5, 6, 8], [1, 2, 3]]
    >>> responses = [Response(answer=None, tokens=ids) for ids in tokens]
    >>> novel_reward(Group(answers=list("4449"), classes=[[0, 1, 2], [3]], responses=responses))
    [0.5, 0.5, 1.0, -0.5]
    """
    similarity = trigram_similarity([response.tokens for response in group.responses])
    return shaped_by_novelty(similarity.tolist(), group.classes)


# The certainty rewards. They read no answer: a response without one gets what its tokens give it. Length
# itself counts only for `probability`, which shrinks with every token. docs/rewards.md compares them.


def of_each(group, measure):
    """measure(response) for each response of a group. Responses with equal tokens get equal rewards exactly.

    The sampler computes them in different batches, so their log-probabilities may differ in the last bits.
    """
    known = {}
    return [known.setdefault(tuple(r.tokens), measure(r)) for r in group.responses]


def trajectory_entropy_reward(group):
    """The mean log-probability of the tokens: minus an estimate of the entropy per token of responses. EM-RL.

    >>> one = Response(answer="4", logprob=[-0.5, -0.1])
    >>> trajectory_entropy_reward(Group(answers=["4"], classes=[[0]], responses=[one]))
    [-0.3]
    """
    return of_each(group, lambda response: mean(response.logprob))


def probability_reward(group):
    """The probability of the whole response, exp of the sum of its log-probabilities. RLSC.

    In fp32 it underflows to 0 where the sum is below -104, and `advantages` adds 1e-6 to the standard
    deviation: where responses are long, the differences vanish, and little or nothing is learned.

    >>> one = Response(answer="4", logprob=[-0.5, -0.5])
    >>> [round(p, 4) for p in probability_reward(Group(answers=["4"], classes=[[0]], responses=[one]))]
    [0.3679]
    """
    return of_each(group, lambda response: math.exp(sum(response.logprob)))


def token_entropy_reward(group):
    """Minus the mean entropy of the policy over the tokens of a response, in nats. EM-RL, RENT.

    >>> one = Response(answer="4", entropy=[0.5, 0.25])
    >>> token_entropy_reward(Group(answers=["4"], classes=[[0]], responses=[one]))
    [-0.375]
    """
    return of_each(group, lambda response: -mean(response.entropy))


def self_certainty_reward(group):
    """The mean over the tokens of the KL divergence from the uniform distribution to the policy. Intuitor.

    >>> one = Response(answer="4", certainty=[8.0, 9.0])
    >>> self_certainty_reward(Group(answers=["4"], classes=[[0]], responses=[one]))
    [8.5]
    """
    return of_each(group, lambda response: mean(response.certainty))


OTHER_REWARDS = {"soft": soft_reward, "selective": selective_reward, "novel": novel_reward,
                 "trajectory_entropy": trajectory_entropy_reward, "probability": probability_reward,
                 "token_entropy": token_entropy_reward, "self_certainty": self_certainty_reward}  # fmt: skip
NEED_POLICY = {"token_entropy", "self_certainty"}  # they read what `measure` adds to a Response


@torch.no_grad()
def measure(run, rollout):
    """Measure what the sampler does not record: {name in Response: values} for each row of a rank's rollout.

    One pass of the policy over all responses, with less memory than an update; None, without a pass, if the
    run's reward does not need it.
    """
    c, found = run.config, {}
    if c.reward not in NEED_POLICY:
        return None
    for rows, _, _ in parallel.micro_batches(rollout, torch.arange(len(rollout)), c.micro_batch_tokens):
        with parallel.mixed_precision(run.device, c.sharded):
            _, entropy, certainty = run.policy(rows, c.temperature, certainty=True)
        columns = (x.tolist() for x in (rows.question, rows.sample, rows.response_length))
        for question, sample, length, *values in zip(*columns, *to_host(entropy, certainty), strict=True):
            entropies, certainties = (array("f", value[:length]) for value in values)
            found[question, sample] = {"entropy": entropies, "certainty": certainties}
    return [found[key] for key in zip(rollout.question.tolist(), rollout.sample.tolist(), strict=True)]


# -----------------------------------------------------------------------------------------------------------
# novel: similarity and what it is worth


def trigram_similarity(responses):
    """The cosine of the counts of token trigrams of each pair: N lists of token ids -> [N, N] in fp64.

    A response of one or two tokens is padded to a single trigram.

    >>> trigram_similarity([[1, 2, 3, 4], [1, 2, 3, 5], [7, 8, 9]]).tolist()
    [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    size, trigrams = 2 + max(map(max, responses)), []
    for response in responses:
        ids = torch.tensor([*response] + [-1] * (3 - len(response))) + 1  # in [0, size)
        trigrams.append((ids[:-2] * size + ids[1:-1]) * size + ids[2:])  # a number for each trigram
    _, column = torch.cat(trigrams).unique(return_inverse=True)
    row = torch.arange(len(responses)).repeat_interleave(torch.tensor(list(map(len, trigrams))))
    counts = torch.zeros(len(responses), int(column.max()) + 1, dtype=torch.float64)  # [N, trigrams]
    counts.index_put_((row, column), torch.ones(len(row), dtype=torch.float64), accumulate=True)
    products = counts @ counts.T
    squares = products.diagonal()
    return products / (squares[:, None] * squares).sqrt()


def shaped_by_novelty(similarity, classes):
    """Rewards [N] from similarities [N][N]: the majority's novelty in [0.5, 1], the others' in [-1, -0.5].

    A response without an answer gets -1 and is compared with none.

    >>> similarity = [[1, 0.8, 0.2, 0.1], [0.8, 1, 0.4, 0.3], [0.2, 0.4, 1, 0.5], [0.1, 0.3, 0.5, 1]]
    >>> [round(reward, 4) for reward in shaped_by_novelty(similarity, [[0, 1, 2], [3]])]
    [0.5833, 0.5, 1.0, -0.5]
    """
    answered, agreeing = [index for members in classes for index in members], majority(classes)
    others = [index for index in answered if index not in agreeing]
    rewards = [-1.0] * len(similarity)
    for lowest, members in ((0.5, agreeing), (-1.0, others)):
        for index, novelty in zip(members, novelties(similarity, members, answered), strict=True):
            rewards[index] = lowest + 0.5 * novelty
    return rewards


def novelties(similarity, members, answered):
    """The novelty of each member of a group, from 0 (the group's least) to 1 (its largest).

    Novelty is 1 - half of the mean similarity to the other members - half of the largest similarity to any
    other response that has an answer. As in EVOL-RL's code a lone member has 1, and members that are equally
    novel have 0.5.
    """
    if len(members) < 2:
        return [1.0] * len(members)
    raw = []
    for index in members:
        in_group = mean(similarity[index][other] for other in members if other != index)
        nearest = max(similarity[index][other] for other in answered if other != index)
        raw.append(1 - in_group / 2 - nearest / 2)
    least, spread = min(raw), max(raw) - min(raw)
    if spread < 1e-9:  # rounding is no difference
        return [0.5] * len(members)
    return [(value - least) / spread for value in raw]

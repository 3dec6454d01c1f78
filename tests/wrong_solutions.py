"""Wrong solutions of the exercises, each with words that the check has to say about it.

The first three exercises have functions as students write them. From the fourth on, where a solution is long,
a wrong one is the project's own with one piece of text in the place of another.
"""

VOTE = """
from collections import Counter
import grading


def vote(answers, kind="math"):
"""

LOSS = """
import torch


def grpo_loss(logprob, old_logprob, advantage, mask, *, clip=0.2, dual_clip=3.0, ref_logprob=None, kl=0.0,
              token_count=None):
    log_ratio = torch.where(mask, logprob - old_logprob, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    chosen = torch.minimum(ratio * advantage, clipped * advantage)
    chosen = torch.where(advantage < 0, chosen.maximum(dual_clip * advantage), chosen)
    sums = {"clip_fraction": ((clipped * advantage < ratio * advantage) & mask).sum(),
            "kl_old_new": (torch.expm1(log_ratio) - log_ratio).sum()}
    loss = -chosen
    if ref_logprob is not None:
        d = torch.where(mask, ref_logprob - logprob, 0.0).clamp(-20, 20)
        estimate = (torch.expm1(d) - d).clamp(max=10)
        loss, sums["kl"] = loss + kl * estimate, estimate.sum()
    loss = torch.where(mask, loss, 0.0)
    count = mask.sum() if token_count is None else token_count
    return loss.sum() / count, {name: value.detach() for name, value in sums.items()}
"""

# {exercise: {name: (the student's file, words)}}
WHOLE = {
    "vote": {
        "no answer votes": (
            VOTE
            + """
    classes = []
    for index, answer in enumerate(answers):
        for members in classes:
            first = answers[members[0]]
            if answer == first or (answer and first and grading.same_answer(first, answer, kind)):
                members.append(index)
                break
        else:
            classes.append([index])
    largest = max(classes, key=len, default=[])
    return Counter(answers[i] for i in largest).most_common(1)[0][0] if classes else None, classes
""",
            "never votes",
        ),
        "spelling": (
            VOTE
            + """
    spellings = [answer for answer in dict.fromkeys(answers) if answer is not None]
    classes = [[i for i, answer in enumerate(answers) if answer == s] for s in spellings]
    return max(spellings, key=answers.count, default=None), classes
""",
            "by value",
        ),
        "tie": (
            VOTE
            + """
    classes = grading.classes(answers, kind)
    best = []
    for members in classes:
        if len(members) >= len(best):
            best = members
    return Counter(answers[i] for i in best).most_common(1)[0][0] if best else None, classes
""",
            "tie",
        ),
    },
    "advantages": {
        "ddof": (
            """
def advantages(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True, correction=0) + 1e-6)
""",
            "ddof 1",
        ),
        "of all rows": (
            """
def advantages(rewards):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)
""",
            "row",
        ),
        "no epsilon": (
            """
def advantages(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
""",
            "1e-6",
        ),
    },
    "loss": {
        "by rows": (LOSS.replace("/ count", "/ len(mask)"), "divided by the response tokens"),
        "mean of rows": (
            LOSS.replace("loss.sum() / count", "(loss.sum(1) / mask.sum(1)).mean()"),
            "every token counts alike",
        ),
        "multiplied by the mask": (
            LOSS.replace("torch.where(mask, logprob - old_logprob, 0.0)", "((logprob - old_logprob) * mask)"),
            "masked token",
        ),
        "clip only": (
            LOSS.replace("torch.minimum(ratio * advantage, clipped * advantage)", "clipped * advantage"),
            "minimum",
        ),
        "direction of the KL": (LOSS.replace("ref_logprob - logprob", "logprob - ref_logprob"), "direction"),
        "digits of the KL": (LOSS.replace("torch.expm1(d) - d", "d.exp() - d - 1"), "expm1"),
    },
    "lucky": {
        "of the label": (
            """
def reward_accuracy(right, agreeing):
    return float(bool(agreeing) and right[agreeing[0]] == 1)
""",
            "label accuracy",
        ),
        "of the majority": (
            """
def reward_accuracy(right, agreeing):
    return len(agreeing) / len(right)
""",
            "share of responses in the majority",
        ),
        "of the right": (
            """
def reward_accuracy(right, agreeing):
    return sum(right) / len(right)
""",
            "share of right responses",
        ),
    },
}

# {exercise: {name: (text of the project, another text, words)}}
CHANGED = {
    "attention": {
        "not itself": ("seen = key_at <= position", "seen = key_at < position", "see itself"),
        "no mask": ("masked_fill_(~seen", "masked_fill_(~seen & False", "behind its own position"),
        "window": ("seen &= key_at > position[:, None] - window", "pass", "window"),
        "offset": (
            "query_at = upload(self.offset, device)[:, None, None, None] + place",
            "query_at = place[None, None]",
            "offset",
        ),
    },
    "sampling": {
        "by row only": ("fold_in(key, position)", "fold_in(key, position * 0)", "position is ignored"),
        "edge": ("reached > target", "reached >= target", "edge"),
        "rounded up": ("(reached == total)", "(torch.arange(mass.shape[1]) > 1)", "rounded up"),
        "log-probability": (
            "return token[:, 0], p.gather(1, token)[:, 0].div_(total).log_()",
            "return token[:, 0], logits.log_softmax(-1).gather(1, token)[:, 0]",
            "temperature included",
        ),
    },
    "logprob": {
        "sums as they are": ("scale = shift.exp()", "scale = torch.ones_like(shift)", "online softmax"),
        "gradient": ("grad_logprob[:, None] / -temperature", "-grad_logprob[:, None]", "chain rule"),
        "target": (
            "(grad_logprob / temperature * inside)[:, None]",
            "(grad_logprob / temperature)[:, None]",
            "one tile that holds the target",
        ),
        "entropy": ("logp.add_(entropy[:, None]).mul_", "logp.mul_", "H is missing"),
    },
    "kernel": {
        "padding": ("z = tl.where(column < vocabulary, z, -1e30)", "z = z", "end of the vocabulary"),
        "old sums": ("sum_exp = tl.exp(shift) * sum_exp", "sum_exp = sum_exp", "rescaled"),
        "piece": ("first = piece * size", "first = 0", "its own piece"),
        "temperature": (
            "c = (z - higher[:, None]) * inverse_temperature",
            "c = z - higher[:, None]",
            "inverse_temperature",
        ),
    },
}

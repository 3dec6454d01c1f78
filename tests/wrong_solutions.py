"""Wrong solutions of the exercises, each with words that the check has to say about it.

The planted bugs of exercises/mutants.json are wrong solutions too, and name such words as "hint".
"""

# {exercise: {name: (the student's function, words)}}
WHOLE = {
    "advantages": {
        "of all rows": (
            "def advantages(rewards):\n    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)\n",
            "row",
        ),
        "no epsilon": (
            "def advantages(rewards):\n"
            "    return (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)\n",
            "1e-6",
        ),
    },
    "lucky": {
        "of the label": (
            "def reward_accuracy(right, agreeing):\n    return float(right[agreeing[0]] == 1)\n",
            "label accuracy",
        ),
        "of the majority": (
            "def reward_accuracy(right, agreeing):\n    return len(agreeing) / len(right)\n",
            "share of responses in the majority",
        ),
        "of the right": (
            "def reward_accuracy(right, agreeing):\n    return sum(right) / len(right)\n",
            "share of right responses",
        ),
    },
}

# {exercise: {name: (text of the project's solution, another text, words)}}
CHANGED = {
    "loss": {
        "mean of rows": (
            "torch.where(mask, per_token, 0.0).sum() / count",
            "(torch.where(mask, per_token, 0.0).sum(1) / mask.sum(1)).mean()",
            "every token counts alike",
        ),
        "multiplied by the mask": (
            "torch.where(mask, logprob - old_logprob, 0.0)",
            "((logprob - old_logprob) * mask)",
            "masked token",
        ),
        "clip only": ("torch.minimum(unclipped, clipped)", "clipped", "minimum"),
        "digits of the KL": ("torch.expm1(d) - d", "d.exp() - d - 1", "expm1"),
    },
    "attention": {
        "not itself": ("seen = key_at <= position", "seen = key_at < position", "see itself"),
        "no mask": ("masked_fill_(~seen", "masked_fill_(~seen & False", "behind its own position"),
        "window": ("seen &= key_at > position[:, None] - window", "pass", "window"),
    },
    "sampling": {
        "rounded up": ("(reached == total)", "(torch.arange(mass.shape[1]) > 1)", "rounded up"),
        "log-probability": (
            "return token[:, 0], p.gather(1, token)[:, 0].div_(total).log_()",
            "return token[:, 0], logits.log_softmax(-1).gather(1, token)[:, 0]",
            "which the temperature is part of",
        ),
    },
    "logprob": {
        "target": (
            "(grad_logprob / temperature * inside)[:, None]",
            "(grad_logprob / temperature)[:, None]",
            "one tile that contains the target",
        ),
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

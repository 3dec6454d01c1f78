r"""TTRL whole, as plainly as it can be written: a model learns from questions whose answers it is never told.

    python exercises/first_lesson.py     # two minutes on one core of a CPU

Read it from top to bottom in ten minutes. Each heading names the real part, which does the same, only faster:
tests/test_lessons.py compares them, docs/lessons.md puts one after the other in. The tokenizer and the search
for \boxed{...} are the project's own: they are work, but they are not the idea.

Letters in shapes: N votes, M trained of them, T tokens, R response tokens, V vocabulary, D width, H heads, E
width of a head. Each function works on the N (or M) responses to one question at a time.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from grading import extract_answer  # noqa: E402
from support.prompts import decode_response, encode_prompt, load_tokenizer  # noqa: E402

LAYERS, HEADS, E, THETA, EPS = 4, 4, 32, 10000.0, 1e-6  # of tiny/model/config.json
QUESTIONS, TERMS, VOTES, TRAINED, STEPS, MAX_NEW_TOKENS, LR, CLIP = 6, 6, 24, 12, 8, 64, 1e-4, 0.2

# ----------------------------------------------------------------------------------------------------------
# the model, a Qwen2 (model.py, Transformer)


def forward(w, tokens):
    """Logits of the token after each token, by the weights {name: tensor}: tokens [N, T] -> [N, T, V]."""
    x = w["model.embed_tokens.weight"][tokens]  # [N, T, D]
    # No token sees a later one. So rows of different lengths may be padded on the right.
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()  # [query, key]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        y = rms_norm(x, w[name + "input_layernorm.weight"])
        q, k, v = (project(w, name + f"self_attn.{part}_proj", y) for part in "qkv")  # [N, H, T, E]
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / E**0.5  # [N, H, T, T]
        mixed = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v  # [N, H, T, E]
        x = x + mixed.transpose(1, 2).flatten(-2) @ w[name + "self_attn.o_proj.weight"].T
        y = rms_norm(x, w[name + "post_attention_layernorm.weight"])
        gate, up = (y @ w[name + f"mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[name + "mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


def rms_norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def project(w, name, y):
    """Queries, keys or values of each head: y [N, T, D] -> [N, H, T, E]. Two query heads share a key head."""
    split = (y @ w[name + ".weight"].T + w[name + ".bias"]).unflatten(-1, (-1, E)).transpose(1, 2)
    return split.repeat_interleave(HEADS // split.shape[1], dim=1)


def rotate(x):
    """Rotary positions: turn each pair of numbers by an angle that grows with the position."""
    angle = torch.arange(x.shape[-2])[:, None] * THETA ** -(torch.arange(0, E, 2) / E)  # [T, E/2]
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


# ----------------------------------------------------------------------------------------------------------
# sampling (rollout.py, generate), and the same log-probabilities to learn from (model.py, forward)


@torch.no_grad()
def sample(w, prompt, uniform, ends):
    """N responses to a prompt (a list of ids): ids [N, R], lengths [N], log-probabilities [N, R].

    uniform [R, N]: a random number in (0, 1) for each token, which is the first one whose running sum of
    probabilities exceeds it. Every token costs a forward pass over all tokens before it.
    """
    tokens, logprobs = torch.tensor(prompt).repeat(uniform.shape[1], 1), []
    length = torch.full((uniform.shape[1],), len(uniform))  # of a response that does not end
    for position, u in enumerate(uniform):
        logprob = forward(w, tokens)[:, -1].log_softmax(-1)  # [N, V]
        token = (logprob.exp().cumsum(-1) <= u[:, None]).sum(-1).clamp(max=logprob.shape[1] - 1)  # [N]
        tokens = torch.cat((tokens, token[:, None]), 1)
        logprobs.append(logprob.gather(1, token[:, None]))
        ended = torch.isin(token, torch.tensor(ends)) & (length > position)
        length[ended] = position + 1  # the end token is part of the response: to stop is learned too
        if length.max() <= position + 1:  # what follows an end token is sampled all the same, and never used
            break
    return tokens[:, len(prompt) :], length, torch.cat(logprobs, 1)


def response_logprob(w, prompt, responses):
    """Log-probability of each token of responses [N, R], with its gradient: [N, R]."""
    tokens = torch.cat((torch.tensor(prompt).repeat(len(responses), 1), responses), 1)
    logprob = forward(w, tokens[:, :-1])[:, len(prompt) - 1 :].log_softmax(-1)  # [N, R, V]
    return logprob.gather(2, responses[:, :, None])[:, :, 0]


# ----------------------------------------------------------------------------------------------------------
# TTRL (ttrl.py: vote, advantages, grpo_loss, learn, train_step)


def vote(answers):
    """The pseudo-label: the most frequent answer, of several the first; None if nobody answered."""
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


def advantages(rewards):
    """How much better than its group each response is, in standard deviations: [M] -> [M]."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def loss_of(logprob, old_logprob, advantage, mask):
    """The clipped policy gradient: all [M, R] but advantage [M, 1]; mask is True at response tokens."""
    ratio = (logprob - old_logprob).exp()
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return -objective[mask].mean()


def learn(w, optimizer, prompt, responses, length, old_logprob, rewards):
    """One update from M responses to one question: lengths and rewards [M], the others [M, R]."""
    mask = torch.arange(responses.shape[1]) < length[:, None]  # [M, R]
    logprob, advantage = response_logprob(w, prompt, responses), advantages(rewards)[:, None]
    loss = loss_of(logprob, old_logprob, advantage, mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main():
    torch.manual_seed(0)
    w = {name: p.requires_grad_() for name, p in load_file(ROOT / "tiny/model/model.safetensors").items()}
    optimizer = torch.optim.AdamW(w.values(), lr=LR, weight_decay=0.01)
    tokenizer, ends = load_tokenizer(ROOT / "tiny/model")
    questions = json.loads((ROOT / "tiny/questions.json").read_text())  # short ones: up to six digits
    questions = [question for question in questions if question["prompt"].count("+") < TERMS][:QUESTIONS]
    print("Each vote, and the share of right answers. The truth is printed, but nothing learns from it.")
    print("truth  ", *(f"{question['answer']:>9}" for question in questions), "     mean")
    for step in range(STEPS + 1):
        votes, right = [], []
        for question in questions:
            prompt = encode_prompt(tokenizer, question["prompt"])
            rows = sample(w, prompt, torch.rand(MAX_NEW_TOKENS, VOTES), ends)  # three tensors of N rows
            texts = [decode_response(tokenizer, ids[:n].tolist()) for ids, n, _ in zip(*rows, strict=True)]
            answers = [extract_answer(text) for text in texts]
            label = vote(answers)
            rewards = torch.tensor([float(answer is not None and answer == label) for answer in answers])
            if step < STEPS:  # after the last update the questions are asked once more
                learn(w, optimizer, prompt, *(x[:TRAINED] for x in (*rows, rewards)))
            right.append(answers.count(question["answer"]) / VOTES)
            votes.append(f"{label or '-':>4} {right[-1]:.2f}")
        print(f"step {step:2}", *votes, f"{sum(right) / len(right):9.2f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small, and threads would wait for each other
    main()

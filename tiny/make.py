r"""Make the embedded default: tiny/model (Qwen2 format, 0.6 M parameters) and tiny/questions.json.

    # 5 to 8 minutes on one core; the same versions on the same machine give the same files
    python tiny/make.py

The base model is trained only on the homework of a pupil who adds single digits one by one. For 7+5+9=? the
pupil writes:

    7+5=12
    12+9=21
    \boxed{21}

The pupil makes two kinds of mistakes, and continues from whatever is written down:
- slips: a sum is occasionally one or two off (SLIP);
- forgotten carries: the result is ten too low. The smaller the digit added, the less the pupil expects a
  carry, so it is rarely forgotten after +9, but more often than not after +1 or +2 (FORGET).

The model is trained until it converges, so it reproduces the mistakes with their frequencies, as a language
model does with those of its corpus. Nothing tells it which answers are wrong. Most single steps are more
often right than wrong, so the vote is better than a sample. But if forgetting wins, or if several steps each
need a carry, the most frequent answer is wrong, and so are the vote and greedy decoding. That is what
training at test time can still improve.
"""

import json
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_SPLIT

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from grading import extract_answer  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from report.metrics import is_right, mean  # noqa: E402
from rollout import Rollout, generate  # noqa: E402
from support.prompts import decode_response, encode_prompt  # noqa: E402
from support.questions import Question  # noqa: E402
from ttrl import vote  # noqa: E402

SLIP = 0.07  # probability that a running sum is one or two off
FORGET = {
    1: 0.60,
    2: 0.55,
    3: 0.35,
    4: 0.28,
    5: 0.23,
    6: 0.19,
    7: 0.15,
    8: 0.11,
    9: 0.08,
}  # of a carry, by digit added
TERMS = (4, 9)  # digits in a question, at least and at most
BATCH, STEPS, PEAK_LR, WARMUP = 32, 700, 3e-3, 50
ASKED = 64  # questions in questions.json
MAX_NEW_TOKENS = 96

# -----------------------------------------------------------------------------------------------------------
# the homework


def ask(rng):
    """A question and its digits."""
    digits = [rng.randint(1, 9) for _ in range(rng.randint(*TERMS))]
    total = "+".join(map(str, digits))
    return rng.choice((f"{total}=?", f"What is {total}?")), digits


def add(total, digit, rng):
    """One step of the pupil: total + digit, possibly with a mistake."""
    if total % 10 + digit >= 10 and rng.random() < FORGET[digit]:
        return total + digit - 10
    if rng.random() < SLIP:
        return max(total + digit + rng.choice((-2, -1, 1, 2)), 0)
    return total + digit


def answer(digits, rng):
    """What the pupil writes: a line per step, then the box."""
    total, lines = digits[0], []
    for digit in digits[1:]:
        result = add(total, digit, rng)
        lines.append(f"{total}+{digit}={result}\n")
        total = result
    return "".join(lines) + f"\\boxed{{{total}}}"


# ----------------------------------------------------------------------------------------------------------
# the tokenizer: byte-level like Qwen2's, but with a handful of words only

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# _: space
WORDS = (
    "Please _reason _step _by _and _put _your _final _answer _within \\boxed boxed system user assistant "
    "What _is"
)
TEMPLATE = (  # Qwen2.5-Math's, its default system turn included, without the parts for tools
    "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder):
    """tokenizer.json and tokenizer_config.json: digits are single tokens, and any text can be encoded."""
    vocabulary, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for word in WORDS.replace("_", "\u0120").split():  # \u0120 stands for a space in byte-level vocabularies
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                merges.append((word[:end], word[end]))
                vocabulary.append(word[: end + 1])
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|endoftext|>",
                  unk_token=None, clean_up_tokenization_spaces=False, model_max_length=512,
                  chat_template=TEMPLATE)  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(folder)


def write_config(folder, tokenizer):
    """config.json and generation_config.json of a small Qwen2."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=len(tokenizer),
                  hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=512, rope_theta=10000.0, rms_norm_eps=1e-6,
                  hidden_act="silu", tie_word_embeddings=True, eos_token_id=end,
                  pad_token_id=pad)  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": True, "temperature": 1.0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------
# the base model


def batch(tokenizer, rng, held_out):
    """A page of homework as a Rollout, the input of the learner's forward pass."""
    rows, prompt_length = [], []
    while len(rows) < BATCH:
        text, digits = ask(rng)
        if text not in held_out:
            prompt = encode_prompt(tokenizer, text)
            rows.append(
                torch.tensor(prompt + tokenizer.encode(answer(digits, rng)) + [tokenizer.eos_token_id])
            )
            prompt_length.append(len(prompt))
    length, prompt_length = torch.tensor([len(row) for row in rows]), torch.tensor(prompt_length)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Rollout(
        torch.arange(BATCH),
        torch.zeros_like(length),
        prompt_length,
        length - prompt_length,
        tokens,
        None,
        None,
    )


def train(model, tokenizer, rng, held_out=()):
    """Plain next-token training on the answers; the learning rate decays to 0 in the second half."""
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3 if name == "embed_tokens.weight" else p.shape[1] ** -0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 2 * (1 - step / STEPS), 1)
    )
    for step in range(STEPS):
        rows = batch(tokenizer, rng, held_out)
        loss = -model(rows)[0].sum() / rows.response_length.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)


# ----------------------------------------------------------------------------------------------------------
# the questions, and how the base model answers them


def write_questions(path, rng):
    """Write ASKED different questions like those of the homework."""
    asked = {}
    while len(asked) < ASKED:
        prompt, digits = ask(rng)
        asked.setdefault(prompt, sum(digits))
    rows = [
        {"prompt": prompt, "answer": str(total), "id": f"tiny-{i:02d}"}
        for i, (prompt, total) in enumerate(asked.items())
    ]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return rows


def measure(model, tokenizer, rows, samples, temperature):
    """Print pass@1, the accuracy of the vote, and statistics of the responses."""
    asked = [Question(**row) for row in rows]
    prompts = [encode_prompt(tokenizer, question.prompt) for question in asked]
    out = generate(model, prompts, samples, max_new_tokens=MAX_NEW_TOKENS, temperature=temperature,
                   eos_ids=[tokenizer.eos_token_id], seed=10, stream="eval", step=0)  # fmt: skip
    answers = [
        extract_answer(decode_response(tokenizer, out.response(i)), truncated=not out.finished[i])
        for i in range(len(out))
    ]
    groups = [answers[i : i + samples] for i in range(0, len(answers), samples)]
    labels, classes = zip(*map(vote, groups), strict=True)
    right = [is_right(question, a) for question, group in zip(asked, groups, strict=True) for a in group]
    print(f"{samples} samples at temperature {temperature}: pass@1 {mean(right):.3f}, "
          f"maj@{samples} {mean(map(is_right, asked, labels)):.3f}; "
          f"{mean(map(len, classes)):.1f} different answers a question, "
          f"{out.finished.float().mean():.3f} finished, {answers.count(None)} without an answer, "
          f"{int(out.response_length.median())} tokens in the median, "
          f"{int(out.response_length.max())} at most")  # fmt: skip


def main():
    torch.set_num_threads(1)  # more threads would split sums differently and change the last bits
    torch.manual_seed(0)
    start, folder = time.time(), HERE / "model"
    folder.mkdir(exist_ok=True)
    questions = write_questions(HERE / "questions.json", random.Random(1))
    tokenizer = write_tokenizer(folder)
    write_config(folder, tokenizer)
    model = Transformer(ModelConfig.from_pretrained(folder), source=folder)
    train(model, tokenizer, random.Random(0), held_out={row["prompt"] for row in questions})
    model.save_pretrained(folder)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters "
        f"in {(time.time() - start) / 60:.1f} minutes"
    )
    measure(model, tokenizer, questions, samples=64, temperature=1.0)
    measure(model, tokenizer, questions, samples=1, temperature=0)


if __name__ == "__main__":
    main()

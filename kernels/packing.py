"""Packing: the rows of a batch as one flat list of tokens without padding.

Embeddings, norms and linear layers process each token independently, so they take the tokens of all rows
concatenated, [T, D]. Only attention needs to know the rows. Packing saves work in two ways: nothing is
computed for padding, and a prompt is computed once for all its responses. The result equals causal attention
over each row alone:

>>> batch = pack_rows(torch.zeros(2, 4, dtype=torch.int64), lengths=torch.tensor([2, 4]), windows=[None])
>>> q, k, v = torch.randn(3, 6, 1, 8)  # six tokens, one head: rows of length 2 and 4
>>> packed = batch.attend_packed(0, q, k, v)
>>> for row in (slice(0, 2), slice(2, 6)):
...     scores = torch.einsum("qhe,khe->hqk", q[row], k[row]) / 8**0.5
...     scores += torch.full_like(scores, -torch.inf).triu(1)  # no query sees a later key
...     plain = torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[row])
...     assert torch.allclose(packed[row], plain, atol=1e-6)

Letters in shape comments: B rows, T tokens (Tp of a prompt, Tq queries, Tk keys), R response tokens, N
response tokens of all rows together, G rows of a group, H heads, K key/value heads, E head width.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from kernels.attention import flash_packed, packed_available, sdpa

PREFILL_TOKENS = 8192  # prompt tokens that sampling packs into one batch


@dataclass
class PackedBatch:
    """The flat tokens of some rows, the groups in which they attend, and the learner's targets."""

    windows: tuple  # per layer: how many keys a query sees, itself included; None is all of them
    tokens: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    groups: list  # AttentionGroups that cover the tokens in order
    targets: torch.Tensor | None = None  # [N] the response tokens
    logit_positions: torch.Tensor | None = None  # [N] the flat index whose logits predict each target
    unpacked: torch.Tensor | None = None  # [N] the index of each target in [B, R], flattened
    shape: torch.Size | None = None  # (B, R)

    def attend_packed(self, layer, q, k, v):
        """q [T, H, E], k and v [T, K, E] -> [T, H, E]."""
        return torch.cat([group.attend_rows(self.windows[layer], q, k, v) for group in self.groups])

    def unpack(self, x):
        """One number per response token, [N] -> [B, R], zero padded."""
        flat = x.new_zeros(self.shape.numel()).scatter(0, self.unpacked, x)
        # Cloned, not a view: FSDP attaches hooks to a model's output, and an in-place operation on a view
        # would lose them.
        return flat.view(self.shape).clone()

    def to(self, device):
        """Move to the model's device in one copy; a group moves its own indices when it first attends.

        Indices are built on the CPU, where reading a size does not synchronize.
        """
        here = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        moved = upload(torch.cat([*here.values()]), device).split([len(value) for value in here.values()])
        vars(self).update(zip(here, moved, strict=True))
        for group in self.groups:
            group.device = device
        return self


def pack_rows(tokens, lengths, windows):
    """Pack independent rows, for prefill and plain logits: tokens [B, T] right-padded, lengths [B]."""
    index = flat_index(lengths.cumsum(0) - lengths, lengths)  # [B, T]
    real = length_mask(lengths)
    positions = torch.arange(real.shape[1]).expand(real.shape)
    group = AttentionGroup(index, lengths, index, torch.zeros_like(lengths))
    return PackedBatch(windows, tokens[real], positions[real], [group])


def pack_responses(rows, windows):
    """Pack each question's prompt once, then all responses, which attend to it. rows: a rollout.Rollout.

    The last token of a response is a target but not an input, since nothing after it is predicted. Two
    responses, d e and f g h, to one prompt a b c:

        flat index       0 1 2 | 3 | 4 5
        tokens           a b c | d | f g
        targets                  d e | f g h
        logit_positions          2 3 | 2 4 5        c predicts both d and f

    Comments with numbers or letters, here and in `append_inputs`, show the values in this example.
    """
    first_row, prompt_of = distinct(rows.question)  # 0, 0 0
    prompts = rows.tokens[first_row, : int(rows.prompt_length.max())]
    batch = pack_rows(prompts, rows.prompt_length[first_row], windows)
    prompt_start = batch.groups[0].query[prompt_of, 0]  # 0 0

    is_response = length_mask(rows.response_length)  # [B, R]
    column = rows.prompt_length[:, None] + torch.arange(is_response.shape[1])  # [B, R]  3 4 5, 3 4 5
    targets = rows.tokens.gather(1, column.clamp(max=rows.tokens.shape[1] - 1))  # [B, R]  d e 0, f g h
    key = append_inputs(batch, targets, column, prompt_start, rows.prompt_length, rows.response_length - 1)
    batch.targets = targets[is_response]  # d e f g h
    batch.logit_positions = key.gather(1, column - 1)[is_response]  # 2 3 2 4 5
    batch.unpacked = is_response.flatten().nonzero()[:, 0]  # 0 1 3 4 5
    batch.shape = is_response.shape  # 2 3
    return batch


def append_inputs(batch, responses, positions, prompt_start, prompt_length, lengths):
    """Append the first `lengths` [B] tokens of responses [B, R] to a batch; returns their keys [B, Tk]."""
    is_input = length_mask(lengths)  # [B, R-1]
    width = is_input.shape[1]
    start = len(batch.tokens) + lengths.cumsum(0) - lengths  # [B] the flat index of each first token  3 4
    query = flat_index(start, lengths)  # [B, R-1]  3 0, 4 5
    key = key_index(prompt_start, prompt_length, start, lengths)  # [B, Tk]  0 1 2 3 0, 0 1 2 4 5
    batch.tokens = torch.cat((batch.tokens, responses[:, :width][is_input]))  # a b c d f g
    batch.positions = torch.cat((batch.positions, positions[:, :width][is_input]))  # 0 1 2 3 3 4
    if is_input.any():
        batch.groups.append(AttentionGroup(query, lengths, key, prompt_length))
    return key


class AttentionGroup:
    """Rows that attend in one call: query [G, Tq] and key [G, Tk] hold flat indices, right-padded.

    Row g has query_length[g] queries, after offset[g] keys of a prompt. Query j sees keys 0 to offset[g] + j,
    or fewer under a sliding window. Padding comes after the real keys, so the causal mask hides it. Flash
    attention takes the same rows without padding. The indices stay on the CPU; the ones that the chosen kind
    of attention needs are copied to the device at its first call.
    """

    def __init__(self, query, query_length, key, offset):
        self.query, self.query_length = query, query_length
        self.key, self.key_length = key, offset + query_length
        all_equal = bool((offset == offset[0]).all())
        self.offset = offset[:1] if all_equal else offset  # equal offsets share one mask
        self.device, self.masks = query.device, {}

    @cached_property
    def real(self):
        """Indices of the G x Tq queries that are not padding."""
        return length_mask(self.query_length).flatten().nonzero()[:, 0]

    @cached_property
    def padded(self):
        """For SDPA: `query`, `key` and `real`."""
        return [upload(index, self.device) for index in (self.query, self.key, self.real)]

    @cached_property
    def flat(self):
        """For flash attention: which tokens are queries, which are keys, and where rows start in both."""
        flat_query = self.query.flatten()[self.real]  # consecutive
        tokens = keys = slice(int(flat_query[0]), int(flat_query[-1]) + 1)
        if self.offset.any():  # prompts are keys of several rows, so keys are gathered
            keys = upload(self.key[length_mask(self.key_length, self.key.shape[1])], self.device)
        begins = torch.stack((cu_seqlens(self.query_length), cu_seqlens(self.key_length)))
        return tokens, keys, upload(begins, self.device)

    def attend_rows(self, window, q, k, v):
        """q [T, H, E], k and v [T, K, E] of all flat tokens -> [the real queries of this group, H, E]."""
        if packed_available(q):
            tokens, keys, begins = self.flat
            k, v = (x[keys] if tokens is keys else gather_rows(x, keys) for x in (k, v))
            return flash_packed(q[tokens], k, v, *begins, self.query.shape[1], self.key.shape[1], window)
        query, key, real = self.padded
        out = sdpa(gather_rows(q, query), gather_rows(k, key), gather_rows(v, key), self.mask(window))
        return gather_rows(out.flatten(0, 1), real)  # drop the padding of [G, Tq, H, E]

    def mask(self, window):
        """Which keys each query sees, [G or 1, 1, Tq, Tk] of bool; cached per window."""
        if window not in self.masks:
            device = self.device
            place = torch.arange(self.query.shape[1], device=device)[:, None]
            query_at = upload(self.offset, device)[:, None, None, None] + place  # [G or 1, 1, Tq, 1]
            key_at = torch.arange(self.key.shape[1], device=device)
            causal = key_at <= query_at
            self.masks[window] = causal if window is None else causal & (key_at > query_at - window)
        return self.masks[window]


def split_by_tokens(rollout, rows, budget):
    """Split rows (indices into a Rollout) into lists of at most `budget` tokens.

    Padding counts, as it does for attention without flash attention. Rows are sorted by question, then by
    response length, to keep padding small. A single row may exceed the budget.
    """
    batches = []
    for row in sorted(rows, key=lambda r: (int(rollout.question[r]), int(rollout.response_length[r]))):
        if not batches or padded_tokens(rollout, [*batches[-1], row]) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def padded_tokens(rollout, rows):
    """Tokens of a micro-batch: one prompt per question and all responses, each padded to the longest."""
    questions = len(set(rollout.question[rows].tolist()))
    prompts = questions * int(rollout.prompt_length[rows].max())
    return prompts + len(rows) * int(rollout.response_length[rows].max())


# ------------------------------------------------------------------------------------------------------------
# indices


def pad(prompts):
    """Lists of token ids -> (ids [B, T], right-padded with zeros; lengths [B])."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def length_mask(lengths, width=None):
    """[G, width] of bool, True before lengths[g] in row g. The default width is the longest, at least 1."""
    width = max(int(lengths.max()), 1) if width is None else width
    return torch.arange(width) < lengths[:, None]


def flat_index(start, lengths):
    """[G, longest] of int64: row g is start[g], start[g] + 1, ..., lengths[g] of them, then zero padding.

    >>> flat_index(torch.tensor([3, 4]), torch.tensor([1, 2])).tolist()
    [[3, 0], [4, 5]]
    """
    mask = length_mask(lengths)
    return (start[:, None] + torch.arange(mask.shape[1])) * mask


def key_index(prompt_start, prompt_length, input_start, input_length):
    """[B, Tp + R-1]: the flat indices of each row's keys: its prompt's, its own, then zero padding."""
    width = int(prompt_length.max()) + max(int(input_length.max()), 1)
    place = torch.arange(width)
    of_prompt, own = prompt_start[:, None] + place, (input_start - prompt_length)[:, None] + place
    index = torch.where(place < prompt_length[:, None], of_prompt, own)
    return index * length_mask(prompt_length + input_length, width)


def distinct(question):
    """The first row of each distinct question [Q], and for each row the index of its question [B].

    >>> distinct(torch.tensor([7, 3, 7]))
    (tensor([1, 0]), tensor([1, 0, 1]))
    """
    unique, which = torch.unique(question, return_inverse=True)
    first = torch.full_like(unique, len(which))
    return first.scatter_reduce_(0, which, torch.arange(len(which)), "amin"), which


def cu_seqlens(lengths):
    """The start of each row if all are concatenated, and the end: [G] -> [G + 1] of int32."""
    return F.pad(lengths.cumsum(0), (1, 0)).int()


def upload(x, device):
    """Copy a CPU tensor to a device from pinned memory, which does not synchronize."""
    if device.type != "cuda":
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)  # a strided x would be copied twice


def to_host(*numbers):
    """Numbers on the device as a list of floats: the host waits once for all of them."""
    return torch.stack([number.double() for number in numbers]).tolist()


def gather_rows(x, index):
    """x[index] over the first dimension, as an embedding look-up, whose backward pass is deterministic."""
    return F.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])

r"""TTRL, Test-Time Reinforcement Learning (arXiv 2504.16084), from scratch: questions without answers.

    python ttrl.py                                                  # the embedded model, minutes on a CPU
    torchrun --nproc-per-node 8 ttrl.py --model Qwen2.5-Math-1.5B   # AIME 2024, the paper's quick start

One step (`train_step`), with P questions, N votes and M trained samples:

    1  draw        P questions                                     draw_questions
    2  sample      N responses to each                             sample, rollout.generate
    3  extract     the answer in each response, or None            extract, grading/__init__.py
    4  vote        the most frequent answer is the pseudo-label    vote
       reward      1 for each response that agrees with it         rewards.vote_reward
    5  advantage   (r - mean) / std over the first M of the N      advantages
    6  learn       clipped policy gradient on those M              learn, grpo_loss

At a first reading stop at `generate` and at `run.learner(...)`: the one samples, the other returns the
log-probabilities of responses. Rollout, engine, packing, model and kernels are how.

What differs from the authors' code (PRIME-RL/TTRL at 3e2cc93), and why:
  - Answers are counted by mathematical value, not by spelling: 1/2 and 0.5 are one candidate.
  - A response without an answer never votes and is never rewarded (there, the empty answer could win).
  - Ties go to the answer with the lowest sample index, and the M trained samples are the first of the N.
    Neither depends on the number of GPUs.
  - A mini-batch is the responses to whole questions, on any number of GPUs (there, rows are first balanced by
    length over the ranks, and on 8 GPUs an update mixes responses to 2 to 4 questions).
  - The loss is divided by the response tokens of the mini-batch over all ranks, not averaged over pairs of
    responses: neither micro-batches nor ranks change the update.
  - The old log-probabilities are the sampler's (there, the actor computes them again, in one more forward
    pass). On a GPU sampler and learner round differently (logprob_gap), so the first ratios are only near 1.
  - The learning rate changes with every update, and the first update already moves the weights (there, it
    changes once per rollout batch and begins at 0).
  - The last, smaller batch of an epoch is used, not dropped.
  - label_accuracy grades the label itself (there, it is parsed as if it were a response, and often lost).
"""

import math
import os
import sys
import time
from array import array
from typing import NamedTuple

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

import grading
from distributed import ranks
from distributed.parallel import exchange_gradients
from distributed.plan import peak_memory_gb, planned_updates, steps_per_epoch
from distributed.ranks import is_rank0, print0
from distributed.shards import unshard
from kernels.packing import micro_batches, upload
from report.ledger import better
from report.metrics import (
    Stopwatch,
    Tally,
    compared_with_last,
    describe,
    evaluation_metrics,
    grade,
    mean,
    to_host,
    training_metrics,
)
from report.screen import counted_votes, progress, shown_responses, taught_nothing
from rewards import REWARDS, Group, toss, vote_reward  # noqa: F401  vote_reward is step 4 of README
from rollout import generate, row_keys
from support.config import LOWER_TEMPERATURES, configure, parse
from support.prompts import decode_response
from support.run import finish, log, open_out, open_run, refresh_sampler, save_checkpoint, save_evaluation

# -----------------------------------------------------------------------------------------------------------
# the algorithm: vote, advantage, loss (the reward is in rewards.py)


def vote(answers, kind="math"):
    """Majority vote over the answers to one question: (pseudo-label, classes). Paper, section 2.1.

    classes: lists of indices into `answers`, one list per class of equal answers, in the order of their first
    members. Equality is mathematical and not transitive (50% equals 0.5 and 50, yet 0.5 is not 50), so an
    answer joins the first class whose *first member* it equals. None is no answer and in no class. The label
    is the most frequent spelling in the largest class, None if nobody answered.

    >>> vote(["1/2", "3", "0.5", "1/2", None])
    ('1/2', [[0, 2, 3], [1]])
    """
    classes = grading.classes(answers, kind)
    return grading.common_spelling(answers, grading.majority(classes)), classes


def advantages(rewards):
    """Group-relative advantages, [P, M] -> [P, M]: (r - mean) / (std + 1e-6) per row, std with ddof 1.

    GRPO (arXiv 2402.03300). A row of equal rewards has advantage 0, and so has a row of one.

    >>> [round(a, 3) for a in advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))[0].tolist()]
    [1.5, -0.5, -0.5, -0.5]
    """
    if rewards.shape[1] < 2:
        return torch.zeros_like(rewards)
    advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    # The mean of equal numbers may differ from them in the last bit, and 1e-6 would let that count.
    return advantage.masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0)


def grpo_loss(logprob, old_logprob, advantage, mask, *, clip=0.2, dual_clip=3.0, ref_logprob=None, kl=0.0,
              token_count=None):  # fmt: skip
    """Clipped policy-gradient loss of response tokens, and what to report: (loss, {name: sum over tokens}).

    All tensors [B, R] (advantage may be [B, 1]); mask is True at response tokens. The loss is the sum over
    them divided by token_count, by default their number. With several micro-batches or ranks, token_count has
    to be that of the whole mini-batch. The objective is PPO's (arXiv 1707.06347, eq. 7), and for a negative
    advantage at least dual_clip * A (arXiv 1912.09729). The KL to a reference policy is the k3 estimator
    exp(d) - d - 1 with d = ref - new, at most 10 (GRPO, eq. 4); by expm1, as its digits would cancel in fp32.

    >>> one = torch.ones(1, 1)
    >>> loss, _ = grpo_loss(-0.5 * one, -one, one, one.bool())  # the ratio e^0.5 = 1.65 is clipped to 1.2
    >>> round(loss.item(), 4)
    -1.2
    """
    # Exponents are bounded, far outside of what the clips let through: exp() = inf would have a NaN gradient.
    log_ratio = torch.where(mask, logprob - old_logprob, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantage
    objective = torch.minimum(unclipped, clipped)
    objective = torch.where(advantage < 0, torch.maximum(objective, dual_clip * advantage), objective)
    sums = {
        "clip_fraction": ((clipped < unclipped) & mask).sum(),
        "kl_old_new": (torch.expm1(log_ratio) - log_ratio).sum(),
    }
    per_token = -objective
    if ref_logprob is not None:
        d = torch.where(mask, ref_logprob - logprob, 0.0).clamp(-20, 20)
        k3 = (torch.expm1(d) - d).clamp(max=10)
        per_token = per_token + kl * k3
        sums["kl"] = k3.sum()
    count = mask.sum() if token_count is None else token_count
    loss = torch.where(mask, per_token, 0.0).sum() / count
    return loss, {name: value.detach() for name, value in sums.items()}


# ----------------------------------------------------------------------------------------------------------
# one step


def train_step(run, step, last_labels):
    """One step of the algorithm, counted from 1: its metrics, and on rank 0 {file: its lines in this step}.

    last_labels: {question id: label of its last vote}, which rank 0 brings up to date.
    """
    c, watch = run.config, Stopwatch()
    drawn = draw_questions(step - 1, len(run.train_set), c.questions_per_step, c.seed)  # P indices
    questions = [run.train_set[i] for i in drawn]
    prompts = [run.train_prompts[i] for i in drawn]

    rollout = sample(run, prompts, c.votes, stream="train", step=step, temperature=c.temperature)
    watch.lap("sampling")
    responses = extract(run, rollout, questions, c.votes)  # rank 0: [P][N]
    votes, rewards, metrics = None, None, {}
    if is_rank0():
        votes, rewards, metrics = score(c, step, questions, responses, last_labels)
    rewards = torch.tensor(ranks.broadcast(rewards))  # [P, N]; rank 0 decides, so the ranks cannot disagree
    watch.lap("voting")
    advantage = advantages(rewards[:, : c.samples])  # [P, M]
    metrics.update(learn(run, rollout, advantage, step))
    watch.lap("learning")

    metrics.update(watch.metrics(), peak_memory_gb=peak_memory_gb())
    metrics["grading_timeouts"] = grading.grading_timeouts
    metrics["train_tokens_per_s"] = metrics.pop("trained_tokens", 0) / watch.seconds["learning"]
    lines = {}
    if is_rank0():
        sampled_tokens = sum(len(response.tokens) for group in responses for response in group)
        metrics["rollout_tokens_per_s"] = sampled_tokens / watch.seconds["sampling"]
        lines["votes.jsonl"] = counted_votes(step, questions, responses, votes)
        lines["rollouts.jsonl"] = shown_responses(step, questions, responses, votes, rewards.tolist())
    return {f"train/{name}": value for name, value in metrics.items()}, lines


def draw_questions(step, count, per_step, seed):
    """The questions of a step, counted from 0, as indices below `count`: each question once per epoch.

    Every epoch has an order of its own, by a hash of seed, epoch and question, and its last batch may be
    smaller. A pure function of its arguments, so a resumed run needs no state.

    >>> sorted(draw_questions(0, 5, 3, seed=0) + draw_questions(1, 5, 3, seed=0))
    [0, 1, 2, 3, 4]
    """
    epoch, batch = divmod(step, math.ceil(count / per_step))
    order = row_keys(seed, "draw", epoch, torch.arange(count), sample=0).argsort()  # no two keys are equal
    return order[batch * per_step : (batch + 1) * per_step].tolist()


def sample(run, prompts, samples, *, stream, step, temperature, top_p=1.0):
    """Sample this rank's share of the P x N responses: a Rollout, None for a rank without rows."""
    c = run.config
    rows = [(question, sample) for question in range(len(prompts)) for sample in range(samples)]
    # Ranks that share a sampler decode their rows together.
    rows, own = ranks.split_rows(rows, run.split.sampler_ranks)
    if not rows:  # an evaluation may have fewer rows than there are ranks
        return None
    rollout = generate(
        run.sampler,
        prompts,
        rows,
        max_new_tokens=c.max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        eos_ids=run.eos_ids,
        seed=c.seed,
        stream=stream,
        step=step,
        budget_tokens=run.rollout_tokens,
        engine=run.engine,
    )
    return rollout[torch.tensor(own, dtype=torch.int64)]


class Response(NamedTuple):
    """What a rank reports of one sampled response."""

    answer: str | None
    text: str
    tokens: array  # of token ids, 4 bytes each on their way to rank 0, about as many as the text
    finished: bool  # False: truncated at --max-new-tokens


def extract(run, rollout, asked, samples):
    """Find the answers in this rank's responses, and gather: on rank 0 a list of Response per question."""
    mine = []
    for row in range(len(rollout) if rollout else 0):
        ids, finished = rollout.response(row), bool(rollout.finished[row])
        text = decode_response(run.tokenizer, ids)
        question = asked[int(rollout.question[row])]
        answer = grading.extract_answer(text, question.kind, not finished, question.letters)
        mine.append(Response(answer, text, array("i", ids), finished))
    flat = ranks.gather(mine)
    if flat is None:
        return None
    return [flat[start : start + samples] for start in range(0, len(flat), samples)]


def vote_on(asked, responses):
    """(label, classes) of each question, from its responses."""
    groups = zip(asked, responses, strict=True)
    return [vote([response.answer for response in group], question.kind) for question, group in groups]


def score(c, step, asked, responses, last_labels):
    """On rank 0: votes [P] of (label, classes), rewards [P][N] and metrics of the responses [P][N].

    Metrics describe the vote whatever the reward is. But for --reward gold, training looks at no true answer.
    """
    votes = vote_on(asked, responses)
    records = [grade(*row) for row in zip(asked, responses, votes, strict=True)]
    rewards, coins = [], toss(c.seed, step, len(asked), c.votes)
    for question, group, (_, classes), tossed in zip(asked, responses, votes, coins, strict=True):
        answers, tokens = [response.answer for response in group], [response.tokens for response in group]
        rewards.append(REWARDS[c.reward](Group(answers, classes, question, tokens, tossed)))
    metrics = {**training_metrics(records, c.votes), **describe(responses)}
    metrics.update(compared_with_last(records, last_labels))
    metrics["reward"] = mean(map(mean, rewards))
    metrics["zero_variance_groups"] = mean(len(set(row[: c.samples])) == 1 for row in rewards)
    return votes, rewards, metrics


# ----------------------------------------------------------------------------------------------------------
# learning


def learn(run, rollout, advantage, step):
    """The optimizer updates of a step from this rank's rows of the rollout: advantage [P, M] -> metrics.

    One update per mini-batch, which is the first M responses to --questions-per-update questions.
    """
    c, count = run.config, len(run.train_set)
    update = planned_updates(c, count, step - 1)  # the number of the first one in the whole run
    total = planned_updates(c, count, c.epochs * steps_per_epoch(c, count))
    tally = Tally(run.device)
    for number, start in enumerate(range(0, len(advantage), c.questions_per_update)):
        stop = min(start + c.questions_per_update, len(advantage))
        if c.kl == 0 and not advantage[start:stop].any():
            continue  # nothing to learn, and momentum and weight decay alone must not move the weights
        in_mini_batch = (rollout.question >= start) & (rollout.question < stop) & (rollout.sample < c.samples)
        rows = in_mini_batch.nonzero()[:, 0]
        accumulate_gradients(run, rollout, rows, advantage, tally)
        (norm,) = to_host(unshard(torch.nn.utils.clip_grad_norm_(run.policy.parameters(), c.grad_clip)))
        if math.isfinite(norm):
            run.optimizer.param_groups[0]["lr"] = learning_rate(c, update + number, total)
            run.optimizer.step()
            tally.norms.append(norm)
        else:
            tally.skipped += 1
        run.optimizer.zero_grad(set_to_none=False)  # gradients stay views of DDP's buckets
    refresh_sampler(run)
    metrics = tally.metrics()
    if tally.norms:
        metrics["lr"] = run.optimizer.param_groups[0]["lr"]
    return metrics


def accumulate_gradients(run, rollout, rows, advantage, tally):
    """Forward and backward over a mini-batch: this rank's `rows` of the rollout, in micro-batches.

    The ranks hold different rows of it, in different numbers of micro-batches or none. But every rank has to
    make the same number of backward passes, so one that has no more repeats its shortest row, all masked.
    """
    batches = micro_batches(rollout, rows.tolist(), run.micro_batch_tokens)
    token_count = int(ranks.all_reduce({"tokens": int(rollout.response_length[rows].sum())})["tokens"])
    passes = int(ranks.all_reduce({"passes": len(batches)}, dist.ReduceOp.MAX)["passes"])
    shortest = int((rollout.prompt_length + rollout.response_length).argmin())
    for index in range(passes):
        is_real = index < len(batches)
        micro_batch = rollout[torch.tensor(batches[index] if is_real else [shortest])]
        mask = micro_batch.mask() & is_real
        with exchange_gradients(run.learner, is_last_pass=index == passes - 1):
            loss = micro_batch_loss(run, micro_batch, mask, advantage, token_count, tally)
            # The exchange averages over the ranks, but the loss of each is a share of one sum.
            (loss * ranks.world_size()).backward()


def micro_batch_loss(run, micro_batch, mask, advantage, token_count, tally):
    """The loss over the tokens of mask [B, R] in a micro-batch (a Rollout of B rows); `tally` takes notes."""
    c, device = run.config, run.device
    # Copies are queued, here and below: the GPU may still be busy with the micro-batch before.
    mask = upload(mask, device)
    old_logprob = upload(micro_batch.logprob[:, : mask.shape[1]], device)  # [B, R]
    trained = micro_batch.sample.clamp(max=c.samples - 1)  # a masked row may be any of the N samples
    row_advantage = upload(advantage[micro_batch.question, trained][:, None], device)  # [B, 1]
    # Shards are cast when they are gathered. No weight cache: it would keep bf16 copies of all weights.
    mixed = device.type == "cuda" and not run.split.sharded
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=False):
        logprob, entropy = run.learner(micro_batch, c.temperature)
        ref_logprob = None
        if run.reference:
            with torch.no_grad():
                ref_logprob, _ = run.reference(micro_batch, c.temperature)
    options = dict(clip=c.clip, ref_logprob=ref_logprob, kl=c.kl, token_count=token_count)
    loss, sums = grpo_loss(logprob, old_logprob, row_advantage, mask, **options)
    tally.add(sums, logprob.detach() - old_logprob, entropy.detach(), mask)
    return loss


def learning_rate(c, update, total):
    """Linear warm-up, then a cosine to 0. Updates count from 0, and the first already moves the weights."""
    warmup = max(1, round(c.warmup * total))
    if update < warmup:
        return c.lr * (update + 1) / warmup
    return c.lr * 0.5 * (1 + math.cos(math.pi * (update - warmup) / (total - warmup)))


# ----------------------------------------------------------------------------------------------------------
# evaluation


def evaluate(run, sampling=None):
    """Sample and grade every evaluation question: on rank 0 (metrics, one record per question).

    sampling: (samples per question, temperature, top-p), by default what the flags say. Every evaluation of a
    run samples with the same random numbers (step 0). So weights that did not move give the same responses,
    and the difference of two evaluations is a difference of pairs, with a smaller standard error.
    """
    c = run.config
    samples, temperature, top_p = sampling or (c.eval_samples, c.eval_temperature, c.eval_top_p)
    options = dict(stream="eval", step=0, temperature=temperature, top_p=top_p)
    rollout = sample(run, run.eval_prompts, samples, **options)
    responses = extract(run, rollout, run.eval_set, samples)
    if not is_rank0():
        return {}, []
    votes = vote_on(run.eval_set, responses)
    records = [grade(*row) for row in zip(run.eval_set, responses, votes, strict=True)]
    return {**evaluation_metrics(records, samples), **describe(responses)}, records


def evaluate_fully(run):
    """The evaluation of the flags, and for the before/after table what a lower temperature alone gives."""
    c = run.config
    metrics, records = evaluate(run)
    for name, sampling in LOWER_TEMPERATURES.items():
        if sampling[1:] == (c.eval_temperature, c.eval_top_p):
            continue
        other, other_records = evaluate(run, sampling)
        if "pass@1" in other:
            metrics.update({name: other["pass@1"], f"{name}_se": other["pass@1_se"]})
        for record, other_record in zip(records, other_records, strict=True):
            if "pass@1" in other_record:
                record[name] = other_record["pass@1"]
    return metrics, records


# ----------------------------------------------------------------------------------------------------------
# the loop


def train(run, state):
    """From `state` (step 0, or a checkpoint's) to the last step: the new state, None if time ran out."""
    c, entered, seconds_before = run.config, time.monotonic(), state["seconds"]
    per_epoch = steps_per_epoch(c, len(run.train_set))
    steps = c.epochs * per_epoch
    if state["step"] == 0:
        metrics, records = evaluate_fully(run)
        state["before"] = {"step": 0, "metrics": metrics, "records": records}
        state["best"] = better(None, 0, records)
        line = {"step": 0, "epoch": 0, **{f"eval/{name}": value for name, value in metrics.items()}}
        log(run, line, {}, state)
    bar = tqdm(total=steps, initial=state["step"], disable=not is_rank0(), unit="step", dynamic_ncols=True)
    for step in range(state["step"] + 1, steps + 1):
        metrics, lines = train_step(run, step, state["labels"])
        line = {"step": step, "epoch": math.ceil(step / per_epoch), **metrics}
        is_last = step == steps
        if is_last or step % c.eval_every == 0:
            bar.set_description("evaluating")
            metrics, records = evaluate_fully(run) if is_last else evaluate(run)
            line.update({f"eval/{name}": value for name, value in metrics.items()})
            state["after"] = {"step": step, "metrics": metrics, "records": records}
            state["best"] = better(state["best"], step, records)
        state["step"], state["seconds"] = step, seconds_before + time.monotonic() - entered
        count_updates(c, state, line, bar)
        log(run, line, lines, state)
        show_progress(bar, line, state)
        minutes = (time.monotonic() - entered) / 60
        out_of_time = ranks.broadcast(c.max_minutes is not None and minutes > c.max_minutes)
        if is_last or out_of_time or step % c.save_every == 0:
            save_checkpoint(run, state)
        if out_of_time and not is_last:
            bar.close()
            print0(
                f"stopped after {c.max_minutes} minutes at step {step} of {steps}; the same command goes on"
            )
            return None
    bar.close()
    return state


def count_updates(c, state, line, bar):
    """Add the step's updates to the state's; say so if some were skipped, or if a step taught nothing."""
    skipped = line["train/skipped_updates"]
    state["updates"] += line["train/updates"]
    state["skipped_updates"] += skipped
    if not is_rank0():
        return
    if skipped:
        bar.write(f"step {line['step']}: {skipped} updates skipped, their gradient was not finite")
    nothing = taught_nothing([line], c)
    state["empty_steps"] += bool(nothing)
    if nothing and state["empty_steps"] in (1, 10, 100, 1000):
        bar.write(nothing)


def show_progress(bar, line, state):
    newest = state.get("after", state["before"])
    bar.update()
    bar.set_description("")
    bar.set_postfix_str(progress(line, newest["metrics"]))


# ----------------------------------------------------------------------------------------------------------
# main


def main(argv=None):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    given = parse(argv, REWARDS)
    rank = int(os.environ.get("RANK", 0))
    try:  # whatever is wrong with flags, files or memory is one sentence here, before any work
        c = configure(given)
        device = ranks.start_processes(c.device)
        run = open_run(c, device, given)
        if c.dry_run:
            return
        state = open_out(run)
    except (ValueError, OSError) as error:
        if rank == 0 or not dist.is_initialized():  # once there is a group, all ranks raise the same
            print(f"ttrl.py: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        raise SystemExit(2) from None
    if c.eval_only:
        metrics, _ = evaluate_fully(run)
        if is_rank0():
            save_evaluation(run, metrics)
    elif train(run, state):
        if state["skipped_updates"] and not state["updates"]:
            count = state["skipped_updates"]
            reason = f"ttrl.py: the gradient of all {count} updates was not finite, nothing was learned"
            raise SystemExit(reason if is_rank0() else 1)
        finish(run, state)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a prompt may hold what the terminal cannot show
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    ranks.run_and_leave(main)

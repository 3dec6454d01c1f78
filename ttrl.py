r"""TTRL, Test-Time Reinforcement Learning (arXiv 2504.16084), from scratch: questions without answers.

    python ttrl.py                                                  # the embedded model, minutes on a CPU
    torchrun --nproc-per-node 8 ttrl.py --model Qwen2.5-Math-1.5B   # AIME 2024, the paper's quick start

One step (`train_step`), with P questions, N votes and M trained samples:

    1  draw        P questions                                     draw_questions
    2  sample      N responses to each                             sample, rollout.generate
    3  extract     the answer in each response, or None            extract, grading/
    4  vote        the most frequent answer is the pseudo-label    vote
       reward      1 for each response that agrees with it         vote_reward
    5  advantage   (r - mean) / std over the first M of the N      advantages
    6  learn       clipped policy gradient on those M              learn, grpo_loss

On a first reading, do not look inside `generate` and `run.learner(...)`: the one samples responses, the other
returns the log-probabilities of their tokens. How they do it is in rollout.py, model.py and kernels/.

What differs from the authors' code, and why: docs/differences.md.
"""

import math
from array import array

import torch

import grading
from distributed import parallel, ranks
from kernels import packing, sampler
from report import metrics
from rewards import OTHER_REWARDS, Group, Response, measure
from rollout import generate
from support.run import open_run

# ------------------------------------------------------------------------------------------------------------
# the algorithm: vote, reward, advantage, loss


def vote(answers, kind="math"):
    """Majority vote over the answers to one question: (pseudo-label, classes). Paper, section 2.1.

    classes: lists of indices into `answers`, one list per class of equal answers. Mathematical equality is
    not transitive (50% equals 0.5 and 50, yet 0.5 is not 50), so an answer joins the first class whose *first
    member* it equals; None equals nothing and joins no class. The largest class wins, on a tie the first. The
    label is its most frequent spelling, None if nobody answered.

    >>> vote(["1/2", "3", "0.5", "1/2", None])
    ('1/2', [[0, 2, 3], [1]])
    """
    classes = []
    for index, answer in enumerate(answers):
        for members in classes:
            if grading.same_answer(answers[members[0]], answer, kind):
                members.append(index)
                break
        else:
            if answer is not None:
                classes.append([index])
    return grading.common_spelling(answers, grading.majority(classes)), classes


def vote_reward(group):
    """TTRL's reward: 1 for the answers of the majority, 0 for others and for no answer. Paper, section 2.2.

    group: a rewards.Group, the answers [N] to one question, the classes of their vote, and more. The answers
    4 4 4 7 7 9 none 5 give the advantages 1.2076 for each 4 and -0.7246 for the rest.

    >>> vote_reward(Group(answers=["4", None, "7", "4"], classes=[[0, 3], [2]]))
    [1.0, 0.0, 0.0, 1.0]
    """
    majority = grading.majority(group.classes)
    return [float(index in majority) for index in range(len(group.answers))]


def gold_reward(group):
    """1 for the answers that equal the true one: the paper's upper bound ("leakage"), not TTRL."""
    return [float(metrics.is_right(group.question, answer)) for answer in group.answers]


def random_reward(group):
    """1 or 0 by a fair coin, whatever the answer: the control of Spurious Rewards (arXiv 2506.10947).

    >>> random_reward(Group(answers=["4", "4", None], classes=[[0, 1]], coins=[0.7, 0.2, 0.4]))
    [0.0, 1.0, 1.0]
    """
    return [float(coin < 0.5) for coin in group.coins]


# The names that --reward takes. Each is a function of a Group that returns one number per answer.
REWARDS = {"vote": vote_reward, "gold": gold_reward, "random": random_reward, **OTHER_REWARDS}


def advantages(rewards):
    """Group-relative advantages, [P, M] -> [P, M]: (r - mean) / (std + 1e-6) per row, std with ddof 1.

    GRPO (arXiv 2402.03300). A row of equal rewards has advantage 0, and so has a row of one.

    >>> [round(a, 3) for a in advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))[0].tolist()]
    [1.5, -0.5, -0.5, -0.5]
    """
    if rewards.shape[1] < 2:
        return torch.zeros_like(rewards)
    advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    # The mean of equal numbers may differ from them in the last bit; dividing by 1e-6 would count that.
    return advantage.masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0)


def grpo_loss(logprob, old_logprob, advantage, mask, *, clip=0.2, dual_clip=3.0, ref_logprob=None, kl=0.0,
              token_count=None):  # fmt: skip
    """Clipped policy-gradient loss of response tokens, and what to report: (loss, {name: sum over tokens}).

    All tensors [B, R] (advantage may be [B, 1]); mask is True at response tokens. The loss is the sum over
    them divided by token_count, by default their number. With several micro-batches or ranks, token_count has
    to be that of the whole mini-batch. The objective is PPO's (arXiv 1707.06347, eq. 7), and for a negative
    advantage at least dual_clip * A (arXiv 1912.09729). The KL to a reference policy is the k3 estimator
    exp(d) - d - 1 with d = ref - new, at most 10 (GRPO, eq. 4); expm1 keeps the digits of a small d.

    >>> one = torch.ones(1, 1)
    >>> loss, _ = grpo_loss(-0.5 * one, -one, one, one.bool())  # the ratio e^0.5 = 1.65 is clipped to 1.2
    >>> round(loss.item(), 4)
    -1.2
    """
    log_ratio = torch.where(mask, logprob - old_logprob, 0.0)
    # Bounded well outside the range that the clips allow: exp() = inf would have a NaN gradient. An infinite
    # log-probability becomes NaN, and the update is skipped: bounded, it would pass for a likely one.
    log_ratio = log_ratio.clamp(-20, 20) + 0 * log_ratio
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


# ------------------------------------------------------------------------------------------------------------
# one step


def train_step(run, step, last_labels):
    """One step of the algorithm, counted from 1: (its metrics, the groups and rewards [P][N] on rank 0).

    last_labels: {question id: label of its last vote}, updated in place on rank 0.
    """
    c, watch = run.config, metrics.Stopwatch()
    drawn = draw_questions(step - 1, len(run.train_set), c.questions_per_step, c.seed)  # P indices
    questions, prompts = [run.train_set[i] for i in drawn], [run.train_prompts[i] for i in drawn]

    rollout = sample(run, prompts, c.votes, stream="train", step=step, temperature=c.temperature)
    watch.lap("sampling")
    responses = extract(run, rollout, questions, c.votes, measure(run, rollout))  # [P][N] on rank 0, else []
    groups = vote_on(questions, responses, toss_coins(c.seed, step, len(questions), c.votes))
    rewards = [REWARDS[c.reward](group) for group in groups]  # [P][N]
    measured = metrics.of_training(groups, rewards, c.samples, last_labels)
    reward = torch.tensor(ranks.broadcast(rewards))  # rank 0 decides, so the ranks cannot disagree
    watch.lap("voting")
    advantage = advantages(reward[:, : c.samples])  # [P, M]
    measured.update(learn(run, rollout, advantage, step))
    watch.lap("learning")
    measured.update(metrics.of_machine(groups, watch, measured.pop("trained_tokens", 0)))
    return measured, groups, rewards


def draw_questions(step, count, per_step, seed):
    """The questions of a step, counted from 0, as indices below `count`: each question once per epoch.

    Every epoch has an order of its own, by a hash of seed, epoch and question, and its last batch may be
    smaller. A pure function of its arguments, so a resumed run needs no state.

    >>> sorted(draw_questions(0, 5, 3, seed=0) + draw_questions(1, 5, 3, seed=0))
    [0, 1, 2, 3, 4]
    """
    epoch, batch = divmod(step, math.ceil(count / per_step))
    order = sampler.row_keys(seed, "draw", epoch, torch.arange(count), sample=0).argsort()
    return order[batch * per_step : (batch + 1) * per_step].tolist()


def sample(run, prompts, n, *, stream, step, temperature, top_p=1.0):
    """Sample this rank's share of the P x n responses: a Rollout, None for a rank without rows."""
    c = run.config
    rows = [(question, sample) for question in range(len(prompts)) for sample in range(n)]
    # Ranks that share a sampler decode their rows together; `own` are this rank's among them.
    rows, own = ranks.split_rows(rows, c.sampler_ranks)
    rollout = None
    if rows:  # an evaluation may have fewer rows than there are ranks
        options = dict(temperature=temperature, top_p=top_p, max_new_tokens=c.max_new_tokens)
        options.update(eos_ids=run.eos_ids, seed=c.seed, stream=stream, step=step)
        rollout = run.repeat_rollout(generate, prompts, rows, **options)
        rollout = rollout[torch.tensor(own, dtype=torch.int64)]
    run.stop_together()  # where a signal, or --max-minutes, ends a run: the weights are those of a whole step
    return rollout


def extract(run, rollout, questions, n, measures=None):
    """Find the answer in each response of this rank, and gather: [P][n] of Response on rank 0, else [].

    measures: what `rewards.measure` returned, for rewards that read more of a response.
    """
    own = []
    for row in range(len(rollout) if rollout else 0):
        ids, finished = rollout.response(row), bool(rollout.finished[row])
        question = questions[int(rollout.question[row])]
        text, more = run.decode(ids), measures[row] if measures else {}
        answer = grading.extract_answer(text, question.kind, not finished, question.letters)
        logprob = array("f", rollout.logprob[row, : len(ids)].tolist())
        own.append(Response(answer=answer, text=text, finished=finished, tokens=array("i", ids),
                            logprob=logprob, **more))  # fmt: skip
    flat = ranks.gather(own)
    return [flat[start : start + n] for start in range(0, len(flat), n)]


def vote_on(questions, responses, coins=None):
    """Let the responses [P][n] to each question vote: a Group per question; [] without responses."""
    groups = []
    for index, (question, own) in enumerate(zip(questions, responses, strict=bool(responses))):
        answers = [response.answer for response in own]
        label, classes = vote(answers, question.kind)
        groups.append(Group(answers=answers, classes=classes, label=label, question=question, responses=own,
                            coins=coins[index] if coins else ()))  # fmt: skip
    return groups


def toss_coins(seed, step, questions, n):
    """The coins of --reward random, [P][n] in (0, 1): hashes, the same on any number of ranks."""
    question = torch.arange(questions).repeat_interleave(n)  # [P n]
    key = sampler.row_keys(seed, "reward", step, question, torch.arange(n).repeat(questions))
    return sampler.uniform(key, torch.zeros_like(key)).reshape(questions, n).tolist()


# ------------------------------------------------------------------------------------------------------------
# learning


def learn(run, rollout, advantage, step):
    """The optimizer updates of a step from this rank's rows of the rollout: advantage [P, M] -> metrics.

    One update per mini-batch: the first M responses to --questions-per-update questions.
    """
    c, tally = run.config, metrics.Tally(run.device)
    # nan everywhere if a sampled log-probability is not finite: then all updates are tried, and skipped
    advantage = advantage + 0 * ranks.all_reduce({"sum": float(rollout.logprob.sum())})["sum"]
    for number, start in enumerate(range(0, len(advantage), c.questions_per_update)):
        stop = start + c.questions_per_update
        if c.kl == 0 and not advantage[start:stop].any():
            continue  # nothing to learn, and momentum and weight decay alone must not move the weights
        in_mini_batch = (rollout.question >= start) & (rollout.question < stop) & (rollout.sample < c.samples)
        rows = in_mini_batch.nonzero()[:, 0]
        run.repeat_update(accumulate_gradients, rollout, rows, advantage, tally, step=step)
        norm = parallel.clip_gradients(run.policy, c.grad_clip)
        if run.health.may_update(norm, step, run.saved):
            run.optimizer.param_groups[0]["lr"] = run.schedule.learning_rate(step, number)
            run.optimizer.step()
            tally.updated(norm, run.optimizer.param_groups[0]["lr"])
        else:
            tally.skipped += 1
        run.optimizer.zero_grad(set_to_none=False)  # gradients stay views of DDP's buckets
    run.refresh_sampler()
    return tally.metrics()


def accumulate_gradients(run, rollout, rows, advantage, tally):
    """Forward and backward over a mini-batch: this rank's `rows` of the rollout, in micro-batches."""
    token_count = int(ranks.all_reduce({"tokens": int(rollout.response_length[rows].sum())})["tokens"])
    for micro_batch, mask, is_last in parallel.micro_batches(rollout, rows, run.config.micro_batch_tokens):
        with parallel.exchange_gradients(run.learner, is_last):
            loss = micro_batch_loss(run, micro_batch, mask, advantage, token_count, tally)
            # The exchange averages over the ranks, but each rank's loss is its share of one sum. A loss that
            # is not finite has gradients that are not, so that the update is skipped.
            (loss * ranks.world_size() * (1 + 0 * loss.detach())).backward()


def micro_batch_loss(run, micro_batch, mask, advantage, token_count, tally):
    """The loss over the tokens of mask [B, R] in a micro-batch (a Rollout); metrics go to `tally`."""
    c, device = run.config, run.device
    # Uploads are queued, here and below: the GPU may still be busy with the previous micro-batch.
    mask = packing.upload(mask, device)
    old_logprob = packing.upload(micro_batch.logprob[:, : mask.shape[1]], device)  # [B, R]
    trained = micro_batch.sample.clamp(max=c.samples - 1)  # a masked filler row may have sample >= M
    row_advantage = packing.upload(advantage[micro_batch.question, trained][:, None], device)  # [B, 1]
    with parallel.mixed_precision(device, c.sharded):
        logprob, entropy = run.learner(micro_batch, c.temperature)
        ref_logprob = None
        if run.reference:
            with torch.no_grad():
                ref_logprob, _ = run.reference(micro_batch, c.temperature)
    options = dict(clip=c.clip, ref_logprob=ref_logprob, kl=c.kl, token_count=token_count)
    loss, sums = grpo_loss(logprob, old_logprob, row_advantage, mask, **options)
    tally.add(sums, logprob.detach() - old_logprob, entropy.detach(), mask)
    return loss


# ------------------------------------------------------------------------------------------------------------
# evaluation, the loop


def evaluate(run, lower_temperatures=False):
    """Sample, vote on and grade every evaluation question: on rank 0 (metrics, a record per question).

    lower_temperatures: also report what a lower temperature alone would give. Every evaluation of a run uses
    the same random numbers (step 0), so weights that did not move give the same responses, and the change
    between two evaluations is a mean of paired differences, with a smaller standard error.
    """
    groups = {}
    for name, (n, temperature, top_p) in run.config.evaluations(lower_temperatures).items():
        options = dict(stream="eval", step=0, temperature=temperature, top_p=top_p)
        rollout = sample(run, run.eval_prompts, n, **options)
        groups[name] = vote_on(run.eval_set, extract(run, rollout, run.eval_set, n))
    return metrics.of_evaluation(groups)


def train(run, state):
    """From `state` (a new run's, or a checkpoint's) to the last step, in place; or till its votes settle.

    A step is finished when its updates are made. Then it is evaluated, if that is due, and logged: that part
    is made again if a run stops in it.
    """
    c, watch = run.config, metrics.Stopwatch(state["seconds"])
    for step in range(state["step"], run.schedule.steps + 1):
        if step > state["step"]:
            labels = dict(state["labels"])  # `state` stays as it is until the step is finished
            run.finish_step(state, step, labels, train_step(run, step, labels))
        is_last = step == run.schedule.steps or run.health.has_settled(state, run.schedule, run.bar.write)
        if state["unlogged"] is not None:
            evaluation = None
            if is_last or step % c.eval_every == 0:
                run.bar.say("evaluating")
                evaluation = evaluate(run, lower_temperatures=is_last or step == 0)
            state["seconds"] = watch.total()
            run.log(state, evaluation)
            if is_last or (step and step % c.save_every == 0):
                run.save_checkpoint(state)
        if is_last:
            break


def main(argv=None):
    run, state = open_run(argv, REWARDS)
    if run.config.eval_only:
        run.save_evaluation(evaluate(run)[0])
    else:
        with run.training(state):
            train(run, state)
        run.finish(state)


if __name__ == "__main__":
    ranks.run_and_leave(main)

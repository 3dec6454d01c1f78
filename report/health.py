"""The health of a run: what ends it, with exit code 3, and what is said while it goes on.

A run ends when its updates are not finite several times in a row, or when sampler and learner do not agree.
It keeps its last good checkpoint: none is written while they do not, or with weights that are not finite.
What may be a collapse is only said.
"""

import math
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from distributed.ranks import all_reduce, is_rank0, on_rank0
from distributed.shards import local
from report.metrics import mean, most_common_label
from support.pretrained import is_finite

SKIPPED_IN_A_ROW = 5  # updates; a single one may be an accident
APART_IN_A_ROW = 2  # steps
# The largest logprob_gap, in nats, by the type of the sampler's weights. Measured: fp32 on a CPU up to 6e-7;
# bf16 on an H200 5e-4 (the embedded model) and 1e-2 (1.5B, random weights), 1.4e-3 emulated on a CPU.
MOST_GAP = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# Signs of a collapse
AGREEMENT, ONE_LABEL, FEWEST_QUESTIONS = 0.9, 0.5, 8  # majority ratio; share of the questions asked so far
ENTROPY_LEFT = 0.1  # of the first step's; 0.16 is the least of the embedded model's run, which learns


class Health:
    """What went wrong in a row. It is the same on all ranks, since each knows the same numbers."""

    def __init__(self):
        self.skipped = 0  # updates
        self.apart, self.gap = 0, 0.0  # steps in which sampler and learner did not agree; the newest gap

    def may_update(self, norm, step, saved):
        """May an update with a gradient of this norm be made? Too many that may not end the run."""
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped == SKIPPED_IN_A_ROW:
            why = (
                f"the gradients of {self.skipped} updates in a row, up to step {step}, were not finite: "
                "the weights have diverged, or the machine is damaged; try a lower --lr, or another machine"
            )
            end(why, saved)
        return not self.skipped

    def compare(self, gap, step, dtype, saved):
        """Do sampler and learner agree in a step? If not twice in a row, the run ends.

        gap: its logprob_gap, None if it had nothing to learn. dtype: of the sampler's weights.
        """
        if gap is None:
            return
        limit, before, self.gap = MOST_GAP[dtype], self.gap, gap
        # Without a finite gap there was no update either, which `may_update` counts.
        self.apart = self.apart + 1 if limit < gap < math.inf else 0
        if self.apart == APART_IN_A_ROW:
            why = (
                "sampler and learner give the same tokens other log-probabilities: logprob_gap was "
                f"{before:.1e} and {gap:.1e} in the last two steps, up to step {step}, and should be below "
                f"{limit:g} ({str(dtype)[6:]}); a cache, position or mask of the sampler is wrong, which "
                "is a bug, or the machine is damaged"
            )
            end(why, saved)

    def doubt(self, policy):
        """Why the weights of a policy may be wrong, in words; None if nothing is known against them.

        All ranks have to call it.
        """
        finite = all(is_finite(local(parameter.detach())) for parameter in policy.parameters())
        if all_reduce({"infinite": not finite}, dist.ReduceOp.MAX)["infinite"]:
            return "weights are not finite"
        return f"sampler and learner do not agree (logprob_gap {self.gap:.1e})" if self.apart else None

    def may_save(self, policy, step, write):
        """May a checkpoint replace an older one? If not, write(text) says why."""
        doubt = self.doubt(policy)
        if doubt:
            write(f"step {step}: no checkpoint, because {doubt}")
        return not doubt

    def has_settled(self, state, schedule, write):
        """Does --stop-when-settled end the run after the newest step of `state`? All ranks have to call it.

        It is decided once, when the step is logged; a resumed run keeps to that. write: see `may_save`.
        """
        passes = schedule.config.stop_when_settled
        if passes is None:
            return False
        if state["unlogged"] is not None:
            ends_pass = state["step"] > 0 and state["step"] % schedule.steps_per_epoch == 0
            state["settled"] = ends_pass and on_rank0(lambda: have_settled(means_of_passes(state), passes))
        if state["settled"]:
            write(f"step {state['step']}: the votes have settled (--stop-when-settled {passes}): the end")
        return state["settled"]

    def may_finish(self, policy, state, saved):
        """End a run, too, that has nothing good to leave."""
        count = state["skipped_updates"]
        if count and not state["updates"]:
            end(f"the gradient of all {count} updates was not finite, nothing was learned", saved)
        doubt = self.doubt(policy)
        if doubt:
            end(f"{doubt}: no model is written", saved)


def end(why, saved):
    """Exit with code 3 on all ranks, with a sentence on rank 0. saved: (step, ...) of the checkpoint."""
    kept = f"the checkpoint of step {saved[0]} is kept" if saved else "there is no checkpoint"
    if is_rank0():
        tqdm.write(f"ttrl.py: {why}; {kept}", file=sys.stderr)  # above the bar
    raise SystemExit(3)


# ------------------------------------------------------------------------------------------------------------
# what is said while a run goes on


def warnings(line, state, c):
    """What to say after a step, from its line of metrics.jsonl. `state` counts and notes what was said."""
    warned = state.setdefault("warned", [])  # names of `signs`, each said once in a run
    if line["step"] == 0:
        doubts = first_doubts(state["before"]["metrics"], c)
        warned += doubts
        return list(doubts.values())
    step, skipped, nothing = line["step"], line["train/skipped_updates"], taught_nothing([line], c)
    said = [f"step {step}: {skipped} updates skipped because their gradient was not finite"] * (skipped > 0)
    state["empty_steps"] += bool(nothing)
    if nothing and state["empty_steps"] in (1, 10, 100, 1000):
        said.append(nothing)
    for name, text in signs(line, state, c).items():
        if text and name not in warned:
            warned.append(name)
            said += [] if any(text in other for other in said) else [f"step {step}: {text}"]
    return said


def signs(line, state, c):
    """What in a step may be a collapse: {name: what was measured and what to try, or None}."""
    agreement, entropy = line["train/majority_ratio"], line.get("train/entropy", math.nan)
    label, share = most_common_label(state["labels"])
    no_answer, truncated = line["train/no_answer"], line["train/truncated"]
    found = {"no answer": unanswered(no_answer, truncated, c)}
    found["truncated"] = truncated > 0.5 >= no_answer and cut_off(truncated, c)
    one_label = agreement > AGREEMENT and share > ONE_LABEL and len(state["labels"]) >= FEWEST_QUESTIONS
    found["one label"] = one_label and (
        f"{agreement:.0%} of the samples agree, and {share:.0%} of the questions have the same label, "
        f"{label!r:.30}: the policy may answer everything so; try a lower --lr or a higher --kl"
    )
    passes = max(2, c.epochs // 10)
    settled = c.stop_when_settled is None and have_settled(means_of_passes(state), passes)
    found["settled"] = settled and (
        f"the samples agreed no more in the last {passes} passes than in the {passes} before: the votes have "
        f"settled, right or wrong; --stop-when-settled {passes} would end the run here"
    )
    if math.isfinite(entropy):
        first = state.setdefault("first_entropy", entropy)
        found["entropy"] = entropy < ENTROPY_LEFT * first and (
            f"the entropy fell from {first:.2g} to {entropy:.2g} nats per token: the samples hardly differ "
            "any more, and teach little; try a lower --lr, a higher --temperature or a higher --kl"
        )
    return found


def note_agreement(agreement, epoch, majority_ratio, questions):
    """Add a step to {epoch: [sum of the majority ratios of its questions, their number]}, in place."""
    total, count = agreement.get(str(epoch), (0.0, 0))
    agreement[str(epoch)] = [total + majority_ratio * questions, count + questions]


def means_of_passes(state):
    """The mean majority ratio of each whole pass over the questions. Only whole passes can be compared."""
    sums = state["agreement"].values()
    most = max((count for _, count in sums), default=0)
    return [total / count for total, count in sums if 0 < count == most]


def have_settled(means, passes):
    """Have the votes settled: did the samples agree no more in the last `passes` passes than before?

    means: of `means_of_passes`. As many passes before are compared, which evens out the noise of sampling.

    >>> have_settled([0.5, 0.7, 0.8, 0.7, 0.75], passes=2), have_settled([0.5, 0.7, 0.8, 0.7, 0.9], passes=2)
    (True, False)
    """
    newest, before = means[-passes:], means[-2 * passes : -passes]
    return len(before) == passes and mean(newest) <= mean(before)


def unanswered(no_answer, truncated, c):
    """Why most responses have no answer, and what to try; None if most have one. Arguments are shares."""
    if no_answer <= 0.5:
        return None
    if truncated > 0.5:
        return cut_off(truncated, c)
    ask = "the prompt in the plan should ask for \\boxed{} (--prompt-suffix, --template)"
    return f"no answer was found in {no_answer:.0%} of the responses; {ask}"


def first_doubts(metrics, c):
    """What an evaluation says against learning from these questions: {name: text}, of one or none.

    metrics: of report.metrics.of_evaluation. Training never sees the true answers.
    """
    unheard = unanswered(metrics["no_answer"], metrics["truncated"], c)
    none_right = (
        "no response to any question with a known answer is right, and TTRL can only strengthen what a model "
        "gets right now and then: read some responses, and try easier questions or another model"
    )
    if unheard:
        return {"no answer": unheard}
    return {"none right": none_right} if metrics.get("pass@1") == 0 else {}


def cut_off(truncated, c):
    limit = f"--max-new-tokens {c.max_new_tokens}"
    return f"{truncated:.0%} of the responses were truncated at {limit}; try a larger limit"


def taught_nothing(lines, c):
    """Which of these steps (lines of metrics.jsonl) taught nothing, and why; None unless most did.

    A step teaches nothing if all trained samples of a question have the same reward: all advantages are 0.
    """
    empty = [line for line in lines if line["train/zero_variance_groups"] == 1]
    if 2 * len(empty) <= len(lines):
        return None
    which = f"{len(empty)} of {len(lines)} steps" if len(lines) > 1 else f"step {lines[0]['step']}"
    shares = [mean(line[f"train/{name}"] for line in empty) for name in ("no_answer", "truncated")]
    alike = "all samples of a question have the same reward; try other questions, or a higher --temperature"
    return f"{which} taught nothing: {unanswered(*shares, c) or alike}"

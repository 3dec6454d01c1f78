"""What a run has before its models: the settings, the questions, and the plan of memory and work."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from distributed.layout import Job, choose_layout
from distributed.machine import find_machine
from distributed.plan import print_plan
from distributed.provenance import HERE, SOURCES, fingerprint
from distributed.ranks import check_same, first_on_node, on_every_rank, print0
from model import ModelConfig
from support import questions
from support.config import Config
from support.hub import fetch_config
from support.pretrained import check_vocabulary
from support.prompts import encode_prompt, load_tokenizer, show_prompt
from support.schedule import Schedule
from support.untrusted import printable


@dataclass
class Inputs:
    """What a run has before its models."""

    config: Config  # with every flag of memory decided
    device: torch.device
    folder: Path  # of the model
    tokenizer: object
    eos_ids: list
    train_set: list  # of Question
    train_prompts: list  # of token ids
    eval_set: list
    eval_prompts: list

    @property
    def longest(self):
        """Tokens of the longest prompt and response."""
        return max(map(len, self.train_prompts + self.eval_prompts)) + self.config.max_new_tokens

    @property
    def most_rows(self):
        """Rows of the largest rollout, in training or evaluation, over all ranks."""
        c = self.config
        return max(c.questions_per_step * c.votes, len(self.eval_set) * c.eval_samples)

    @property
    def schedule(self):
        return Schedule(self.config, len(self.train_set))


def plan_run(c, device, given):
    """Load questions and tokenizer, decide the flags of memory, and print the plan: the Inputs.

    given: the flags that the user set, {field: value}. Raises ValueError for what cannot work.
    """
    check_same({"flags": dataclasses.asdict(c), "sources": SOURCES})
    folder = HERE / "tiny" / "model" if c.model == "tiny" else first_on_node(lambda: fetch_config(c.model))
    eval_set = first_on_node(lambda: questions.load(c.eval_data))
    train_set = eval_set
    if c.data != c.eval_data and not c.eval_only:
        train_set = first_on_node(lambda: questions.load(c.data))
    machine = find_machine(c, device)
    inputs = on_every_rank(lambda: prepare(c, device, machine, given, folder, train_set, eval_set))
    check_same({"questions": fingerprint(inputs)})
    return inputs


def prepare(c, device, machine, given, folder, train_set, eval_set):
    """The part of `plan_run` that needs no other rank."""
    model_config = ModelConfig.from_pretrained(folder)
    tokenizer, eos_ids = load_tokenizer(folder)
    check_vocabulary(model_config, tokenizer)
    evaluation = load_prompts(c, tokenizer, c.eval_data, eval_set)
    train = evaluation if train_set is eval_set else load_prompts(c, tokenizer, c.data, train_set)
    inputs = Inputs(c, device, folder, tokenizer, eos_ids, *train, *evaluation)
    check_against_data(inputs, model_config, machine)
    job = Job(c, model_config, machine, inputs.longest - c.max_new_tokens, inputs.most_rows)
    layout = choose_layout(job)
    inputs.config = layout.config
    print_plan(inputs, job, layout, given, show_prompt(tokenizer, inputs.train_prompts[0]))
    return inputs


def load_prompts(c, tokenizer, name, loaded):
    """(questions, prompts) of a question set. Prompts that are too long are named and left out, never cut."""
    kept, prompts, dropped = [], [], []
    options = dict(template=c.template, suffix=c.prompt_suffix, thinking=c.thinking)
    for question in loaded:
        ids = encode_prompt(tokenizer, question.prompt, kind=question.kind, **options)
        if len(ids) > c.max_prompt_tokens:
            dropped.append(question.id)
        else:
            kept.append(question)
            prompts.append(ids)
    limit = f"--max-prompt-tokens {c.max_prompt_tokens}"
    if dropped:
        print0(
            f"left out of {name}: {len(dropped)} prompts over {limit}: {', '.join(map(printable, dropped))}"
        )
    if not kept:
        raise ValueError(f"{name}: every prompt is longer than {limit}")
    return kept, prompts


def check_against_data(inputs, model_config, machine):
    """Raise ValueError for settings that do not go with these questions, this model or this many ranks."""
    c, longest = inputs.config, inputs.longest
    if longest > model_config.max_positions:
        raise ValueError(
            f"--max-new-tokens {c.max_new_tokens}: with the longest prompt that is {longest} tokens, "
            f"but {c.model} takes {model_config.max_positions} (max_position_embeddings)"
        )
    if c.eval_only:
        return
    if c.reward == "gold" and any(question.answer is None for question in inputs.train_set):
        raise ValueError(f"--reward gold: {c.data} has questions without an answer")
    if machine.ranks > c.votes:
        raise ValueError(
            f"--votes {c.votes}: fewer than the {machine.ranks} ranks, each needs a response to learn from"
        )

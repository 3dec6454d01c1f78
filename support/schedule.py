"""When a run does what: its steps, its optimizer updates and their learning rates."""

import math
from dataclasses import dataclass

from support.config import Config


@dataclass(frozen=True)
class Schedule:
    """Steps count from 1. The last step of an epoch may have fewer questions than the others.

    >>> schedule = Schedule(Config(questions_per_step=8, questions_per_update=2, epochs=3), question_count=10)
    >>> schedule.steps, schedule.updates
    (6, 15)
    """

    config: Config
    question_count: int

    @property
    def steps_per_epoch(self):
        return math.ceil(self.question_count / self.config.questions_per_step)

    @property
    def steps(self):
        return self.config.epochs * self.steps_per_epoch

    @property
    def updates(self):
        return self.updates_of(self.steps)

    def updates_of(self, steps):
        """Optimizer updates in the first `steps` steps."""
        c = self.config
        epochs, rest = divmod(steps, self.steps_per_epoch)
        full, last = divmod(self.question_count, c.questions_per_step)
        per_step = math.ceil(c.questions_per_step / c.questions_per_update)
        per_epoch = full * per_step + math.ceil(last / c.questions_per_update)
        return epochs * per_epoch + rest * per_step

    def learning_rate(self, step, number):
        """The learning rate of an update: its step, and its number in that step, from 0.

        Linear warm-up, then a cosine to 0. The first update already moves the weights.
        """
        c, total = self.config, self.updates
        update = self.updates_of(step - 1) + number
        warmup = max(1, round(c.warmup * total))
        if update < warmup:
            return c.lr * (update + 1) / warmup
        return c.lr * 0.5 * (1 + math.cos(math.pi * (update - warmup) / (total - warmup)))

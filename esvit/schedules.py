"""What learning rate, weight decay, EMA momentum and temperature hold at an optimizer step, in closed form.

Nothing is stored per step: any step can be asked for at any time, so a resumed run needs no schedule state.
The values are those of the paper's code (utils.cosine_scheduler and the temperature schedule of its losses):
the warm-up is a linspace that includes both of its ends, so its last step and the first cosine step both have the
full learning rate; a cosine never reaches its final value, because step S would be the first after the end.
"""

import math

from esvit.errors import OptionError
from esvit.records import StepValues

IMAGES_PER_BASE_RATE = 256  # base learning rates are given for a global batch of this many images


def scaled_learning_rate(base: float, global_batch: int) -> float:
    """Linear scaling rule: `base` is the learning rate for a global batch of 256 images."""
    return base * global_batch / IMAGES_PER_BASE_RATE


class Schedules:
    """The values of every optimizer step, counted from 0.

    epochs                              length of training
    steps_per_epoch                     optimizer steps (not micro-batches) in an epoch
    learning_rate                       peak, already scaled to the global batch
    warmup_learning_rate                learning rate of step 0 when there is a warm-up; not scaled
    final_learning_rate                 what the cosine tends to; not scaled
    warmup_epochs                       length of the linear warm-up of the learning rate
    weight_decay_start, _end            cosine over the whole of training
    teacher_momentum_start, _end        cosine over the whole of training, of the EMA
    teacher_temperature_start, _end     linear per epoch over the first teacher_temperature_warmup_epochs, then the end value
    freeze_last_layer_epochs            epochs in which the prototypes are not trained

    Raises OptionError for a warm-up that is negative or longer than training.
    """

    def __init__(
        self,
        *,
        epochs: int,
        steps_per_epoch: int,
        learning_rate: float,
        warmup_learning_rate: float,
        final_learning_rate: float,
        warmup_epochs: int,
        weight_decay_start: float,
        weight_decay_end: float,
        teacher_momentum_start: float,
        teacher_momentum_end: float,
        teacher_temperature_start: float,
        teacher_temperature_end: float,
        teacher_temperature_warmup_epochs: int,
        freeze_last_layer_epochs: int,
    ):
        if epochs < 1:
            raise OptionError("epochs", f"{epochs} epochs", "train for at least 1")
        if steps_per_epoch < 1:
            raise ValueError(f"an epoch needs at least one step, not {steps_per_epoch}")
        _check_warmup("schedule.warmup_epochs", warmup_epochs, epochs)
        _check_warmup("schedule.teacher_temperature_warmup_epochs", teacher_temperature_warmup_epochs, epochs)
        for option, value in (
            ("schedule.teacher_temperature_start", teacher_temperature_start),
            ("schedule.teacher_temperature_end", teacher_temperature_end),
        ):
            if value <= 0:
                raise OptionError(option, f"{value} is not a temperature", "use a number above 0, 0.04 for example")
        for option, value in (
            ("schedule.teacher_momentum_start", teacher_momentum_start),
            ("schedule.teacher_momentum_end", teacher_momentum_end),
        ):
            if not 0 <= value <= 1:
                raise OptionError(option, f"{value} is not between 0 and 1", "use a momentum near 1, 0.996 for example")
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = epochs * steps_per_epoch
        self.learning_rate = learning_rate
        self.warmup_learning_rate = warmup_learning_rate
        self.final_learning_rate = final_learning_rate
        self.warmup_steps = warmup_epochs * steps_per_epoch
        self.weight_decay_start = weight_decay_start
        self.weight_decay_end = weight_decay_end
        self.teacher_momentum_start = teacher_momentum_start
        self.teacher_momentum_end = teacher_momentum_end
        self.teacher_temperature_start = teacher_temperature_start
        self.teacher_temperature_end = teacher_temperature_end
        self.teacher_temperature_warmup_epochs = teacher_temperature_warmup_epochs
        self.freeze_last_layer_epochs = freeze_last_layer_epochs

    def at(self, step: int) -> StepValues:
        """Values of optimizer step `step`; steps beyond the end have those of the last one."""
        if step < 0:
            raise ValueError(f"steps count from 0, {step} is none")
        step = min(step, self.total_steps - 1)
        epoch = step // self.steps_per_epoch
        return StepValues(
            epoch=epoch,
            learning_rate=self._learning_rate(step),
            weight_decay=_cosine(self.weight_decay_start, self.weight_decay_end, step, self.total_steps),
            momentum=_cosine(self.teacher_momentum_start, self.teacher_momentum_end, step, self.total_steps),
            temperature=self._temperature(epoch),
            last_layer_frozen=epoch < self.freeze_last_layer_epochs,
        )

    def _learning_rate(self, step: int) -> float:
        if step < self.warmup_steps:
            return _linspace(self.warmup_learning_rate, self.learning_rate, step, self.warmup_steps)
        steps = self.total_steps - self.warmup_steps
        return _cosine(self.learning_rate, self.final_learning_rate, step - self.warmup_steps, steps)

    def _temperature(self, epoch: int) -> float:
        if epoch < self.teacher_temperature_warmup_epochs:
            start, end = self.teacher_temperature_start, self.teacher_temperature_end
            return _linspace(start, end, epoch, self.teacher_temperature_warmup_epochs)
        return self.teacher_temperature_end


def _linspace(start: float, end: float, index: int, count: int) -> float:
    """Entry `index` of `count` equally spaced values from `start` to `end`, both included; a single value is `start`, as in numpy."""
    if index == 0:
        return start
    if index == count - 1:
        return end
    return start + (end - start) * index / (count - 1)


def _cosine(start: float, end: float, step: int, steps: int) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def _check_warmup(option: str, warmup: int, epochs: int) -> None:
    if warmup < 0:
        raise OptionError(option, f"{warmup} epochs", "use 0 for no warm-up")
    if warmup > epochs:
        raise OptionError(option, f"a warm-up of {warmup} epochs is longer than the training of {epochs}", f"use at most {epochs}")

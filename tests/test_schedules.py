"""Schedules: ends, plateaus and refused lengths; the numbers themselves are pinned by tests/golden."""

import numpy as np
import pytest

from esvit.errors import OptionError
from esvit.schedules import Schedules, scaled_learning_rate


def schedules(**changes) -> Schedules:
    options = {
        "epochs": 10,
        "steps_per_epoch": 7,
        "learning_rate": 0.002,
        "warmup_learning_rate": 0.0,
        "final_learning_rate": 1e-6,
        "warmup_epochs": 3,
        "weight_decay_start": 0.04,
        "weight_decay_end": 0.4,
        "teacher_momentum_start": 0.996,
        "teacher_momentum_end": 1.0,
        "teacher_temperature_start": 0.04,
        "teacher_temperature_end": 0.07,
        "teacher_temperature_warmup_epochs": 4,
        "freeze_last_layer_epochs": 1,
    }
    return Schedules(**(options | changes))


def test_the_learning_rate_is_scaled_to_the_global_batch():
    assert scaled_learning_rate(0.0005, 512) == 0.001


def test_the_warmup_starts_at_its_start_and_reaches_the_peak_on_its_last_step():
    made = schedules()
    rates = [made.at(step).learning_rate for step in range(made.total_steps)]
    assert rates[0] == 0.0
    assert rates[20] == rates[21] == 0.002
    assert rates[:21] == sorted(rates[:21])
    assert rates[21:] == sorted(rates[21:], reverse=True)
    assert rates[-1] > 1e-6


def test_without_warmup_training_starts_at_the_peak():
    assert schedules(warmup_epochs=0).at(0).learning_rate == 0.002


def test_a_warmup_as_long_as_training_ends_at_the_peak():
    made = schedules(warmup_epochs=10)
    assert made.at(made.total_steps - 1).learning_rate == 0.002


def test_the_temperature_changes_by_epoch_and_has_its_end_value_in_the_last_warmup_epoch():
    made = schedules()
    by_epoch = [made.at(epoch * 7).temperature for epoch in range(10)]
    np.testing.assert_allclose(by_epoch, [0.04, 0.05, 0.06] + 7 * [0.07], rtol=1e-12)
    assert len({made.at(step).temperature for step in range(7)}) == 1


def test_one_warmup_epoch_of_the_temperature_has_the_start_value():
    made = schedules(teacher_temperature_warmup_epochs=1)
    assert [made.at(epoch * 7).temperature for epoch in range(3)] == [0.04, 0.07, 0.07]


def test_the_last_layer_is_frozen_in_the_first_epochs_only():
    made = schedules(freeze_last_layer_epochs=2)
    assert [made.at(epoch * 7).last_layer_frozen for epoch in range(4)] == [True, True, False, False]
    assert not schedules(freeze_last_layer_epochs=0).at(0).last_layer_frozen


def test_steps_beyond_the_end_have_the_values_of_the_last_step():
    made = schedules()
    assert made.total_steps == 70
    assert made.at(70) == made.at(10_000) == made.at(69)
    assert made.at(69).epoch == 9


@pytest.mark.parametrize("option", ["warmup_epochs", "teacher_temperature_warmup_epochs"])
@pytest.mark.parametrize("length", [11, -1])
def test_a_warmup_that_does_not_fit_into_training_is_refused(option, length):
    with pytest.raises(OptionError) as caught:
        schedules(**{option: length})
    assert caught.value.option == f"schedule.{option}"
    assert str(length) in str(caught.value)


def test_training_of_no_epochs_is_refused():
    with pytest.raises(OptionError, match="^epochs: "):
        schedules(epochs=0, warmup_epochs=0, teacher_temperature_warmup_epochs=0)


@pytest.mark.parametrize("change", [{"teacher_temperature_start": 0.0}, {"teacher_momentum_end": 1.01}])
def test_impossible_values_are_refused(change):
    with pytest.raises(OptionError, match=f"^schedule.{next(iter(change))}: "):
        schedules(**change)

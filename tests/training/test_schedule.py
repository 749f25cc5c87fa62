"""The learning rate over a run: by steps, and by the clock where that is further on."""

import pytest

from deltaw import TrainConfig
from deltaw.training.optim import lr_factor


def factors(config, steps, total, seconds_a_step=0.0):
    return [lr_factor(config, step, total, step * seconds_a_step) for step in range(steps)]


@pytest.mark.parametrize("warmup", [4, 0.2])
def test_warm_up_in_steps_or_as_a_share_then_linear_to_zero(warmup):
    found = factors(TrainConfig(warmup=warmup, schedule="linear"), 20, 20)
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, *(1 - i / 16 for i in range(16))])


def test_constant_and_cosine_after_warm_up():
    assert factors(TrainConfig(warmup=0, schedule="constant"), 5, 5) == [1.0] * 5
    found = factors(TrainConfig(warmup=0, schedule="cosine"), 4, 4)
    assert found == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_clock_that_ends_long_before_the_steps_still_warms_up_and_goes_to_zero(schedule):
    config = TrainConfig(warmup=0.1, schedule=schedule, minutes=1)
    found = factors(config, 61, 100_000, seconds_a_step=1.0)
    assert found.index(max(found)) == 6 and max(found) == 1.0  # a tenth of the minute
    assert found[:7] == sorted(found[:7]) and found[6:] == sorted(found[6:], reverse=True)
    assert found[-2] < 0.05 and found[-1] == 0.0


def test_a_clock_with_time_to_spare_changes_nothing():
    steps = factors(TrainConfig(warmup=0.1), 50, 50)
    assert factors(TrainConfig(warmup=0.1, minutes=60), 50, 50, seconds_a_step=0.5) == steps


def test_steps_of_warm_up_know_no_clock():
    found = factors(TrainConfig(warmup=10, minutes=1, schedule="linear"), 12, 1000, seconds_a_step=3.0)
    assert found[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert found[11] == pytest.approx(1 - 33 / 60)

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.errors import ConfigError
from kdpipe.losses import CONSTANT, Schedule
from kdpipe.training import TrainPlan

weights = st.floats(0, 100)


def over(schedule: Schedule, weight: float, steps: int) -> list[float]:
    return [schedule.weight_at(weight, step, steps) for step in range(steps)]


@given(weight=weights, steps=st.integers(1, 200))
def test_constant_is_the_weight(weight, steps):
    assert over(CONSTANT, weight, steps) == [weight] * steps


@given(weight=st.floats(0.1, 100), steps=st.integers(1, 300), fraction=st.floats(0.01, 1))
def test_warmup_rises_as_a_learning_rate_does(weight, steps, fraction):
    plan = TrainPlan(steps=steps, seed=0, learning_rate=weight, schedule="constant", warmup_fraction=fraction)
    expected = [plan.learning_rate_at(step) for step in range(steps)]
    assert over(Schedule(kind="warmup", fraction=fraction), weight, steps) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@given(weight=weights, to=weights, steps=st.integers(2, 200))
def test_the_others_go_from_the_weight_to_the_end_and_never_back(kind, weight, to, steps):
    found = over(Schedule(kind=kind, to=to), weight, steps)
    assert (found[0], found[-1]) == (weight, pytest.approx(to, abs=1e-12))
    sign = 1 if to >= weight else -1
    assert all(sign * (later - earlier) >= -1e-9 for earlier, later in itertools.pairwise(found))


def test_by_hand():
    assert over(Schedule(kind="warmup", fraction=0.5), 2.0, 8) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert over(Schedule(kind="linear", to=0.0), 2.0, 5) == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert over(Schedule(kind="cosine", to=1.0), 0.0, 5) == pytest.approx([0, 0.146447, 0.5, 0.853553, 1], abs=1e-6)
    assert over(Schedule(kind="linear", to=0.0), 2.0, 1) == [2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "step"}, "kind 'step' is unknown; the choices are constant, warmup, linear, cosine"),
        ({"kind": "warmup"}, "fraction is missing; warmup needs it"),
        ({"kind": "cosine"}, "to is missing; cosine needs it"),
        ({"kind": "linear", "to": 1.0, "fraction": 0.5}, "fraction does not go with linear"),
        ({"kind": "warmup", "to": 1.0, "fraction": 0.5}, "to does not go with warmup"),
        ({"to": 1.0}, "to does not go with constant"),
        ({"kind": "warmup", "fraction": 0.0}, "fraction is 0.0; expected a share of the steps"),
        ({"kind": "warmup", "fraction": float("nan")}, "fraction is nan"),
        ({"kind": "linear", "to": -1.0}, "to is -1.0; expected a weight of 0 or more"),
        ({"kind": "linear", "to": float("inf")}, "to is inf"),
    ],
)
def test_what_means_nothing_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**arguments)

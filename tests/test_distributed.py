from __future__ import annotations

import pytest

from kdpipe.distributed import rank, world_size
from kdpipe.errors import ConfigError


@pytest.fixture
def environment(monkeypatch):
    """Sets RANK and WORLD_SIZE; None: not there."""

    def set_to(rank, world_size):
        for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return set_to


def test_without_torchrun_a_process_is_alone(environment):
    environment(None, None)
    assert (rank(), world_size()) == (0, 1)


def test_under_torchrun_a_process_has_a_place(environment):
    environment("2", "4")
    assert (rank(), world_size()) == (2, 4)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (("1", None), "RANK is '1', WORLD_SIZE is not set"),
        ((None, "4"), "RANK is not set, WORLD_SIZE is '4'"),
        (("first", "4"), "RANK is 'first'"),
        (("0", "4.0"), "WORLD_SIZE is '4.0'"),
        (("-1", "4"), "RANK is '-1'"),
    ],
)
def test_half_of_torchruns_variables_are_refused(environment, found, said):
    environment(*found)
    for ask in (rank, world_size):
        with pytest.raises(ConfigError, match=said) as error:
            ask()
        assert "Unset them, or use torchrun" in str(error.value)

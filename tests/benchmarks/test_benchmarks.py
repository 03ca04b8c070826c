"""The benchmarks, small: that they run and print a table, not how fast they are."""

from __future__ import annotations

from benchmarks import read_store


def test_read_store(capsys):
    read_store.main(num_rows=600, num_classes=10, rounds=2)
    assert "| store |" in capsys.readouterr().out

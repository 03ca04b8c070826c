"""The benchmark, small: that it runs and prints its tables, not how fast it is."""

from __future__ import annotations

from benchmarks import write_store


def test_write_store(capsys):
    write_store.main(num_rows=600, num_classes=10, rounds=2, pairs=2, captured=[(600, 10)], us_per_row=1.0)
    printed = capsys.readouterr().out
    assert "| store.write |" in printed
    assert "| all, 2 |" in printed

"""Measurements, not tests: ratios of CPU time in interleaved rounds, with their spread. The tests run them, small."""

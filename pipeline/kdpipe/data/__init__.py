"""Prepared rows on disk: sources, inputs, labels and splits."""

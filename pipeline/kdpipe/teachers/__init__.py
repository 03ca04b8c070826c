"""Models that speak about rows: whatever framework, one protocol."""

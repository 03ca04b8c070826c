"""What the student sees of a row: some columns, standardised."""

from __future__ import annotations

from sklearn.compose import ColumnTransformer
from sklearn.preprocessing import StandardScaler


def columns(names: list[str]) -> ColumnTransformer:
    """Of these columns; the others are dropped."""
    return ColumnTransformer([("numbers", StandardScaler(), names)])

"""Which versions of a row the teacher speaks about. View 0 is the clean row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """How many augmented views a store holds beside the clean row, and from which seed."""

    count: int = 0
    seed: int = 0

    @property
    def num_views(self) -> int:
        """Length of a store's view axis: the clean row and `count` augmented ones."""
        return 1 + self.count

    def view_of_epoch(self, epoch: int) -> int:
        """The view that a student meets in `epoch` (from 0): 1 + epoch mod count, or the clean row."""
        return 1 + epoch % self.count if self.count else 0

"""A user's own map-style dataset, its examples joined by what the teacher said about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, default_collate

from kdpipe.errors import ConfigError
from kdpipe.store.target_store import TargetStore
from kdpipe.targets import Targets


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Examples of a batch as the dataset gave them, and their targets `[B, …]`."""

    examples: Sequence[Any]
    targets: Targets

    def __getitem__(self, index: int) -> Any:
        """What torch's own collate does with a batch. Raises `ConfigError`: it is not for this one."""
        raise ConfigError("the DataLoader lacks collate_fn=data.collate, data being the WithTargets")


class WithTargets(Dataset[tuple[Any, Targets]]):
    """`dataset[i]` together with the targets of sample `sample_ids[i]`; a batch's targets are read at once.

        data = WithTargets(dataset, open_store("data/targets/big"), sample_ids)
        for batch, targets in DataLoader(data, batch_size=64, shuffle=True, collate_fn=data.collate): ...

    Any sampler, order, number of workers or ranks is right, as targets are found by sample. `view` may be set between
    epochs. Random rows are read one by one: quick from an uncompressed store, slow from a compact one.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        store: TargetStore,
        sample_ids: Sequence[str],
        *,
        output: str = "logits",
        view: int = 0,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        """`collate` puts the examples of a batch together. Raises `IncompleteStoreError` for an unknown sample."""
        if len(dataset) != len(sample_ids):  # type: ignore[arg-type]
            raise ConfigError(
                f"the dataset has {len(dataset)} examples, but {len(sample_ids)} sample ids were given; "  # type: ignore[arg-type]
                "expected one id per example, in the same order"
            )
        store.array_names([output])
        self.view = view
        self._dataset, self._store, self._output, self._collate = dataset, store, output, collate
        self._rows = store.rows_of(sample_ids)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, Targets]:
        """An example and its targets `[1, …]`."""
        return self._dataset[index], self._read([index])

    def __getitems__(self, indices: list[int]) -> Fetched:
        """What `DataLoader` asks for a whole batch; `collate` takes it."""
        if hasattr(self._dataset, "__getitems__"):
            examples = self._dataset.__getitems__(indices)
        else:
            examples = [self._dataset[index] for index in indices]
        return Fetched(examples=examples, targets=self._read(indices))

    def collate(self, fetched: Fetched) -> tuple[Any, Targets]:
        """`collate_fn` of a DataLoader over this dataset: the collated examples, and targets `[B, …]`.

        Raises `ConfigError` for what is no batch of it, such as one of a `ConcatDataset`.
        """
        if not isinstance(fetched, Fetched):
            raise ConfigError(
                f"collate got a {type(fetched).__name__}; expected a batch that WithTargets gave as a whole: put the "
                "datasets together first and the targets beside them, and leave the DataLoader its batch_size"
            )
        return self._collate(list(fetched.examples)), fetched.targets

    def _read(self, indices: list[int]) -> Targets:
        return self._store.read(self._rows[indices], self.view, [self._output])[self._output]

"""A folder of image files, one folder per class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from kdpipe.data.sources.base import BLOCK_BYTES, BLOCK_ROWS, expect_folder, files_below, reading
from kdpipe.errors import DataError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFolder:
    """Image files `CLASS/…/name.png` below a folder, or `SPLIT/CLASS/…/name.png` with `split_folders`.

    Columns: `id`, the path below the folder; `image`, the file's bytes, not decoded; `label`, the class folder's name
    (null where the images of the folder, or split, lie in none); with `split_folders` also `split`. In the order of
    names, folder by folder.
    Files that match a pattern of `ignore`, and those beginning with `.` or `_`, are left out; any other file that is
    no image is an error.
    """

    def __init__(self, path: Path, split_folders: bool = False, ignore: Sequence[str] = ()) -> None:
        self.path = path
        self._levels = ("split", "label") if split_folders else ("label",)
        self._ignore = ignore

    @property
    def schema(self) -> pa.Schema:
        """Columns and types."""
        return pa.schema({"id": pa.string(), "image": pa.binary(), **dict.fromkeys(self._levels, pa.string())})

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The images in order, read when they are asked for. Raises `DataError` naming the file."""
        expect_folder(self.path, "a folder of images, CLASS/name.png")
        if "split" in self._levels:
            self._check_splits()
        first_of: dict[str, tuple[str, str | None]] = {}
        rows: list[tuple[str | bytes | None, ...]] = []
        num_bytes = num_rows = 0
        for name in files_below(self.path, ENDINGS, self._ignore):
            encoded = self._encoded(name)
            if rows and (num_bytes + len(encoded) > BLOCK_BYTES or len(rows) == BLOCK_ROWS):
                yield self._batch(rows)
                rows, num_bytes = [], 0
            *split, label = self._folders(name)
            first, first_label = first_of.setdefault("/".join(map(str, split)), (name, label))
            if (first_label is None) != (label is None):
                raise self._beside(name if label is None else first)
            rows.append((name, encoded, *split, label))
            num_bytes += len(encoded)
            num_rows += 1
        if not num_rows:
            raise DataError(f"{self.path} holds no image ({', '.join(ENDINGS)}); expected CLASS/name.png")
        yield self._batch(rows)

    def _check_splits(self) -> None:
        """Raise `DataError` where images lie in folders, but none in a class folder of a split."""
        deepest = 0
        for name in files_below(self.path, ENDINGS, self._ignore):
            deepest = max(deepest, name.count("/"))
            if deepest >= 2:
                return
        if deepest == 1:
            raise DataError(
                f"{self.path} has one level of folders only; with split_folders expected SPLIT/CLASS/name.png. Where "
                "its folders are classes, leave data.source.split_folders out and give data.splits.shares."
            )

    def _encoded(self, name: str) -> bytes:
        with reading(self.path / name):
            encoded = (self.path / name).read_bytes()
        if not encoded:
            raise DataError(f"{self.path / name} is empty; expected an image. Repair or remove it.")
        return encoded

    def _folders(self, name: str) -> list[str | None]:
        """The class of an image, after its split where there are splits."""
        folders: list[str | None] = [*name.split("/")[:-1]]
        if len(self._levels) == 2 and not folders:
            raise DataError(f"{self.path / name} lies in no split's folder; expected SPLIT/CLASS/name.png")
        return [*folders, None][: len(self._levels)]

    def _beside(self, name: str) -> DataError:
        return DataError(
            f"{self.path / name} lies beside class folders; expected every image in one (CLASS/name.png), or none "
            "where there are no labels. Move it elsewhere, or name it in data.source.ignore."
        )

    def _batch(self, rows: list[tuple[str | bytes | None, ...]]) -> pa.RecordBatch:
        columns = zip(*rows, strict=True)
        arrays = [pa.array(values, each.type) for values, each in zip(columns, self.schema, strict=True)]
        return pa.record_batch(arrays, schema=self.schema)

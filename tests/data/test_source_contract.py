"""Every source passes the contract that users run on their own."""

from __future__ import annotations

import gzip
import io
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kdpipe.data.sources import HuggingFace, ImageFolder, NumPy, Synthetic, Table, TextFile
from kdpipe.testing import SourceContract

SIZE = 2**16
"""Bytes of a row of a large source."""
MANY = 2 * SourceContract.max_block_bytes // SIZE + 8


def table_of(rows):
    return pa.table(
        {
            "id": [f"r{i}" for i in rows],
            "number": pa.array([i * i for i in rows], pa.int64()),
            "text": [f"row {i}" for i in rows],
        }
    )


def large_table():
    return pa.table({"id": pa.array(range(MANY)), "text": ["x" * SIZE] * MANY})


class FileContract(SourceContract):
    """A table in one file."""

    id_column = "id"
    name = ""

    @staticmethod
    def write(table, path):
        raise NotImplementedError

    def source(self, folder, rows):
        self.write(table_of(rows), folder / self.name)
        return Table(folder / self.name, batch_rows=3)

    def large(self, folder):
        self.write(large_table(), folder / self.name)
        return Table(folder / self.name)


class TestParquet(FileContract):
    name = "rows.parquet"
    write = staticmethod(pq.write_table)


class TestCsv(FileContract):
    name = "rows.csv"
    write = staticmethod(pa.csv.write_csv)


class TestPackedCsv(FileContract):
    name = "rows.csv.gz"

    @staticmethod
    def write(table, path):
        with gzip.open(path, "wb", compresslevel=1) as file:
            pa.csv.write_csv(table, file)


class TestJsonLines(FileContract):
    name = "rows.jsonl"

    @staticmethod
    def write(table, path):
        path.write_text("".join(f"{row}\n" for row in table.to_pylist()).replace("'", '"'))


class TestPackedJsonLines(TestJsonLines):
    name = "rows.jsonl.gz"

    @staticmethod
    def write(table, path):
        with gzip.open(path, "wt", compresslevel=1) as file:
            file.writelines(f"{row}\n".replace("'", '"') for row in table.to_pylist())


class TestFeather(FileContract):
    name = "rows.feather"
    write = staticmethod(pa.feather.write_feather)


class TestArrowStream(FileContract):
    name = "rows.arrow"

    @staticmethod
    def write(table, path):
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)


class TestFolderOfParquet(SourceContract):
    """Rows in three files, and what a job leaves beside them."""

    id_column = "id"

    def source(self, folder, rows):
        for number, start in enumerate(range(0, len(rows), 3)):
            pq.write_table(table_of(rows[start : start + 3]), folder / f"part-{number}.parquet")
        (folder / "_SUCCESS").touch()
        return Table(folder)

    def large(self, folder):
        for name in "ab":
            pq.write_table(large_table().slice(0, MANY // 2), folder / f"{name}.parquet")
        return Table(folder)


class TestImageFolder(SourceContract):
    id_column = "id"

    def source(self, folder, rows):
        for number in rows:
            path = folder / ("even" if number % 2 == 0 else "odd") / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((2, 3, 3), number, np.uint8)).save(path)
        return ImageFolder(folder)

    def large(self, folder):
        file = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
        Image.fromarray(noise).save(file, "BMP")
        (folder / "noise").mkdir()
        for number in range(2 * self.max_block_bytes // len(file.getvalue()) + 2):
            (folder / "noise" / f"{number}.bmp").write_bytes(file.getvalue())
        return ImageFolder(folder)


class TestImageFolderByContent(TestImageFolder):
    id_column = None
    content = ("image",)


class TestLines(SourceContract):
    content = ("text",)

    def source(self, folder, rows):
        (folder / "rows.txt").write_text("".join(f"row {i}\n" for i in rows))
        return TextFile(folder / "rows.txt")

    def large(self, folder):
        (folder / "rows.txt").write_text(("x" * SIZE + "\n") * MANY)
        return TextFile(folder / "rows.txt")


class TestParagraphs(SourceContract):
    content = ("text",)

    def source(self, folder, rows):
        with gzip.open(folder / "rows.txt.gz", "wt") as file:
            file.write("\n\n".join(f"row {i}\nof two lines" for i in rows))
        return TextFile(folder / "rows.txt.gz", documents="paragraphs")

    def large(self, folder):
        (folder / "rows.txt").write_text(("x" * SIZE + "\n\n") * MANY)
        return TextFile(folder / "rows.txt", documents="paragraphs")


class TestWholeFiles(SourceContract):
    id_column = "id"

    def source(self, folder, rows):
        for i in rows:
            (folder / f"{i}.txt").write_text(f"row {i}\n\nof three lines\n")
        return TextFile(folder, documents="files")

    def large(self, folder):
        for i in range(MANY):
            (folder / f"{i}.txt").write_text("x" * SIZE)
        return TextFile(folder, documents="files")


class TestNpz(SourceContract):
    id_column = "key"

    def source(self, folder, rows):
        numbers = np.array(rows)
        arrays = {"key": numbers.astype("<U4"), "image": np.repeat(numbers, 6).reshape(-1, 2, 3).astype(np.uint8)}
        np.savez_compressed(folder / "rows.npz", **arrays)
        return NumPy(folder / "rows.npz")

    def large(self, folder):
        np.savez_compressed(folder / "rows.npz", x=np.zeros((MANY, SIZE // 4), np.float32))
        return NumPy(folder / "rows.npz")


class TestNpyFolder(SourceContract):
    def source(self, folder, rows):
        np.save(folder / "x_train.npy", np.array(rows, np.float32))
        np.save(folder / "y_train.npy", np.array(rows) % 2 == 0)
        return NumPy(folder, columns={"x": "x_train", "label": "y_train"})

    def large(self, folder):
        np.save(folder / "x.npy", np.zeros((MANY, SIZE), np.uint8))
        return NumPy(folder)


class TestSynthetic(SourceContract):
    id_column = "id"

    def source(self, folder, rows):
        columns = {"x": {"kind": "normal"}, "text": {"kind": "text", "length": [1, 9], "words": ["a", "b", "c"]}}
        return Synthetic(num_rows=len(rows), columns=columns)

    def large(self, folder):
        return Synthetic(num_rows=MANY, columns={"text": {"kind": "text", "length": 1, "words": ["x" * SIZE]}})


class TestHuggingFace(SourceContract):
    id_column = "id"
    datasets = staticmethod(lambda: pytest.importorskip("datasets"))

    def source(self, folder, rows):
        self.datasets().Dataset(table_of(rows)).save_to_disk(folder / "saved")
        return HuggingFace(folder / "saved")

    def large(self, folder):
        self.datasets().Dataset(large_table()).save_to_disk(folder / "saved")
        return HuggingFace(folder / "saved")


# The contract itself


class Broken:
    """Rows of a list, in one block each, but for what is wrong with them."""

    def __init__(self, rows, wrong):
        self.rows, self.wrong, self.passes = rows, wrong, 0
        self.shared = iter(self._blocks())

    def batches(self):
        self.passes += 1
        return self.shared if self.wrong == "one pass only" else self._blocks()

    def _blocks(self):
        for place, row in enumerate(self.rows):
            number = {"counts passes": row + 100 * self.passes, "names places": place}.get(self.wrong, row)
            kind = pa.float64() if self.wrong == "changes types" and place else pa.int64()
            yield pa.record_batch({"number": pa.array([number], kind)})


def broken_contract(wrong):
    class TestBroken(SourceContract):
        max_block_bytes = 50

        def source(self, folder, rows):
            if wrong == "no source":
                return object()
            return Broken([*rows, 99] if wrong == "a row too many" else rows, wrong)

        def large(self, folder):
            if wrong == "in one block":
                return InOneBlock()
            return self.source(folder, range(20))

    return TestBroken()


class InOneBlock:
    def batches(self):
        yield pa.record_batch({"number": pa.array(range(20))})


CONTRACT = [name for name in vars(SourceContract) if name.startswith("test_")]


def failures(contract, folder):
    failed = set()
    for name in CONTRACT:
        (folder / name).mkdir()
        try:
            getattr(contract, name)(folder / name)
        except Exception:
            failed.add(name)
    return failed


def test_a_source_without_fault_fails_nowhere(tmp_path):
    assert failures(broken_contract(None), tmp_path) == set()


@pytest.mark.parametrize(
    ("wrong", "test"),
    [
        ("no source", "test_it_is_a_source"),
        ("a row too many", "test_there_is_a_row_for_each_number"),
        ("one pass only", "test_every_pass_gives_the_same_rows"),
        ("one pass only", "test_two_passes_at_once_do_not_disturb_each_other"),
        ("counts passes", "test_every_pass_gives_the_same_rows"),
        ("changes types", "test_columns_and_types_are_the_same_in_every_block"),
        ("in one block", "test_blocks_are_bounded"),
    ],
)
def test_the_contract_finds_faults(tmp_path, wrong, test):
    assert test in failures(broken_contract(wrong), tmp_path)


def test_the_contract_finds_rows_that_depend_on_their_place(tmp_path):
    """Named by their place, rows have the same contents in any order, but not with others before them."""

    class TestPlaces(SourceContract):
        id_column = "place"

        def source(self, folder, rows):
            pq.write_table(pa.table({"place": range(len(rows)), "number": rows}), folder / "rows.parquet")
            return Table(folder / "rows.parquet")

        def large(self, folder):
            return self.source(folder, range(3))

    assert failures(TestPlaces(), tmp_path) >= {
        "test_rows_do_not_depend_on_their_order",
        "test_rows_do_not_depend_on_others",
        "test_growth_is_appended",
    }


OF_ONES_OWN = """
import pyarrow as pa
from kdpipe.testing import SourceContract


class Letters:
    def __init__(self, rows):
        self.rows = rows

    def batches(self):
        yield pa.RecordBatch.from_pydict({"text": [chr(65 + row) * 1000 for row in self.rows]})


class TestLetters(SourceContract):
    def source(self, folder, rows):
        return Letters(rows)

    def large(self, folder):
        return Letters([0] * 70_000)
"""


def test_users_run_it_on_their_own_and_see_what_was_found(tmp_path):
    (tmp_path / "test_letters.py").write_text(OF_ONES_OWN)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 failed, 9 passed" in found.stdout, found.stdout + found.stderr
    assert re.search(r"assert 70\d{6} <= 33554432", found.stdout), found.stdout

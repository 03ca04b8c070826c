"""Wrong inputs through the real command line: one message, exit status 1, and nothing already written is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdpipe_stages.cli import run
from projects import cache, fails, make_project, params, project_in, tree, write_params
from real_processes import committed_rows, work_folders

processes = multiprocessing.get_context("spawn")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with its rows prepared; the current folder, as for a user."""
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(["prepare-data"]) == 0
    return tmp_path


@pytest.fixture
def cached(folder):
    """A project with a complete store."""
    cache(folder)
    return folder


def change(folder, *path, value):
    """Set one leaf of params.yaml."""
    changed = params()
    section = changed
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    write_params(folder, changed)


def replace_rows(folder, **columns):
    path = folder / "data" / "raw" / "digits.parquet"
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, path)


def test_what_prepared_rows_lack_is_said_at_once(folder, capsys):
    table = pq.read_table(folder / "data" / "raw" / "digits.parquet")
    splits, labels = (table[name].to_pylist() for name in ("split", "label"))
    splits = [None if row < 20 else split for row, split in enumerate(splits)]
    labels = [None if (split, label) == ("train", 7) else label for split, label in zip(splits, labels, strict=True)]
    replace_rows(folder, split=pa.array(splits), label=pa.array(labels))
    change(folder, "evaluate", value={"split": "tset"})
    capsys.readouterr()
    assert run(["prepare-data"]) == 0
    said = capsys.readouterr().err
    assert "; 20 of no split, which are not used" in said
    assert re.search(r"warning: evaluate\.split: there is no split 'tset'; prepared are .*train", said)
    assert "no row of split 'train' has the label 7" in said
    change(folder, "evaluate", value={"split": "train"})
    replace_rows(folder, split=pa.array(["train"] * len(splits)), label=table["label"])
    assert run(["prepare-data"]) == 0
    assert "no split" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("student", "lable_weight"), 1, "student.lable_weight: unknown key .* did you mean 'label_weight'"),
        (("student", "seeds"), "many", 'student.seeds: expected a whole number \\(found "many"\\)'),
        (("student", "seeds"), True, r"student\.seeds: expected a whole number \(found true\)"),
        (("student", "labelled_rows"), "150", r"student\.labelled_rows: expected a whole number"),
        (("student", "losses"), {}, r"student\.losses: expected a list \(found \{\}\)"),
        (("student", "train"), None, r"student\.train: expected a mapping \(found null\)"),
        (("student", "train"), {"epochs": 0}, "student.train.epochs: .*greater than 0"),
        (("student", "model", "hiden"), [8], r"student\.model\.hiden: .* does not take it; it takes .*hidden"),
        (("student", "model", "hidden"), "wide", r"student\.model\.hidden: .*list"),
        (("student", "model", "factory"), "kdpipe.models.mlp:MPL", "has no 'MPL'; it has MLP"),
        (("student", "model", "factory"), "kdpipe.modles:MLP", "there is no module 'kdpipe.modles'"),
        (
            ("student", "losses"),
            [{"factory": "kdpipe.losses:ForwardKL", "teacher": "bigg"}],
            "no teacher 'bigg'; .*big",
        ),
        (
            ("student", "losses"),
            [{"factorry": "kdpipe.losses:ForwardKL", "teacher": "big"}],
            r"student\.losses\.0\.factory: missing; student\.losses\.0\.factorry: .* did you mean 'factory'\?",
        ),
        (
            ("student", "losses", 0, "tempratur"),
            4,
            r"losses\.0\.tempratur: .* it takes .*; did you mean 'temperature'\?",
        ),
        (("student", "losses", 0, "wieght"), 4, r"student\.losses\.0\.wieght: .*; did you mean 'weight'\?"),
        (("student", "losses", 0, "temperature"), "4", r'losses\.0\.temperature: expected a number \(found "4"\)'),
        (("teachers", "big", "modl"), {}, r"teachers\.big\.modl: unknown key .*; did you mean 'model'\?"),
        (("teachers", "big", "train", "epoch"), 2, r"teachers\.big\.train\.epoch: unknown key .* 'epochs'\?"),
        (("teachers",), {}, "teachers: empty; expected at least one"),
        (("targets", "big", "encodng"), "topk", r"targets\.big\.encodng: unknown key .*; did you mean 'encoding'\?"),
        (("targets",), {"bigg": {}}, r"targets\.bigg: .* the teachers are big; did you mean 'big'\?"),
        (("targets", "big"), None, r"targets\.big: expected a mapping \(found null\)"),
        (("targets", "big", "min_k"), 2, r"targets\.big\.min_k: encoding 'dense' has no such parameter"),
        (("views",), {"cuont": 3}, r"views\.cuont: unknown key .*; did you mean 'count'\?"),
        (("data", "source", "batch_row"), 3, r"data\.source\.batch_row: .*; did you mean 'batch_rows'\?"),
        (("student", "baselines"), ["label"], "labels_only"),
        (("targets", "big", "dtype"), "float8", "float16"),
        (("views",), {"count": 3}, r"views\.count is 3, but there is no views\.transform"),
        (("evaluat",), {}, "evaluat: unknown key"),
        (("task", "shape"), [8, 8, 2], "1 or 3 channels"),
        (("task", "shape"), [8, 8], r"task\.shape\.2: missing \(found \[8, 8\]\)"),
    ],
)
def test_typos_in_params_name_the_key_and_the_choices(folder, capsys, path, value, message):
    before = tree(folder / "data" / "prepared")
    change(folder, *path, value=value)
    found = fails(capsys, "check")
    assert _matches(message, found)
    assert not _PYTHON.search(found), found
    assert tree(folder / "data" / "prepared") == before


_PYTHON = re.compile(r"Section|TypeError|<class|NoneType|Traceback|\bNone\b|\bTrue\b|instance of|Factory\(")
"""What says more about kdpipe's inside than about params.yaml."""


def _matches(pattern, text):
    assert re.search(pattern, text, re.DOTALL), text
    return True


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("data", "columns", "label"), "lable", "there is no column 'lable'; the source has id, image, label, split"),
        (("task", "num_classes"), 5, r"labels must lie in 0\.\.4"),
        (("task", "column"), "picture", "there is no column 'picture'"),
        (("evaluate",), {"split": "tset"}, "evaluate.split: there is no split 'tset'; prepared are test, train"),
        (("student", "distil_on"), ["trian"], "student.distil_on: there is no split 'trian'"),
        (("student", "labelled_rows"), 15000, "labels for 15000 rows were asked"),
        (("targets", "big", "outputs"), ["logits", "haed"], r"targets\.big\.outputs: .*'haed' .*: logits, head"),
        (("targets", "big", "shard_rows"), 9973, r"targets\.big: shard_rows is 9973, .* even chunks .* such as 8192"),
        (
            ("targets", "big"),
            {"encoding": "sampled", "draws": 3, "head": 10},
            r"targets\.big: head is 10, .* 10 classes",
        ),
        (
            ("views",),
            {"count": 1, "transform": {"factory": "same.py:Same"}, "splits": ["train", "tset"]},
            r"views\.splits: there is no split 'tset'; prepared are test, train, validation",
        ),
        (
            ("views",),
            {"transform": {"factory": "same.py:Smae"}},
            r"views\.transform: same\.py has no 'Smae'; it has Same",
        ),
        (
            ("views",),
            {"transform": {"factory": "same.py:Same", "size": 1}},
            r"views\.transform\.size: .* takes nothing",
        ),
        (("student", "model", "factory"), "broken.py:Net", "broken.py cannot be imported: ZeroDivisionError"),
        (("teachers", "big", "model"), {"factory": "wrong.py:Net"}, r"forward gives \[64, 3\]; expected .* \[64, 10\]"),
    ],
)
def test_check_finds_what_a_few_rows_can_show(folder, capsys, path, value, message):
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "same.py").write_text(
        "class Same:\n    def __call__(self, columns, keys, seed):\n        return columns\n"
    )
    (folder / "wrong.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(64, 3)\n"
        "    def forward(self, inputs):\n        return super().forward(inputs.flatten(1))\n"
    )
    change(folder, *path, value=value)
    assert _matches(message, fails(capsys, "check"))


def test_check_passes_and_says_what_it_checked(folder, capsys):
    capsys.readouterr()
    assert run(["check"]) == 0
    assert "teachers: big" in capsys.readouterr().out


TRANSFORMS = {
    "shuffles": (
        "return {**columns, 'image': columns['image'][::-1]}",
        "makes another 'image' .* them in another order",
    ),
    "is normalised over the batch": (
        "return {**columns, 'image': columns['image'] - columns['image'].min(axis=0)}",
        "makes another 'image' .* let no row depend on the others",
    ),
    "draws anew": (
        "return {**columns, 'image': columns['image'] + numpy.random.randint(0, 9, (8, 8, 1), 'uint8')}",
        "makes another 'image' .* a second time; .*kdpipe.random_numbers.uniform",
    ),
    "gives nothing": ("return None", r"gives nothing; expected the layout .*: image uint8 \[16, 8, 8, 1\]"),
    "gives fewer rows": ("return {'image': columns['image'][1:]}", r"gives image uint8 \[15, 8, 8, 1\]; expected"),
    "gives floats": ("return {'image': columns['image'] / 16}", r"gives image float64 \[16, 8, 8, 1\]; expected"),
    "fails": ("return columns['pixels']", r"fails on image uint8 \[16, 8, 8, 1\]: KeyError: 'pixels'"),
    "cannot be made": ("", "mine.py:Mine fails: ValueError: of no use"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_that_is_of_no_use_is_refused_before_the_teacher_speaks(cached, capsys, name):
    body, message = TRANSFORMS[name]
    call = f"    def __call__(self, columns, keys, seed):\n        {body}\n"
    made = call if body else "    def __init__(self):\n        raise ValueError('of no use')\n"
    (cached / "mine.py").write_text(f"import numpy\nclass Mine:\n{made}")
    change(cached, "views", value={"count": 1, "transform": {"factory": "mine.py:Mine"}})
    before = tree(cached / "data" / "targets")
    for command in ("check", "cache-teacher"):
        (cached / "calls.log").unlink(missing_ok=True)
        assert _matches(rf"^error: views\.transform: (Mine )?{message}", fails(capsys, command))
    assert tree(cached / "data" / "targets") == before
    assert not (cached / "calls.log").exists()


def test_few_rows_are_enough_to_check_a_transform(folder, capsys):
    (folder / "same.py").write_text(
        "class Same:\n    def __call__(self, columns, keys, seed):\n        return columns\n"
    )
    change(folder, "views", value={"count": 2, "transform": {"factory": "same.py:Same"}})
    path = folder / "data" / "raw" / "digits.parquet"
    pq.write_table(pq.read_table(path).slice(0, 3), path)
    assert run(["check"]) == 0
    assert "views: 2 of train by same.py:Same" in capsys.readouterr().out


def test_params_absent_or_no_yaml(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no " in fails(capsys, "prepare-data")
    (tmp_path / "params.yaml").write_text("a: [1")
    assert "no valid YAML" in fails(capsys, "prepare-data")
    assert "params.yaml" in fails(capsys, "check", "--params", "elsewhere/params.yaml")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("prepare-dada", "No such command"),
        ("cache-teacher --shards 2/2", "--shards is '2/2'; expected i/n"),
        ("cache-teacher --shards 0/2 --repair", "run it alone, without --shards"),
        ("estimate --rows 0", "--rows"),
        ("verify data/targets/big --rows 5", "--rows belongs to --deep"),
        ("verify data/targets/big --deep --rows 0", "--rows"),
        ("gc --remove", "--remove takes fingerprints"),
        ("gc abcd --remove-earlier", "--remove-earlier takes none"),
        ("export-targets data/targets/big --format csv", "the choices are parquet, arrow, npz"),
        ("export-targets data/targets/big --view first", "expected a number from 0 up, or all"),
        ("export-targets data/targets/big --out big.csv", "expected a name that ends in .parquet"),
        ("import-targets big.parquet made --k 0", "--k"),
    ],
)
def test_usage_errors_exit_with_2(folder, capsys, command, message):
    assert message in fails(capsys, *command.split(), status=2)


def test_missing_file(folder, capsys):
    change(folder, "data", "path", value="data/raw/absent.parquet")
    assert "no file" in fails(capsys, "prepare-data")
    assert "absent.parquet" in fails(capsys, "check")


def test_wrong_class_count(folder, capsys):
    before = tree(folder / "data" / "prepared")
    change(folder, "task", "num_classes", value=9)
    assert _matches(r"0\.\.8 .*found 9 in row \d+ \(id \d+\)", fails(capsys, "prepare-data"))
    assert tree(folder / "data" / "prepared") == before


def test_a_teacher_of_another_class_count(cached, capsys):
    before = tree(cached / "data" / "targets")
    source = (cached / "teacher.py").read_text()
    (cached / "teacher.py").write_text(source.replace("return self.head(", "return torch.nn.functional.pad(self.head(")
                                       .replace("flatten(1))\n", "flatten(1)), (0, 2))\n"))  # fmt: skip
    assert run(["train-teacher"]) == 0
    assert _matches(r"\[1, 12\] for 1 rows; .*\[1, …, 10\]", fails(capsys, "cache-teacher"))
    assert tree(cached / "data" / "targets") == before


def test_nan_logits_name_the_samples(cached, capsys):
    before = tree(cached / "data" / "targets")
    source = (cached / "teacher.py").read_text()
    strange = "\n\ndef _strange(self, inputs):\n    return (inputs[:, 0, 0, 2:3] >= 1) & (not self.training)\n"
    broken = "return self.head(inputs.flatten(1)).masked_fill(_strange(self, inputs), float('nan'))"
    (cached / "teacher.py").write_text(source.replace("return self.head(inputs.flatten(1))", broken) + strange)
    assert run(["train-teacher"]) == 0
    assert _matches(
        r"NaN or infinite for \d+ of 64 samples .* such as \d+-[0-9a-f]{16}", fails(capsys, "cache-teacher")
    )
    assert tree(cached / "data" / "targets") == before


def test_a_teacher_that_ends_the_program_is_no_success(cached, capsys):
    before = tree(cached / "data" / "targets")
    source = (cached / "teacher.py").read_text()
    ends = "return self.head(inputs.flatten(1)) if self.training else exit(0)"
    (cached / "teacher.py").write_text(source.replace("return self.head(inputs.flatten(1))", ends))
    assert run(["train-teacher"]) == 0
    said = fails(capsys, "cache-teacher")
    assert _matches(r"^error: .*teacher\.py, line \d+, ended the program \(SystemExit: 0\)", said)
    assert tree(cached / "data" / "targets") == before


def test_duplicate_ids(folder, capsys):
    before = tree(folder / "data" / "prepared")
    replace_rows(folder, id=pa.array([0, *range(1796)], pa.int32()))
    assert _matches(r"row 0 and row 1 \(id 0\) have the same id", fails(capsys, "prepare-data"))
    assert tree(folder / "data" / "prepared") == before


def test_corrupt_image(folder, capsys):
    import io

    from PIL import Image

    before = tree(folder / "data" / "prepared")
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 100).save(buffer, "PNG")
    images = [buffer.getvalue()[:40] if index == 17 else buffer.getvalue() for index in range(1797)]
    replace_rows(folder, image=pa.array(images, pa.binary()))
    for command in ("check", "prepare-data"):
        assert _matches(r"the image of row 17 \(id 17\) cannot be decoded", fails(capsys, command))
    assert tree(folder / "data" / "prepared") == before


def test_store_of_other_inputs(cached, capsys):
    """The teacher learnt from the row as it was; a machine that has no teacher is told that the new one is unknown."""
    images = pq.read_table(cached / "data" / "raw" / "digits.parquet")["image"].combine_chunks()
    pixels = images.flatten().to_numpy().copy()
    pixels[64 * 5] += 1
    replace_rows(cached, image=pa.FixedSizeListArray.from_arrays(pa.array(pixels), 64))
    assert run(["prepare-data"]) == 0
    assert "teachers.big learnt from other rows, or other labels, of the split 'train'" in fails(
        capsys, "train-student"
    )
    shutil.rmtree(cached / "data" / "models" / "teachers")
    message = fails(capsys, "train-student")
    assert "has no targets for 1 of" in message
    assert "kdpipe cache-teacher" in message


def test_store_absent_incomplete_or_damaged(cached, capsys):
    targets = cached / "data" / "targets" / "big"
    shutil.copytree(targets, cached / "kept")
    next((targets / "logits").glob("c.0.2.*")).unlink()
    assert "lacks 1 of 29 shards" in fails(capsys, "train-student")
    assert "--repair" in fails(capsys, "verify", str(targets))
    (targets / "manifest.json").unlink()
    assert "Run `kdpipe cache-teacher big`" in fails(capsys, "train-student")
    assert "no target store" in fails(capsys, "inspect", str(targets))
    capsys.readouterr()
    assert run(["inspect", "--json", str(cached / "kept")]) == 0
    assert json.loads(capsys.readouterr().out)["num_rows"] == 1797


def test_a_pickle_with_code_is_no_weights_file(folder, capsys, tmp_path):
    import pickle

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    (folder / "weights.pt").write_bytes(pickle.dumps(Attack()))
    changed = params()
    changed["teachers"]["big"].pop("train")
    changed["teachers"]["big"]["weights"] = "weights.pt"
    write_params(folder, changed)
    assert "no safetensors file" in fails(capsys, "train-teacher")
    assert not (tmp_path / "attacked").exists()


def test_split_without_rows_and_labels_that_do_not_suffice(cached, capsys):
    change(cached, "student", "distil_on", value=["transfer"])
    assert "'transfer' has no rows; the splits here are test, train, validation" in fails(capsys, "train-student")
    change(cached, "student", "labelled_rows", value=5000)
    assert "labels for 5000 rows were asked" in fails(capsys, "train-student")
    change(cached, "student", "labelled_rows", value=0)
    assert "set it to 0" in fails(capsys, "train-student")
    change(cached, "teachers", "big", "train", "split", value="trian")
    assert "there is no split 'trian'; prepared are test, train, validation" in fails(capsys, "train-teacher")


def test_a_file_that_may_not_be_so_large_is_told(folder, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        said = fails(capsys, "prepare-data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "labels.parquet: the limit is the file system's, or the shell's (ulimit -f)" in said


def test_disk_full_keeps_what_was_committed(cached, capsys, small_disk):
    """The work area moves to a disk of 256 KiB, which the store of a second teacher does not fit."""
    changed = params()
    changed["targets"]["big"] |= {"dtype": "float32", "shard_rows": 16}
    write_params(cached, changed)
    before = tree(cached / "data" / "targets")
    shutil.rmtree(cached / "data" / ".work")
    (cached / "data" / ".work").symlink_to(small_disk)
    assert "the disk is full" in fails(capsys, "cache-teacher")
    assert tree(cached / "data" / "targets") == before
    assert not list(small_disk.rglob("*.tmp"))
    assert list(small_disk.rglob("commits/*.json"))
    assert run(["verify", str(cached / "data" / "targets" / "big")]) == 0


def test_read_only_folder(cached, capsys):
    data = cached / "data"
    if subprocess.run(["mount", "--bind", data, data], check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", data], check=True)
        before = tree(data / "targets")
        for command in ("prepare-data", "train-teacher", "cache-teacher", "train-student"):
            assert "no permission" in fails(capsys, command)
        assert tree(data / "targets") == before
        assert run(["verify", str(data / "targets" / "big")]) == 0
    finally:
        subprocess.run(["umount", data], check=True)


def _cache_slowly(folder, seconds):
    os.environ["TEACHER_SECONDS"] = str(seconds)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born ignoring it
    os.chdir(folder)
    sys.exit(run(["cache-teacher"]))


def _started_slow_capture(folder, seconds=0.05):
    """A process that caches, once it has begun; each of 29 batches takes so long."""
    (folder / "calls.log").unlink(missing_ok=True)
    child = processes.Process(target=_cache_slowly, args=(folder, seconds))
    child.start()
    while child.is_alive() and not (folder / "calls.log").exists():
        time.sleep(0.01)
    return child


def test_two_processes_cache_at_once(folder, capsys):
    assert run(["train-teacher"]) == 0
    first = _started_slow_capture(folder)
    message = fails(capsys, "cache-teacher")
    first.join()
    assert "another process is caching teacher big" in message
    assert first.exitcode == 0
    assert run(["verify", "data/targets/big"]) == 0


def test_ctrl_c_keeps_what_was_committed(folder, capfd):
    assert run(["train-teacher"]) == 0
    child = _started_slow_capture(folder, seconds=0.5)
    while child.is_alive() and not committed_rows(*work_folders(folder)):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGINT)
    child.join()
    assert child.exitcode == 1
    assert "error: interrupted" in capfd.readouterr().err
    assert not (folder / "data" / "targets" / "big").exists()
    shown = (folder / "calls.log").read_text().count("\n")
    (folder / "calls.log").unlink()
    assert run(["cache-teacher"]) == 0
    assert (folder / "calls.log").read_text().count("\n") < 29
    assert shown > 0
    assert project_in(folder).store("big").is_dir()


HUNGRY = """
import torch
from kdpipe.models.mlp import MLP


class Hungry(MLP):
    def forward(self, inputs):
        return super().forward(inputs) + torch.empty(2**50)[0]
"""


def test_a_student_that_needs_more_memory_than_there_is(tmp_path, capsys, monkeypatch):
    (tmp_path / "hungry.py").write_text(HUNGRY)
    make_project(tmp_path)
    cache(tmp_path)
    monkeypatch.chdir(tmp_path)
    changed = params()
    changed["student"]["model"] = {"factory": "hungry.py:Hungry", "hidden": [8]}
    write_params(tmp_path, changed)
    message = fails(capsys, "train-student")
    assert "out of memory" in message
    assert "can't allocate memory" in message
    assert "train.micro_batch_size" in message


OWN_SOURCE = """
from kdpipe.data.sources import Table


class Halved(Table):
    def batches(self):
        for batch in super().batches():
            yield batch.filter(batch["kind"])
"""


def test_a_source_of_ones_own_that_fails_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "own.py").write_text(OWN_SOURCE)
    changed = params()
    changed["data"]["source"] = {"factory": "own.py:Halved"}
    make_project(tmp_path)
    write_params(tmp_path, changed)
    monkeypatch.chdir(tmp_path)
    for command in ("check", "prepare-data"):
        message = fails(capsys, command)
        assert "data.source: own.py:Halved fails: KeyError" in message
        assert "kind" in message

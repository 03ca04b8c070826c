"""`kdpipe gc`: what the work area holds, what is in use, and what goes when it is told to."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from kdpipe import durable
from kdpipe.errors import ConfigError, LockedError
from kdpipe.store import open_store
from kdpipe_stages import cache_teacher, prepare_data, terminal, train_student, train_teacher
from kdpipe_stages.cli import run
from kdpipe_stages.work_area import WorkArea
from projects import forget_rows_shown, make_project, params, project_in, rows_shown, tree, write_params

NUM_ROWS = 1797


def quick(**teacher):
    """Settings with one seed and no baseline; keyword arguments replace keys of the teacher."""
    changed = params()
    changed["teachers"]["big"]["train"]["epochs"] = 1
    changed["student"] |= {"seeds": 1, "baselines": []}
    changed["student"]["train"]["epochs"] = 1
    changed["teachers"]["big"] |= teacher
    return changed


def cache(folder):
    project = project_in(folder)
    train_teacher.run(project, "big")
    return cache_teacher.run(project, "big")


def seed(number):
    return quick(train={**quick()["teachers"]["big"]["train"], "seed": number})


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A project that has run twice, with seed 1 and then with seed 0; a student of each."""
    folder = tmp_path_factory.mktemp("gc") / "project"
    folder.mkdir()
    make_project(folder, **seed(1))
    prepare_data.run(project_in(folder))
    for number in (1, 0):
        write_params(folder, seed(number))
        cache(folder)
        train_student.run(project_in(folder))
    return folder


@pytest.fixture
def folder(template, tmp_path):
    """A copy whose hard links are links again."""
    shutil.copytree(template, tmp_path / "project")
    link_again(template, tmp_path / "project")
    forget_rows_shown(tmp_path / "project")
    return tmp_path / "project"


def link_again(source, copy):
    first = {}
    for path in sorted(each for each in source.rglob("*") if each.is_file()):
        twin = copy / path.relative_to(source)
        if path.stat().st_ino in first:
            twin.unlink()
            os.link(first[path.stat().st_ino], twin)
        first.setdefault(path.stat().st_ino, twin)


def area_of(folder):
    return WorkArea(project_in(folder))


def states(folder):
    """Kind -> states of the work area's folders."""
    found = {}
    for each in area_of(folder).holdings():
        found.setdefault(each.kind, []).append(each.state)
    return found


def only(folder, kind, state):
    (found,) = [each for each in area_of(folder).holdings() if (each.kind, each.state) == (kind, state)]
    return found


def outside(folder):
    """Every file that gc must not touch."""
    return {name: content for name, content in tree(folder).items() if not name.startswith("data/.work/")}


def test_every_folder_is_told_what_it_is(folder):
    assert states(folder) == {kind: ["current", "earlier"] for kind in ("student", "targets", "teacher")}
    store = only(folder, "targets", "current")
    assert store.fingerprint == open_store(folder / "data" / "targets" / "big").fingerprint
    assert store.what == "targets of big: 1,797 rows, logits dense"
    assert store.why == "published as data/targets/big"
    assert store.freed_bytes == 0 < store.num_bytes
    earlier = only(folder, "targets", "earlier")
    assert earlier.why == "teacher.train.seed was 1, params.yaml says 0"
    assert earlier.cost == "the teacher runs on 1,797 rows again"
    assert (
        earlier.freed_bytes
        == earlier.num_bytes
        == sum(
            each.stat().st_size
            for each in (folder / "data" / ".work" / earlier.fingerprint).rglob("*")
            if each.is_file()
        )
    )
    assert only(folder, "teacher", "earlier").what == "teacher model big"
    assert only(folder, "student", "current").what == "student runs: student x 1"


def test_earlier_work_goes_and_nothing_else(folder):
    before = outside(folder)
    kept = [each for each in area_of(folder).holdings() if each.state == "current"]
    freed = sum(each.freed_bytes for each in area_of(folder).holdings() if each.state == "earlier")
    done = area_of(folder).remove_earlier()
    assert len(done.removed) == 3
    assert done.freed_bytes == freed > 0
    assert done.left == []
    assert area_of(folder).holdings() == kept
    assert outside(folder) == before
    assert cache(folder).rows_computed == 0
    assert train_student.run(project_in(folder)).trained == []
    assert area_of(folder).remove_earlier().removed == []


def test_removed_targets_cost_a_teacher_pass(folder):
    prefix = only(folder, "targets", "earlier").fingerprint[:6]
    done = area_of(folder).remove([prefix])
    assert [each[:6] for each in done.removed] == [prefix]
    write_params(folder, seed(1))
    assert train_teacher.run(project_in(folder), "big").skipped
    assert cache_teacher.run(project_in(folder), "big").rows_computed == NUM_ROWS == rows_shown(folder)


def test_what_is_current_stays(folder):
    before = tree(folder)
    for kind in ("targets", "teacher", "student"):
        names = [only(folder, kind, state).fingerprint for state in ("earlier", "current")]
        with pytest.raises(ConfigError, match=rf"{names[1][:12]}.* is current: published as .*Nothing was removed"):
            area_of(folder).remove(names)
    assert tree(folder).keys() >= before.keys()
    assert outside(folder) == outside(folder) | {name: each for name, each in before.items() if ".work" not in name}


def test_what_todays_params_say_is_current_before_it_is_published(folder):
    """Back to earlier settings: their work is not cleared away before the stages have run."""
    write_params(folder, seed(1))
    found = states(folder)
    assert found["targets"] == found["teacher"] == ["current", "current"]
    assert only(folder, "student", "unknown").why.startswith("today's student cannot be told: ")
    assert area_of(folder).remove_earlier().removed == []
    assert cache(folder).rows_computed == 0
    assert states(folder)["targets"] == ["current", "earlier"]
    students = [each for each in area_of(folder).holdings() if each.kind == "student"]
    assert {each.why for each in students} == {"as params.yaml says today", "published as data/models/student"}
    assert train_student.run(project_in(folder)).trained == []
    assert states(folder)["student"] == ["current", "earlier"]


def test_no_teacher_is_needed(folder):
    (folder / "teacher.py").unlink()
    assert states(folder)["targets"] == ["current", "earlier"]
    assert len(area_of(folder).remove_earlier().removed) == 3


def test_work_in_progress_stays(folder):
    """The lock of whoever works alone, of a part, and of trainings."""
    earlier = only(folder, "targets", "earlier").fingerprint
    locks = folder / "data" / ".work" / "locks"
    for name, others in ((earlier, 2), (f"{earlier}.shards-1-of-4", 0)):
        with durable.only_writer(locks / name, "caching"):
            assert only(folder, "targets", "in progress").fingerprint == earlier
            with pytest.raises(LockedError, match=earlier[:12]):
                area_of(folder).remove([earlier])
            assert len(area_of(folder).remove_earlier().removed) == others
        assert (folder / "data" / ".work" / earlier / "manifest.json").is_file()


@pytest.mark.parametrize(("lock", "kind"), [("student", "student"), ("teacher-big", "teacher")])
def test_no_model_goes_while_another_process_trains(folder, lock, kind):
    earlier = only(folder, kind, "earlier").fingerprint
    with durable.only_writer(folder / "data" / ".work" / "locks" / lock, "training"):
        with pytest.raises(LockedError, match="train"):
            area_of(folder).remove([earlier[:8]])
        done = area_of(folder).remove_earlier()
    assert len(done.removed) == 2
    assert len(done.left) == 1
    assert "training" in done.left[0]
    assert only(folder, kind, "earlier").fingerprint == earlier


def interrupt_capture(folder):
    """Leave a store of seed 2 with some shards, as a killed capture does."""
    write_params(folder, seed(2))
    train_teacher.run(project_in(folder), "big")

    class Killed(Exception):
        pass

    def kill(now):
        if now.rows_done > NUM_ROWS // 2:
            raise Killed

    with pytest.raises(Killed):
        cache_teacher.run(project_in(folder), "big", kill)


def test_unfinished_targets_of_today_stay_and_the_stage_goes_on_with_them(folder):
    interrupt_capture(folder)
    store = only(folder, "targets", "unfinished")
    assert " shards" in store.what
    area_of(folder).remove_earlier()
    assert only(folder, "targets", "unfinished") == store
    forget_rows_shown(folder)
    assert 0 < cache(folder).rows_computed < NUM_ROWS
    assert only(folder, "targets", "current").fingerprint == store.fingerprint


def test_targets_of_which_nothing_was_written_are_unfinished_not_damaged(folder):
    store = work(folder, "targets", "current")
    shutil.rmtree(folder / "data" / "targets" / "big")
    for each in store.iterdir():
        if each.name != "manifest.json":
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    found = only(folder, "targets", "unfinished")
    assert (found.why, found.cost) == ("no row was written yet", "nothing")
    assert cache(folder).rows_computed == NUM_ROWS


def test_unfinished_targets_of_today_go_by_name_and_the_list_says_what_that_costs(folder):
    interrupt_capture(folder)
    store = only(folder, "targets", "unfinished")
    assert store.why == "of today's settings: `kdpipe cache-teacher` goes on with it"
    assert re.fullmatch(r"those \d+ shards of today's settings, which are computed again", store.cost)
    assert len(area_of(folder).remove([store.fingerprint[:8]]).removed) == 1
    forget_rows_shown(folder)
    assert cache(folder).rows_computed == NUM_ROWS


def test_unfinished_targets_of_other_settings_say_what_differs(folder):
    interrupt_capture(folder)
    write_params(folder, seed(0))
    store = only(folder, "targets", "unfinished")
    assert store.why == "teacher.train.seed was 2, params.yaml says 0"
    assert re.fullmatch(r"those \d+ shards", store.cost)
    assert len(area_of(folder).remove([store.fingerprint]).removed) == 1


def test_the_cost_counts_views_and_names_a_table(folder):
    (folder / "same.py").write_text(
        "class Same:\n    def __call__(self, columns, keys, seed):\n        return columns\n"
    )
    of_views = seed(0) | {"views": {"count": 2, "transform": {"factory": "same.py:Same"}, "splits": ["train"]}}
    write_params(folder, of_views)
    shown = cache(folder).rows_computed
    assert NUM_ROWS < shown < 3 * NUM_ROWS
    assert cli("export-targets", folder / "data" / "targets" / "big", "--view", "0", "--out", folder / "said.parquet")
    changed = seed(0) | {"teachers": {"big": {"table": "said.parquet"}}}
    write_params(folder, changed)
    cache(folder)
    write_params(folder, seed(1))
    costs = {each.cost for each in area_of(folder).holdings() if each.kind == "targets"}
    assert costs == {
        "the teacher runs on 1,797 rows again",
        f"the teacher runs on {shown:,} rows again, in 3 views",
        "said.parquet is read again",
    }


def cli(*arguments):
    return run([str(each) for each in arguments]) == 0


def work(folder, kind, state):
    return folder / "data" / ".work" / only(folder, kind, state).fingerprint


def test_leftovers_of_stopped_runs_are_swept(folder):
    """Temporary files, a checkpoint beside a finished model, and folders that never were published."""
    store, student = work(folder, "targets", "current"), work(folder, "student", "current")
    (store / "logits" / "c.0.0.0.tmp").write_bytes(b"half a shard")
    (student / "student" / "seed-0" / "checkpoint.tmp").write_bytes(b"of a training that ended")
    empty = folder / "data" / ".work" / ("0" * 64)
    (empty / "commits").mkdir(parents=True)
    (empty / "manifest.json.tmp").write_bytes(b"{")
    staged = folder / "data" / ".work" / "staging" / "targets" / "big"
    staged.mkdir(parents=True)
    os.link(store / "manifest.json", staged / "manifest.json")
    assert only(folder, "targets", "current").leftovers == ["logits/c.0.0.0.tmp"]
    assert only(folder, "staging", "leftover").freed_bytes == 0
    holdings = [each.to_json() for each in area_of(folder).holdings()]
    summary = terminal.holdings_summary(holdings, "here")
    assert "would remove 5 of them, 2 leftover files in others, and free" in summary
    before = outside(folder)
    done = area_of(folder).remove_earlier()
    assert len(done.removed) == 3 + 4
    assert not list((folder / "data" / ".work").rglob("*.tmp"))
    assert not empty.exists()
    assert set(states(folder)) == {"student", "targets", "teacher"}
    assert outside(folder) == before
    assert area_of(folder).remove_earlier().removed == []


def test_a_checkpoint_to_go_on_from_is_no_leftover(folder):
    stopped = folder / "data" / ".work" / ("1" * 64) / "student" / "seed-0"
    stopped.mkdir(parents=True)
    (stopped / "checkpoint.tmp").write_bytes(b"hours of work")
    training = folder / "data" / ".work" / ("2" * 64)
    training.mkdir()
    (training / "checkpoint.tmp").write_bytes(b"hours of work")
    area_of(folder).remove_earlier()
    assert only(folder, "student", "unfinished").fingerprint == "1" * 64
    assert only(folder, "teacher", "unfinished").fingerprint == "2" * 64
    assert len(area_of(folder).remove(["1111", "2222"]).removed) == 2


def test_what_gc_does_not_know_or_cannot_read_goes_only_by_name(folder):
    earlier = work(folder, "targets", "earlier")
    (earlier / "manifest.json").write_text('{"format_version": 1, "teacher": {"name": "big"}}')
    strange = folder / "data" / ".work" / ("3" * 64)
    strange.mkdir()
    (strange / "notes.txt").write_text("mine")
    (folder / "data" / ".work" / "not-a-fingerprint").mkdir()
    assert len(area_of(folder).remove_earlier().removed) == 2
    assert "format version 1" in only(folder, "targets", "unreadable").why
    assert only(folder, "unknown", "unknown").fingerprint == "3" * 64
    assert len(area_of(folder).remove([earlier.name, "3333"]).removed) == 2
    assert (folder / "data" / ".work" / "not-a-fingerprint").is_dir()


def test_a_link_goes_without_what_it_leads_to(folder, tmp_path):
    """A work folder that somebody moved to another disk."""
    earlier = work(folder, "targets", "earlier")
    earlier.rename(tmp_path / "another_disk")
    earlier.symlink_to(tmp_path / "another_disk")
    area_of(folder).remove([earlier.name])
    assert not earlier.is_symlink()
    assert (tmp_path / "another_disk" / "manifest.json").is_file()


def test_a_kill_in_the_middle_leaves_no_half_of_a_folder(folder, monkeypatch):
    earlier = work(folder, "teacher", "earlier")
    files = tree(earlier)

    def killed(path, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            area_of(folder).remove([earlier.name])
    assert (tree(earlier) if earlier.exists() else files) == files
    assert set(states(folder)["teacher"]) <= {"current", "earlier"}
    area_of(folder).remove_earlier()
    assert states(folder) == {kind: ["current"] for kind in ("student", "targets", "teacher")}


@pytest.mark.parametrize("prefix", ["", "abc", "zzzz"])
def test_a_name_that_fits_no_single_folder_is_refused(folder, prefix):
    names = [each.fingerprint[:12] for each in area_of(folder).holdings()]
    with pytest.raises(ConfigError, match="expected the first characters of one fingerprint, at least 4") as error:
        area_of(folder).remove([prefix])
    if prefix == "zzzz":
        assert "fits 0 folders" in str(error.value)
        assert all(name in str(error.value) for name in names)
    assert len(area_of(folder).holdings()) == len(names)


def test_ready_weights_and_an_empty_project(tmp_path):
    """Nothing is trained: there is no teacher model in the work area."""
    changed = quick()
    del changed["teachers"]["big"]["train"]
    changed["teachers"]["big"]["weights"] = "ready.safetensors"
    changed["teachers"]["big"]["preprocess"] |= {"mean": [0.5], "std": [1.0]}
    make_project(tmp_path, **changed)
    assert area_of(tmp_path).holdings() == []
    assert area_of(tmp_path).remove_earlier().removed == []
    save_file({"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}, tmp_path / "ready.safetensors")
    prepare_data.run(project_in(tmp_path))
    cache(tmp_path)
    assert states(tmp_path) == {"targets": ["current"]}


def test_the_command(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert run(["gc"]) == 0
    shown = capsys.readouterr().out
    store = only(folder, "targets", "earlier")
    for text in (store.fingerprint[:12], "earlier", "current", "seed was 1", "teacher runs on 1,797 rows again", " kB"):
        assert text in " ".join(shown.split())
    assert run(["gc", store.fingerprint[:6], "--json"]) == 0
    (held,) = json.loads(capsys.readouterr().out)["holdings"]
    assert held["fingerprint"] == store.fingerprint
    assert held["num_bytes"] == store.num_bytes
    assert run(["gc", "--remove", store.fingerprint[:6], only(folder, "student", "earlier").fingerprint]) == 0
    assert "2 removed, " in capsys.readouterr().out
    assert run(["gc", "--remove-earlier", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["removed"]) == 1
    assert run(["gc", "--remove", only(folder, "targets", "current").fingerprint]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    for usage in (["--remove"], ["--remove-earlier", "abcd"], ["--remove", "--remove-earlier", "abcd"]):
        assert run(["gc", *usage]) == 2

"""Damage to a store of the work area or to the published one: what is said and published, what `--repair` costs."""

from __future__ import annotations

import re
import shutil

import pytest

from kdpipe.errors import CorruptStoreError
from kdpipe.store import open_store
from kdpipe_stages import cache_teacher
from projects import cache, forget_rows_shown, make_project, params, project_in, rows_shown, tree, write_params

NUM_ROWS, SHARD_ROWS = 1797, 64
DESCRIPTION = ["extent.json", "rows.parquet", "zarr.json", "logits/zarr.json"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A project with a complete store; not to be changed."""
    folder = tmp_path_factory.mktemp("repair") / "project"
    folder.mkdir()
    make_project(folder)
    cache(folder)
    return folder


@pytest.fixture
def folder(template, tmp_path):
    """A copy in which the published store and that of the work area are the same files, as publishing leaves them."""
    shutil.copytree(template, tmp_path / "project")
    folder = tmp_path / "project"
    shutil.rmtree(folder / "data" / "targets")
    cache_teacher.run(project_in(folder), "big")
    forget_rows_shown(folder)
    return folder


@pytest.fixture
def copied(folder):
    """The published store is a copy, as DVC makes one."""
    published = folder / "data" / "targets" / "big"
    shutil.copytree(published, folder / "copy")
    shutil.rmtree(published)
    (folder / "copy").rename(published)
    return folder


def published(folder):
    return folder / "data" / "targets" / "big"


def work(folder):
    (manifest,) = (folder / "data" / ".work").glob("*/manifest.json")
    return manifest.parent


def flip(path, place=0.5):
    """Flip a bit of a file where it lies."""
    with path.open("r+b") as file:
        at = int(place * path.stat().st_size)
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ 1]))


def run(folder, **options):
    return cache_teacher.run(project_in(folder), "big", **options)


@pytest.mark.parametrize("name", DESCRIPTION)
def test_a_damaged_description_of_the_published_store_is_told(folder, name):
    """Plain `cache-teacher` reads no shard; but all the rest it would call complete."""
    before = tree(published(folder))
    flip(published(folder) / name)
    with pytest.raises(CorruptStoreError, match=rf"{re.escape(name)} .*cache-teacher \w+ --repair"):
        run(folder)
    assert run(folder, repair=True).rows_computed == 0
    assert tree(published(folder)) == before
    assert not run(folder).published


@pytest.mark.parametrize("name", ["rows.parquet", "logits/zarr.json"])
def test_a_lost_description_of_the_published_store_is_told(folder, name):
    before = tree(published(folder))
    (published(folder) / name).unlink()
    with pytest.raises(CorruptStoreError, match=rf"{re.escape(name)} is absent .*cache-teacher big --repair"):
        run(folder)
    run(folder, repair=True)
    assert tree(published(folder)) == before


def test_a_store_that_gives_way_to_another_may_be_damaged(folder):
    """What stands at its place is replaced anyway."""
    flip(published(folder) / "rows.parquet")
    changed = params()
    changed["targets"]["big"]["dtype"] = "float32"
    write_params(folder, changed)
    assert run(folder).published
    assert open_store(published(folder)).verify() == []


def test_a_damaged_shard_is_never_published(folder):
    before = tree(published(folder))
    shutil.rmtree(published(folder))
    flip(work(folder) / "logits" / "c.0.3.0")
    with pytest.raises(CorruptStoreError, match=r"not published: view 0, shard 3: c\.0\.3\.0 of logits .*--repair"):
        run(folder)
    assert not published(folder).exists()
    assert run(folder, repair=True).rows_computed == SHARD_ROWS
    assert tree(published(folder)) == before


def test_what_was_not_damaged_is_published_without_the_teacher(folder):
    before = tree(published(folder))
    shutil.rmtree(published(folder))
    done = run(folder)
    assert (done.published, done.rows_computed) == (True, 0)
    assert tree(published(folder)) == before
    assert not run(folder).published


def test_what_a_killed_capture_had_committed_is_read_before_it_is_published(folder):
    """The shards of this run are not read again; those of the earlier one are."""
    shutil.rmtree(published(folder))
    (work(folder) / "logits" / "c.0.5.0").unlink()
    flip(work(folder) / "statistics" / "c.0.2.0")
    with pytest.raises(CorruptStoreError, match=r"shard 2: .*statistics differs"):
        run(folder)
    assert rows_shown(folder) == SHARD_ROWS
    assert run(folder, repair=True).rows_computed == SHARD_ROWS


@pytest.mark.parametrize("place", [0.001, 0.3, 0.5, 0.9])
def test_a_damaged_manifest_is_written_anew_from_todays_settings(folder, place):
    before = tree(published(folder))
    flip(work(folder) / "manifest.json", place)
    with pytest.raises(CorruptStoreError, match="--repair"):
        run(folder)
    assert run(folder, repair=True).rows_computed == 0
    assert tree(published(folder)) == before


@pytest.mark.parametrize("shard_rows", [None, 4096])
def test_a_manifest_written_anew_keeps_the_shards_size(folder, shard_rows):
    """Today's rows alone would suggest another one than the store was started with."""
    changed = params()
    changed["targets"]["big"] |= {"shard_rows": shard_rows}
    write_params(folder, changed)
    run(folder)
    manifest = open_store(published(folder)).manifest
    (stored,) = (folder / "data" / ".work").glob(f"{manifest.fingerprint}/manifest.json")
    text = stored.read_text()
    flip(stored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdpipe_stages.cache_teacher.choose_shard_rows", lambda *_: 32)
        assert run(folder, repair=True).rows_computed == 0
    assert stored.read_text() == text


def test_a_format_version_that_cannot_be_there_is_damage(folder):
    path = work(folder) / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 3'))
    assert run(folder, repair=True).rows_computed == 0
    assert open_store(published(folder)).verify() == []


def test_a_damaged_log_vouches_for_nothing(folder):
    before = tree(published(folder))
    flip(work(folder) / "commits.parquet")
    with pytest.raises(CorruptStoreError, match=r"commits\.parquet .*--repair"):
        run(folder)
    assert run(folder, repair=True).rows_computed == NUM_ROWS
    assert tree(published(folder)) == before


@pytest.mark.parametrize("name", ["commits.parquet", "commits.parquet.sha256"])
def test_where_the_work_areas_log_is_damaged_an_intact_copy_is_gone_on_from(copied, name):
    before = tree(published(copied))
    flip(work(copied) / name)
    assert run(copied, repair=True).rows_computed == 0
    assert tree(published(copied)) == before
    assert open_store(work(copied)).verify() == []


@pytest.mark.parametrize("repair", [False, True])
def test_where_the_work_areas_log_is_gone_the_published_store_is_gone_on_from(copied, repair):
    before = tree(published(copied))
    (work(copied) / "commits.parquet").unlink()
    (work(copied) / "commits.parquet.sha256").unlink()
    assert run(copied, repair=repair).rows_computed == 0
    assert tree(published(copied)) == before
    assert open_store(work(copied)).verify() == []


def test_a_log_that_is_a_link_to_nothing_is_as_good_as_none(copied):
    before = tree(published(copied))
    for store in (work(copied), published(copied)):
        (store / "commits.parquet").unlink()
        (store / "commits.parquet").symlink_to(copied / "cache" / "commits.parquet")
    assert run(copied, repair=True).rows_computed == NUM_ROWS
    assert tree(published(copied)) == before


def test_a_damaged_record_costs_its_shard(folder):
    shutil.rmtree(published(folder))
    (work(folder) / "logits" / "c.0.5.0").unlink()
    (work(folder) / "logits" / "c.0.6.0").unlink()

    class Killed(Exception):
        pass

    def kill(now):
        if now.rows_done == 2 * SHARD_ROWS:
            raise Killed

    with pytest.raises(Killed):
        cache_teacher.run(project_in(folder), "big", kill)
    record = work(folder) / "commits" / "0-5.json"
    record.write_bytes(record.read_bytes()[:40])
    with pytest.raises(CorruptStoreError, match=r"0-5\.json is damaged: .*--repair"):
        run(folder)
    forget_rows_shown(folder)
    assert run(folder, repair=True).rows_computed == rows_shown(folder) <= 2 * SHARD_ROWS


@pytest.mark.parametrize(
    ("name", "rows"), [("extent.json", 0), ("manifest.json", NUM_ROWS), ("commits.parquet", NUM_ROWS)]
)
def test_a_pulled_store_that_is_damaged_is_not_computed_again_unasked(folder, name, rows):
    """It may be fetched again; the extent is written anew by whoever adopts it."""
    before = tree(published(folder))
    shutil.rmtree(folder / "data" / ".work")
    flip(published(folder) / name)
    with pytest.raises(CorruptStoreError, match=rf"{re.escape(name)} .*--repair.* or fetch the store again"):
        run(folder)
    assert rows_shown(folder) == 0
    assert run(folder, repair=True).rows_computed == rows
    assert tree(published(folder)) == before

"""The command line: `kdpipe`. Torch is imported inside the commands, so that `--help` is quick."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdpipe.errors import KdpipeError, UsageError, is_out_of_memory

if TYPE_CHECKING:
    from kdpipe_stages.project import Project

app = typer.Typer(
    name="kdpipe",
    help="Run a teacher once, store what it said, train any number of students from the store.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ParamsFile = Annotated[Path, typer.Option("--params", help="The run's parameters; paths in it are relative to it.")]
TeacherName = Annotated[str | None, typer.Argument(help="A teacher of params.yaml; all of them when left out.")]
StorePath = Annotated[str, typer.Argument(help="A target store: data/targets/NAME, or an s3:// or gs:// url.")]
Json = Annotated[bool, typer.Option("--json", help="Answer as JSON.")]
PARAMS = Path("params.yaml")
_INTERRUPTED = 130  # what typer makes of Ctrl-C
_OUT_OF_MEMORY = (
    "out of memory ({}). What was finished is kept. Set a smaller train.batch_size or train.micro_batch_size for what "
    "is trained, targets.NAME.batch_size or targets.NAME.shard_rows for a teacher, or a smaller ram_budget_mb, and run "
    "the same command again."
)


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command; `run` looks for them itself, as it also reports errors of the parser."""


@app.command("prepare-data")
def prepare_data(params: ParamsFile = PARAMS) -> None:
    """Source -> data/prepared/: row ids, inputs, labels, splits."""
    from kdpipe_stages import commands

    commands.prepare_data(_project(params))


@app.command("train-teacher")
def train_teacher(name: TeacherName = None, params: ParamsFile = PARAMS) -> None:
    """Train a teacher on the labels of its split; ready teachers are taken note of."""
    from kdpipe_stages import commands

    project = _project(params)
    for each in project.teacher_names(name):
        commands.train_teacher(project, each)


@app.command("cache-teacher")
def cache_teacher(
    name: TeacherName = None,
    params: ParamsFile = PARAMS,
    repair: Annotated[bool, typer.Option("--repair", help="Read every byte; compute damaged shards again.")] = False,
    shards: Annotated[
        str | None, typer.Option("--shards", metavar="I/N", help="Part I (from 0) of N, one process for each part.")
    ] = None,
) -> None:
    """Rows -> teacher -> data/targets/NAME. Resumes, computes only what is missing, does nothing when complete."""
    from kdpipe_stages import commands

    project = _project(params)
    for each in project.teacher_names(name):
        commands.cache_teacher(project, each, repair, shards)


@app.command("train-student")
def train_student(params: ParamsFile = PARAMS) -> None:
    """Train every seed of the student and of its baselines from the stores; no teacher is needed."""
    from kdpipe_stages import commands

    commands.train_student(_project(params))


@app.command("evaluate")
def evaluate(params: ParamsFile = PARAMS) -> None:
    """Student, baselines and teacher beside each other -> metrics.json; the teacher is not run."""
    from kdpipe_stages import commands

    commands.evaluate(_project(params))


@app.command("check")
def check(params: ParamsFile = PARAMS) -> None:
    """Validate params.yaml: keys, types, factories, losses, outputs, views, files; no training."""
    from kdpipe_stages import check as stage
    from kdpipe_stages.terminal import answer

    for line in stage.run(_project(params)):
        answer(line)


@app.command("estimate")
def estimate(
    name: TeacherName = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="How many rows to measure on (512).")] = None,
    params: ParamsFile = PARAMS,
    as_json: Json = False,
) -> None:
    """Before caching: bytes, write rate, hours, and what each encoding loses, on a sample of the rows."""
    from kdpipe_stages import commands
    from kdpipe_stages.terminal import answer, answer_json, answer_table, estimate_lines, estimate_table, say

    project = _project(params)
    estimates = {}
    for each in project.teacher_names(name):
        table = project.teacher(each).table
        if name is None and table is not None:
            say(f"estimate       {each}: what it said is in {table}; there is nothing to estimate")
        else:
            estimates[each] = commands.estimate(project, each, rows)
    if as_json:
        answer_json(estimates)
        return
    for found in estimates.values():
        answer_table(estimate_table(found))
        for line in estimate_lines(found):
            answer(line)


@app.command("inspect")
def inspect(store: StorePath, as_json: Json = False) -> None:
    """What a store is: rows, bytes per row, fingerprint, what the teacher said."""
    from kdpipe_stages.stores import inspect as describe
    from kdpipe_stages.terminal import answer_json, answers, store_table

    description = describe(store)
    if as_json:
        answer_json(description)
    else:
        answers.print(store_table(description))


@app.command("verify")
def verify(
    store: StorePath,
    deep: Annotated[bool, typer.Option("--deep", help="Show sampled rows to the teacher again, and compare.")] = False,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="How many rows to show it again (2,048).")] = None,
    params: ParamsFile = PARAMS,
) -> None:
    """Check every byte of a store against its checksums; lists bad shards."""
    from kdpipe_stages import commands
    from kdpipe_stages.stores import verify as check_store
    from kdpipe_stages.terminal import answer

    if rows is not None and not deep:
        raise UsageError("--rows belongs to --deep")
    for line in check_store(store):
        answer(line)
    for line in commands.verify_deep(store, _project(params), rows) if deep else ():
        answer(line)


@app.command("export-targets")
def export_targets(
    store: StorePath,
    table_format: Annotated[str, typer.Option("--format", help="parquet, arrow or npz.")] = "parquet",
    out: Annotated[Path | None, typer.Option("--out", help="The file; beside you, named as the store is.")] = None,
    view: Annotated[str, typer.Option("--view", help="A view's number, or all.")] = "all",
    outputs: Annotated[list[str] | None, typer.Option("--output", help="An output; all when left out.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """A store as a table, for pandas, DuckDB, HF datasets or NumPy."""
    from kdpipe_stages.tables import export_targets as export
    from kdpipe_stages.terminal import answer

    path, num_rows = export(store, table_format, out, view, outputs or [], force)
    answer(f"{path}: {num_rows:,} rows")


@app.command("import-targets")
def import_targets(
    table: Annotated[Path, typer.Argument(help="Parquet, Arrow, npz or JSON Lines.")],
    store: Annotated[Path, typer.Argument(help="The folder to make.")],
    num_classes: Annotated[
        int | None, typer.Option("--num-classes", min=1, help="Where the table does not say it.")
    ] = None,
    encoding: Annotated[str | None, typer.Option("--encoding", help="dense, int8 or topk.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of dense: float16 or float32.")] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Of topk: classes per row.")] = None,
    values: Annotated[str | None, typer.Option("--values", help="Of topk: float16 or int8.")] = None,
    masked_classes: Annotated[
        bool, typer.Option("--masked-classes", help="Of int8: classes may be masked (-inf), a bit for each.")
    ] = False,
    temperatures: Annotated[
        list[float] | None, typer.Option("--temperature", help="Of tail_log_mass, one by one, in its order.")
    ] = None,
) -> None:
    """A store of a table alone, for your own loop. In a project, name the table as teachers.NAME.table instead."""
    from kdpipe_stages.tables import import_targets as import_
    from kdpipe_stages.terminal import answer, say

    parameters = {"dtype": dtype, "k": k, "values": values, "masked_classes": masked_classes or None}
    done = import_(
        table,
        store,
        num_classes=num_classes,
        encoding=encoding,
        parameters=parameters,
        temperatures=temperatures or (),
    )
    if done.columns_not_read:
        say(f"import-targets  columns that are not read: {', '.join(done.columns_not_read)}")
    if done.num_not_covered:
        say(f"import-targets  {done.num_not_covered:,} of {done.num_places:,} {done.places} are not covered")
    made = done.store
    answer(f"{store}: {made.num_rows:,} rows, {made.num_views} views, {made.num_bytes:,} bytes")


@app.command("gc")
def gc(
    fingerprints: Annotated[
        list[str] | None,
        typer.Argument(metavar="FINGERPRINT", help="Folders of data/.work by their first characters; else all."),
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove those, unfinished ones too; never what is current or in use.")
    ] = False,
    remove_earlier: Annotated[
        bool, typer.Option("--remove-earlier", help="Remove finished work of other settings, and leftovers.")
    ] = False,
    params: ParamsFile = PARAMS,
    as_json: Json = False,
) -> None:
    """What the work area data/.work holds, what of it is in use, and removal of what is not wanted."""
    from kdpipe_stages.terminal import answer, answer_json, answers, holdings_summary, holdings_table, removal_lines
    from kdpipe_stages.work_area import WorkArea

    if (remove and not fingerprints) or (remove_earlier and (remove or fingerprints)):
        raise UsageError("--remove takes fingerprints, --remove-earlier takes none")
    area = WorkArea(_project(params))
    if remove or remove_earlier:
        done = (area.remove(fingerprints or []) if remove else area.remove_earlier()).to_json()
        if as_json:
            answer_json(done)
            return
        for line in removal_lines(done):
            answer(line)
        return
    held = [each.to_json() for each in (area.named(fingerprints) if fingerprints else area.holdings())]
    if as_json:
        answer_json({"path": str(area.path), "holdings": held})
        return
    answers.print(holdings_table(held))
    answer(holdings_summary(held, str(area.path)))


@app.command("demo")
def demo(folder: Annotated[Path, typer.Argument(help="Where; made if absent.")] = Path("kdpipe-demo")) -> None:
    """The whole pipeline on scikit-learn's digits, offline, in under two minutes."""
    from kdpipe_stages import demo as stage
    from kdpipe_stages.terminal import answer, answers, gain_lines, result_table

    folder.mkdir(parents=True, exist_ok=True)
    stage.scaffold(folder)
    project = _project(folder / "params.yaml")
    done = stage.run(project)
    answers.print(result_table(done.metrics, done.timings, done.title))
    for line in [*gain_lines(done.metrics["gain"]), *done.notes]:
        answer(line)
    answer(f"everything in {project.root / 'metrics.json'}")


def _project(params: Path) -> Project:
    from kdpipe_stages.project import Project

    return Project(params)


def main() -> None:
    """Run the command line. Exit status 0: done; 1: the user's error, told in one message; 2: usage."""
    # Idle OpenMP threads sleep: by default they spin, and two processes on one machine then slow each other many times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit status."""
    verbose = "-v" in arguments or "--verbose" in arguments
    try:
        status = app(list(arguments), standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    except UsageError as error:
        return _fail(str(error), status=2)
    except SystemExit as error:
        if verbose:
            traceback.print_exception(error)
        return _fail(_who_ended(error))
    except Exception as error:
        if isinstance(error, _usage_errors()):
            error.show()  # type: ignore[attr-defined]
            return 2
        message = _explained(error)
        if verbose or message is None:
            raise
        return _fail(message)
    if status == _INTERRUPTED:
        return _fail("interrupted. What was finished is kept; run the same command again to go on.")
    return status if isinstance(status, int) else 0


@contextmanager
def plain_errors() -> Iterator[None]:
    """For scripts beside params.yaml: what is no fault of kdpipe ends them as it ends a command, by one message."""
    try:
        yield
    except Exception as error:
        message = _explained(error)
        if message is None:
            raise
        sys.exit(_fail(message))


def _explained(error: Exception) -> str | None:
    """What to tell the user of an error that is not a fault of kdpipe; None for any other."""
    if isinstance(error, KdpipeError):
        return str(error)
    if is_out_of_memory(error):
        return _OUT_OF_MEMORY.format(str(error).partition("\n")[0] or "no more to allocate")
    if isinstance(error, OSError) and not (error.filename is None and error.errno is None):
        return _explain_os_error(error)
    return None


def _who_ended(error: SystemExit) -> str:
    """No code of kdpipe's does; a factory's may."""
    frames = traceback.extract_tb(error.__traceback__)
    at = next(each for each in reversed(frames) if Path(each.filename).is_file())  # `exit` itself has none
    return (
        f"{at.filename}, line {at.lineno}, ended the program (SystemExit: {error.code}) before the command was done. "
        "Raise another error there. What was finished is kept."
    )


def _usage_errors() -> type:
    """Root of the command-line parser's own errors; typer may carry a click of its own, so it has no other name."""
    return next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")


def _fail(message: str, status: int = 1) -> int:
    sys.stderr.write(f"error: {message}\n")
    return status


def _explain_os_error(error: OSError) -> str:
    what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({what}). What was committed is kept; free some space and run the same command again."
    if error.errno == errno.EFBIG:
        return f"{what}: the limit is the file system's, or the shell's (ulimit -f). What was committed is kept."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        user = f"user {os.getuid()}"
        return f"no permission to write or read there ({what}) as {user}. Make it writable, or work in another folder."
    return what

"""The tables, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from benchmarks.encodings.measures import TEMPERATURES, Found

MASSES = ("head mass, stored", "head mass, between")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print Markdown."""
    for row in [header, ["---"] * len(header), *rows]:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def describe(name: str, found: Found, num_rows: int) -> None:
    """Print how a teacher is."""
    means = {key: found.scores[key].mean().item() for key in ("entropy", "top-1", "range")}
    print(
        f"{name}: C = {found.num_classes:,}, {num_rows:,} rows (errors on {len(found.scores['range']):,}); "
        f"entropy {means['entropy']:.2f} nats, top-1 {means['top-1']:.2f}, range {means['range']:.1f}\n"
    )


def worst(values: Tensor) -> str:
    """Mean, and the largest."""
    return f"{values.mean():.1e}, {values.max():.1e}"


def bytes_and_kl(found: Mapping[str, Found], asked: Mapping[str, str]) -> None:
    """Print bytes per row and KL of dense, int8 and topk."""
    rows = []
    for name, each in found.items():
        kl = [worst(each.scores[f"KL at {t:g}"]) for t in TEMPERATURES]
        mass = [worst(each.scores[key]) if key in each.scores else "-" for key in MASSES]
        rows.append([name, asked.get(name, "-"), f"{each.bytes_per_row():.1f}", *kl, *mass])
    columns = [f"KL at T = {t:g}: mean, max" for t in TEMPERATURES]
    table(["encoding", "asked: B", "B/row", *columns, *(f"{key}: mean, max" for key in MASSES)], rows)


def sampling(found: Mapping[str, Found], base: str, student: str) -> None:
    """Print bytes and the gradient's error of `sampled`, beside that of `base`."""

    def of(each: Found) -> tuple[float, float, float]:
        error, full = each.scores[f"error at {student}"], each.scores[f"gradient at {student}"]
        ratio = error / full
        return (error.mean() / full.mean()).item(), ratio.mean().item(), ratio.median().item()

    rows, bases = [], of(found[base])
    for name, each in found.items():
        unique = each.scores.get("unique")
        metrics = [
            f"{value:.3f} ({100 * (value / other - 1):+.0f} %)" for value, other in zip(of(each), bases, strict=True)
        ]
        rows.append([name, f"{each.bytes_per_row():.1f}", "-" if unique is None else f"{unique.mean():.1f}", *metrics])
    print(f"student: {student}; in brackets: against {base}\n")
    header = ["encoding", "B/token", "unique ids", "mean error / mean gradient", "error / gradient: mean", "median"]
    table(header, rows)

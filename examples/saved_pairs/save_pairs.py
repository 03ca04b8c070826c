"""The network's owner: trains it, asks it about inputs, and gives the answers away: `python save_pairs.py`.

What is saved, data/pairs.parquet, is all that the student's side has: a table of `sample_id`, `split`, the columns of
the input, the network's `logits`, and to measure with a `label`, in rows of `validation` and `test` alone. Replace it
by a table of your own network's answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from kdpipe.config import load_yaml
from kdpipe.data.sources import Synthetic, Table
from kdpipe.errors import ConfigError
from kdpipe.fingerprint import uniform_by_id
from kdpipe_stages.cli import plain_errors

HERE = Path(__file__).parent
FILE = Path("data") / "pairs.parquet"
PARTS = {"network": 0.5, "real": 0.45, "validation": 0.05}
"""Shares of the training rows: the network learns from the first, and is asked about the others and the test rows."""


def settings_in(folder: Path) -> dict[str, Any]:
    """A folder's network.yaml; `rows` as a path from anywhere, and `class_names` of params.yaml, if it has any."""
    settings: dict[str, Any] = load_yaml(folder / "network.yaml")
    names = load_yaml(folder / "params.yaml")["task"].get("class_names")
    return settings | {"rows": folder / settings["rows"], "class_names": names}


def save(settings: Mapping[str, Any], path: Path) -> None:
    """Train the network of the settings, and write what it says.

    Raises `ConfigError` for rows that it cannot learn from, and `DataError` where they cannot be read.
    """
    columns, label = settings["columns"], settings["label"]
    rows = _rows(settings["rows"], settings["seed"], [*columns, label, "split"])
    known = rows[rows["split"] == "network"]
    network = make_pipeline(
        StandardScaler(), MLPClassifier(settings["hidden"], early_stopping=True, random_state=settings["seed"])
    ).fit(known[columns], known[label])
    asked = rows[rows["split"] != "network"].rename(columns={label: "label"})
    asked["label"] = asked["label"].where(asked["split"] != "real")
    made_up = [
        _synthetic(name, kinds, settings["num_synthetic"], settings["seed"])
        for name, kinds in settings["synthetic"].items()
    ]
    pairs = pd.concat([asked[["sample_id", "split", *columns, "label"]], *made_up])
    table = pa.Table.from_pandas(pairs, preserve_index=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = _answers(network, pairs[columns], settings["class_names"])
    pq.write_table(table.append_column("logits", answers), path)


def num_parameters(settings: Mapping[str, Any]) -> int:
    """Weights and biases of the network: one logit of its inputs."""
    widths = [len(settings["columns"]), *settings["hidden"], 1]
    return sum((before + 1) * after for before, after in itertools.pairwise(widths))


def _rows(path: Path, seed: int, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of the real rows, those of `train` parted by `PARTS`."""
    rows = pa.Table.from_batches(Table(path).batches()).to_pandas()
    for name in columns:
        if name not in rows:
            raise ConfigError(f"network.yaml: {path} has no column {name!r}; it has {', '.join(rows)}")
        if rows[name].isna().any():
            raise ConfigError(f"network.yaml: {path} has rows without {name!r}, from which the network cannot learn")
    rows = rows[[*columns]]
    rows["sample_id"] = [f"real-{number}" for number in range(len(rows))]
    drawn = uniform_by_id(rows["sample_id"].tolist(), seed, "part")
    parts = np.array(list(PARTS))[np.searchsorted(np.cumsum(list(PARTS.values())), drawn, side="right")]
    rows["split"] = np.where(rows["split"] == "train", parts, rows["split"])
    return rows


def _synthetic(name: str, kinds: Mapping[str, Mapping[str, Any]], num_rows: int, seed: int) -> pd.DataFrame:
    """Inputs that nobody has seen, of a split of their own; each column is drawn by itself."""
    rows = pa.Table.from_batches(Synthetic(num_rows, kinds, seed).batches()).to_pandas()
    return rows.assign(sample_id=[f"{name}-{number}" for number in rows.pop("id")], split=name)


def _answers(network: Pipeline, inputs: pd.DataFrame, class_names: Sequence[str] | None) -> pa.Array:
    """Log-probabilities of the classes, in the order of their names; none is below that of one in a million."""
    known = [str(each) for each in network.classes_]
    names = known if class_names is None else list(class_names)
    if sorted(names) != sorted(known):
        raise ConfigError(f"network.yaml: the network knows the classes {known}; task.class_names are {names}")
    probabilities = network.predict_proba(inputs)[:, [known.index(name) for name in names]]
    logits = np.log(np.maximum(probabilities, 1e-6)).astype(np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1])


if __name__ == "__main__":
    with plain_errors():
        settings = settings_in(HERE)
        save(settings, HERE / FILE)
    print(f"{FILE}: what a network of {num_parameters(settings):,} parameters says")

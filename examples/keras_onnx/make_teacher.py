"""The teacher's owner: trains a Keras model and exports it to ONNX: `python make_teacher.py`.

It runs where requirements.txt is installed, without kdpipe; kdpipe reads the file without Keras. Replace it by an
export of your own model: `model.export("teacher.onnx", format="onnx")`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow.parquet as pq
import yaml

HERE = Path(__file__).parent
FILE = Path("data") / "teacher.onnx"
EPOCHS = 5


def rows(params: dict[str, Any], split: str) -> tuple[np.ndarray, np.ndarray]:
    """A split's images `[N, 28, 28, 1]`, from 0 to 1, and labels `[N]`, of a Parquet file."""
    columns, image = params["data"]["columns"], params["task"]["column"]
    table = pq.read_table(HERE / params["data"]["path"], filters=[(columns["split"], "==", split)])
    pixels = table[image].combine_chunks().flatten().to_numpy()
    return pixels.reshape(-1, 28, 28, 1) / np.float32(255), table[columns["label"]].to_numpy()


def network() -> keras.Model:
    """A convolutional network, channels last; it gives logits of ten classes."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2D(64, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )


def make(params: dict[str, Any], epochs: int, file: Path) -> None:
    """Train on the labels of `train`, and export for batches of any size."""
    keras.utils.set_random_seed(0)
    model = network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.001), loss, metrics=["accuracy"])
    model.fit(*rows(params, "train"), batch_size=128, epochs=epochs, verbose=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    model.export(file, format="onnx")
    print(f"{file}: {model.count_params():,} parameters")


if __name__ == "__main__":
    make(yaml.safe_load((HERE / "params.yaml").read_text()), EPOCHS, HERE / FILE)

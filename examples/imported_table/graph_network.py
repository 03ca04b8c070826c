"""What a graph network says about every row, as a table: `python graph_network.py`, after `kdpipe prepare-data`.

A teacher that nobody can ask about one row: it sees all rows at once, as nodes of a graph of nearest neighbours, and
knows the labels that the student knows. Replace it by what your own network said: `sample_id` and `logits`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import sparse
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn
from torch.nn import functional

from kdpipe_stages.cli import plain_errors
from kdpipe_stages.lesson import known_labels
from kdpipe_stages.project import Project

HERE = Path(__file__).parent
FILE = Path("data") / "said.parquet"
NEIGHBOURS, HIDDEN, DROPOUT = 5, 64, 0.5
EPOCHS, LEARNING_RATE, WEIGHT_DECAY = 100, 0.01, 0.0005


class Propagation(torch.autograd.Function):
    """A symmetric matrix `[N, N]` times values of the nodes `[N, D]`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, matrix: sparse.csr_array) -> Tensor:
        ctx.matrix = matrix
        return torch.from_numpy(matrix @ values.detach().numpy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.from_numpy(ctx.matrix @ gradient.numpy()), None


def neighbourhoods(features: np.ndarray) -> sparse.csr_array:
    """D^-1/2 (A + I) D^-1/2 `[N, N]` of the graph of nearest neighbours among the rows (Kipf & Welling 2017)."""
    edges = sparse.csr_array(kneighbors_graph(features, NEIGHBOURS))
    edges = edges.maximum(edges.T) + sparse.eye_array(len(features))
    scale = sparse.diags_array(edges.sum(axis=1) ** -0.5)
    return sparse.csr_array(scale @ edges @ scale, dtype=np.float32)


def said(features: np.ndarray, labels: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """Log-probabilities `[N, C]` of a graph convolutional network of two layers; labels `[N]`, -1 where unknown."""
    torch.manual_seed(seed)
    near = neighbourhoods(features)
    first, last = nn.Linear(features.shape[1], HIDDEN), nn.Linear(HIDDEN, num_classes)
    optimizer = torch.optim.Adam([*first.parameters(), *last.parameters()], LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    inputs = Propagation.apply(torch.from_numpy(features), near)
    known, of = torch.from_numpy(np.flatnonzero(labels >= 0)), torch.from_numpy(labels[labels >= 0])

    def logits(dropout: float) -> Tensor:
        hidden = functional.dropout(first(inputs).relu(), dropout)
        return Propagation.apply(last(hidden), near)

    for _ in range(EPOCHS):
        optimizer.zero_grad()
        functional.cross_entropy(logits(DROPOUT)[known], of).backward()
        optimizer.step()
    return logits(0.0).detach().log_softmax(dim=1).numpy()


def write(project: Project, seed: int = 0) -> None:
    """Write `FILE`: what the network says about all prepared rows, from the labels that the student knows."""
    torch.set_num_threads(1)
    data, student = project.prepared_data(), project.params.student
    images = data.inputs.read(np.arange(len(data.inputs)))["image"]
    features = images.reshape(len(images), -1).astype(np.float32) / 16
    labels = known_labels(data, data.rows_of(student.distil_on), student)
    log_probs = said(features, labels, project.task().num_classes, seed)
    logits = pa.FixedSizeListArray.from_arrays(pa.array(log_probs.ravel()), log_probs.shape[1])
    table = pa.table({"sample_id": pa.array(data.inputs.sample_ids.tolist()), "logits": logits})
    pq.write_table(table, project.root / FILE)


if __name__ == "__main__":
    with plain_errors():
        write(Project(HERE / "params.yaml"))

"""Stores as tables, and tables as stores: for pandas, DuckDB, HF datasets, and for targets that were made elsewhere.

One row per (sample, view). Columns; `[T]` stands for one more list level in stores of per-token targets:

sample_id      string (integers are taken as strings)
view           int32; absent: 0 everywhere
covered        bool [T]; absent: the teacher spoke about every row, and every token that has an entry. Where it is
               false, numbers are NaN, lists empty
logits         list of C floats [T], a masked class is -inf: encodings `dense` and `int8`
class_ids      list of ids [T], log_probs: their log-probabilities at T = 1: encoding `topk`
tail_log_mass  list of N floats [T]: `log R_T` at each of `temperatures`; optional in imports
weights        list beside `class_ids` [T]: encoding `sampled`; exports only
<output>       list of D floats: features
top1, confidence, entropy    the teacher's statistics at T = 1, in nats; exports only

Columns of further logits are named `<output>` and `<output>.class_ids`, …. Arrow's schema metadata has a key `kdpipe`
with JSON: `fingerprint`, `encodings`, `num_classes`, `temperatures`, `class_names`, `views`. An npz file has one member
per column, `temperatures`, and that JSON as the text `kdpipe`; its lists are padded: log_probs by -inf, weights by 0.
"""

from kdpipe.store.tables.exporting import export_table
from kdpipe.store.tables.files import FORMATS, Table, open_table
from kdpipe.store.tables.filling import fill
from kdpipe.store.tables.importing import TableTargets, stored_encodings
from kdpipe.store.tables.matching import OwnRows, own_rows, prepared_rows

__all__ = [
    "FORMATS",
    "OwnRows",
    "Table",
    "TableTargets",
    "export_table",
    "fill",
    "open_table",
    "own_rows",
    "prepared_rows",
    "stored_encodings",
]

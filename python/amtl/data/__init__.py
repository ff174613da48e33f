"""Data sets, readers, splits and encoding: from a file to tensors of embedding rows."""

from __future__ import annotations

from amtl.data.encoded import EncodedData
from amtl.data.encoding import Encoder
from amtl.data.fields import infer_fields
from amtl.data.labels import label_note, labelled, read_labels
from amtl.data.readers import require_columns
from amtl.data.registry import Source, load_rows, load_source, named_sets
from amtl.data.specs import FieldSpec
from amtl.data.splits import split_rows
from amtl.data.writers import require_kind, require_other, write_rows

__all__ = [
    "EncodedData",
    "Encoder",
    "FieldSpec",
    "Source",
    "infer_fields",
    "label_note",
    "labelled",
    "load_rows",
    "load_source",
    "named_sets",
    "read_labels",
    "require_columns",
    "require_kind",
    "require_other",
    "split_rows",
    "write_rows",
]

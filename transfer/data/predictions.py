"""What a number is made of: a row per image in a Parquet file beside the record.

Every file has the columns `set` (which of the run's test sets; "" for its only or main one) and `image` (path below the
images' common folder); docs/predictions.md lists the others. The record names the file, its SHA-256 and the hash of its
image list: two runs can be compared image by image where that hash is the same.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mae_core import distributed
from mae_core.checkpoint import sha256_of
from mae_core.errors import UserError
from mae_core.files import printable
from mae_core.space import Space
from mae_core.writing import named_if_refused, replacing

PREDICTIONS_FILE = "predictions.parquet"
MAIN = ""  # the set that the headline is of
BYTES = 50  # that a row of five classes and their log-probabilities takes, in random data

Columns = Mapping[str, Sequence | np.ndarray]  # name -> [n], or [n, k] for lists of one length


def prediction_space(images: int) -> Space:
    return Space(BYTES * images, BYTES * images)


def names_of(files: Sequence[Path | str]) -> list[str]:
    """The files' paths below the folder that holds them all, with "/"; bytes that are no UTF-8 escaped."""
    texts = [str(file) for file in files]
    above = len(os.path.commonpath([os.path.dirname(text) for text in texts])) if texts else 0
    return [printable(text[above:].strip(os.sep).replace(os.sep, "/")) for text in texts]


def write_predictions(work: Path, sets: Mapping[str, Columns]) -> dict[str, str]:
    """Write the sets, in this order, to predictions.parquet in the work folder, which is made. The same rows give the
    same bytes for one version of pyarrow.

    Returns what the record keeps: file, its sha256, and `images`, the hash of the image list; on all processes but the
    main one, writes nothing and returns {}.
    """
    if not distributed.is_main():
        return {}
    import pyarrow
    from pyarrow import parquet

    names = [name for name, columns in sets.items() for _ in range(len(columns["image"]))]
    table = pyarrow.concat_tables(map(table_of, sets.values()), promote_options="default").unify_dictionaries()
    table = table.add_column(0, "set", pyarrow.array(names, pyarrow.string()).dictionary_encode())
    path = work / PREDICTIONS_FILE
    with named_if_refused(work):
        work.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")
    return {"file": path.name, "sha256": sha256_of(path), "images": digest_of(sets)}


def table_of(columns: Columns) -> Any:
    import pyarrow

    made = {}
    for name, values in columns.items():
        if name == "image":
            made[name] = pyarrow.array(values, pyarrow.string()).dictionary_encode()
        elif np.ndim(values) == 2:
            rows = np.ascontiguousarray(values)
            made[name] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), rows.shape[1])
        else:
            made[name] = pyarrow.array(values)
    return pyarrow.table(made)


def read_predictions(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The sets of a file by name, in their order, each with its columns; UserError if it holds none."""
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
        columns = {name: array_of(table[name].combine_chunks()) for name in table.column_names}
        sets, images = columns.pop("set"), columns["image"]
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ArrowException, OSError, KeyError, ValueError) as e:
        raise UserError(f"{path} holds no predictions ({' '.join(str(e).split())[:200]})") from None
    starts = [0, *(np.flatnonzero(sets[1:] != sets[:-1]) + 1).tolist(), len(images)] if len(images) else []
    return {
        str(sets[start]): {name: values[start:end] for name, values in columns.items()}
        for start, end in pairwise(starts)
    }


def array_of(column: Any) -> np.ndarray:
    if hasattr(column.type, "list_size"):
        return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
    return column.to_numpy(zero_copy_only=False)


def digest_of(sets: Mapping[str, Columns]) -> str:
    """SHA-256 over the names of the sets, their images in order, each once, and its label where it has one."""
    digest = hashlib.sha256()
    for name, columns in sets.items():
        digest.update(f"{name}\n".encode())
        if "label" in columns:
            lines = (f"{image}\t{label}\n" for image, label in zip(columns["image"], columns["label"]))
        else:
            lines = (f"{image}\n" for image in dict.fromkeys(columns["image"]))
        digest.update("".join(lines).encode())
    return digest.hexdigest()

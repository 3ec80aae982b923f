"""Parquet: a row is a document. Batches of rows are streamed, whatever the size of the file."""

from base import InputError, one_line
from data.sources import Source
from data.sources.jsonl import ABOUT, ID, document

ROWS = 256  # read at once


def read_file(path, name, part):
    """Yield the Documents of a file. Raises InputError."""
    import pyarrow
    import pyarrow.parquet

    column = part.column or "text"
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as f:
            there = f.schema_arrow.names
            if column not in there:
                raise InputError(f"{path}: no column {column}; found {', '.join(there)}")
            wanted = [column] + [n for n in (*ID, *ABOUT) if n in there and n != column]
            for batch in f.iter_batches(batch_size=ROWS, columns=[*dict.fromkeys(wanted)]):
                for row in batch.to_pylist():
                    number += 1
                    yield document(row, column, f"{name}:{number}")
    except InputError:
        raise
    except TypeError as e:
        raise InputError(f"{path}: row {number}: {e}") from None
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        said = one_line(e, 200)
        raise InputError(f"{path}: corrupt or cut short after row {number}: {said}") from None


SOURCE = Source("parquet, a row a document", endings=(".parquet",), read_file=read_file)

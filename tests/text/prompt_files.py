"""Prompt files for tests: written in every format, and read."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from engine.text.rows import Rejected, read_rows


def read(path, stdin=b""):
    with read_rows(path, io.BytesIO(stdin)) as rows:
        return list(rows)


def lines(*rows):
    """JSON lines; bytes stand for themselves."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def jsonl(*rows):
    return read("-", lines(b'{"prompt": "first"}', *rows))[1:]


def reason(row):
    """Why the one row is rejected, which must be one printable line."""
    assert isinstance(row, Rejected), row
    assert row.reason.isprintable() and len(row.reason) < 250
    return row.reason


@pytest.fixture
def write(tmp_path):
    """Writes rows (dicts, or bytes as they are) into a file of the format that the name says."""

    def write(name, rows):
        path = tmp_path / name
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        elif path.suffix.lower() == ".csv":
            with open(path, "w", newline="", encoding="utf-8") as file:
                names = list(dict.fromkeys(name for row in rows for name in row))
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix.lower() == ".parquet":
            names = list(dict.fromkeys(name for row in rows for name in row))
            table = {name: [row.get(name) for row in rows] for name in names}
            kinds = {"seed": pa.uint64(), "guidance_scale": pa.float64()}
            pa.parquet.write_table(
                pa.table({name: pa.array(values, kinds.get(name)) for name, values in table.items()}), path
            )
        else:
            path.write_bytes(lines(*rows))
        return path

    return write

"""Formats of prompt files: CSV and Parquet row by row, and files that are refused."""

import datetime
import io
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from engine.errors import UserError
from engine.text import row_files
from engine.text.rows import Rejected, Row, read_rows, unread_columns
from tests.text.prompt_files import jsonl, read, reason

# ---- CSV


def test_rows_of_csv_that_are_rejected(write):
    rows = read(
        write("r.csv", b'prompt,seed\na\nb,1,2\n"c"d,1\ne,x\nf,nan\n,1\n"g, ""h""",1\n\xd9\xa1,\xd9\xa1')
    )
    assert "1 cells, the header has 2" in reason(rows[0])
    assert "3 cells, the header has 2; put texts with commas in quotes" in reason(rows[1])
    assert "invalid CSV" in reason(rows[2])
    assert "seed='x' (a text): write a whole number" in reason(rows[3])
    assert "seed='nan' (a text)" in reason(rows[4])
    assert reason(rows[5]) == "no prompt"
    assert rows[6] == Row(6, "6", 'g, "h"', {}, seed=1)
    assert "seed='\u0661'" in reason(rows[7]), "only the digits 0 to 9 are digits"
    (row,) = read(write("n.csv", b"prompt,guidance_scale\na," + b"9" * 5000))
    assert "guidance_scale=" in reason(row)


def test_a_quote_that_is_not_closed_takes_one_row_with_it(write):
    rows = read(write("r.csv", b'prompt,note\n"a,1\nb,2\n"c, c",3\nd,4\n'))
    assert "close every quote" in reason(rows[0])
    assert [row.prompt for row in rows[1:]] == ["b", "c, c", "d"]
    rows = read(write("r.csv", b'prompt\na\n"b\nc\nd'))
    assert [type(row) for row in rows] == [Row, Rejected, Row, Row]


@pytest.mark.parametrize("limit", ["MAX_LINES", "MAX_LINE"])
def test_an_open_quote_is_looked_for_only_so_far(write, monkeypatch, limit):
    monkeypatch.setattr(row_files, limit, 100)
    rows = read(write("r.csv", b'prompt\n"a\n' + b"b\n" * 300 + b'"c"\n"d\nd"\n'))
    assert "a text that does not end" in reason(rows[0])
    assert [row.prompt for row in rows[1:]] == ["b"] * 300 + ["c", "d\nd"]


def test_a_million_columns(write):
    header = ",".join(f"c{i}" for i in range(10**6)).encode()
    rows = read(write("r.csv", header + b"\n1,2,3\na fox\n"))
    assert [reason(row) for row in rows] == ["1000000 columns; write at most 1000"] * 2
    rows = read(write("r.csv", header.replace(b"c", b"a longer name") + b"\n1,2,3\na fox\n"))
    assert [reason(row) for row in rows] == ["a header of more than 16 MiB; write at most 1000 columns"] * 2
    (row,) = jsonl(b'{"prompt": "a"' + b"".join(b',"c%d":1' % i for i in range(10**5)) + b"}")
    assert reason(row) == "100001 columns; write at most 1000"


def test_a_megabyte_in_a_cell(write):
    (row, other) = read(write("r.csv", b"prompt\n%s\na fox\n" % (b"x" * 2**20)))
    assert "prompt of 1048576 characters" in reason(row) and other.prompt == "a fox"


# ---- Parquet


def test_columns_of_parquet_that_do_not_fit_into_json(write):
    nested = pa.array([[{"a": [1.5]}]], pa.list_(pa.struct([("a", pa.list_(pa.float16()))])))
    table = pa.table(
        {
            "prompt": pa.array(["a"]).dictionary_encode(),
            "thumb": [b"\xff"],
            "day": [datetime.date(2026, 1, 1)],
            "deep": [[{"a": b"x"}]],
            "x.y": nested,
            "flag": [True],
        }
    )
    buffer = io.BytesIO()
    pa.parquet.write_table(table, buffer)
    path = write("r.parquet", buffer.getvalue())
    assert read(path) == [Row(0, "0", "a", {"x.y": [{"a": [1.5]}], "flag": True})]
    with read_rows(path, io.BytesIO()) as rows:
        warnings = unread_columns(rows.columns)
    assert [warning.split("'")[1] for warning in warnings] == ["thumb", "day", "deep"]
    assert all("is left out" in warning for warning in warnings)


def test_pictures_inside_of_parquet_are_refused_and_never_opened(write):
    image = pa.array(
        [{"bytes": b"PNG", "path": None}, None], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    mask = pa.array([b"", b"bomb"])
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.table({"prompt": ["a", "b"], "image": image, "mask": mask}), buffer)
    rows = read(write("r.parquet", buffer.getvalue()))
    assert [reason(row).split(":")[0] for row in rows] == ["image", "mask"]


def test_invalid_utf8_in_parquet_is_one_row_s_failure(write):
    data = pa.array([b"a", b"\xff", b"b"], pa.binary())
    bad = pa.StringArray.from_buffers(3, data.buffers()[1], data.buffers()[2])
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.table({"prompt": bad}), buffer)
    rows = read(write("r.parquet", buffer.getvalue()))
    assert [type(row) for row in rows] == [Row, Rejected, Row] and "UTF-8" in reason(rows[1])


def test_many_rows_and_columns_of_parquet(write):
    many = [{"prompt": f"p{i}", "seed": i} for i in range(1000)]
    assert [row.seed for row in read(write("r.parquet", many))] == list(range(1000))
    wide = write("wide.parquet", [{"prompt": "a"} | {f"c{i}": 1 for i in range(1000)}] * 2)
    assert [reason(row) for row in read(wide)] == ["1001 columns; write at most 1000"] * 2


def test_damaged_parquet(write):
    path = write("r.parquet", [{"prompt": f"p{i}" * 50} for i in range(1000)])
    sound = path.read_bytes()
    for damaged in (b"", b"PAR1", sound[:-9] + b"x" * 9, sound[:4] + bytes(2000) + sound[2004:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged.*Parquet|Parquet.*damaged") as error:
            read(path)
        assert str(error.value).isprintable()


def test_parquet_without_the_package(write, monkeypatch):
    path = write("r.parquet", [{"prompt": "a red fox"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        UserError, match=r"r\.parquet: needs a package; write pip install 'fogsculpt\[jobs\]'"
    ):
        read(path)


# ---- files that are refused


def parquet(**columns):
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


FILES = [
    ("r.txt", b"", "no prompt in it"),
    ("r.txt", b"\xef\xbb\xbf\n # only\n\n", "no prompt in it"),
    ("r.txt", "a fox\n".encode("utf-16"), "UTF-16; save the file as UTF-8"),
    ("r.csv", "prompt\na fox\n".encode("utf-16"), "UTF-16; save the file as UTF-8"),
    ("r.jsonl", b"\n", "no prompt in it"),
    ("r.csv", b"", "no prompt in it"),
    ("r.csv", b"prompt,seed\n", "no prompt in it"),
    ("r.csv", b"promt,seed\na,1\n", r"no prompt \(is it 'promt'\?\)"),
    ("r.csv", b"note,seed\na,1\n", "no prompt; name the column"),
    ("r.csv", b"prompt;seed\na;1\n", "separate the columns with commas"),
    ("r.csv", b"prompt,seed,seed\na,1,1\n", "column 'seed' stands there twice"),
    ("r.csv", b'prompt,"see\nd', "the first line is invalid CSV"),
    ("r.csv", b"prompt,caf\xe9\na,1\n", "the first line is not UTF-8"),
    ("r.parquet", parquet(prompt=pa.array([], pa.string())), "no prompt in it"),
    ("r.parquet", parquet(), "no prompt in it"),
    ("r.parquet", parquet(Prompt=["a"]), r"no prompt \(is it 'Prompt'\?\)"),
    ("r.parquet", parquet(prompt=[b"a"]), "column prompt is of type 'binary'; write texts or numbers"),
    ("r.parquet", parquet(prompt=["a"], seed=[datetime.date(2026, 1, 1)]), "column seed is of type 'date32"),
    ("r.json", b"{}", r"the suffix '\.json' is unknown; write a file that ends in \.txt, \.jsonl, \.csv or"),
    ("prompts", b"a", r"the suffix '' is unknown; .* or - for standard input"),
]


@pytest.mark.parametrize(("name", "data", "message"), FILES)
def test_files_that_are_refused(write, name, data, message):
    with pytest.raises(UserError, match=message) as error:
        read(write(name, data))
    assert str(error.value).isprintable() and name in str(error.value)


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"missing\.txt: no such file; write a file that ends in \.txt"):
        read(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="Is a directory"):
        read(tmp_path)
    with pytest.raises(UserError, match="is no path"):
        read("a\0.txt")
    with pytest.raises(UserError, match="standard input: no prompt in it"):
        read("-", b"\n")


def test_a_disk_that_fails_while_it_is_read(write, monkeypatch):
    class Failing(io.BytesIO):
        def readline(self, limit=-1):
            if self.tell() > 20:
                raise OSError(5, "Input/output error")
            return super().readline(limit)

    for name in ("r.txt", "r.jsonl", "r.csv"):
        failing = Failing(b"prompt\n" + b"a\n" * 50)
        monkeypatch.setattr(row_files, "_open", lambda path, failing=failing: failing)
        with pytest.raises(UserError, match="Input/output error"):
            read(name)


def test_no_room_for_temporary_files(monkeypatch):
    with open("/dev/full", "r+b", buffering=0) as full:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: full)
        with pytest.raises(UserError, match=r"No space left on device.*TMPDIR"):
            read("-", b"a fox\n")

"""Prompt files of jobs: the same rows from every format, and what bad rows and hostile files come to."""

import base64
import io
import json
import math
import pathlib
import random
import subprocess
import sys
import threading

import pytest

from engine.text import row_files
from engine.text.rows import Rejected, Row, read_rows, unread_columns
from tests.text.prompt_files import jsonl, lines, read, reason

ROWS = [
    {"prompt": "a red fox", "id": "fox", "seed": 2**64 - 1, "guidance_scale": 7.5, "note": "one, two"},
    {"prompt": ' "a cat"\nat sea\u2028 ', "negative_prompt": "fog", "steps": 20, "height": 64, "width": 32},
    {"prompt": "\N{FOX FACE} \0 \u202e", "index": 0, "sampler": "ddim", "guidance_scale": 1},
    {"prompt": "a", "image": "a/1.png", "mask": "x/m.png", "strength": 1, "image_guidance_scale": 1.5},
]
EXPECTED = [
    Row(0, "fox", "a red fox", {"note": "one, two"}, seed=2**64 - 1, guidance_scale=7.5),
    Row(1, "1", ' "a cat"\nat sea\u2028 ', {}, "fog", steps=20, height=64, width=32),
    Row(2, "2", "\N{FOX FACE} \0 \u202e", {}, index=0, sampler="ddim", guidance_scale=1.0),
    Row(3, "3", "a", {}, image="a/1.png", mask="x/m.png", strength=1.0, image_guidance_scale=1.5),
]


# ---- what is read


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.parquet", "R.JSONL", "r.Csv"])
def test_all_formats_give_the_same_rows(write, name):
    path = write(name, ROWS)
    assert read(path) == EXPECTED
    with read_rows(str(path), io.BytesIO()) as rows, read_rows("-", io.BytesIO(lines(*ROWS))) as others:
        assert len(rows) == 4 and rows[3] == rows[-1] == EXPECTED[3]
        assert rows.digest == others.digest and len(rows.digest) == 64
        assert rows.columns == {name: True for row in ROWS for name in row}
        with pytest.raises(IndexError):
            rows[4]


def test_the_digest_is_of_the_rows_and_nothing_else():
    def digest(*rows):
        with read_rows("-", io.BytesIO(lines(*rows))) as found:
            return found.digest

    row = {"prompt": "a", "seed": 1, "guidance_scale": 5, "note": {"x": [1, 2], "y": 2}}
    same = {"note": {"y": 2, "x": [1, 2]}, "id": None, "guidance_scale": 5.0, "seed": 1.0, "prompt": "a"}
    assert digest(row) == digest(b"\r", same)
    others = [{**row, "seed": 2}, {**row, "note": {"x": [2, 1], "y": 2}}, {**row, "id": "0"}, {"prompt": "a"}]
    assert len({digest(row), *map(digest, others), digest(row, row), digest(*others)}) == 7


TXT = "\ufeffa fox\r\n\r\n  # a comment\r\n\ta cat \r\n#x\r\na \u2028line\x0cfeed\0\r\n\N{FOX FACE}".encode()


@pytest.mark.parametrize("path", ["r.txt", "-"])
def test_one_prompt_a_line(write, path):
    rows = read(write(path, TXT) if path != "-" else path, TXT)
    prompts = ["a fox", "a cat", "a \u2028line\x0cfeed\0", "\N{FOX FACE}"]
    assert rows == [Row(i, str(i), prompt, {}) for i, prompt in enumerate(prompts)]


def test_standard_input_is_json_where_its_first_line_is():
    assert read("-", b'\xef\xbb\xbf\n \n {"prompt": "a"}\n\n') == [Row(0, "0", "a", {})]
    assert [row.prompt for row in read("-", b'a\n{"prompt": "b"}\n')] == ["a", '{"prompt": "b"}']
    assert [row.prompt for row in read("-", b'# a\n{"prompt": "b"}')] == ['{"prompt": "b"}']


def test_home_is_found(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("r.txt", b"a fox")
    assert read("~/r.txt")[0].prompt == "a fox"


def test_empty_cells_are_not_given(write):
    table = (
        b"\xef\xbb\xbfprompt,negative_prompt, seed ,id,note,\r\n\r\na fox,,,,,\r\na cat,fog, 7.0 ,x,n,0\r\n"
    )
    path = write("r.csv", table)
    assert read(path) == [Row(0, "0", "a fox", {}), Row(1, "x", "a cat", {"note": "n"}, "fog", seed=7)]
    with read_rows(path, io.BytesIO()) as rows:
        assert rows.columns[""] is False, "a column without a name is left out"
    path = write("r.parquet", [{"prompt": "a", "note": "", "w": math.nan, "seed": None}])
    assert read(path) == [Row(0, "0", "a", {})]
    path = write("r.parquet", [{"prompt": "a", "guidance_scale": math.nan}])
    assert reason(*read(path)) == "guidance_scale=nan: write a number"
    assert jsonl({"prompt": "a", "seed": None, "note": None, "negative_prompt": ""}) == [
        Row(1, "1", "a", {}, negative_prompt="")
    ]


def test_numbers_may_be_ids_and_floats_may_be_whole():
    assert [row.id for row in jsonl({"prompt": "a", "id": 7}, {"prompt": "a", "id": 7.5})] == ["7", "7.5"]
    assert jsonl({"prompt": "a", "seed": 7.0, "extra": 7.0})[0] == Row(1, "1", "a", {"extra": 7.0}, seed=7)


def test_rows_are_read_by_many_threads(write):
    path = write("r.jsonl", [{"prompt": f"{i} " * (i % 50 + 1), "seed": i} for i in range(2000)])
    found = []

    def work(start):
        order = random.Random(start).sample(range(2000), 2000)
        found.append(all(rows[i].seed == i and rows[i].prompt.split()[0] == str(i) for i in order))

    with read_rows(path, io.BytesIO()) as rows:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 8


MEMORY = """
import io, json, sys, tracemalloc
from engine.text.rows import read_rows

class Many(io.RawIOBase):
    # The same lines again and again, made when they are read.
    line, count = sys.argv[1].encode().decode("unicode_escape").encode(), int(sys.argv[2])
    def readable(self):
        return True
    def readinto(self, buffer):
        count = min(self.count, len(buffer) // len(self.line))
        self.count -= count
        buffer[: count * len(self.line)] = self.line * count
        return count * len(self.line)

stream = io.BufferedReader(Many(), 2**16)
tracemalloc.start()
with read_rows("-", stream) as rows:
    held, most = tracemalloc.get_traced_memory()
    print(json.dumps([len(rows), held, most]))
"""


def memory(line, count):
    """[rows, bytes that they hold, bytes at most while they are read], where no types are checked."""
    command = [sys.executable, "-c", MEMORY, line, str(count)]
    root = pathlib.Path(__file__).parents[2]
    return json.loads(subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=120).stdout)


def test_rows_are_not_kept_in_memory():
    rows, held, most = memory(r"a red fox at night in the snow beside two green trees\n", 200_000)
    assert rows == 200_000
    assert held < 16 * rows + 2**20 and most < 24 * rows + 4 * 2**20


def test_a_line_without_an_end_is_not_kept_in_memory():
    rows, held, most = memory("x" * 2**14, 2**12)  # 64 MiB
    assert rows == 1 and held < 2**20 and most < 2.5 * row_files.MAX_LINE


# ---- rows that are rejected, while those around them are not


BAD = [
    ({}, "no prompt"),
    ({"promt": "a"}, "no prompt (is it 'promt'?)"),
    ({"Caption": "a"}, "no prompt (is it 'Caption'?)"),
    ({"pro\nmpt": "a"}, r"no prompt (is it 'pro\nmpt'?)"),
    ({"prompt": ""}, "no prompt"),
    ({"prompt": " \n"}, "no prompt"),
    ({"prompt": None}, "no prompt"),
    ({"prompt": 5}, "prompt=5: write a text"),
    ({"prompt": ["a"]}, "prompt=a list: write a text"),
    ({"prompt": "x" * 2**20}, "prompt of 1048576 characters; write at most 100000"),
    ({"prompt": "a", "negative_prompt": "x" * 100_001}, "negative_prompt of 100001 characters"),
    ({"prompt": "a", "id": "x" * 1001}, "id of 1001 characters"),
    ({"prompt": "a", "id": True}, "id=true: write a text"),
    ({"prompt": "a", "id": {}}, "id=an object: write a text"),
    ({"prompt": "a", "id": ""}, "id=''; leave it out"),
    ({"prompt": "a", "sampler": 1}, "sampler=1: write a text"),
    ({"prompt": "a", "sampler": "x" * 101}, "sampler of 101 characters"),
    ({"prompt": "a", "seed": "7"}, f"seed='7' (a text): write a whole number, 0 to {2**64 - 1}"),
    ({"prompt": "a", "seed": "\x1b\n" * 100}, r"seed='\x1b\n\x1b"),
    ({"prompt": "a", "seed": 2**64}, f"seed={2**64}: write a whole number, 0 to {2**64 - 1}"),
    ({"prompt": "a", "seed": -1}, "seed=-1: write"),
    ({"prompt": "a", "seed": 1.5}, "seed=1.5: write a whole number"),
    ({"prompt": "a", "seed": 1e300}, "seed=1e+300: write a whole number"),
    ({"prompt": "a", "seed": 10**4000}, "seed=10000"),
    ({"prompt": "a", "index": -1}, "index=-1: write a whole number, 0 to"),
    ({"prompt": "a", "index": 2**32}, "index=4294967296: write"),
    ({"prompt": "a", "steps": 0}, "steps=0: write a whole number, 1 to"),
    ({"prompt": "a", "steps": True}, "steps=true: write a whole number"),
    ({"prompt": "a", "height": 0}, "height=0: write"),
    ({"prompt": "a", "width": []}, "width=a list: write"),
    ({"prompt": "a", "guidance_scale": "7.5"}, "guidance_scale='7.5' (a text): write a number"),
    ({"prompt": "a", "guidance_scale": False}, "guidance_scale=false: write a number"),
    ({"prompt": "a", "guidance_scale": 10**400}, "guidance_scale=1000"),
    ({"prompt": "a", "guidance_scale": math.nan}, "NaN is no JSON"),
    ({"prompt": "a", "guidance_scale": -math.inf}, "-Infinity is no JSON"),
    (b'{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale=inf: write a number"),
    (b'{"prompt": "a", "note": [1e999]}', "a number that is not finite"),
    (b'{"prompt": "a", "note": ' + b"1" * 5000 + b"}", "a number of more than 4300 digits"),
    ({"prompt": "a", "image": "/etc/passwd"}, "image='/etc/passwd' is an absolute path; write one from the"),
    ({"prompt": "a", "image": "a/../../b.png"}, "image='a/../../b.png' leads out of the folder"),
    ({"prompt": "a", "image": "https://x.org/a.png"}, "is no file of this machine; download it, and write"),
    ({"prompt": "a", "mask": "a\0b"}, r"mask='a\x00b' is no path"),
    ({"prompt": "a", "mask": "x" * 4097}, "mask of 4097 characters; write at most 4096"),
    (
        {"prompt": "a", "mask": {"bytes": "x"}},
        "mask: a picture inside of the file; write the path of its own",
    ),
    ({"prompt": "a", "image": 5}, "image=5: write a text"),
    ({"prompt": "a", "strength": "0.5"}, "strength='0.5' (a text): write a number"),
    ({"prompt": "a", "image_guidance_scale": True}, "image_guidance_scale=true: write a number"),
    (
        {"prompt": "a", "init_image": "a.png"},
        "init_image is not read: write a picture to change under 'image'",
    ),
    (b'{"prompt": "a"', "invalid JSON: Expecting ',' delimiter at character 15"),
    (b'{"prompt": "a"} {}', "invalid JSON: Extra data at character 17"),
    (b"a fox", "invalid JSON: Expecting value at character 1"),
    (b'["a fox"]', "no JSON object"),
    (b"null", "no JSON object"),
    (b'{"prompt": "a", "prompt": "b"}', "'prompt' stands there twice"),
    (b'{"prompt": "a", "x": {"\x5cn": 1, "\x5cn": 1}}', r"'\n' stands there twice"),
    (b'{"prompt": "a", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested too deep"),
    (b'{"prompt": "a", "x": ' + b"[" * 33 + b"]" * 33 + b"}", "nested more than 32 deep"),
    (b'{"prompt": "a", "x": ' + b'{"a":' * 33 + b"1" + b"}" * 34, "nested more than 32 deep"),
    (b'{"prompt": "caf\xe9"}', "not UTF-8"),
    (b'{"prompt": "\x5cud83e"}', "not Unicode text"),
    (b'{"prompt": "a", "x": ["\x5cudcff"]}', "not Unicode text"),
    ({"prompt": "a", "x": "y" * 2**16}, f"{2**16 + 8} bytes in columns to carry through"),
    ({"prompt": "a"} | {str(i): 1 for i in range(1000)}, "1001 columns; write at most 1000"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_a_bad_row_is_rejected_alone(row, message):
    bad, good = jsonl(row, {"prompt": "after"})
    assert message in reason(bad)
    assert (bad.number, bad.id) == (1, "1") and good == Row(2, "2", "after", {})


def test_what_is_just_within_the_limits_passes():
    row = {"prompt": "x" * 100_000, "id": "x" * 1000, "seed": 0, "index": 2**32 - 1, "steps": 1}
    row |= {"note": "y" * (2**16 - 11), "image": None, "mask": "", "init_image": ""}
    found = Row(1, row["id"], row["prompt"], {"note": row["note"]}, None, 0, 2**32 - 1, 1, mask="")
    assert jsonl(row) == [found]
    deep = b'{"prompt": "a", "x": ' + b"[" * 32 + b"]" * 32 + b"}"
    assert isinstance(jsonl(deep)[0], Row)
    assert isinstance(jsonl({"prompt": "a"} | {str(i): 1 for i in range(999)})[0], Row)


def test_rejected_rows_keep_their_ids():
    rows = jsonl({"id": "x"}, {"prompt": "a", "id": 7, "steps": 0}, b'{"steps": 0, "id": "\x5cudcff"}')
    assert [(row.id, type(row)) for row in rows] == [("x", Rejected), ("7", Rejected), ("3", Rejected)]


def test_an_id_is_given_once():
    ids = ["a", "b", 7, "b", None, "7", "a", "b", "4"]
    rows = jsonl(*({"prompt": str(i), "id": id} for i, id in enumerate(ids)))
    rejected = {row.number: reason(row) for row in rows if isinstance(row, Rejected)}
    firsts = {4: ("b", 2), 6: ("7", 3), 7: ("a", 1), 8: ("b", 2)}
    assert rejected == {
        number: f"id {id!r} is that of row {first} already; give each row its own"
        for number, (id, first) in firsts.items()
    }
    assert [row.id for row in rows] == ["a", "b", "7", "b", "5", "7", "a", "b", "4"]
    rows = jsonl({"id": "x"}, {"prompt": "a", "id": "x"}, {"prompt": "a", "id": "x", "steps": 0})
    assert reason(rows[0]) == "no prompt" and "that of row 1" in reason(rows[1])
    assert reason(rows[2]).startswith("steps=0"), "what was wrong first"


def test_a_row_without_an_id_is_called_by_its_number_and_no_other_is():
    ids = ["3", "b", None, "c", None, 5, 8]
    rows = jsonl(*({"prompt": str(i), "id": id} for i, id in enumerate(ids)))
    rejected = {row.number: reason(row) for row in rows if isinstance(row, Rejected)}
    assert rejected == {
        3: "id '3' is that of row 1 already; give each row its own",
        6: "id '5' is that of row 5 already; give each row its own",
    }
    assert [row.id for row in rows] == ["3", "b", "3", "c", "5", "5", "8"]
    assert not any(isinstance(row, Rejected) for row in jsonl(*({"prompt": "a"} for _ in range(9))))


def test_ids_of_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr("engine.text.rows.hash", lambda id: 1, raising=False)
    rows = jsonl(*({"prompt": "a", "id": id} for id in "abcab"))
    assert [type(row) for row in rows] == [Row, Row, Row, Rejected, Rejected]


def test_invalid_utf8_leaves_the_other_lines(write):
    for name, head in (("r.txt", b""), ("r.csv", b"prompt\n")):
        rows = read(write(name, head + b"a fox\na caf\xe9\na cat\n# caf\xe9\n"))
        assert [row.prompt for row in rows if isinstance(row, Row)][:2] == ["a fox", "a cat"]
        assert "save the file as UTF-8" in reason(rows[1])


def test_a_line_that_is_too_long_leaves_the_others(write):
    long = b"x" * (row_files.MAX_LINE + 1)
    for name, text in (("r.txt", b"%s\n"), ("r.jsonl", b'{"prompt": "%s"}\n'), ("r.csv", b"%s\n")):
        head = b"prompt\n" if name == "r.csv" else b""
        rows = read(write(name, head + text % b"a" + text % long + text % b"b"))
        assert [type(row) for row in rows] == [Row, Rejected, Row]
        assert "a line of more than 16 MiB" in reason(rows[1]) and rows[2].prompt == "b"
    assert len(read("-", long)) == 1


# ---- names of columns


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("negative promt", "negative_prompt"),
        ("Prompt", "prompt"),
        ("SEED", "seed"),
        ("guidance", "guidance_scale"),
        ("cfg", "guidance_scale"),
        ("CFG Scale", "guidance_scale"),
        ("num-inference-steps", "steps"),
        ("scheduler", "sampler"),
        ("heigth", "height"),
        ("num_steps", "steps"),
        ("denoising_strength", "strength"),
        ("mask_image", "mask"),
    ],
)
def test_names_that_may_be_slips_are_told(name, hint):
    assert unread_columns({"prompt": True, name: True}) == [
        f"column {name!r} is carried through, not read (did you mean {hint}?)"
    ]


def test_other_names_are_no_slips():
    columns = ["prompt", *row_files.TEXTS, *row_files.NUMBERS, "note", "text", "source", "prompt_id"]
    columns += [*row_files.PATHS, "init_image"]
    assert unread_columns(dict.fromkeys(columns, True)) == []


def test_names_from_files_are_cut_and_printable():
    columns = {"prompt": True, "seed\x1b\n": True, "x" * 10**6: False}
    warnings = unread_columns(columns)
    assert len(warnings) == 2 and all(w.isprintable() and len(w) < 200 for w in warnings)
    warnings = unread_columns({f"seed{i}": True for i in range(1000)})
    assert len(warnings) == 13 and warnings[-1] == "and 988 columns more of this kind"


def test_names_of_columns_take_bounded_memory():
    rows = [{"promp" + "t" * 10**4: 1, f"c{i}-{base64.b64encode(b'x' * 100)}": 1} for i in range(2000)]
    with read_rows("-", io.BytesIO(lines(*rows))) as found:
        assert len(found.columns) == row_files.MAX_COLUMNS
        assert max(map(len, found.columns)) == row_files.SHOWN

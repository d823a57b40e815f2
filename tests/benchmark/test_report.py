import json

from engine.benchmark import report

ROWS = [
    {"model": "sd15", "batch": 4, "images/s": 12345.678, "MFU": None, "_seconds": [1.0]},
    {"model": "sdxl", "batch": 16, "images/s": 0.0123456, "times peer": "1.50 (1.40 to 1.60)"},
]


def test_table():
    assert report.table(ROWS).splitlines() == [
        "model  batch  images/s  MFU  times peer",
        "sd15       4     12346",
        "sdxl      16   0.01235       1.50 (1.40 to 1.60)",
    ]


def test_file_has_everything(tmp_path):
    file = tmp_path / "found.json"
    report.write(file, ["generate", "--model", "a b"], ROWS)
    found = json.loads(file.read_text())
    assert found["command"] == "python -m launch.benchmark generate --model 'a b'"
    assert found["rows"][0] == {
        "model": "sd15",
        "batch": 4,
        "images/s": 12345.678,
        "MFU": None,
        "seconds": [1.0],
    }
    assert {"date", "devices", "processor", "cores", "versions"} <= found.keys()
    assert list(tmp_path.iterdir()) == [file]

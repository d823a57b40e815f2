"""python -m launch.scenes."""

import json

import numpy as np
import pytest
from PIL import Image

from engine import world
from engine.world import drawing
from launch import cli, scenes
from tests import backgrounds


def drawn(out, *options):
    """Captions and pictures."""
    assert cli.exit_code(scenes.main, [f"--out={out}", "--num_images=3", "--size=32", *options]) == cli.DONE
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    return [row["text"] for row in rows], [np.asarray(Image.open(out / row["file_name"])) for row in rows]


def test_a_folder_of_captioned_scenes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(drawing, "tables", backgrounds.MANY)
    captions, pictures = drawn(tmp_path / "all", "--seed=5")
    singly = [world.batch(5, index, 1, 32) for index in range(3)]
    assert captions == [caption for _, (caption,), _ in singly]
    np.testing.assert_array_equal(pictures, [image for (image,), _, _ in singly])
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "all")]

    in_style, neon = drawn(tmp_path / "neon", "--seed=5", "--style=neon", "--easy=1")
    assert all(caption.endswith(", neon") for caption in in_style)
    assert np.mean(neon) < 60  # lines on black

    told, chalk = drawn(tmp_path / "chalk", "--seed=5", "--style=chalk", "--easy=1")
    assert [caption.replace("chalk", "neon") for caption in told] == in_style
    for picture in chalk:
        assert picture[0, 0].tolist() == [0x17, 0x35, 0x2B] and picture.max() > 200


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--style=neno"], "style='neno' is unknown (did you mean neon?); write watercolour, pencil sketch"),
        (["--size=48"], "size=48: the world is drawn in multiples of 32 pixels"),
        (["--size=16"], "size=16 is out of range; write 32 to 1024"),
        (["--easy=2"], "easy=2.0 is out of range; write 0 to 1"),
        ([], "write --out"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, options, told):
    out = [f"--out={tmp_path}"] if options else []
    assert cli.exit_code(scenes.main, [*out, *options]) == cli.MISTAKE
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1

"""Folders appear whole or not at all."""

import pytest

from engine.types import UserError
from engine.weights.files import new_folder, read_json, write_json


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def write_model(path, text, overwrite=False):
    with new_folder(path, "index.json", overwrite) as new:
        write_json(new / "index.json", {"text": text})


def test_the_folder_appears_at_the_end(tmp_path):
    path = tmp_path / "deep" / "model"
    with new_folder(path, "index.json", False) as new:
        (new / "a").write_text("a")
        assert not path.exists()
    assert names_in(path) == ["a"]
    assert names_in(path.parent) == ["model"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", "new")
    assert read_json(tmp_path / "model" / "index.json") == {"text": "new"}


def test_overwriting_only_when_asked(tmp_path):
    write_model(tmp_path / "model", "old")
    with pytest.raises(UserError, match=r"model already exists"):
        write_model(tmp_path / "model", "new")
    assert read_json(tmp_path / "model" / "index.json") == {"text": "old"}
    (tmp_path / "model" / "left over").touch()
    write_model(tmp_path / "model", "new", overwrite=True)
    assert read_json(tmp_path / "model" / "index.json") == {"text": "new"}
    assert names_in(tmp_path / "model") == ["index.json"]
    assert names_in(tmp_path) == ["model"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"home holds no index\.json, so it is not replaced"):
        write_model(tmp_path / "home", "new", overwrite=True)
    assert names_in(tmp_path / "home") == ["thesis.tex"]
    with pytest.raises(UserError, match=r"thesis\.tex is a file"):
        write_model(tmp_path / "home" / "thesis.tex", "new", overwrite=True)
    assert names_in(tmp_path) == ["home"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [False, True])
def test_an_interruption_changes_nothing(tmp_path, error, existed):
    if existed:
        write_model(tmp_path / "model", "old")
    with pytest.raises(type(error)), new_folder(tmp_path / "model", "index.json", True) as new:
        write_json(new / "index.json", {"text": "new"})
        raise error
    assert names_in(tmp_path) == (["model"] if existed else [])
    if existed:
        assert read_json(tmp_path / "model" / "index.json") == {"text": "old"}


def test_the_old_folder_returns_when_the_new_one_cannot_take_its_place(tmp_path):
    write_model(tmp_path / "model", "old")
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "model", "index.json", True) as new:
        new.rmdir()
    assert read_json(tmp_path / "model" / "index.json") == {"text": "old"}
    assert names_in(tmp_path) == ["model"]

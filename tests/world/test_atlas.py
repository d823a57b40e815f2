"""The sprites' file: drawn from the font, written, read, and refused where it is another's."""

import numpy as np
import pytest

from engine import emoji
from engine.errors import UserError
from engine.world import atlas
from engine.world.scene import Thing
from engine.world.things import THINGS as ALL_THINGS
from tests.world.sprites import THINGS, plain_atlas

FOX, BOARD = Thing("🦊", ("fox",)), Thing("🛹", ("skateboard",), turn=-26.0)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    made = plain_atlas()
    atlas.save(made, tmp_path / "a.webp")
    found = atlas.load(THINGS, tmp_path / "a.webp")
    for field in ("pixels", "extent", "top", "bottom"):
        np.testing.assert_array_equal(getattr(found, field), getattr(made, field))
    assert found.index["hat"] == 5
    assert [file.name for file in tmp_path.iterdir()] == ["a.webp"]


@pytest.mark.parametrize("things", [THINGS[::-1], THINGS[:-1], (*THINGS[:-1], Thing("g", ("hat",)))])
def test_an_atlas_of_other_things_is_refused_in_one_line(things, tmp_path):
    atlas.save(plain_atlas(), tmp_path / "a.webp")
    with pytest.raises(UserError, match="holds other things") as error:
        atlas.load(things, tmp_path / "a.webp")
    assert "\n" not in str(error.value)


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no"):
        atlas.load(THINGS, tmp_path / "none.webp")
    (tmp_path / "text.webp").write_text("no picture")
    with pytest.raises(UserError, match="cannot be read"):
        atlas.load(THINGS, tmp_path / "text.webp")


def test_words_do_not_change_the_digest_but_pictures_do():
    renamed = Thing("🦊", ("vixen",), eyes=(0.5, 0.5, 0.5))
    assert atlas.digest([FOX, BOARD]) == atlas.digest([renamed, BOARD])
    assert atlas.digest([FOX, BOARD]) != atlas.digest([FOX, Thing("🛹", ("skateboard",))])


def test_sprites_of_the_font_fill_their_cells():
    drawn = atlas.build([FOX, BOARD])
    room = 1 - 2 * atlas.MARGIN / atlas.SIDE
    np.testing.assert_allclose(drawn.extent.max(1), room, atol=0.03)
    assert drawn.extent[1, 0] > 2 * drawn.extent[1, 1]  # turned level, a skateboard is flat
    assert (drawn.pixels[..., :3] <= drawn.pixels[..., 3:]).all()
    red, _, blue, alpha = drawn.pixels[0].astype(int)[drawn.pixels[0, ..., 3] > 0].mean(0)
    assert alpha > 200 and red > 2 * blue


def test_without_the_font_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv(emoji.FONT_VARIABLE, str(tmp_path / "none.ttf"))
    with pytest.raises(UserError, match="fonts-noto-color-emoji"):
        atlas.build([FOX])


def test_a_picture_that_the_font_lacks_is_named():
    with pytest.raises(UserError, match=r"no picture of .* \(nothing\)"):
        atlas.build([Thing("\ue000", ("nothing",))])


def test_the_shipped_atlas_is_of_the_world_s_things():
    shipped = atlas.load(ALL_THINGS)
    assert len(shipped.pixels) == len(ALL_THINGS) and shipped.extent.max() < 1
    assert shipped.extent.max(1).min() > 0.9
    assert atlas.FILE.stat().st_size < 3 * 2**20

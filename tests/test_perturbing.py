"""Guidance away from perturbed attention: what it is part of, what compiles, and its mistakes in one line.

That pictures are those of diffusers: tests/parity/test_table.py.
"""

import pathlib

import jax
import numpy as np
import pytest

import engine
from engine import finish
from engine.models.perturbing import apart, perturbing
from engine.types import UserError
from launch import cli, generate
from tests.compiled import COMPILED
from tests.tiny import tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def pipe(folder):
    return engine.load(folder)


def draw(pipe, **options):
    return pipe.generate(["a red fox", "a cat"], **{"seed": 7, "steps": STEPS, "sampler": "euler"} | options)


def test_rows_before_the_last_have_their_own_values():
    out, v = jax.random.normal(jax.random.key(0), (2, 6, 3, 2, 4))
    with perturbing(("mid_block", "up_blocks.1"), 3):
        for place in ("mid_block.attentions.0.attn1", "up_blocks.1.attn1"):
            found = apart(place, out, v)
            np.testing.assert_array_equal(found[1::3], v[1::3])
            for own in (0, 2):
                np.testing.assert_array_equal(found[own::3], out[own::3])
        assert apart("up_blocks.10.attn1", out, v) is out
    assert apart("mid_block.attn1", out, v) is out
    with perturbing(("mid_block",), 2), perturbing((), 1):
        assert apart("mid_block.attn1", out, v) is out


def test_none_is_none_and_other_scales_compile_nothing(pipe):
    plain, some = draw(pipe), draw(pipe, pag_scale=3.0)
    np.testing.assert_array_equal(draw(pipe, pag_scale=0.0), plain)
    before = COMPILED.copy()
    more = draw(pipe, pag_scale=6.0)
    assert before == COMPILED
    apart_by = [np.abs(each.astype(int) - plain).mean() for each in (some, more)]
    assert 1 < apart_by[0] < apart_by[1]


def test_a_picture_is_the_same_alone(pipe):
    both = draw(pipe, pag_scale=3.0, batch_size=2)
    for i, prompt in enumerate(("a red fox", "a cat")):
        (one,) = pipe.generate(
            [prompt], seed=7, first_index=i, steps=STEPS, sampler="euler", pag_scale=3.0, batch_size=2
        )
        np.testing.assert_array_equal(one, both[i])


@pytest.mark.parametrize("cache_interval", [None, 2])
def test_it_ends_where_guidance_does(pipe, cache_interval):
    def stages(**options):
        settings = pipe.settings(4, "euler", 4.0, batch_size=1, cache_interval=cache_interval, **options)
        (batch,) = pipe.stream(["a red fox"], None, settings, seed=7, frames=5)
        return batch.frames.noisy[0].astype(int)

    whole, half, none = stages(pag_scale=3.0), stages(pag_scale=3.0, guidance_end=0.5), stages()
    np.testing.assert_array_equal(half[:3], whole[:3])
    assert np.abs(half[3] - whole[3]).max() > 1 and np.abs(whole[1] - none[1]).max() > 1


def test_without_words_guidance_may_still_end(pipe):
    whole = draw(pipe, guidance_scale=1.0, pag_scale=3.0)
    half = draw(pipe, guidance_scale=1.0, pag_scale=3.0, guidance_end=0.5)
    plain = draw(pipe, guidance_scale=1.0)
    assert len({image.tobytes() for image in (whole, half, plain)}) == 3


def test_which_word_steered_what_is_of_the_network_as_it_is(pipe):
    def heat(**options):
        settings = pipe.settings(STEPS, "euler", batch_size=1, **options)
        (batch,) = pipe.stream(["a red fox"], None, settings, seed=7, heat=True)
        return batch.heat

    tokens = pipe.model.tokenizer.model_max_length
    found = heat(pag_scale=3.0)
    assert found.shape == heat().shape == (1, 8, 8, tokens)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("options", [{"hires": 2}, {"merge_tokens": 0.5}], ids=str)
def test_it_goes_with(pipe, options):
    found, without = draw(pipe, pag_scale=3.0, **options), draw(pipe, **options)
    assert found.shape == without.shape and np.abs(found.astype(int) - without).mean() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pag_scale": -1.0}, "pag_scale=-1.0: write 0 or more; 3 is usual"),
        (
            {"pag_scale": 3.0, "pag_layers": "mid_block,up_blocks.9"},
            r"pag_layers: this model has no 'up_blocks.9' that attends among pixels; it has "
            r"down_blocks.0.attentions.0, .*mid_block.attentions.0, and what lies in them or around them",
        ),
    ],
)
def test_mistakes_are_one_line(pipe, options, message):
    with pytest.raises(UserError, match=message):
        pipe.settings(STEPS, **options)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"in_channels": 8}, "a model that is told how to change a picture takes none"),
        ({"time_cond_proj_dim": 16}, "this model learned guidance, and takes no other"),
    ],
)
def test_models_with_guidance_of_their_own_have_none(tmp_path, unet, message):
    other = engine.load(tiny_folder(tmp_path / "other", unet=unet))
    with pytest.raises(UserError, match=message):
        other.settings(STEPS, pag_scale=3.0)


def test_pictures_remember_it(folder, tmp_path, capsys):
    def run(*argv):
        code = generate.run([str(arg) for arg in argv])
        said, told = capsys.readouterr()
        return code, said.splitlines(), told

    flags = ("a fox", "--model", folder, "--steps", 2, "--seed", 3, "--pag_scale", 2.5)
    _, (path,), _ = run(*flags, "--pag_layers", "mid_block,up_blocks", "--out", tmp_path / "a")
    settings = finish.read_settings(path)
    assert (settings["pag_scale"], settings["pag_layers"]) == (2.5, "mid_block,up_blocks")
    _, (again,), _ = run("--like", path, "--out", tmp_path / "b")
    assert pathlib.Path(again).read_bytes() == pathlib.Path(path).read_bytes()
    code, _, told = run(*flags[:-2], "--pag_layers", "mid_block")
    assert code == cli.MISTAKE and "pag_layers=mid_block without such guidance: write --pag_scale 3" in told
    assert run(*flags, "--guidance_scale", 1, "--guidance_end", 0.5, "--out", tmp_path / "c")[0] == cli.DONE

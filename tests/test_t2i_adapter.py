"""T2I-Adapters beside a tiny model; against PyTorch: tests/parity/test_t2i_adapter.py and test_table.py."""

import numpy as np
import pytest

import engine
from engine.models.controlnet import ControlNetModel
from engine.models.t2i_adapter import T2IAdapter
from engine.types import UserError
from tests.compiled import COMPILED
from tests.test_controls import PROMPTS, STEPS, difference, draw, picture, shown
from tests.tiny import tiny_controlnet, tiny_folder, tiny_t2i_adapter

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A folder with a model, an adapter and a ControlNet."""
    at = tmp_path_factory.mktemp("tiny")
    tiny_folder(at / "model")
    tiny_t2i_adapter(at / "adapter")
    tiny_controlnet(at / "net")
    return at


@pytest.fixture(scope="module")
def pipe(at):
    return engine.load(at / "model", controlnet=[(at / "adapter", 1.0)])


@pytest.fixture(scope="module")
def plain(at):
    return engine.load(at / "model").generate(PROMPTS, seed=7, steps=STEPS, batch_size=3)


def test_it_heeds_its_picture_by_its_scale(at, pipe, plain):
    nothing, little = (
        draw(engine.load(at / "model", controlnet=[(at / "adapter", scale)]), shown()) for scale in (0.0, 0.1)
    )
    much = draw(pipe, shown())
    assert difference(nothing, plain) <= 1
    away = [np.abs(each.astype(int) - plain).mean() for each in (little, much)]
    assert 0.5 < away[0] < away[1]
    assert difference(draw(pipe, shown(first=9)), much) > 20
    assert difference(draw(pipe, shown()[2:], PROMPTS[2:], first_index=2), much[2:]) <= 1


def test_one_of_greys_sees_no_colours(at, tmp_path):
    net = tiny_t2i_adapter(tmp_path / "greys", in_channels=1)
    pipe = engine.load(at / "model", controlnet=[(net, 1.0)])
    grey = [each.control[0].copy() for each in shown()]
    for each in grey:
        each[:] = each[..., :1]
    other = [
        engine.Given(control=(each + np.uint8([0, 0, 1]) * (each < 4),)) for each in grey
    ]  # within a grey
    first = draw(pipe, [engine.Given(control=(each,)) for each in grey])
    np.testing.assert_array_equal(draw(pipe, other), first)
    assert difference(draw(pipe, shown(first=9)), first) > 20


def test_it_looks_once_and_compiles_once(at, monkeypatch):
    calls = []

    def look(self, *args):
        calls.append("look")
        return original(self, *args)

    original = T2IAdapter.look
    monkeypatch.setattr(T2IAdapter, "look", look)
    pipe = engine.load(at / "model", controlnet=[(at / "adapter", 1.0)])
    draw(pipe, shown())
    assert calls == ["look"]  # traced in the one program that looks, and in none of those of the steps
    draw(pipe, shown(), control_end=0.5)
    before = COMPILED.copy()
    draw(pipe, shown(first=5), PROMPTS[::-1], control_start=0.25, control_end=0.75, guidance_scale=3.0)
    assert before == COMPILED and calls == ["look"]


def test_in_part_of_the_steps(pipe, plain):
    whole, half = draw(pipe, shown()), draw(pipe, shown(), control_end=0.5)
    assert difference(half, whole) > 8 and difference(half, plain) > 8
    assert difference(draw(pipe, shown(), control_start=0.0, control_end=1.0), whole) == 0


def test_beside_a_controlnet(at, monkeypatch):
    """Each sees its own picture, in the order in which they were named."""
    one, other = [each.control[0] for each in shown()], [each.control[0] for each in shown(first=9)]

    def drawn(*named):
        nets = [(at / name, 0.7) for name, _ in named]
        given = [engine.Given(control=each) for each in zip(*(own for _, own in named), strict=True)]
        return draw(engine.load(at / "model", controlnet=nets), given)

    both = drawn(("adapter", one), ("net", other))
    assert difference(drawn(("net", other), ("adapter", one)), both) <= 1
    assert difference(drawn(("net", one), ("adapter", other)), both) > 8
    monkeypatch.setattr(ControlNetModel, "near", None)  # an adapter alone calls none
    drawn(("adapter", one))


def test_sides_are_multiples_of_what_it_sees_as_one_place(at, tmp_path, monkeypatch):
    net = tiny_t2i_adapter(tmp_path / "net", channels=(16,))
    engine.load(at / "model", controlnet=[(net, 1.0)])  # it need not add to all levels
    unet = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    xl = tiny_folder(tmp_path / "xl", unet=unet)
    options = {"channels": (16, 32), "downscale_factor": 4, "adapter_type": "full_adapter_xl"}
    pipe = engine.load(xl, controlnet=[(tiny_t2i_adapter(tmp_path / "of-xl", **options), 1.0)])
    given = [engine.Given(control=(picture(i, 20),)) for i in range(3)]
    assert draw(pipe, given, height=20, width=20).shape == (3, 20, 20, 3)
    with pytest.raises(
        UserError, match="height=18: this model with its T2I-Adapter makes multiples of 4; write 16"
    ):
        draw(pipe, given, height=18, width=20)
    monkeypatch.setattr(
        "engine.controls.cell", lambda nets: 16
    )  # as of SDXL's, whose latents are of 8 pixels
    with pytest.raises(UserError, match="makes 24 x 24 pixels of 16 x 16; this model with its T2I-Ad"):
        draw(pipe, shown(), hires=1.5)

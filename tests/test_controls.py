"""ControlNets beside a tiny model; against PyTorch: tests/parity/test_controlnet.py and test_table.py."""

import json

import jax
import numpy as np
import pytest

import engine
from engine import controls
from engine.models.controlnet import ControlNetModel
from engine.requests import Given, Settings
from engine.types import UserError
from tests.compiled import COMPILED
from tests.tiny import REFINER, XL, shallow, tiny_controlnet, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

PROMPTS = ["a red fox", "a blue car", "a cat"]
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return tiny_controlnet(tmp_path_factory.mktemp("tiny") / "controlnet")


@pytest.fixture(scope="module")
def pipe(folder, net):
    return engine.load(folder, controlnet=[(net, 1.0)])


def picture(seed: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def shown(count: int = 3, first: int = 0) -> list[Given]:
    return [Given(control=(picture(first + i),)) for i in range(count)]


def draw(pipe, given, prompts=PROMPTS, **options):
    return pipe.generate(prompts, given=given, **{"seed": 7, "steps": STEPS, "batch_size": 3} | options)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


def test_it_heeds_its_picture_by_its_scale(folder, net, pipe):
    plain = engine.load(folder).generate(PROMPTS, seed=7, steps=STEPS, batch_size=3)
    nothing = draw(engine.load(folder, controlnet=[(net, 0.0)]), shown())
    assert difference(nothing, plain) <= 1
    little, much = (draw(each, shown()) for each in (engine.load(folder, controlnet=[(net, 0.1)]), pipe))
    away = [np.abs(each.astype(int) - plain).mean() for each in (little, much)]
    assert 0.5 < away[0] < away[1]
    assert difference(draw(pipe, shown(first=9)), much) > 20


def test_a_picture_does_not_depend_on_those_beside_it(pipe):
    together = draw(pipe, shown())
    assert difference(draw(pipe, shown()[2:], PROMPTS[2:], first_index=2), together[2:]) <= 1


def test_another_picture_prompt_or_scale_compiles_nothing(pipe):
    draw(pipe, shown(), control_end=0.5)
    before = COMPILED.copy()
    draw(pipe, shown(first=5), PROMPTS[::-1], control_start=0.25, control_end=0.75, guidance_scale=3.0)
    net = pipe.programs.nets[0]
    pipe.programs.nets = (net._replace(scale=0.3),)
    try:
        draw(pipe, shown(), seed=3)
    finally:
        pipe.programs.nets = (net,)
    assert before == COMPILED


def test_in_part_of_the_steps(folder, pipe):
    """Behind control_end the way goes on as without it, from where it was."""
    whole, half, plain = (
        draw(pipe, shown(), sampler="euler"),
        draw(pipe, shown(), sampler="euler", control_end=0.5),
        engine.load(folder).generate(PROMPTS, seed=7, steps=STEPS, batch_size=3, sampler="euler"),
    )
    assert difference(half, whole) > 8 and difference(half, plain) > 8
    assert difference(draw(pipe, shown(), sampler="euler", control_start=0.0, control_end=1.0), whole) == 0


def test_which_word_steered_what_is_asked_of_the_unet_alone(folder, net):
    """A ControlNet that adds nothing attends to the words, too, and changes nothing of what is seen."""
    pipe = engine.load(folder, controlnet=[(net, 0.0)])
    settings = pipe.settings(STEPS, "euler", batch_size=3)
    options = {"seed": 7, "heat": True}
    (seen,) = pipe.stream(PROMPTS, None, settings, given=shown(), **options)
    (plain,) = engine.load(folder).stream(PROMPTS, None, settings, **options)
    np.testing.assert_allclose(seen.heat, plain.heat, atol=1e-5)
    assert plain.heat.std() > 1e-3


@pytest.mark.parametrize(
    "given, options, message",
    [
        (None, {}, "a ControlNet without a picture to see: write --control_image FILE"),
        ([Given()] * 3, {}, "a ControlNet without a picture to see"),
        ([Given(control=(picture(0),) * 2)] * 3, {}, "2 control pictures for 1 ControlNets: write one for"),
        ([Given(control=(picture(0, 8),))] * 3, {}, r"of shape \(8, 8, 3\): it must be \(16, 16, 3\)"),
        (shown(2), {}, "2 pictures for 3 prompts"),
        (shown(), {"control_start": 0.5, "control_end": 0.5}, "leave none of 4 steps between them"),
        (shown(), {"control_end": 1.5}, "control_end=1.5: write a share of the steps, from 0 to 1"),
    ],
)
def test_mistakes_are_one_line(pipe, given, options, message):
    with pytest.raises(UserError, match=message):
        draw(pipe, given, **options)


def test_a_picture_and_no_controlnet(folder):
    pipe = engine.load(folder)
    with pytest.raises(UserError, match="a picture for a ControlNet, and there is none: write --controlnet"):
        draw(pipe, shown())
    with pytest.raises(UserError, match="control_end without a ControlNet"):
        draw(pipe, None, control_end=0.5)


def test_as_many_files_as_there_are_controlnets_are_asked_for():
    settings = Settings(4, "euler", 1.0, 16, 16, 1)
    with pytest.raises(UserError, match=r"write --control_image FILE,FILE$"):
        controls.checked([Given()], 2, settings)


def test_beside_a_refiner_the_last_part_has_none(tmp_path):
    """Two refiners of other weights would heed it, were it theirs: they are told nothing of it."""
    base = tiny_folder(tmp_path / "base", **shallow(XL))
    refiner = tiny_folder(tmp_path / "refiner", seed=1, **shallow(REFINER))
    net = tiny_controlnet(tmp_path / "net", **shallow(XL)["unet"])
    pipe = engine.load(base, refiner=refiner, controlnet=[(net, 1.0)])
    assert not pipe.refiner.nets
    own, other = (draw(pipe, shown(first=i), refiner_start=0.5) for i in (0, 5))
    assert difference(own, other) > 8
    with pytest.raises(UserError, match=r"control_start=0.75 lies behind refiner_start=0.5"):
        draw(pipe, shown(), refiner_start=0.5, control_start=0.75)


@pytest.mark.parametrize(
    "steps, strength, start, end, inside",
    [
        (10, 1.0, 0.2, 0.8, range(2, 8)),
        (8, 1.0, 0.0, 0.45, range(0, 3)),
        (20, 1.0, 0.0, 0.33, range(0, 6)),
        (5, 1.0, 0.5, 1.0, range(3, 5)),
        (10, 0.5, 0.0, 0.5, range(5, 7)),
        (10, 0.6, 0.5, 1.0, range(7, 10)),
    ],
)
def test_the_steps_are_those_of_diffusers(steps, strength, start, end, inside):
    """controlnet_keep of its pipelines, over the steps that are taken."""
    settings = Settings(steps, "euler", 5.0, 16, 16, 1, strength, control_start=start, control_end=end)
    assert settings.controlled_steps == inside
    taken = settings.intervals
    keep = [1.0 - float(i / taken < start or (i + 1) / taken > end) for i in range(taken)]
    assert [float(steps - taken + i in inside) for i in range(taken)] == keep


@pytest.mark.parametrize("interval", [None, 2])
def test_its_deep_part_is_computed_where_that_of_the_unet_is(folder, net, interval, monkeypatch):
    """Calls at run time: at full size in the steps that are its own, deep in those of them that are fresh."""
    calls = {"near": 0, "deep": 0}

    def counted(name, call):
        def count(self, *args):
            jax.debug.callback(lambda: calls.update({name: calls[name] + 1}))
            return call(self, *args)

        return count

    for name in calls:
        monkeypatch.setattr(ControlNetModel, name, counted(name, getattr(ControlNetModel, name)))
    fresh = engine.load(folder, controlnet=[(net, 1.0)])
    draw(fresh, shown(), sampler="euler", steps=8, control_end=0.75, cache_interval=interval)
    jax.effects_barrier()
    assert calls == {"near": 6, "deep": 6 if interval is None else 3}


@pytest.mark.parametrize(
    "unet, message",
    [
        ({"downsample_padding": 0}, "downsample_padding 0, and here 1"),
        ({"cross_attention_dim": 20}, r"cross_attention_dim \(20, 20\), and here \(24, 24\)"),
        ({"block_out_channels": (16, 16)}, r"channels of its skips \[16, 16, 16, 16\], and here"),
        ({"layers_per_block": (1, 2)}, "channels of its skips"),
        (XL["unet"] | {"cross_attention_dim": 24}, "addition_embed_type text_time, and here None"),
    ],
)
def test_a_controlnet_of_another_model_is_refused(folder, tmp_path, unet, message):
    other = tiny_controlnet(tmp_path / "other", **unet)
    with pytest.raises(UserError, match=f"other was made for another model: {message}"):
        engine.load(folder, controlnet=[(other, 1.0)])


def test_a_controlnet_of_another_scale_is_refused(folder, net, tmp_path):
    config = json.loads((net / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"conditioning_embedding_out_channels": [4]}))
    with pytest.raises(UserError, match="pixels a side to a latent 1, and here 2"):
        engine.load(folder, controlnet=[(tmp_path, 1.0)])


def test_folders_that_are_none(folder, tmp_path):
    for path, message in (
        (tmp_path / "no", "no ControlNet .*no: a ControlNet is a folder with config.json and safetensors"),
        (tmp_path, "has no config.json: a ControlNet is a folder"),
        (folder, "is a model, no ControlNet: write the folder of one"),
        (folder / "unet", "describes a UNet2DConditionModel; the engine reads ControlNetModel"),
    ):
        with pytest.raises(UserError, match=message):
            engine.load(folder, controlnet=[(path, 1.0)])


def test_a_model_that_is_told_what_to_change_takes_none(tmp_path):
    folder = tiny_folder(tmp_path / "model", **shallow({"unet": {"in_channels": 8}}))
    net = tiny_controlnet(tmp_path / "net", **shallow({})["unet"])
    with pytest.raises(UserError, match="changes pictures as it is told, and takes no ControlNet"):
        engine.load(folder, controlnet=[(net, 1.0)])


def test_kernels_in_eight_bits_are_the_unets_alone(folder, net):
    pytest.importorskip("qwix")
    pipe = engine.load(folder, controlnet=[(net, 1.0)], quantize="int8")
    kernel = pipe.programs.nets[0].part.params["down_blocks"][0]["resnets"][0]["conv1"]["kernel"]
    assert kernel.dtype == np.float32
    assert draw(pipe, shown()).std() > 10

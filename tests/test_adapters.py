"""IP-Adapters beside a tiny model; against PyTorch: tests/parity/test_ip_adapter.py."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import engine
from engine import adapters
from engine.requests import Given
from engine.types import UserError
from tests.adapters import picture, tensor, tiny_adapter, tiny_encoder
from tests.compiled import COMPILED
from tests.test_controls import difference
from tests.tiny import REFINER, SHALLOW, XL, shallow, tiny_controlnet, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

PROMPTS = ["a red fox", "a blue car", "a cat"]
STEPS = 4
WIDTHS = {1: 16}  # of a shallow model
WORDS, WORDS_XL = 24, 44


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of a model, an adapter and its image encoder."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny_folder(folder / "model", **SHALLOW)
    tiny_encoder(folder / "image_encoder")
    tiny_adapter(folder / "plain.safetensors", WIDTHS, WORDS)
    tiny_adapter(folder / "plus.safetensors", WIDTHS, WORDS, "plus", seed=1)
    return folder


@pytest.fixture(scope="module")
def pipe(place):
    return engine.load(place / "model", ip_adapter=[(place / "plus.safetensors", 1.0)])


@pytest.fixture(scope="module")
def plain(place):
    return engine.load(place / "model").generate(PROMPTS, seed=7, steps=STEPS, batch_size=3)


def shown(count: int = 3, first: int = 0) -> list[Given]:
    return [Given(image_prompt=(picture(first + i),)) for i in range(count)]


def draw(pipe, given, prompts=PROMPTS, **options):
    return pipe.generate(prompts, given=given, **{"seed": 7, "steps": STEPS, "batch_size": 3} | options)


@pytest.mark.parametrize("way", ["plain", "plus"])
def test_it_heeds_its_picture_by_its_scale(place, plain, way):
    file = place / f"{way}.safetensors"
    nothing, little, much = (
        draw(engine.load(place / "model", ip_adapter=[(file, scale)]), shown()) for scale in (0.0, 0.1, 1.0)
    )
    np.testing.assert_array_equal(nothing, plain)
    away = [np.abs(each.astype(int) - plain).mean() for each in (little, much)]
    assert 0.5 < away[0] < away[1]
    other = draw(engine.load(place / "model", ip_adapter=[(file, 1.0)]), shown(first=9))
    assert difference(other, much) > 8


def test_a_picture_does_not_depend_on_those_beside_it(pipe):
    together = draw(pipe, shown())
    assert difference(draw(pipe, shown()[2:], PROMPTS[2:], first_index=2), together[2:]) <= 1


def test_another_picture_prompt_or_scale_compiles_nothing(pipe):
    draw(pipe, shown())
    before = COMPILED.copy()
    larger = [Given(image_prompt=(picture(i, 90, 200),)) for i in range(3)]  # of any size
    draw(pipe, larger, PROMPTS[::-1], guidance_scale=3.0)
    adapter = pipe.programs.adapters[0]
    pipe.programs.adapters = (adapter._replace(scales=(0.3,)),)
    try:
        draw(pipe, shown(), seed=3)
    finally:
        pipe.programs.adapters = (adapter,)
    assert before == COMPILED


def test_which_word_steered_what_is_asked_where_the_adapter_adds_something(place, pipe):
    """The heat of words is that of the picture that is drawn; of an adapter that adds nothing, as without."""
    settings = pipe.settings(STEPS, "euler", batch_size=3)
    options = {"seed": 7, "heat": True}
    (plain,) = engine.load(place / "model").stream(PROMPTS, None, settings, **options)
    mute = engine.load(place / "model", ip_adapter=[(place / "plus.safetensors", 0.0)])
    streams = [each.stream(PROMPTS, None, settings, given=shown(), **options) for each in (mute, pipe)]
    heats = [next(stream).heat for stream in streams]
    np.testing.assert_allclose(heats[0], plain.heat, atol=1e-6)
    assert np.abs(heats[1] - plain.heat).max() > 1e-3
    assert heats[1].shape == plain.heat.shape and np.isfinite(heats[1]).all()


def test_beside_a_controlnet_and_with_features_kept(place, tmp_path):
    net = tiny_controlnet(tmp_path / "net", **SHALLOW["unet"])
    files = {"ip_adapter": [(place / "plain.safetensors", 1.0)], "controlnet": [(net, 1.0)]}
    pipe, control = engine.load(place / "model", **files), np.zeros((16, 16, 3), np.uint8)
    given = [[each._replace(control=(control + level,)) for each in shown()] for level in (0, 255)]
    one, other = (draw(pipe, each, cache_interval=2) for each in given)
    assert difference(one, other) > 8
    for each in given[0]:
        each.image_prompt[0][:] = 255 - each.image_prompt[0]
    assert difference(draw(pipe, given[0], cache_interval=2), one) > 8


def test_beside_a_refiner_the_last_part_has_none(tmp_path):
    base = tiny_folder(tmp_path / "base", **shallow(XL))
    refiner = tiny_folder(tmp_path / "refiner", seed=1, **shallow(REFINER))
    tiny_encoder(tmp_path / "image_encoder")
    file = tiny_adapter(tmp_path / "xl.safetensors", WIDTHS, WORDS_XL)
    pipe = engine.load(base, refiner=refiner, ip_adapter=[(file, 1.0)])
    assert not pipe.refiner.adapters
    own, other = (draw(pipe, shown(first=i), refiner_start=0.5) for i in (0, 5))
    assert difference(own, other) > 8


def test_a_picture_that_comes_again_is_read_once(pipe, monkeypatch):
    calls, real = [], pipe.prompting.program
    monkeypatch.setattr(pipe.prompting, "program", lambda *args: (calls.append(1), real(*args))[1])
    same = [Given(image_prompt=(picture(2),))] * 3
    first = draw(pipe, same, batch_size=1)
    assert len(calls) <= 1  # of three batches
    np.testing.assert_array_equal(draw(pipe, same, batch_size=1), first)
    draw(pipe, shown(first=20), batch_size=1)
    assert len(calls) >= 3


def test_a_picture_that_is_as_large_as_it_is_read_is_read_as_it_is(pipe):
    (adapter,) = pipe.programs.adapters
    large = [Given(image_prompt=(picture(3, 70, 50),))]
    (small,) = adapters.pixels(large, [adapter])
    assert small.shape == (1, 24, 24, 3)
    np.testing.assert_array_equal(adapters.pixels([Given(image_prompt=(small[0],))], [adapter])[0], small)


@pytest.mark.parametrize(
    "given, message",
    [
        (None, "an IP-Adapter without a picture to see: write --image_prompt FILE"),
        (
            [Given(image_prompt=(picture(0),) * 2)] * 3,
            "2 image prompts for 1 IP-Adapters: write one",
        ),
        (shown(2), "2 pictures for 3 prompts"),
        ([Given(image_prompt=(picture(0)[..., :1],))] * 3, r"\(40, 31, 1\) of uint8: it must be \(height"),
        ([Given(image_prompt=(picture(0) / 255,))] * 3, r"of float64: it must be \(height, width, 3\) of u"),
        ([Given(image_prompt=(picture(0, 300, 2),))] * 3, "an image prompt of 2 x 300 pixels: it may be 100"),
    ],
)
def test_mistakes_are_one_line(pipe, given, message):
    with pytest.raises(UserError, match=message):
        draw(pipe, given)


def test_a_picture_and_no_adapter(place):
    with pytest.raises(UserError, match="a picture for an IP-Adapter, and there is none: write --ip_adapter"):
        draw(engine.load(place / "model"), shown())


# ---- files


def changed(source, target, **others):
    """The file with some tensors in place of its own, without those that are None; returns the path."""
    tensors = load_file(source) | {key.replace("__", "."): value for key, value in others.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, target)
    return target


FACES = {"image_proj__proj__weight": None, "image_proj__proj__0__weight": tensor("a", (4, 4), 0)}
WRONG = {
    "none": (
        lambda place, to: place / "none.safetensors",
        "no IP-Adapter .*none.safetensors: write the",
    ),
    "pickle": (
        lambda place, to: to.with_suffix(".bin"),
        r"never opened because .* part in d.items\(\)",
    ),
    "other": (
        lambda place, to: changed(place / "plain.safetensors", to, image_proj__proj__weight=None),
        "does not hold an IP-Adapter, plain, plus or full$",
    ),
    "part": (
        lambda place, to: changed(place / "plus.safetensors", to, image_proj__norm_out__bias=None),
        r"does not hold an IP-Adapter, plain, plus or full: missing: \(1\) image_proj.norm_out.bias",
    ),
    "faces": (
        lambda place, to: changed(place / "plain.safetensors", to, **FACES),
        "a recogniser says of",
    ),
    "words": (
        lambda place, to: tiny_adapter(to, WIDTHS, WORDS + 8),
        "made for another model: its tokens have 32 numbers, and the words of this one 24; write one",
    ),
    "model": (
        lambda place, to: tiny_adapter(to, {1: 16, 3: 32}, WORDS),
        "made for another model: it adds to 2 layers of 16 to 32 channels, and here are 1 layers of 16 to 16",
    ),
}


def test_layers_that_are_not_there_are_one_line(place):
    files = {"ip_adapter": [(place / "plain.safetensors", 1.0)], "ip_adapter_layers": ["up_blocks.0"]}
    with pytest.raises(
        UserError, match=r"no 'up_blocks.0' that attends to words; it has down_blocks.0.attent"
    ):
        engine.load(place / "model", **files)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_one_line(place, tmp_path, wrong):
    make, message = WRONG[wrong]
    file = make(place, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=message) as error:
        engine.load(place / "model", ip_adapter=[(file, 1.0)], image_encoder=place / "image_encoder")
    assert "\n" not in str(error.value)


def test_where_the_image_encoder_is(place, tmp_path):
    """As in the originals' folders, and in the model's own; or where one says."""

    def load(file, **options):
        return engine.load(place / "model", ip_adapter=[(file, 1.0)], **options).programs.adapters[0]

    (tmp_path / "sdxl_models").mkdir()
    file = tiny_adapter(tmp_path / "sdxl_models" / "a.safetensors", WIDTHS, WORDS)
    with pytest.raises(UserError, match=r"no folder image_encoder beside .*12 numbers of a picture; write"):
        load(file)
    tiny_encoder(tmp_path / "sdxl_models" / "image_encoder", projection_dim=20)
    with pytest.raises(UserError, match=r"image_encoder says 20, and the IP-Adapter .* 12 numbers of a p"):
        load(file)
    assert load(file, image_encoder=place / "image_encoder").encoder.config.projection_dim == 12
    cache = tmp_path / "snapshots" / "models"  # as links of Hugging Face's cache, beside an encoder
    tiny_encoder(cache / "image_encoder")
    (cache / "b.safetensors").symlink_to(file)
    assert load(cache / "b.safetensors").encoder.config.projection_dim == 12
    tiny_encoder(tmp_path / "models" / "image_encoder")
    assert load(file).encoder.config.projection_dim == 12
    with pytest.raises(UserError, match=r"nothing has no config\.json: this IP-Adapter reads an"):
        load(file, image_encoder=tmp_path / "nothing")

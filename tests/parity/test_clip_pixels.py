"""Pictures for CLIP, bit by bit those of transformers' image processor that works with PIL."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from engine.types import UserError
from engine.weights.clip_pixels import PixelsConfig, prepare, prepared, read_pixels_config

try:  # transformers 5 has two, of which the other one works with torchvision
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Original
except ImportError:
    from transformers import CLIPImageProcessor as Original

SMALL = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
# what preprocessor_config.json says, in spellings old and new
CONFIGS = {
    "numbers, as openai writes": {"size": 20, "crop_size": 20},
    "objects": SMALL,
    "a crop that is smaller": SMALL | {"crop_size": {"height": 13, "width": 18}},
    "a crop that is larger, in odd steps": SMALL | {"crop_size": {"height": 27, "width": 40}},
    "stretched": {"size": {"height": 16, "width": 24}, "crop_size": 16},
    "bilinear": SMALL | {"resample": 2},
    "not scaled": SMALL | {"do_resize": False},
    "not cropped": SMALL | {"do_center_crop": False},
    "not rescaled": SMALL | {"do_rescale": False},
    "not normalized": SMALL | {"do_normalize": False},
    "other numbers": SMALL
    | {"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 2, 0.5], "rescale_factor": 0.01},
}
SIZES = [(20, 20), (64, 64), (37, 50), (50, 37), (7, 30), (31, 9), (3, 3), (21, 20)]


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("name", CONFIGS)
def test_pictures_of_all_sizes(name):
    config, original = PixelsConfig.from_json(CONFIGS[name], "file"), Original(**CONFIGS[name])
    for size in SIZES:
        (theirs,) = original(
            picture(*size), input_data_format="channels_last", return_tensors="np"
        ).pixel_values
        ours = prepare(picture(*size), config)
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs.transpose(1, 2, 0).astype(np.float32))
        if config.shape is not None:
            assert ours.shape[:2] == config.shape


def test_the_defaults_are_the_originals():
    ours, theirs = prepare(picture(300, 260), PixelsConfig()), Original()(picture(300, 260)).pixel_values[0]
    np.testing.assert_array_equal(ours, theirs.transpose(1, 2, 0))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_saves_is_read(name, tmp_path):
    Original(**CONFIGS[name]).save_pretrained(tmp_path)
    assert read_pixels_config(tmp_path) == PixelsConfig.from_json(CONFIGS[name], "file")


def test_the_file_of_a_whole_processor(tmp_path):
    """What CLIPProcessor of transformers 5 saves; the file of before, where it is there, comes first."""
    options = {"image_processor": SMALL | {"resample": 2}, "processor_class": "CLIPProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(options))
    assert read_pixels_config(tmp_path) == PixelsConfig(size=20, crop_size=(20, 20), resample=2)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SMALL))
    assert read_pixels_config(tmp_path) == PixelsConfig(size=20, crop_size=(20, 20))


def test_no_file_is_told(tmp_path):
    with pytest.raises(
        UserError, match=r"has no preprocessor_config\.json, which says how pictures are scaled"
    ):
        read_pixels_config(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor": 3}')
    with pytest.raises(UserError, match=r"processor_config\.json: image_processor=3: write an object"):
        read_pixels_config(tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sise": 224}, "file: unknown option 'sise' (did you mean size?)"),
        (
            {"image_processor_type": "ViTImageProcessor"},
            "'ViTImageProcessor' is not supported; supported: 'CLIP",
        ),
        ({"do_pad": True}, "do_pad=True is not supported"),
        (
            {"size": {"shortest_edge": 224, "longest_edge": 336}},
            'file: size={"shortest_edge": 224, "longest_edge": 336}: write 224, {"shortest_edge": 224} or',
        ),
        ({"size": [224]}, "size=[224]: write 2 numbers"),
        ({"size": "large"}, 'size="large": write 224'),
        ({"size": {"shortest_edge": 2.5}}, "size=2.5: write a whole number"),
        ({"size": 0}, "size=0: write whole numbers from 1"),
        (
            {"crop_size": {"shortest_edge": 224}},
            'crop_size={"shortest_edge": 224}: write 224, {"height": 224',
        ),
        ({"crop_size": [224, 0]}, "crop_size=(224, 0): write whole numbers from 1"),
        ({"image_mean": [0.5]}, "image_mean=[0.5]: write 3 numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std=[0.5, 0.0, 0.5]: write numbers other than 0"),
        ({"resample": 9}, "resample=9: write the number of a filter of PIL; bicubic is 3"),
        ({"do_resize": 1}, "do_resize=1: write true or false"),
    ],
    ids=str,
)
def test_what_the_engine_lacks_is_refused(options, told):
    with pytest.raises(UserError) as error:
        PixelsConfig.from_json(options, "file")
    assert told in str(error.value)


@pytest.mark.parametrize("resample", [2, 3, 1], ids=["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape", [(40, 52), (33, 20), (12, 17)], ids=["wide", "tall", "small"])
def test_with_a_gradient_they_are_the_same_but_for_roundings(shape, resample):
    """PIL rounds to whole levels, twice."""
    config = PixelsConfig(size=20, crop_size=(20, 18), resample=resample)
    picture = np.random.default_rng(0).integers(60, 200, (*shape, 3), np.uint8)
    ours = np.asarray(prepared(jnp.asarray(picture[None], jnp.float32), config))[0]
    levels = 255 * np.array(config.image_std)
    assert np.abs((ours - prepare(picture, config)) * levels).max() < 1.6


def test_a_filter_without_a_gradient_is_told_of():
    with pytest.raises(UserError, match=r"resample=0: devices have 2 \(bilinear\) or 3 \(bicubic"):
        prepared(jnp.zeros((1, 8, 8, 3)), PixelsConfig(resample=0))

"""Folders of SDXL and of its refiner: what model_index.json says, and what does not fit together."""

import json

import jax
import numpy as np
import pytest

from engine.types import UserError
from engine.weights.folder import load_folder, save_folder
from tests.tiny import REFINER, XL, tiny_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("xl") / "base", **XL)


def index_of(folder) -> dict:
    return json.loads((folder / "model_index.json").read_text())


def test_a_folder_is_written_as_it_was_read(base, tmp_path):
    model = load_folder(base)
    save_folder(tmp_path / "again", model)
    again = load_folder(tmp_path / "again")
    assert index_of(tmp_path / "again") == index_of(base)
    assert again.parts.keys() == {"unet", "vae", "text_encoder", "text_encoder_2"}
    for kind, part in model.parts.items():
        assert again.parts[kind].config == part.config
        jax.tree.map(np.testing.assert_array_equal, again.parts[kind].params, part.params)


def test_what_the_index_says(base, tmp_path):
    refiner = tiny_folder(tmp_path / "refiner", **REFINER)
    paints = tiny_folder(tmp_path / "paints", **{**XL, "unet": XL["unet"] | {"in_channels": 9}})
    names = [index_of(folder)["_class_name"] for folder in (base, refiner, paints)]
    ends = ("Pipeline", "Img2ImgPipeline", "InpaintPipeline")
    assert names == [f"StableDiffusionXL{end}" for end in ends]
    assert index_of(refiner)["text_encoder"] == index_of(refiner)["tokenizer"] == [None, None]
    assert [index_of(folder).get("requires_aesthetics_score") for folder in (base, refiner)] == [None, True]
    assert load_folder(base).zeros and not load_folder(refiner).zeros


@pytest.mark.parametrize("said", [True, False])
def test_no_negative_prompt_is_what_the_index_says(base, tmp_path, said):
    folder = tiny_folder(tmp_path / "model", **XL)
    index = index_of(folder) | {"force_zeros_for_empty_prompt": said}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_folder(folder).zeros == said


def without(folder, part):
    index = {name: value for name, value in index_of(folder).items() if name != part}
    (folder / "model_index.json").write_text(json.dumps(index))


def changed(**options):
    def change(folder):
        file = folder / "unet" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | options))

    return change


WRONG = {
    "no second encoder": (lambda folder: without(folder, "text_encoder_2"), "names no text_encoder_2"),
    "no second tokenizer": (lambda folder: without(folder, "tokenizer_2"), "names no tokenizer_2"),
    "half of the first": (lambda folder: without(folder, "tokenizer"), "names no tokenizer"),
    "words of another width": (
        changed(cross_attention_dim=24),
        r"cross_attention_dim 24, text_encoder/config\.json hidden_size 24 \+ text_encoder_2/config\.json "
        "hidden_size 20",
    ),
    "other numbers": (
        changed(projection_class_embeddings_input_dim=64),
        r"projection_class_embeddings_input_dim 64: projection_dim 12 of .* are 60 or 52",
    ),
    "no numbers": (
        changed(
            addition_embed_type=None,
            addition_time_embed_dim=None,
            projection_class_embeddings_input_dim=None,
        ),
        "a second text encoder and addition_embed_type .* go together",
    ),
}


@pytest.mark.parametrize(("spoil", "pattern"), WRONG.values(), ids=WRONG.keys())
def test_wrong_folders(tmp_path, spoil, pattern):
    folder = tiny_folder(tmp_path / "model", **XL)
    spoil(folder)
    with pytest.raises(UserError, match=pattern) as error:
        load_folder(folder)
    assert "\n" not in str(error.value)

"""CLIP score: a folder of transformers, from its files to the score, against transformers itself."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from engine.evaluate.clip_score import ClipScorer
from engine.types import UserError
from tests.compiled import COMPILED
from tests.parity.common import assert_same, random_weights
from tests.parity.test_clip_pixels import Original as ImageProcessor
from tests.weights.conftest import write_tokenizer

LENGTH = 24  # tokens; every letter is one
CAPTIONS = [
    "a red fox at night",
    "A blue car!",
    "",
    "a cat above a dog at sunset, and so much more that it is cut",
    "two green trees",
    "x" * (LENGTH - 2),  # just fits
    "y" * (LENGTH - 1),
]
SIZES = [(20, 20), (64, 48), (17, 50), (9, 9), (48, 64), (20, 31), (100, 20)]
PICTURES = [
    np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) // (i + 1) for i, size in enumerate(SIZES)
]
TEXT = {
    "vocab_size": 514,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
}
SEED = 7  # of weights with which some cosines are positive, and one is not
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 5,
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Model, image processor and tokenizer of transformers, and the folder that they save. Read it only."""
    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(folder / "vocabulary")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "vocabulary", model_max_length=LENGTH)
    processor = ImageProcessor(size={"shortest_edge": 20}, crop_size=20)
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=6)
    model = random_weights(CLIPModel(config), SEED)
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder / "saved")
    return model, processor, tokenizer, folder / "saved"


@pytest.fixture
def folder(originals, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(originals[-1], tmp_path / "clip")


def expected(originals) -> np.ndarray:
    """100 max(cos, 0) as transformers says it, of each picture with its caption."""
    model, processor, tokenizer, _ = originals
    pixels = [
        processor(p, input_data_format="channels_last", return_tensors="pt").pixel_values for p in PICTURES
    ]
    texts = tokenizer(CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=torch.cat(pixels), **texts).logits_per_image / model.logit_scale.exp()
    return 100 * logits.diagonal().clamp(min=0).numpy()


@pytest.fixture(scope="module")
def scorer(originals):
    return ClipScorer(originals[-1], batch_size=3)


def test_scores_are_those_of_transformers(originals, scorer):
    wanted = expected(originals)
    assert 0 < (wanted > 0).sum() < len(wanted), "another SEED shows what is kept and what is cut to 0"
    found = scorer.score([(PICTURES, CAPTIONS)])
    assert_same(found.scores, wanted)
    assert found.mean == pytest.approx(wanted.mean(), rel=1e-4)
    assert found.truncated == 2


def test_however_pictures_come_the_scores_are_the_same(originals, scorer):
    """In batches of any size, of which the last is not full; and nothing compiles a second time."""
    whole = scorer.score([(PICTURES, CAPTIONS)])
    before = COMPILED["jit(_cosines_of)"]
    assert before >= 1
    for cuts in ([0, 7], [0, 1, 7], [0, 2, 2, 5, 7], range(8)):
        parts = [(PICTURES[a:b], CAPTIONS[a:b]) for a, b in itertools.pairwise(cuts)]
        found = scorer.score(iter(parts))
        np.testing.assert_array_equal(found.scores, whole.scores)
        assert found.truncated == whole.truncated
    same_size = np.stack([PICTURES[0]] * 2)
    one_by_one = scorer.score([(PICTURES[:1], ["a fox"]), (PICTURES[:1], ["a car"])])
    np.testing.assert_array_equal(scorer.score([(same_size, ["a fox", "a car"])]).scores, one_by_one.scores)
    assert COMPILED["jit(_cosines_of)"] == before


def test_the_tokenizer_may_come_in_two_files(originals, scorer, folder):
    """vocab.json and merges.txt, as the hub's older folders have it."""
    tokenizer = originals[2]
    (folder / "tokenizer.json").unlink()
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    found = ClipScorer(folder).score([(PICTURES, CAPTIONS)])
    np.testing.assert_allclose(found.scores, scorer.score([(PICTURES, CAPTIONS)]).scores, rtol=1e-5)


def test_numbers_that_do_not_fit_are_refused(scorer):
    with pytest.raises(ValueError, match="2 pictures for 1 captions"):
        scorer.score([(PICTURES[:2], CAPTIONS[:1])])
    with pytest.raises(ValueError, match="no pictures"):
        scorer.score([])


def change(file, **options):
    def spoil(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | options))

    return spoil


def change_part(name, **options):
    def spoil(folder):
        part = json.loads((folder / "config.json").read_text())[name]
        change("config.json", **{name: part | options})(folder)

    return spoil


def only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


FOLDERS = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        r"clip is no CLIP: looked for config\.json .* it holds model\.safetensors, .*download it first",
    ),
    "no folder": (shutil.rmtree, r"clip is no CLIP: .*; there is no such folder"),
    "a pickle alone": (only_a_pickle, r"holds weights as pytorch_model\.bin alone, a format that is never"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors or "),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"vocab\.json is missing"),
    "no preprocessor": (
        lambda f: (f / "preprocessor_config.json").unlink(),
        r"has no preprocessor_config\.json",
    ),
    "another model": (
        change("config.json", model_type="siglip"),
        r"config\.json: model_type='siglip' is not",
    ),
    "another width": (change_part("vision_config", hidden_size=8), r"does not fit .*wrong shape: "),
    "other pictures": (
        change("preprocessor_config.json", crop_size=24),
        r"different models: config\.json has image_size 20, and the preprocessor makes pictures of 24 x 24",
    ),
    "pictures of many sizes": (
        change("preprocessor_config.json", do_center_crop=False),
        r"image_size 20, and the preprocessor makes pictures of many sizes",
    ),
    "longer texts": (
        change("tokenizer_config.json", model_max_length=77),
        r"max_position_embeddings 24, and tokenizer_config\.json model_max_length 77",
    ),
    "another end": (
        change_part("text_config", eos_token_id=7),
        r"eos_token_id 7, and the tokenizer ends texts with 513",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_wrong_are_told_in_one_line(folder, name):
    spoil, told = FOLDERS[name]
    spoil(folder)
    with pytest.raises(UserError, match=told) as error:
        ClipScorer(folder)
    assert "\n" not in str(error.value)


def test_the_batch_size_is_checked(originals):
    with pytest.raises(UserError, match="batch_size=0: write 1 or more"):
        ClipScorer(originals[-1], batch_size=0)

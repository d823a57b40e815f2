"""The safety checker against diffusers': the same pictures are held back, from the same folder."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig

import engine
from engine import finish
from engine.checking import prepared
from engine.errors import UserNotice
from engine.parts import module
from engine.types import UserError
from engine.weights.clip_pixels import PixelsConfig, prepare
from engine.weights.safety_checker import load_safety_checker
from launch import cli
from launch import generate as command
from tests.parity.common import nchw, random_weights
from tests.tiny import SHALLOW, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

SIDE = 24
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
HELD = 2, 4
DRAWN = {"seed": 1, "steps": 2, "height": 48, "width": 48}
PROMPTS = [f"a {what}" for what in ("fox", "car", "cat", "dog", "tree", "house")]


def pictures(count: int, height: int = 40, width: int = 60) -> np.ndarray:
    """Of few colours, so that they look the same when they are smaller."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)[:, :height, :width]


def pixels(images: np.ndarray) -> np.ndarray:
    """As transformers prepares them (tests/parity/test_clip_pixels.py)."""
    config = PixelsConfig(size=SIDE, crop_size=(SIDE, SIDE))
    return np.stack([prepare(image, config) for image in images])


def given(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(nchw(pixels(images)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "model", **SHALLOW)


@pytest.fixture(scope="module")
def plain(model):
    return engine.load(model).generate(PROMPTS, **DRAWN)


@pytest.fixture(scope="module")
def original(plain):
    """It knows a concept that the third picture has, and another that is found in the fifth with special care
    alone."""
    torch.manual_seed(0)
    checker = random_weights(StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, projection_dim=8)))
    with torch.no_grad():
        seen = checker.visual_projection(checker.vision_model(given(plain))[1])
        near = torch.nn.functional.cosine_similarity(seen[:, None], seen[None], dim=-1)
        nearest = [near[i][[j for j in range(len(seen)) if j != i]].max() for i in HELD]
        for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
            weights.fill_(2)
        checker.concept_embeds[0], checker.concept_embeds_weights[0] = seen[HELD[0]], (1 + nearest[0]) / 2
        checker.concept_embeds[5], checker.concept_embeds_weights[5] = seen[HELD[1]], 1.005
        checker.special_care_embeds[1] = seen[HELD[1]]
        checker.special_care_embeds_weights[1] = (1 + nearest[1]) / 2
    return checker.eval()


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    at = tmp_path_factory.mktemp("safe") / "safety_checker"
    original.save_pretrained(at)
    return at


def test_the_same_pictures_are_held_back(original, folder, plain):
    _, held = original(given(plain), [np.zeros(1)] * len(plain))
    assert np.flatnonzero(held).tolist() == list(HELD)
    part = load_safety_checker(folder)
    safe = np.asarray(module(part, part.params)(jnp.asarray(pixels(plain))))
    np.testing.assert_array_equal(~safe, held)


@pytest.mark.parametrize("size", [(40, 60), (61, 33), (24, 24), (12, 16)])
def test_pictures_are_prepared_on_the_devices_as_by_pillow(size):
    images = pictures(3, *size)
    found = np.asarray(prepared(jnp.asarray(images), SIDE))
    assert found.shape == (3, SIDE, SIDE, 3)
    levels = np.abs(found - pixels(images)).max() * 255 * max(PixelsConfig().image_std)
    assert levels < 1.1  # Pillow computes with fixed points, and may round otherwise


def test_what_is_held_back_is_black_and_told_of(model, folder, plain):
    pipe = engine.load(model, safety_checker=folder)
    with pytest.warns(UserNotice, match=r"held back by the safety checker, and black: index \[2, 4\]"):
        images = pipe.generate(PROMPTS, **DRAWN)
    assert not images[list(HELD)].any()
    others = [i for i in range(len(PROMPTS)) if i not in HELD]
    np.testing.assert_array_equal(images[others], plain[others])


def test_no_checker_is_one_line(model, tmp_path):
    for wrong, message in (
        (tmp_path, "no safety checker in .*: write its folder, with config.json"),
        (model / "unet", "describes a UNet2DConditionModel; the engine reads StableDiffusionSafetyChecker"),
    ):
        with pytest.raises(UserError, match=message):
            engine.load(model, safety_checker=wrong)


def test_runs_and_jobs_write_the_others(model, folder, tmp_path, capsys):
    common = ["--model", str(model), "--safety_checker", str(folder.parent), "--steps", "2", "--seed", "1"]
    common += ["--height", "48", "--width", "48", "--batch_size", "6"]
    assert cli.exit_code(command.main, [*PROMPTS, *common, "--out", str(tmp_path / "run")]) == cli.FAILED
    told = capsys.readouterr().err
    assert all(f"picture {i} of seed 1 was held back by the safety checker" in told for i in HELD)
    names = sorted(path.name for path in (tmp_path / "run").glob("0*.png"))
    assert [int(name[:5]) for name in names] == [0, 1, 3, 5]
    settings = finish.read_settings(tmp_path / "run" / names[0])
    assert settings["safety_checker"] == str(folder.parent) and "safety_checker" in settings["contents"]
    (tmp_path / "rows.txt").write_text("\n".join(PROMPTS))
    job = ["--prompts_file", str(tmp_path / "rows.txt"), *common, "--out", str(tmp_path / "job")]
    assert cli.exit_code(command.main, job) == cli.FAILED
    failures = map(json.loads, (tmp_path / "job" / "failures.jsonl").read_text().splitlines())
    assert {one["row"]: one["reason"] for one in failures} == dict.fromkeys(
        HELD, "held back by the safety checker"
    )

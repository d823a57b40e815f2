"""A run that begins with the weights of a folder."""

import contextlib
import filecmp

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.train import stages
from engine.train.stage_data import Scenes
from engine.types import UserError
from engine.weights.folder import Model, load_folder, save_folder
from tests.train.tiny_run import get_config, plain_steps


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "LATENT_IMAGES", 32)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as the config describes it, with the weights that a run would begin with."""
    config = plain_steps(get_config())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "CAPTIONS_FOR_TOKENIZER", 200)
        tokenizer = stages._tokenizer(config, tmp_path_factory.mktemp("none"), Scenes(config))
    scheduler = stages._scheduler(config)
    model = Model(**stages.components(config, tokenizer), tokenizer=tokenizer, scheduler=scheduler)
    path = tmp_path_factory.mktemp("start") / "model"
    save_folder(path, model, dtype=jnp.float16)
    return path


@pytest.fixture
def config(folder):
    """A run from that folder that trains nothing."""
    config = plain_steps(get_config())
    config.start, config.seed = str(folder), 5  # a seed of its own: fresh weights would be others
    for stage in (config.autoencoder, config.words, config.diffusion, config.decoder):
        stage.steps = 0
    return config


def same(ours, theirs) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, ours.params, theirs.params)))


def test_a_run_without_steps_hands_on_what_it_began_with(config, folder, tmp_path):
    model = stages.train(config, tmp_path)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        assert filecmp.cmp(file, model / file.relative_to(folder), shallow=False), file


@pytest.mark.parametrize(
    "stage, kind",
    [("autoencoder", "vae"), ("words", "text_encoder"), ("diffusion", "unet"), ("decoder", "vae")],
)
def test_a_stage_with_steps_trains_its_part_alone(config, folder, tmp_path, stage, kind):
    getattr(config, stage).steps = 4  # the words' readers begin at zero and hand nothing back at first
    after, before = load_folder(stages.train(config, tmp_path)), load_folder(folder)
    for name in ("vae", "text_encoder", "unet"):
        assert same(getattr(after, name), getattr(before, name)) == (name != kind)


def test_a_stage_that_others_have_learned_from_does_not_go_on(config, tmp_path):
    """The latents would be others, and what knows the old ones would be exported beside them."""
    (tmp_path / "diffusion" / "2").mkdir(parents=True)
    config.autoencoder.steps = config.diffusion.steps = 3
    told = r"autoencoder\.steps=3: .* has 0 of them, and its diffusion has learned"
    with pytest.raises(UserError, match=told):
        stages.train(config, tmp_path)
    config.autoencoder.steps = 0
    stages._check_order(config, tmp_path)  # the last one may
    (tmp_path / "words" / "4").mkdir(parents=True)
    for steps, refused in ((4, False), (5, True)):
        config.words.steps = steps
        with pytest.raises(UserError, match=r"words\.steps=5") if refused else contextlib.nullcontext():
            stages._check_order(config, tmp_path)


def test_a_run_may_draw_another_size_than_the_model_it_began_with(config, folder, tmp_path):
    config.image_size, config.diffusion.steps = 64, 2
    after, before = load_folder(stages.train(config, tmp_path)), load_folder(folder)
    assert (before.default_size, after.default_size) == ((32, 32), (64, 64))
    assert same(after.vae, before.vae) and not same(after.unet, before.unet)


def test_training_begins_with_the_weights_of_the_folder(config, folder, tmp_path):
    """A rate of next to nothing leaves them where they were, up to the rounding to 16 bits."""
    config.diffusion.steps, config.diffusion.optim.learning_rate = 2, 1e-9
    after = load_folder(stages.train(config, tmp_path)).unet
    before = load_folder(folder).unet
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.params, before.params)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda config: config.unet.update(block_out_channels=(32,)), "its unet has block_out_channels="),
        (lambda config: config.vae.update(latent_channels=8), "its vae has latent_channels=4, the config 8"),
        (lambda config: setattr(config, "max_tokens", 8), "its text_encoder has max_position_embeddings=16"),
        (lambda config: setattr(config, "start", "nowhere"), "nowhere"),
    ],
    ids=["unet", "vae", "max_tokens", "folder"],
)
def test_a_folder_of_another_shape_is_refused(config, tmp_path, change, named):
    change(config)
    with pytest.raises(UserError, match=named):
        stages.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()

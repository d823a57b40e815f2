"""Models that are built alike share what is compiled: `Pipeline.with_model`."""

import gc
import json
import shutil
import weakref

import jax
import numpy as np
import pytest

import engine
from engine.types import UserError
from engine.weights import lora
from engine.weights.folder import load_folder
from tests.compiled import COMPILED
from tests.launch.test_lora import write
from tests.long import LONG
from tests.tiny import REFINER, SCHEDULER, SHALLOW, TINY_VAE, XL, shallow, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")
PROMPTS = ["a red fox", "a blue car"]


def draw(pipe, **options):
    return pipe.generate(PROMPTS, **{"seed": 7, "steps": 2, "batch_size": 2} | options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model", **SHALLOW)


@pytest.fixture(scope="module")
def configs(folder):
    return {kind: part.config for kind, part in load_folder(folder).parts.items() if kind in lora.KINDS}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "other", seed=1, **SHALLOW)


@pytest.fixture(scope="module")
def pipe(folder):
    return engine.load(folder)


@pytest.mark.parametrize("parallel", ["shard_map", pytest.param("jit", marks=LONG), "pmap"])
def test_it_draws_what_the_other_model_draws_and_compiles_nothing(folder, other, parallel):
    pipe = engine.load(folder, parallel=parallel)
    ours, before = draw(pipe), COMPILED.copy()
    found = pipe.with_model(other)
    theirs = draw(found)
    assert before == COMPILED
    assert (found.name, found.folder) == (str(other), other)
    np.testing.assert_array_equal(draw(pipe), ours)
    assert not np.array_equal(theirs, ours)
    np.testing.assert_array_equal(theirs, draw(engine.load(other, parallel=parallel)))


def test_the_model_before_leaves_memory_though_its_programs_are_used(folder, other):
    pipe = engine.load(folder)
    draw(pipe)
    there = [weakref.ref(leaf) for part in pipe.model.parts.values() for leaf in jax.tree.leaves(part.params)]
    found = pipe.with_model(other)
    del pipe
    gc.collect()
    assert not any(leaf() is not None for leaf in there)
    assert draw(found).shape == (2, 16, 16, 3)


def test_another_noise_schedule_is_heeded(pipe, tmp_path):
    scheduler = SCHEDULER | {"prediction_type": "epsilon", "beta_schedule": "linear"}
    noisy = tiny_folder(tmp_path / "other", scheduler=scheduler, **SHALLOW)  # the same weights
    np.testing.assert_array_equal(draw(pipe.with_model(noisy)), draw(engine.load(noisy)))
    assert not np.array_equal(draw(pipe.with_model(noisy)), draw(pipe))


def test_another_grid_is_no_other_program(pipe, tmp_path):
    scheduler = SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    even = tiny_folder(tmp_path / "other", scheduler=scheduler, **SHALLOW)
    draw(pipe, sampler="euler")
    before = COMPILED.copy()
    found = draw(pipe.with_model(even))
    assert before == COMPILED
    np.testing.assert_array_equal(found, draw(engine.load(even)))
    assert not np.array_equal(found, draw(pipe, sampler="euler"))


def test_another_vocabulary_is_heeded(pipe, folder, tmp_path):
    """Which words a prompt has is no matter of programs."""
    swapped = shutil.copytree(folder, tmp_path / "swapped")
    (swapped / "tokenizer" / "tokenizer.json").unlink()  # which says the same again
    file = swapped / "tokenizer" / "vocab.json"
    words = json.loads(file.read_text())
    words |= {"x</w>": words["r</w>"], "r</w>": words["x</w>"]}  # at the end of fox and of car
    file.write_text(json.dumps(words))
    found = draw(pipe.with_model(swapped))
    np.testing.assert_array_equal(found, draw(engine.load(swapped)))
    assert not np.array_equal(found, draw(pipe))


def test_its_own_loras_come_with_it(pipe, other, configs, tmp_path):
    file = write(tmp_path / "fox.safetensors", configs)
    found = pipe.with_model(other, loras=[(file, 1.0)])
    expected = draw(engine.load(other, lora=[(file, 1.0)]))
    np.testing.assert_array_equal(draw(found), expected)
    np.testing.assert_array_equal(draw(pipe.with_model(other).with_loras([(file, 1.0)])), expected)
    np.testing.assert_array_equal(draw(found.with_loras([])), draw(pipe.with_model(other)))


def test_a_decoder_that_was_named_stays(folder, other, tmp_path):
    decoder = tiny_folder(tmp_path / "decoder", seed=2, **shallow({"vae": TINY_VAE}))
    found = engine.load(folder, decoder=decoder).with_model(other)
    np.testing.assert_array_equal(draw(found), draw(engine.load(other, decoder=decoder)))


def test_a_refiner_stays_and_takes_over_its_latents(tmp_path):
    first, second = (tiny_folder(tmp_path / f"xl{i}", seed=i, **shallow(XL)) for i in range(2))
    refiner = tiny_folder(tmp_path / "refiner", seed=3, **shallow(REFINER))
    found = engine.load(first, refiner=refiner).with_model(second)
    options = {"refiner_start": 0.5, "steps": 4}
    np.testing.assert_array_equal(
        draw(found, **options), draw(engine.load(second, refiner=refiner), **options)
    )
    assert found.refiner.model.vae is found.model.vae


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({}, r"its unet has down_block_types=\('Cross.*'\), not \(.*,\)"),
        (shallow({"vae": TINY_VAE}), "its vae is of another class"),
        (shallow(XL), "it has a text_encoder_2"),
        (
            shallow({"text_encoder": {"num_hidden_layers": 2}}),
            "its text_encoder has num_hidden_layers=2, not 1",
        ),
    ],
)
def test_one_that_is_built_otherwise_is_refused(pipe, folder, tmp_path, overrides, told):
    strange = tiny_folder(tmp_path / "strange", **overrides)
    for file in strange.rglob("*.safetensors"):
        file.unlink()  # before they are read
    with pytest.raises(UserError, match=f"^{strange} is built otherwise than {folder}: {told}; load it"):
        pipe.with_model(strange)


def test_another_size_to_draw_is_no_other_build(pipe, tmp_path):
    large = tiny_folder(tmp_path / "large", **shallow({"unet": {"sample_size": 16}}))
    assert draw(pipe.with_model(large)).shape == (2, 32, 32, 3)
    assert draw(pipe).shape == (2, 16, 16, 3)


def test_no_folder_is_a_mistake(pipe, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path / "none")):
        pipe.with_model(tmp_path / "none")

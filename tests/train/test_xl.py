"""SDXL, trained: its U-Net, its text encoders, LoRAs, words; from pictures and from cached latents."""

import dataclasses

import jax
import numpy as np
import pytest

import engine
from engine.config import (
    DataConfig,
    FinetuneConfig,
    FinetuneStage,
    InversionConfig,
    LoraConfig,
    OptimConfig,
    PriorConfig,
    SamplesConfig,
)
from engine.train import dry_run, finetune, latents
from engine.types import UserError
from engine.weights.component import digest_of
from engine.weights.folder import load_folder, load_trainable
from launch import cache
from tests.long import LONG
from tests.tiny import REFINER, XL, shallow, tiny_folder
from tests.train.laid_out import LAYOUTS

OPTIMIZER = OptimConfig(learning_rate=1e-2, warmup_steps=0, decay_steps=0)
DATA = DataConfig(buckets=3, multiple=8, workers=2, crop="random", flip=0.5)
DRAWN = {"steps": 2, "guidance_scale": 3.0, "seed": 1}
PROMPTS = ["a red fox", "a cat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "xl", **shallow(XL))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "data"
    LAYOUTS["webdataset"](folder, 14)
    return dataclasses.replace(DATA, paths=(str(folder),))


@pytest.fixture
def config(model, data):
    """Three steps of four pictures, unless told."""

    def config(what="unet", steps=3, **options):
        stage = FinetuneStage(
            steps=steps, batch_size=4, ema=(0.0,), checkpoint_every=100, caption_dropout=0.3, optim=OPTIMIZER
        )
        own = {"model": str(model), "what": what, "data": data, "finetune": stage}
        return FinetuneConfig(**own | options)

    return config


def parts_that_differ(first, second):
    models = [load_folder(folder) for folder in (first, second)]
    digests = [{kind: digest_of(part.params) for kind, part in model.parts.items()} for model in models]
    return {kind for kind, digest in digests[0].items() if digest != digests[1][kind]}


def weights(model):
    """Of the U-Net, all in one."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(model.unet.params)])


def drawn(model, **options):
    return engine.load(model, **options).generate(PROMPTS, **DRAWN)


TRAINED = {"unet": {"unet"}, "unet+text_encoder": {"unet", "text_encoder", "text_encoder_2"}}


@pytest.mark.parametrize(
    "what",
    [pytest.param("unet", marks=LONG), "unet+text_encoder"],  # the U-Net alone: test_finetune.py
)
def test_what_is_trained_alone_changes(config, model, tmp_path, what):
    samples = SamplesConfig(prompts=tuple(PROMPTS), every=3, steps=2)
    exported = finetune.train(config(what, samples=samples), tmp_path)
    before = tiny_folder(tmp_path / "before", **shallow(XL))
    finetune.export(finetune.begin(config(what)), {}, before, overwrite=True)  # in float16 as well
    assert parts_that_differ(exported, before) == TRAINED[what]
    assert np.abs(drawn(exported).astype(int) - drawn(before)).max() > 8
    assert (tmp_path / "samples" / "00000003.png").exists()


@LONG  # as with one text encoder: test_controlnet.py
def test_a_stopped_run_goes_on_as_if_it_had_not_been(config, tmp_path):
    whole = finetune.train(config(steps=5), tmp_path / "whole")
    finetune.train(config(steps=2), tmp_path / "stopped")
    again = finetune.train(config(steps=5), tmp_path / "stopped")
    assert parts_that_differ(whole, again) == set()


def test_a_lora_of_all_three_networks_is_a_file_that_draws(config, model, tmp_path):
    lora = LoraConfig(rank=2, alpha=4.0, text_encoder=True)
    file = finetune.train(config("lora", lora=lora), tmp_path)
    task = finetune.begin(config("lora", lora=lora))
    assert {name.split(".")[0] for name in task.lora.layers} == {"unet", "text_encoder", "text_encoder_2"}
    assert np.abs(drawn(model, lora=[(file, 1.0)]).astype(int) - drawn(model)).max() > 8
    np.testing.assert_array_equal(drawn(model, lora=[(file, 0.0)]), drawn(model))


def test_a_word_is_learned_by_both_encoders(config, model, tmp_path):
    word = InversionConfig("<thing>", "at", num_vectors=2, templates=("a {}",))
    told = config("textual_inversion", inversion=word)
    before = finetune.begin(told).word
    file = finetune.train(told, tmp_path)
    found = engine.load(model, embeddings=[file])
    for kind, own in zip(("text_encoder", "text_encoder_2"), before.every, strict=True):
        assert own.kind == kind
        table = found.model.parts[kind].params["text_model"]["embeddings"]["token_embedding"]["embedding"]
        assert np.abs(np.asarray(table)[own.ids] - own.vectors).max() > 1e-3
    pictures = found.generate(["a <thing>"], **DRAWN), found.generate(["a at at"], **DRAWN)
    assert (pictures[0] != pictures[1]).any()


def test_cached_latents_train_as_the_pictures_do(config, model, data, tmp_path):
    central = dataclasses.replace(data, crop="center", flip=0.0)
    cache.encode(central, str(model), tmp_path / "cache", 3)
    held = latents.cached_batches(tmp_path / "cache", 4, central.seed)
    sizes = np.concatenate([held(step)["sizes"] for step in range(14)])
    assert len(np.unique(sizes[:, 4:], axis=0)) == 3 and sizes[:, 2:4].any()

    finetunings = {
        "pictures": config(data=central),
        "cached": config(data=DataConfig(seed=central.seed), latents=str(tmp_path / "cache")),
    }
    models = [load_folder(finetune.train(each, tmp_path / name)) for name, each in finetunings.items()]
    begun, *ended = map(weights, (load_folder(model), *models))
    assert np.abs(ended[0] - ended[1]).mean() < 0.02 * np.abs(ended[0] - begun).mean()


@pytest.mark.parametrize("cached", [False, True], ids=["pictures", "cached"])
def test_dropped_captions_are_zeros_and_sizes_are_seen(config, model, data, tmp_path, cached):
    """As pictures without a prompt are drawn: the model says force_zeros_for_empty_prompt."""
    told = config()
    if cached:
        cache.encode(dataclasses.replace(data, crop="center", flip=0.0), str(model), tmp_path / "cache", 4)
        told = config(data=DataConfig(), latents=str(tmp_path / "cache"))
    told.finetune.caption_dropout = 1.0
    task = finetune.begin(told)
    batch = dict(finetune.batches(told, task, tmp_path)(0))

    def value(batch, zeros=True):
        begun = dataclasses.replace(task, model=dataclasses.replace(task.model, zeros=zeros))
        loss, frozen, _ = finetune.objective(told, begun)
        return float(jax.jit(loss)(task.params, frozen, batch, jax.random.key(0))[0])

    dropped = value(batch)
    assert abs(value(batch, zeros=False) - dropped) > 1e-5 * dropped  # what the encoders say of no text
    elsewhere = batch | {"sizes": batch["sizes"] + 100}
    assert abs(value(elsewhere) - dropped) > 1e-5 * dropped
    if cached:  # it can be told zeros, and nothing is dropped
        nothing = {name: np.zeros_like(batch[name]) for name in ("context", "pooled")}
        told.finetune.caption_dropout = 0.0
        assert value(batch | nothing) == pytest.approx(dropped, rel=1e-6)
        assert abs(value(batch) - dropped) > 1e-5 * dropped
    else:
        others = batch | {"ids": np.roll(batch["ids"], 1, 0)}
        assert value(others) == dropped


def test_a_prior_and_a_dry_run(config, tmp_path, capsys):
    prior = PriorConfig(prompt="a fox", num_images=4)
    assert finetune.train(config(prior=prior), tmp_path / "dry", dry_run.fit) is None
    assert "parameters that are trained" in capsys.readouterr().out
    assert finetune.train(config(prior=prior, steps=1), tmp_path / "run").name == "model"
    assert len(list((tmp_path / "run" / "prior").glob("*.png"))) == 4


def test_a_refiner_is_not_trained(tmp_path):
    folder = tiny_folder(tmp_path / "refiner", **shallow(REFINER))
    with pytest.raises(UserError, match="is a refiner, and is not trained: give its base") as error:
        load_trainable(folder)
    assert "\n" not in str(error.value)

"""A model from scratch on a folder of pictures with captions: every stage, stopped, exported, begun anew."""

import contextvars
import os
import shutil
import signal

import jax
import numpy as np
import pytest

import engine
from configs import own as own_config
from engine.config import DataConfig
from engine.models import layers
from engine.train import dry_run, export, stages
from engine.train.sources import pictures
from engine.train.stage_data import OwnPictures, Scenes, stage_data
from engine.types import UserError
from engine.weights.folder import load_folder
from tests.long import LONG
from tests.tiny import tiny_tokenizer
from tests.train.laid_out import WORDS, listed, noisy, plain_png, with_sidecars, write
from tests.train.tiny_run import EVERY, STEPS, assert_same_arrays, get_config, saved, steps_in

STAGES = {"autoencoder": STEPS, "diffusion": STEPS, "decoder": 2}


@pytest.fixture(autouse=True, scope="module")
def _quickly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "LATENT_IMAGES", 8)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures, tall and wide; beside them one that is cut off, and one without a caption."""
    folder = tmp_path_factory.mktemp("own") / "pictures"
    with_sidecars("txt")(folder, 12)
    return write(folder, {"half.png": noisy("PNG")[:3000], "half.txt": "a half", "silent.png": plain_png(1)})


def own(config, *paths, **options):
    """The same run on pictures."""
    config.data = DataConfig(paths=tuple(map(str, paths)), workers=2, **options)
    config.words.steps, config.diffusion.easy = 0, 0.0
    config.diffusion.train_text_encoder, config.diffusion.accumulate = True, 1
    return config


@pytest.fixture
def config(folder):
    return own(get_config(), folder, crop="random")


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    assert stages.train(own(get_config(), folder, crop="random"), workdir) == workdir / "model"
    return workdir


def same(ours, theirs) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, ours.params, theirs.params)))


def weights(folder) -> list[bytes]:
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == 3
    return [file.read_bytes() for file in files]


def test_every_stage_leaves_a_model_that_draws(uninterrupted, config, capsys):
    pipe = engine.load(uninterrupted / "model")
    first, second = pipe.generate(["a red fox", "a boat, at night"], seed=1, steps=3)
    assert first.shape == (32, 32, 3) and (first != second).any()
    tokenizer = pipe.model.tokenizer
    assert tokenizer.unknown_words("a red fox and a zebra") == ["and", "zebra"]
    assert tokenizer.vocab_size > 514, "bytes and specials: nothing was merged"
    fresh = stages.components(config, tokenizer)
    for kind, part in fresh.items():
        assert not same(getattr(pipe.model, kind), part)


def test_what_cannot_be_used_is_listed(uninterrupted):
    """One at the first look, the other when it was to be decoded."""
    skipped = {file.rpartition("/")[2]: reason for file, reason in listed(uninterrupted)}
    assert skipped.keys() == {"half.png", "silent.png"}
    assert skipped["silent.png"] == "no caption" and skipped["half.png"].startswith("damaged: ")


@LONG  # stages: test_resume.py; pictures: test_controlnet.py
def test_a_run_that_was_stopped_ends_as_one_that_was_not(uninterrupted, config, tmp_path, in_stage, capsys):
    for stage, step in (("autoencoder", 1), ("diffusion", EVERY)):
        in_stage(stage, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert stages.train(config, tmp_path) is None
        assert f"{stage}: stopped and saved at step {step + 1}" in capsys.readouterr().out
    assert stages.train(config, tmp_path) == tmp_path / "model"
    assert f"diffusion: goes on from step {EVERY + 1}\n" in capsys.readouterr().out
    for stage, steps in STAGES.items():
        assert steps_in(tmp_path / stage)[-1] == steps
        assert_same_arrays(saved(tmp_path / stage), saved(uninterrupted / stage))
    assert weights(tmp_path / "model") == weights(uninterrupted / "model")


def test_other_pictures_later_do_not_move_the_latents(uninterrupted, config, tmp_path, capsys):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    with_sidecars("txt")(tmp_path / "others", 3)
    config.data.paths = (str(tmp_path / "others"),)
    assert stages.train(config, workdir) == workdir / "model"
    assert weights(workdir / "model") == weights(uninterrupted / "model")
    (workdir / "autoencoder" / stages.SCALE).unlink()
    stages.train(config, workdir)
    assert "data: changed since this run began" in capsys.readouterr().out
    assert weights(workdir / "model") != weights(uninterrupted / "model"), "the others have their own scale"


def test_an_export_needs_no_pictures(uninterrupted, config, tmp_path):
    """Of any average, of the U-Net and of the text encoder."""
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    file = workdir / "config.json"
    file.write_text(file.read_text().replace(config.data.paths[0], str(tmp_path / "nowhere")))
    export.export(workdir, tmp_path / "same")
    assert weights(tmp_path / "same") == weights(uninterrupted / "model")
    found = [
        load_folder(export.export(workdir, tmp_path / "params", which="params")),
        load_folder(export.export(workdir, tmp_path / "width", sigma_rel=0.08)),
        load_folder(tmp_path / "same"),
    ]
    for kind in ("unet", "text_encoder"):
        parts = [getattr(model, kind) for model in found]
        assert not same(parts[0], parts[1]) and not same(parts[1], parts[2]) and not same(parts[0], parts[2])
    assert same(found[0].vae, found[2].vae)


def test_a_dry_run_counts_both(config, tmp_path, capsys):
    assert stages.train(config, tmp_path, dry_run.fit) is None
    said = capsys.readouterr().out
    counted = [line.split()[-1] for line in said.splitlines() if line.startswith("parameters that are")]
    parts = stages.components(config, stages._tokenizer(config, tmp_path, OwnPictures(config, tmp_path)))
    sizes = {k: sum(leaf.size for leaf in jax.tree.leaves(part.params)) for k, part in parts.items()}
    assert counted[:2] == [f"{sizes['vae']:,}", f"{sizes['unet'] + sizes['text_encoder']:,}"]
    assert not (tmp_path / "diffusion").exists() and len(counted) == len(STAGES)


AUTOENCODER = pytest.param("autoencoder", ["vae"], marks=LONG)  # as in tests/train/test_start.py


@pytest.mark.parametrize("stage, kinds", [AUTOENCODER, ("diffusion", ["unet", "text_encoder"])])
def test_from_a_folder_a_stage_trains_its_parts_alone(uninterrupted, config, tmp_path, capsys, stage, kinds):
    config.start = str(uninterrupted / "model")
    config.data.buckets, config.data.multiple = 2, 16
    for each in STAGES:
        getattr(config, each).steps = 2 * (each == stage)
    after, before = load_folder(stages.train(config, tmp_path)), load_folder(uninterrupted / "model")
    assert "data: 13 pictures (16x48: 6, 48x16: 7); 1 skipped" in capsys.readouterr().out
    for name in ("vae", "text_encoder", "unet"):
        assert same(getattr(after, name), getattr(before, name)) == (name not in kinds)


def test_scenes_may_train_the_text_encoder_with_the_u_net(uninterrupted, tmp_path):
    config = get_config()
    config.diffusion.train_text_encoder, config.words.steps = True, 0
    config.validate()  # from scratch, too
    config.start, config.diffusion.steps = str(uninterrupted / "model"), 2
    config.autoencoder.steps = config.decoder.steps = 0
    after, before = load_folder(stages.train(config, tmp_path)), load_folder(uninterrupted / "model")
    assert not same(after.text_encoder, before.text_encoder) and same(after.vae, before.vae)


def test_the_tokenizer_sees_so_many_captions_and_no_pixels(config, tmp_path, monkeypatch):
    def decoded(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(pictures, "read_pixels", decoded)
    data = OwnPictures(config, tmp_path)
    some, words = data.texts(5)
    every, _ = data.texts(100)
    assert some == words == every[:5] == OwnPictures(config, tmp_path).texts(5)[0]
    assert sorted(every) == sorted([*(WORDS[n % len(WORDS)] for n in range(12)), "a half"])


def test_captions_that_are_cut_are_told_of(config, tmp_path, capsys):
    config.max_tokens = 6
    stages._tokenizer(config, tmp_path, OwnPictures(config, tmp_path))
    # "a half" and "a boat, at night", whose words are seen once and stay in letters
    assert capsys.readouterr().out.endswith(" ids from 13 captions; 2 are cut at max_tokens=6\n")


@pytest.mark.parametrize("kind", [Scenes, OwnPictures])
def test_hosts_share_each_batch(config, tmp_path, kind):
    if kind is Scenes:
        config = get_config()
    else:
        config.data.buckets, config.data.multiple = 2, 16
    config.diffusion.caption_shuffle = True
    config.diffusion.batch_size = config.decoder.batch_size = 4
    alone, first, second = (stage_data(config, tmp_path, *host) for host in ((0, 1), (0, 2), (1, 2)))
    assert isinstance(alone, kind)

    def both(data):
        return data.pictures("decoder"), data.captioned(tiny_tokenizer())

    for whole, *halves in zip(both(alone), both(first), both(second), strict=True):
        for step in range(5):
            for name, rows in whole(step).items():
                np.testing.assert_array_equal(rows, np.concatenate([half(step)[name] for half in halves]))
    np.testing.assert_array_equal(alone.images(3), second.images(3))


def no_captions(config, tmp_path):
    write(tmp_path / "silent", {f"{n}.png": plain_png(n) for n in range(3)})
    config.data.paths = (str(tmp_path / "silent"),)


def of_size(config, image_size, multiple):
    config.image_size, config.data.multiple = image_size, multiple


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, _: setattr(c.words, "steps", 7), "words.steps=7 asks what drawn scenes show"),
        (
            lambda c, _: setattr(c.diffusion, "train_text_encoder", False),
            "write diffusion.train_text_encoder=True",
        ),
        (lambda c, _: setattr(c.diffusion, "easy", 0.5), "write diffusion.easy=0"),
        (no_captions, "no picture can be used; skipped.jsonl says why (of the last: no caption)"),
        (lambda c, _: setattr(c, "image_size", 40), "image_size=40: write a multiple of data.multiple=16"),
        (lambda c, _: of_size(c, 34, 1), "image_size=34: this autoencoder takes multiples of 4"),
        (lambda c, _: of_size(c, 34, 17), "image_size=34: this autoencoder takes multiples of 4"),
        (lambda c, _: of_size(c, 36, 6), "data.multiple=6: this autoencoder takes multiples of 4"),
        (lambda c, _: setattr(c.data, "size", 16), "data.size=16 is not image_size=32: write image_size"),
        (lambda c, _: setattr(c.data, "paths", ("nowhere",)), "nowhere: no such folder or file"),
        (lambda c, _: setattr(c, "data", DataConfig(flip=0.5)), "data.flip=0.5 without pictures"),
    ],
)
def test_mistakes_are_told_in_one_line(config, tmp_path, change, message):
    config.data.buckets, config.data.multiple = 2, 16
    change(config, tmp_path)
    with pytest.raises(UserError) as error:
        stages.train(config, tmp_path / "run")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_scenes_do_not_go_on_with_pictures_nor_pictures_with_scenes(uninterrupted, config, tmp_path):
    with pytest.raises(UserError, match=r"holds a run on data\.paths, not on the drawn world: give another"):
        stages.train(get_config(), uninterrupted)
    stages.remember(get_config(), tmp_path)
    with pytest.raises(UserError, match=r"holds a run on the drawn world, not on data\.paths: give another"):
        stages.train(config, tmp_path)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"scaling_factor": 0.18}, "vae.scaling_factor=0.18: write 1.0"),
        ({"use_quant_conv": False}, "vae.use_quant_conv and use_post_quant_conv: write True"),
    ],
)
def test_an_autoencoder_whose_latents_would_not_fit(config, tmp_path, option, told):
    config.vae |= option
    with pytest.raises(UserError, match=told):
        stages.train(config, tmp_path / "run")
    config.start, config.autoencoder.steps = "nowhere", 0  # of a model that has it so
    with pytest.raises(UserError, match="nowhere"):
        stages.train(config, tmp_path / "run")


def test_the_config_is_sound(folder, tmp_path, monkeypatch):
    """Its shapes, on small pictures; to compile it would take minutes, to draw its weights ten seconds."""
    looked_at = {}
    monkeypatch.setattr(layers, "_outlining", contextvars.ContextVar("outlining", default=True))

    def fit(name, loss, params, frozen, optimizer, stage, *, batch_at, **_):
        key = jax.random.key(0, impl="threefry2x32")
        looked_at[name] = jax.eval_shape(loss, params, frozen, batch_at(0), key)[0].shape
        return params

    monkeypatch.setattr(stages, "scaled_once", lambda vae, params, *_: params)
    config = own_config.get_config()
    with pytest.raises(UserError, match=r"without pictures: write data\.paths too"):
        config.validate()
    config.data.paths, config.data.min_size, config.image_size = (str(folder),), 1, 16
    config.autoencoder.batch_size = config.diffusion.batch_size = 2
    assert stages.train(config, tmp_path, fit) is None
    assert looked_at == {"autoencoder": (), "diffusion": ()}

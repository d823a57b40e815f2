"""Textual inversion: the vectors of a new word are learned, from pictures with and without captions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

import engine
from engine.config import (
    DataConfig,
    FinetuneConfig,
    FinetuneStage,
    InversionConfig,
    OptimConfig,
    PriorConfig,
    SamplesConfig,
)
from engine.train import dry_run, finetune, objectives
from engine.types import UserError
from engine.weights import embeddings
from engine.weights.embeddings import TABLE
from engine.weights.folder import load_folder
from launch import cli
from launch import export as export_command
from launch import train as train_command
from tests.train.laid_out import listed
from tests.train.tiny_run import assert_same_arrays, saved

WIDTH = 24  # of the tiny text encoder
WORD = {"placeholder": "<red>", "initializer": "at", "templates": ("a {}", "{} at night")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five plain red pictures; nobody says what they show."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(5):
        Image.new("RGB", (16, 16), (220, 20 * i, 30)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def config(model, pictures):
    """Six steps of four pictures, unless told; options of InversionConfig are told by name."""

    def config(steps=6, paths=(pictures,), prior=None, samples=None, **options):
        optimizer = OptimConfig(learning_rate=0.1, warmup_steps=0, decay_steps=0, weight_decay=0.0)
        stage = {"ema": (0.0,), "checkpoint_every": 3, "caption_dropout": 0.0, "optim": optimizer}
        return FinetuneConfig(
            model=str(model),
            what="textual_inversion",
            data=DataConfig(paths=tuple(map(str, paths))),
            inversion=InversionConfig(**WORD | options),
            finetune=FinetuneStage(steps=steps, batch_size=4, **stage),
            prior=prior or PriorConfig(),
            samples=samples or SamplesConfig(),
        )

    return config


def table(model) -> np.ndarray:
    return np.asarray(traverse_util.flatten_dict(model.text_encoder.params)[TABLE])


# ---- what is trained


@pytest.mark.parametrize("count", [1, 3])
def test_it_begins_as_the_initializer(config, model, count):
    task = finetune.begin(config(num_vectors=count))
    before = load_folder(model)
    ((at, _),) = before.tokenizer.pieces("at")
    rows = table(task.model)
    np.testing.assert_array_equal(rows[: len(table(before))], table(before))
    np.testing.assert_array_equal(rows[len(table(before)) :], np.repeat(rows[[at]], count, 0))
    assert jax.tree.map(np.shape, task.params) == {"embedding": (count, WIDTH)}
    ids = task.model.tokenizer.encode(["a <red>"])[0]
    assert ids[2 : 2 + count].tolist() == task.word.words.ids


def test_gradients_are_those_of_the_new_rows_alone(config):
    """dL/dv is what dL/dW of the whole table has in the rows of the word."""
    task = finetune.begin(config(num_vectors=2))
    inverted, frozen, _ = finetune.objective(config(num_vectors=2), task)
    loss = objectives.text_to_image_loss(task.model.graphdefs, task.model.scheduler, config().finetune)
    ids = task.model.tokenizer.encode(["a <red> fox", "<red>", "a fox", "at <red>"])
    batch = {"image": jnp.full((4, 16, 16, 3), 200, jnp.uint8), "ids": ids}

    def whole(params):
        rest = {name: value for name, value in frozen.items() if name != "unet"}
        return loss(frozen["unet"], rest | {"text_encoder": params}, batch, jax.random.key(0))[0]

    def own(params):
        return inverted(params, frozen, batch, jax.random.key(0))[0]

    value, grads = jax.jit(jax.value_and_grad(own))(task.params)
    wanted, full = jax.jit(jax.value_and_grad(whole))(task.model.text_encoder.params)
    rows = np.asarray(traverse_util.flatten_dict(full)[TABLE])[task.word.words.ids]
    assert float(value) == pytest.approx(float(wanted), rel=1e-6)
    assert np.abs(rows).max() > 1e-6
    np.testing.assert_allclose(grads["embedding"], rows, rtol=1e-4, atol=1e-6 * np.abs(rows).max())


def test_a_resumed_run_equals_an_uninterrupted_one_and_nothing_but_the_word_is_new(config, model, tmp_path):
    file = finetune.train(config(num_vectors=2), tmp_path / "whole")
    assert file == tmp_path / "whole" / "learned_embeds.safetensors"
    finetune.train(config(steps=3, num_vectors=2), tmp_path / "stopped")
    again = finetune.train(config(num_vectors=2), tmp_path / "stopped")
    arrays = saved(tmp_path / "whole" / "finetune")
    assert_same_arrays(saved(tmp_path / "stopped" / "finetune"), arrays)
    assert again.read_bytes() == file.read_bytes()
    # nothing else has a place in the state that is trained
    assert {array.shape for array in arrays.values() if array.ndim} == {(2, WIDTH)}
    assert not (tmp_path / "whole" / "model").exists()

    word = embeddings.read(file)
    assert (word.token, word.vectors.shape) == ("<red>", (2, WIDTH))
    begun = finetune.begin(config(num_vectors=2)).params["embedding"]
    assert (word.vectors != np.asarray(begun)).all()
    pipes, prompts = (engine.load(model), engine.load(model, embeddings=[file])), ["a fox", "a <red> fox"]
    plain, new = (pipe.encode(prompts, 2) for pipe in pipes)
    np.testing.assert_allclose(plain["a fox"].words, new["a fox"].words, atol=1e-5)
    assert np.abs(plain["a <red> fox"].words - new["a <red> fox"].words).max() > 0.1


def test_a_short_training_lowers_the_loss(config, tmp_path):
    """On batches and noise that were not trained on."""
    told = config(steps=60)
    file = finetune.train(told, tmp_path)
    task = finetune.begin(told)
    batch_at = finetune.batches(told, task, tmp_path)
    loss, frozen, _ = finetune.objective(told, task)
    value = jax.jit(lambda params, batch, key: loss(params, frozen, batch, key)[0])

    def mean(vectors):
        keys = jax.random.split(jax.random.key(1), 20)
        return np.mean([value({"embedding": vectors}, batch_at(100 + i), key) for i, key in enumerate(keys)])

    before, after = mean(task.params["embedding"]), mean(embeddings.read(file).vectors)
    assert after < 0.97 * before, (before, after)


# ---- captions


def test_templates_stand_in_for_captions(config, tmp_path, capsys):
    templates = ("a {}", "{} at night", "the {}, {}")
    told = config(templates=templates)
    task = finetune.begin(told)
    batch_at = finetune.batches(told, task, tmp_path)
    assert "captions: 3 templates, such as 'a <red>'" in capsys.readouterr().out
    assert listed(tmp_path) == []
    known = task.model.tokenizer.encode([template.replace("{}", "<red>") for template in templates])
    ids = np.concatenate([batch_at(step)["ids"] for step in range(8)])
    assert {tuple(row) for row in ids} == {tuple(row) for row in known}
    # which one follows from seed, step and place: after a break, and in a host's part of the batch
    again = finetune.batches(told, finetune.begin(told), tmp_path)
    np.testing.assert_array_equal(again(5)["ids"], batch_at(5)["ids"])
    drawn = task.word.captions()["reword"]
    assert drawn([""] * 4, 5, 0)[2:] == drawn([""] * 2, 5, 2)


def test_captions_of_the_data_must_have_the_word(config, pictures, tmp_path):
    captions = {"0": "a <red> car", "1": "a red car" + " and" * 9 + " <red>", "2": "<RED>"}
    folder = tmp_path / "captioned"
    folder.mkdir()
    for picture in pictures.iterdir():
        (folder / picture.name).write_bytes(picture.read_bytes())
    for name, caption in captions.items():
        (folder / f"{name}.txt").write_text(caption)
    told = config(paths=(folder,), templates=())
    task = finetune.begin(told)
    batch_at = finetune.batches(told, task, tmp_path)
    reason = "no <red> in what is read of its caption; write it, or inversion.templates"
    assert listed(tmp_path) == [(str(folder / f"{name}.png"), reason) for name in ("1", "3", "4")]
    seen = {tuple(row) for step in range(4) for row in batch_at(step)["ids"]}
    assert seen == {tuple(row) for row in task.model.tokenizer.encode(["a <red> car", "<red>"])}
    with pytest.raises(UserError, match=r"no picture can be used; skipped\.jsonl says why"):
        finetune.train(config(templates=()), tmp_path / "none")


def test_a_prior_keeps_its_own_captions(config, tmp_path):
    told = config(prior=PriorConfig(prompt="a car", num_images=2))
    task = finetune.begin(told)
    batch = finetune.batches(told, task, tmp_path)(0)
    np.testing.assert_array_equal(batch["prior"]["ids"], task.model.tokenizer.encode(["a car"] * 4))
    assert (batch["ids"] == task.word.words.ids[0]).any(1).all()


# ---- around it


def test_samples_and_exports_know_the_word(config, tmp_path, capsys):
    samples = SamplesConfig(prompts=("a <red> car",), every=3, steps=2)
    file = finetune.train(config(samples=samples), tmp_path / "run")
    sheets = [Image.open(tmp_path / "run" / "samples" / f"{step:08d}.png").tobytes() for step in (3, 6)]
    assert sheets[0] != sheets[1]
    capsys.readouterr()
    for step, out in (("6", tmp_path / "folder"), ("3", tmp_path / "red.safetensors")):
        argv = ["--workdir", str(tmp_path / "run"), "--out", str(out), "--step", step]
        assert cli.exit_code(export_command.main, argv) == cli.DONE, capsys.readouterr().err
    assert capsys.readouterr().out.split()[0] == str(tmp_path / "folder" / "learned_embeds.safetensors")
    assert (tmp_path / "folder" / "learned_embeds.safetensors").read_bytes() == file.read_bytes()
    earlier = embeddings.read(tmp_path / "red.safetensors")
    assert earlier.token == "<red>" and (earlier.vectors != embeddings.read(file).vectors).all()


def test_a_dry_run_says_how_little_is_trained(config, tmp_path, capsys):
    assert finetune.train(config(num_vectors=3), tmp_path, dry_run.fit) is None
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert int(rows["parameters that are trained"].replace(",", "")) == 3 * WIDTH


def test_the_config_is_sound(model, pictures, capsys):
    argv = ["--config=configs/inversion.py", "--dry_run", f"--config.model={model}"]
    argv += [f"--config.data.paths=('{pictures}',)", "--config.inversion.initializer=at"]
    argv += ["--config.inversion.templates=('a {}',)"]
    assert cli.exit_code(train_command.main, argv) == cli.DONE, capsys.readouterr().err
    assert "arithmetic of a step" in capsys.readouterr().out


def test_another_word_in_the_same_folder_is_refused(config, tmp_path):
    finetune.train(config(steps=1), tmp_path)
    with pytest.raises(UserError, match=r"holds a run with inversion=.*'<red>'.*, not .*'<blue>'"):
        finetune.train(config(placeholder="<blue>"), tmp_path)


def test_a_run_of_an_older_version_goes_on(model, pictures, tmp_path):
    """One that did not know of this kind of training."""
    told = FinetuneConfig(model=str(model), data=DataConfig(paths=(str(pictures),)))
    finetune.remember(told, tmp_path)
    file = tmp_path / "config.json"
    options = json.loads(file.read_text())
    del options["inversion"]
    file.write_text(json.dumps(options))
    finetune.check_same_run(told, tmp_path, finetune.SETTLED)
    told.inversion.placeholder = "<red>"
    with pytest.raises(UserError, match="holds a run with inversion="):
        finetune.check_same_run(told, tmp_path, finetune.SETTLED)


def test_templates_are_a_tuple():
    told = InversionConfig(**WORD)
    vars(told).update(templates="a {}")  # as flags do
    with pytest.raises(UserError, match=r"inversion\.templates='a {}': write a tuple, such as"):
        told.validate()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"placeholder": ""}, "inversion.placeholder='': write a new word, such as '<my-thing>'"),
        ({"placeholder": "<my thing>"}, "inversion.placeholder='<my thing>': write a new word"),
        ({"placeholder": "<Red>"}, "inversion.placeholder='<Red>': write it in small letters, '<red>'"),
        (
            {"placeholder": "at"},
            "inversion.placeholder='at': the token 'at' is in the tokenizer already; wri",
        ),
        ({"initializer": ""}, "inversion.initializer='': write the word that <red> begins as, such as 'dog'"),
        (
            {"initializer": "at at"},
            "inversion.initializer='at at' is 2 tokens of this model (at + at): write a word that is one",
        ),
        ({"num_vectors": 0}, "inversion.num_vectors=0 is out of range; write 1 to 64"),
        (
            {"num_vectors": 14},
            "num_vectors=14: 'a {}' is then too long for this model, which reads 14 tokens",
        ),
        ({"num_vectors": 15, "templates": ()}, "num_vectors=15: '{}' is then too long"),
        ({"templates": ("a {}", "a red")}, "inversion.templates: 'a red' has no {}, where <red> is to stand"),
        ({"paths": ()}, "what='textual_inversion' without pictures: write data.paths, such as"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(config, tmp_path, options, words):
    with pytest.raises(UserError) as error:
        finetune.train(config(**options), tmp_path / "run")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()

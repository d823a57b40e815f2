"""Models that exist, trained further: all of the U-Net, with the text encoder, a LoRA, beside a prior."""

import dataclasses
import functools
import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import engine
from engine import chips
from engine.config import (
    DataConfig,
    LoraConfig,
    OptimConfig,
    PriorConfig,
    SamplesConfig,
)
from engine.errors import UserNotice
from engine.finish import to_uint8
from engine.train import dry_run, finetune
from engine.train.checkpoint import whole_steps
from engine.train.objectives import applier, to_float
from engine.train.samples import Samples
from engine.types import UserError
from engine.weights.folder import load_folder
from launch import cache as cache_command
from launch import cli
from launch import export as export_command
from launch import train as train_command
from tests.long import LONG
from tests.tiny import SHALLOW, tiny_folder
from tests.train.conftest import COLOURS, paint


def leaves(part):
    """As they are on the disk of a model that was trained."""
    return [np.asarray(leaf, np.float16) for leaf in jax.tree.leaves(part.params)]


def differ(a, b):
    return any(not np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


@pytest.mark.parametrize("what", ["unet", "unet+text_encoder"])
def test_only_what_is_named_is_trained(config, model, tmp_path, what):
    folder = finetune.train(config(what), tmp_path)
    before, after = load_folder(model), load_folder(folder)
    assert differ(before.unet, after.unet)
    assert differ(before.text_encoder, after.text_encoder) == ("text_encoder" in what)
    assert not differ(before.vae, after.vae)


def test_a_lora_is_a_file_beside_the_model(config, model, tmp_path):
    file = finetune.train(config("lora", lora=LoraConfig(rank=2, alpha=2.0)), tmp_path)
    prompts = ["a red car above"]
    plain = engine.load(model).generate(prompts, seed=1, steps=3)
    with_lora = engine.load(model, lora=[(file, 1.0)]).generate(prompts, seed=1, steps=3)
    assert (plain != with_lora).any()
    assert (tmp_path / "model").exists() is False


def test_the_prior_is_drawn_once_and_learned_beside(config, tmp_path):
    prior = PriorConfig(prompt="a car", num_images=3)
    finetune.train(config(prior=prior, steps=2), tmp_path)
    files = sorted((tmp_path / "prior").glob("*.png"))
    assert len(files) == 3
    times = [file.stat().st_mtime_ns for file in files]
    finetune.train(config(prior=prior, steps=3), tmp_path)
    assert [file.stat().st_mtime_ns for file in files] == times
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["prior_loss"] > 0 for line in metrics)
    with pytest.raises(UserError, match="prior has pictures of 'a car', not of 'a fox': give another"):
        finetune.train(config(prior=PriorConfig(prompt="a fox", num_images=3), steps=3), tmp_path)
    plain = tmp_path / "plain"
    finetune.train(config(steps=2), plain)
    first = json.loads((plain / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics[0]["loss"] > first["loss"]


def test_a_smaller_prior_leaves_pictures_out(config, tmp_path, capsys):
    """And a larger one takes them back, without drawing them again."""
    said = []
    for steps, count in enumerate((4, 2, 3), 1):
        finetune.train(config(prior=PriorConfig(prompt="a car", num_images=count), steps=steps), tmp_path)
        said.append(capsys.readouterr().out)
        assert f"data: {count} pictures" in said[-1]
    assert ["drawing" in each for each in said] == [True, False, False]


@pytest.fixture(scope="module")
def cached(model, pictures, tmp_path_factory):
    """The pictures as launch.cache keeps them."""
    out = tmp_path_factory.mktemp("cached")
    command = ["--model", str(model), "--data", str(pictures), "--out", str(out), "--batch_size", "4"]
    assert cache_command.main(command) == 0
    return out


@pytest.mark.parametrize("what", ["unet", "lora"])
def test_cached_latents_train_as_pictures_do(config, cached, tmp_path, what):
    stage = {"caption_dropout": 0.5}
    of_pictures = config(what, stage=stage)
    of_latents = dataclasses.replace(of_pictures, data=DataConfig(), latents=str(cached))
    losses = []
    for name, each in (("pictures", of_pictures), ("latents", of_latents)):
        made = finetune.train(each, tmp_path / name)
        assert made.exists()
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[-1])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3) and losses[0] != losses[1]


def test_a_model_exports_without_its_latents(config, cached, model, tmp_path):
    copy = shutil.copytree(cached, tmp_path / "cached")
    finetune.train(dataclasses.replace(config(), data=DataConfig(), latents=str(copy)), tmp_path / "run")
    shutil.rmtree(copy)
    assert export_command.main(["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert differ(load_folder(tmp_path / "out").unet, load_folder(model).unet)


def test_latents_of_another_model_are_refused(config, cached, tmp_path):
    other = tiny_folder(tmp_path / "other", seed=1, **SHALLOW)
    wrong = dataclasses.replace(config(), data=DataConfig(), latents=str(cached), model=str(other))
    with pytest.raises(UserError, match="made with another autoencoder or text encoder"):
        finetune.train(wrong, tmp_path / "run")
    with pytest.raises(UserError, match="holds no whole cache"):
        finetune.train(dataclasses.replace(wrong, latents=str(tmp_path)), tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "data.paths"),
        ({"data": DataConfig(), "prior": PriorConfig("a car", 3)}, "prior.num_images"),
        ({"data": DataConfig(), "what": "unet+text_encoder"}, "training the text encoder"),
        (
            {"data": DataConfig(), "what": "lora", "lora": LoraConfig(text_encoder=True)},
            "training the text encoder",
        ),
    ],
)
def test_latents_stand_in_place_of_pictures(config, options, what):
    wrong = dataclasses.replace(config(), latents="somewhere", **options)
    with pytest.raises(UserError, match=f"latents='somewhere' and {what} do not go together"):
        wrong.validate()


@pytest.mark.parametrize(
    ("data", "instead"),
    [
        ({"buckets": 3}, "as --buckets 3, and write data.buckets=1 here"),
        ({"size": 64}, "as --size 64, and write data.size=0 here"),
        ({"min_size": 64}, "as --min_size 64, and write data.min_size=1 here"),
        ({"caption_field": "tags"}, "as --caption_field tags, and write data.caption_field='' here"),
        ({"crop": "random"}, ": write data.crop='center'"),
        ({"repeats": (3,)}, ": write data.repeats=(1,)"),
        ({"kind": "world"}, ": write data.kind='auto'"),
        ({"workers": 2}, ": write data.workers=8"),
    ],
)
def test_settings_of_pictures_do_nothing_with_latents(config, data, instead):
    asked = dataclasses.replace(config(), data=DataConfig(**data), latents="somewhere")
    (name,) = data
    with pytest.raises(UserError) as error:
        asked.validate()
    assert str(error.value).startswith(f"data.{name}={data[name]!r} does nothing with latents='somewhere'")
    assert str(error.value).endswith(instead)


def test_a_config_that_mirrors_pictures_takes_latents_and_says_so():
    """configs/lora.py is one."""
    argv = ["--config=configs/lora.py", "--workdir=w", "--config.latents=cached", "--config.data.seed=3"]
    chosen, _ = train_command.parse(argv)
    with pytest.warns(UserNotice, match=r"^data.flip=0.5: latents are not mirrored$"):
        chosen.validate()


def test_settings_of_what_is_not_trained_are_told_of(config, recwarn):
    """One who sets the rank of a LoRA may not know that all of the U-Net is to be trained."""
    for what, part in (("unet", "lora"), ("lora", "inversion")):
        sets = {"lora": {"rank": 32}, "inversion": {"initializer": "dog"}}[part]
        chosen = config(what)
        chosen.validate()
        assert not recwarn.list
        setattr(chosen, part, dataclasses.replace(getattr(chosen, part), **sets))
        chosen.validate()
        assert f"settings of {part} do nothing with what='{what}'" in str(recwarn.pop(UserNotice).message)


@pytest.mark.parametrize(
    ("data", "stage", "told"),
    [
        (
            {"max_aspect": 3.0},
            {},
            "data.max_aspect=3.0 does nothing with data.buckets=1, which is squares alone",
        ),
        ({"multiple": 8}, {}, "data.multiple=8 does nothing with data.buckets=1, which is squares alone"),
        ({"max_aspect": 3.0, "multiple": 8, "buckets": 3}, {}, None),
        (
            {},
            {"time_sampling": "uniform", "time_mean": 0.5},
            "finetune.time_mean=0.5 does nothing with finetune.time_sampling='uniform'",
        ),
        ({}, {"time_mean": 0.5, "time_std": 2.0}, None),
    ],
)
def test_settings_that_do_nothing_beside_others_are_told_of(config, recwarn, data, stage, told):
    chosen = config(stage=stage)
    chosen.data = dataclasses.replace(chosen.data, **data)
    chosen.validate()
    assert [str(warning.message) for warning in recwarn.list] == ([told] if told else [])


def test_a_coordinator_of_one_process_is_a_mistake(tmp_path, capsys):
    argv = ["--config=configs/lora.py", f"--workdir={tmp_path}", "--coordinator=host:1"]
    assert cli.exit_code(train_command.main, argv) == cli.MISTAKE
    advice = "write --processes N --process_id I, too"
    told = f"error: coordinator='host:1', and one process that trains alone: {advice}"
    assert capsys.readouterr().err.strip() == told


def test_samples_show_the_way(config, tmp_path):
    samples = SamplesConfig(prompts=("a red car above", "a cat"), every=2, steps=2)
    finetune.train(config(samples=samples, steps=4), tmp_path)
    sheets = [Image.open(tmp_path / "samples" / f"{step:08d}.png") for step in (2, 4)]
    assert sheets[0].size == sheets[1].size and sheets[0].size[0] >= 2 * 16
    assert sheets[0].tobytes() != sheets[1].tobytes()


def test_what_goes_wrong_with_a_sample_loses_no_steps(config, tmp_path, monkeypatch):
    samples = SamplesConfig(prompts=("a cat",), every=3, steps=2)

    def draw(*_):
        raise RuntimeError("no such picture")

    monkeypatch.setattr(Samples, "draw", draw)
    with pytest.raises(RuntimeError, match="no such picture"):
        finetune.train(config(samples=samples, steps=6, stage={"checkpoint_every": 100}), tmp_path)
    assert whole_steps(tmp_path / "finetune") == [3]


def test_the_prior_is_drawn_by_the_model_as_it_is(config, tmp_path, monkeypatch):
    """Not as what it is to become, of which it knows nothing yet."""
    seen = []
    monkeypatch.setattr(finetune, "draw_prior", lambda config, model, folder: seen.append(model) or folder)
    monkeypatch.setattr(finetune, "training_batches", lambda *_, **__: None)
    own = config(prior=PriorConfig(prompt="a car", num_images=3))
    before = finetune.begin(own).model.scheduler.prediction_type
    other = "epsilon" if before != "epsilon" else "v_prediction"
    own = dataclasses.replace(own, scheduler={"prediction_type": other})
    task = finetune.begin(own)
    finetune.batches(own, task, tmp_path)
    assert (task.model.scheduler.prediction_type, seen[0].scheduler.prediction_type) == (other, before)


def test_a_file_beside_a_model_of_other_noise_is_told_of(config, tmp_path):
    own = dataclasses.replace(config("lora", steps=1), scheduler={"rescale_betas_zero_snr": True})
    with pytest.warns(UserNotice, match="rescale_betas_zero_snr of config.scheduler: what is trained here"):
        finetune._tell_of_scheduler(own, finetune.begin(own))


def test_samples_leave_no_copy_of_the_model_on_the_devices(config, tmp_path):
    """Nor does the training: what it does not train of a model stays on the host, but for the step's own."""
    parts = {"samples": SamplesConfig(prompts=("a cat",), every=1, steps=2), "prior": PriorConfig("a dog", 2)}
    drawn = dataclasses.replace(config(), **parts)
    task = finetune.begin(drawn)
    leaves = [jax.tree.leaves(part.params) for part in task.model.parts.values()]
    assert all(isinstance(leaf, np.ndarray) for each in leaves for leaf in each)
    samples = Samples(drawn.samples, task.model, drawn.finetune, tmp_path)
    gc.collect()
    before = sum(leaf.nbytes for leaf in jax.live_arrays())
    gc.disable()  # what it would find some time is memory that the training lacks now
    try:
        samples.draw(1, task.params)
        finetune.draw_prior(drawn, task.model, tmp_path / "prior")
        kept = sum(leaf.nbytes for leaf in jax.live_arrays()) - before
    finally:
        gc.enable()
    assert kept < 0.01 * sum(leaf.nbytes for leaf in jax.tree.leaves(task.params))


def test_too_little_memory_is_one_line(pictures, tmp_path, monkeypatch, capsys):
    def train(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")

    monkeypatch.setattr(finetune, "train", train)
    argv = ["--config=configs/lora.py", f"--workdir={tmp_path}", f"--config.data.paths=('{pictures}',)"]
    assert cli.exit_code(train_command.main, argv) == cli.MISTAKE
    told = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory; write a smaller --config.finetune.batch_size, or " in told and "--dry_run" in told


@LONG  # each objective learns four pictures in test_objectives.py
def test_four_pictures_are_learned_by_heart(config, tmp_path):
    """160 steps on 4 plain pictures reach a low loss and redraw them, each at its own words."""
    # Two levels: what one level sees at once is no whole picture.
    model = tiny_folder(tmp_path / "model", vae=SHALLOW["vae"], text_encoder=SHALLOW["text_encoder"])
    prompts = [f"a {colour} car above" for colour in COLOURS]
    (tmp_path / "pictures").mkdir()
    for prompt, rgb in zip(prompts, COLOURS.values(), strict=True):
        paint(tmp_path / "pictures" / f"{prompt}.png", rgb, "above")
        (tmp_path / "pictures" / f"{prompt}.txt").write_text(prompt)
    optimizer = OptimConfig(learning_rate=2e-2, warmup_steps=20, decay_steps=60)
    stage = {"optim": optimizer, "ema": (0.9,), "time_sampling": "uniform", "batch_size": 32}
    data = DataConfig(paths=(str(tmp_path / "pictures"),))
    by_heart = dataclasses.replace(config(steps=160, stage=stage), model=str(model), data=data)
    folder = finetune.train(by_heart, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] < 0.1, "of about 1 at the start"
    drawn = engine.load(folder).generate(prompts, seed=3, steps=10, guidance_scale=1.0).astype(float)
    wanted = given_back(model, [tmp_path / "pictures" / f"{prompt}.png" for prompt in prompts])
    distance = ((drawn[:, None] - wanted[None]) ** 2).mean((2, 3, 4))
    assert (distance.argmin(1) == np.arange(4)).all(), distance.round(0)


def given_back(model, files):
    """The pictures as the autoencoder, of random weights, gives them back."""
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    vae = load_folder(model).vae
    module = applier(vae.graphdef)(vae.params)
    latents = module.encode(to_float(jnp.asarray(images))).mean
    return np.asarray(to_uint8(module.decode(latents)), float)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dry_run_says_what_it_takes(config, tmp_path, capsys, dtype):
    told = config("lora", prior=PriorConfig(prompt="a car", num_images=3), stage={"compute_dtype": dtype})
    assert finetune.train(told, tmp_path, dry_run.fit) is None
    assert not (tmp_path / "prior").exists(), "to draw it takes hours"
    said = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in said.splitlines() if "  " in line)
    trained = int(rows["parameters that are trained"].replace(",", ""))
    stay = int(rows["parameters that stay"].replace(",", ""))
    assert 0 < trained < stay / 5
    parts = finetune.begin(told).model.parts.values()
    assert stay == sum(leaf.size for part in parts for leaf in jax.tree.leaves(part.params))
    assert float(rows["arithmetic of a step"].split()[0]) > 0
    assert not (tmp_path / "finetune").exists()


def test_export_of_any_average(config, tmp_path, capsys):
    stage = {"ema": (0.1, 0.3), "ema_sigma_rel": (0.05, 0.1), "ema_snapshot_every": 2}
    folder = finetune.train(config(steps=6, stage=stage), tmp_path / "run")
    capsys.readouterr()
    found = {}
    for name, flags in {
        "chosen": [],
        "params": ["--which", "params"],
        "longer": ["--which", "ema_0.3"],
        "width": ["--sigma_rel", "0.08"],
    }.items():
        argv = ["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / name), *flags]
        assert cli.exit_code(export_command.main, argv) == cli.DONE, capsys.readouterr().err
        assert capsys.readouterr().out.strip() == str(tmp_path / name)
        found[name] = load_folder(tmp_path / name).unet
    assert not differ(found["chosen"], load_folder(folder).unet)
    names = list(found)
    assert all(differ(found[a], found[b]) for a in names for b in names if a < b)
    argv = ["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "x"), "--which", "ema_0.8"]
    assert cli.exit_code(export_command.main, argv) == cli.MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert "write one of" in line and "ema_0.3" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"what": "vae"}, "what='vae' is unknown"),
        ({"prior": PriorConfig(prompt="a dog")}, "write both prior.prompt and prior.num_images"),
        ({"samples": SamplesConfig(every=3)}, "samples.every=3 without prompts"),
        ({"scheduler": {"prediction_typ": "epsilon"}}, "unknown option 'prediction_typ'"),
        ({"stage": {"weighting": "min_snrr"}}, "did you mean min_snr?"),
        ({"stage": {"snr_gamma": 3.0}}, "write finetune.weighting=min_snr, or leave it out"),
        ({"stage": {"p2_k": 2.0, "weighting": "min_snr"}}, "write finetune.weighting=p2, or leave it out"),
        ({"samples": SamplesConfig(("a",), 3, steps=2000)}, "steps=2000 is out of range; write 1 to 1000"),
        ({"samples": SamplesConfig(steps=0)}, "samples.steps=0: write a number from 1"),
        ({"samples": SamplesConfig(seed=-1)}, "samples.seed=-1 is out of range; write 0 to"),
        ({"seed": -1}, "seed=-1 is out of range; write 0 to 2147483647"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(config, tmp_path, options, words):
    with pytest.raises(UserError) as error:
        finetune.train(config(**options), tmp_path / "run")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("finetune.ema", 0.9, "write a tuple, with a comma"),
        ("finetune.optim.no_weight_decay", "bias$", "write a tuple, with a comma"),
        ("data.repeats", 2, "write a tuple, with a comma"),
        ("finetune.ema", ("a",), "write a list, each a number"),
        ("data.paths", (1,), "write a list, each a text"),
        ("data.repeats", ("a",), "write a list, each a whole number"),
        ("lora.targets", (3,), "write a list, each a text"),
        ("prior", None, "leave it out, or write prior.NAME=VALUE"),
    ],
)
def test_what_is_no_tuple_of_its_kind(config, name, value, instead):
    """As a flag of launch.train may give it."""
    chosen = config()
    *parents, field = name.split(".")
    setattr(functools.reduce(getattr, parents, chosen), field, value)
    with pytest.raises(UserError) as error:
        chosen.validate()
    assert str(error.value) == f"{name}={value!r}: {instead}"


def test_a_model_that_draws_from_a_picture_is_refused(config, tmp_path):
    other = tiny_folder(tmp_path / "inpaints", unet={"in_channels": 9})
    with pytest.raises(UserError, match="draws from a picture beside words, and is not trained"):
        finetune.train(dataclasses.replace(config(), model=str(other)), tmp_path / "run")


def test_a_scheduler_s_settings_are_flags():
    argv = ["--config=configs/finetune.py", "--workdir=w", "--config.finetune.steps=3"]
    asked = ["prediction_type=v_prediction", "rescale_betas_zero_snr=True", "beta_end=0.02"]
    config, _ = train_command.parse([*argv, *(f"--config.scheduler.{each}" for each in asked)])
    wanted = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "beta_end": 0.02}
    assert (config.scheduler, config.finetune.steps) == (wanted, 3)


def test_another_model_in_the_same_folder_is_refused(config, tmp_path):
    finetune.train(config(steps=1), tmp_path)
    with pytest.raises(UserError, match="holds a run with what='unet', not 'lora'"):
        finetune.train(config("lora"), tmp_path)


FEWER = "--config.lora.targets=('to_q','conv1')"  # the least of models has one level, and changes no size


@pytest.mark.parametrize("name, options", [("finetune", []), ("lora", []), ("lcm", [FEWER])])
def test_the_configs_are_sound(name, options, tmp_path, model, pictures, capsys):
    argv = [f"--config=configs/{name}.py", "--dry_run", f"--config.model={model}", *options]
    argv += [f"--config.data.paths=('{pictures}',)", "--config.finetune.batch_size=2"]
    assert cli.exit_code(train_command.main, argv) == cli.DONE, capsys.readouterr().err
    assert "arithmetic of a step" in capsys.readouterr().out


def test_utilisation_where_the_peak_is_known(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.Chip(1e12, 1e11, 1))
    finetune.train(config(steps=2), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    capsys.readouterr()
    finetune.train(config(steps=2), tmp_path / "dry", dry_run.fit)
    table = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    step = float(table["arithmetic of a step"].split()[0])
    last = lines[-1]
    rate = last["images/s"] / 4  # steps a second
    assert last["mfu"] == pytest.approx(rate * step, rel=0.02)

"""A run that was stopped, or that died, ends exactly as one that was not."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import diffusers
import jax
import numpy as np
import pytest
import torch

import engine
from engine.train import stages
from engine.types import UserError
from launch import cli, train
from tests.train.laid_out import with_sidecars
from tests.train.tiny_run import EVERY, STEPS, assert_same_arrays, get_config, saved, steps_in

ROOT = pathlib.Path(__file__).parents[2]
STAGES = {"autoencoder": STEPS, "words": STEPS, "diffusion": STEPS, "decoder": 2}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The tokenizer sees fewer captions, and the latents' scale fewer pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "CAPTIONS_FOR_TOKENIZER", 200)
        patch.setattr(stages, "LATENT_IMAGES", 32)
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    assert stages.train(get_config(), workdir) == workdir / "model"
    return workdir


class PowerCut(BaseException):
    """What nothing catches."""


def power_cut() -> None:
    raise PowerCut


def position(folder: pathlib.Path) -> dict:
    """Where the newest checkpoint of a stage was made: its step, tally and data."""
    return json.loads((folder / str(steps_in(folder)[-1]) / "position/metadata").read_text())


def assert_same_run(workdir: pathlib.Path, other: pathlib.Path) -> None:
    for stage, steps in STAGES.items():
        assert steps_in(workdir / stage)[-1] == steps
        assert_same_arrays(saved(workdir / stage), saved(other / stage))
        assert position(workdir / stage) == position(other / stage)
    for file in (snapshots := [*other.glob("*/ema/*")]):
        assert file.read_bytes() == (workdir / file.relative_to(other)).read_bytes()
    assert len(snapshots) == 2 * len([EVERY, 2 * EVERY, STEPS])
    weights = sorted((other / "model").rglob("*.safetensors"))
    assert len(weights) == 3
    for file in weights:
        assert file.read_bytes() == (workdir / file.relative_to(other)).read_bytes()


def test_a_run_that_was_stopped_and_died_ends_as_one_that_was_not(uninterrupted, tmp_path, in_stage, capsys):
    def run(told: str):
        folder = stages.train(get_config(), tmp_path)
        assert told in capsys.readouterr().out
        return folder

    in_stage("autoencoder", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run("autoencoder: stopped and saved at step 2; the same command goes on") is None
    assert steps_in(tmp_path / "autoencoder") == [2]

    in_stage("words", EVERY, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run("autoencoder: goes on from step 2\n") is None
    assert steps_in(tmp_path / "words") == [EVERY, EVERY + 1]

    in_stage("diffusion", EVERY + 1, power_cut)
    with pytest.raises(PowerCut):
        run("")
    assert f"words: goes on from step {EVERY + 1}\n" in capsys.readouterr().out
    assert steps_in(tmp_path / "diffusion") == [EVERY]
    # one more that was being written: Orbax gives a folder its name when all is in it
    torn = tmp_path / "diffusion" / f"{EVERY + 1}.orbax-checkpoint-tmp-0"
    shutil.copytree(tmp_path / "diffusion" / str(EVERY), torn)
    (torn / "params").rename(torn / "params.orbax-checkpoint-tmp-0")

    in_stage("decoder", 0, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run(f"diffusion: goes on from step {EVERY}\n") is None
    assert not torn.exists()
    assert steps_in(tmp_path / "decoder") == [1]

    assert run("decoder: goes on from step 1\n") == tmp_path / "model"
    assert_same_run(tmp_path, uninterrupted)


def test_the_last_stage_leaves_the_latents_alone(uninterrupted, tmp_path):
    """Without it, the encoder, the U-Net and the text encoder are the same and the decoder is another."""
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    config = get_config()
    config.decoder.steps = 0
    without = engine.load(stages.train(config, tmp_path)).model
    whole = engine.load(uninterrupted / "model").model
    same = jax.tree.map(np.array_equal, without.vae.params, whole.vae.params)
    assert all(jax.tree.leaves([same["encoder"], same["quant_conv"]]))
    assert not all(jax.tree.leaves(same["decoder"]))
    for kind in ("unet", "text_encoder"):
        pairs = jax.tree.map(np.array_equal, getattr(without, kind).params, getattr(whole, kind).params)
        assert all(jax.tree.leaves(pairs))


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda config: config.unet.update(block_out_channels=(32,)), "a run with unet="),
        (lambda config: config.vae.update(latent_channels=8), "a run with vae="),
        (lambda config: setattr(config, "image_size", 64), "a run with image_size=32, not 64"),
        (lambda config: setattr(config, "seed", 1), "a run with seed=0, not 1"),
    ],
    ids=["unet", "vae", "image_size", "seed"],
)
def test_the_run_of_another_model_is_refused(uninterrupted, change, named):
    config = get_config()
    change(config)
    before = (uninterrupted / "config.json").read_bytes()
    with pytest.raises(UserError, match=named) as error:
        stages.train(config, uninterrupted)
    assert str(uninterrupted) in str(error.value) and "give another --workdir" in str(error.value)
    assert (uninterrupted / "config.json").read_bytes() == before


def test_the_model_loads_here_and_in_pytorch_and_draws_the_same(uninterrupted):
    folder = uninterrupted / "model"
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    ours = engine.load(folder).generate(["a red car"], steps=5, latents=latents)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    nchw = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    theirs = pipeline("a red car", num_inference_steps=5, guidance_scale=5.0, latents=nchw, output_type="np")
    error = np.mean((ours.astype(np.float64) / 255 - theirs.images) ** 2)
    assert ours.std() > 5
    assert 10 * np.log10(1 / error) >= 40


def launch(workdir: pathlib.Path, *overrides: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "launch.train",
        "--config=tests/train/tiny_run.py",
        f"--workdir={workdir}",
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    if folder := jax.config.jax_compilation_cache_dir:
        environment |= {"JAX_COMPILATION_CACHE_DIR": folder}
    return subprocess.Popen(
        [*command, *overrides],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_checkpoint(process: subprocess.Popen, folder: pathlib.Path, after: int) -> int:
    """The first whole checkpoint of a later step than `after`."""
    while process.poll() is None:
        if folder.exists() and (steps := steps_in(folder)) and steps[-1] > after:
            return steps[-1]
        time.sleep(0.02)
    raise AssertionError(process.stderr.read())


def test_a_killed_program_goes_on_and_a_terminated_one_ends_well(tmp_path):
    """On pictures: to paint the backgrounds of the drawn world takes longer than all the rest."""
    with_sidecars("txt")(tmp_path / "pictures", 4)
    endless = [f"--config.data.paths=('{tmp_path / 'pictures'}',)", "--config.words.steps=0"]
    endless += ["--config.diffusion.easy=0.0", "--config.diffusion.train_text_encoder=True"]
    endless += ["--config.autoencoder.steps=1000000", "--config.autoencoder.checkpoint_every=2"]
    folder = tmp_path / "run" / "autoencoder"
    process = launch(tmp_path / "run", *endless)
    wait_for_checkpoint(process, folder, after=0)
    process.kill()
    process.communicate()
    killed_at = steps_in(folder)[-1]

    process = launch(tmp_path / "run", *endless)
    wait_for_checkpoint(process, folder, after=killed_at)
    process.terminate()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"autoencoder: goes on from step {killed_at}\n" in out
    assert f"autoencoder: stopped and saved at step {steps_in(folder)[-1]}; the same command goes on" in out


@pytest.mark.parametrize(
    "argument, message",
    [
        (
            "--config.diffusion.stps=3",
            "no such setting: --config.diffusion.stps=3 (did you mean diffusion.steps?)",
        ),
        (
            "--config.difusion.steps=3",
            "no such setting: --config.difusion.steps=3 (did you mean diffusion.steps?)",
        ),
        ("--config.zzz=3", "no such setting: --config.zzz=3\n"),
        ("--config.unet.blocks=3", "no such setting: --config.unet.blocks=3"),
        ("--config.diffusion.steps=many", "--config.diffusion.steps=many"),
        ("--config=nothing.py", "nothing.py"),
        ("--workdri=there", "unknown flag --workdri (did you mean --workdir?)"),
        ("there", "'there' is no flag"),
        ("--workdir=", "write --workdir"),
        ("--workdir=README.md/run", "README.md/run cannot be written"),
        ("--config.image_size=0", "image_size"),
        ("--config.image_size=48", "image_size=48: the world is drawn in multiples of 32 pixels"),
        ("--config.autoencoder.steps=0", "autoencoder.steps=0: write a number from 1"),
        ("--config.start=nowhere", "nowhere"),
        (
            "--config.autoencoder.optim.name=adam",
            "autoencoder.optim.name='adam' is unknown (did you mean adamw?)",
        ),
        ("--config.words.ema=(0.9,1.5)", "words.ema=(0.9, 1.5): write one or more numbers from 0"),
        ("--config.diffusion.accumulate=3", "diffusion.accumulate=3 does not divide diffusion.batch_size=2"),
        ("--config.words.max_skipped=0", "words.max_skipped=0: write a number from 1"),
        ("--config.words.compute_dtype=half", "words.compute_dtype='half' is unknown"),
        ("--config.diffusion.easy=2.0", "diffusion.easy=2.0: write 0 to 1"),
        ("--config.diffusion.weighting=minsnr", "diffusion.weighting='minsnr' is unknown (did you mean min_"),
        ("--config.diffusion.keep_tags=2", "write diffusion.caption_shuffle=True"),
        ("--config.diffusion.easy_steps=0", "diffusion.easy=0.5 for 0 steps: write easy_steps from 1"),
    ],
)
def test_a_mistake_in_an_argument_is_named(tmp_path, capsys, argument, message):
    argv = ["--config=tests/train/tiny_run.py", f"--workdir={tmp_path / 'run'}", argument]
    assert cli.exit_code(train.main, argv) == cli.MISTAKE
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, told",
    [
        (
            "def get_config():\n    return nothing\n",
            "own.py, line 2: NameError: name 'nothing' is not defined",
        ),
        ("import nowhere\n", "own.py, line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("def get_config():\n    return {}['steps']\n", "own.py, line 2: KeyError: 'steps'"),
        (
            "from engine.config import FinetuneStage as F\n\ndef get_config():\n    return F(step=1)\n",
            "own.py, line 4: TypeError: ",
        ),
        ("def get_config(:\n", "invalid syntax"),
    ],
)
def test_a_mistake_in_a_config_file_is_named(tmp_path, capsys, text, told):
    (tmp_path / "own.py").write_text(text)
    argv = [f"--config={tmp_path / 'own.py'}", f"--workdir={tmp_path / 'run'}"]
    assert cli.exit_code(train.main, argv) == cli.MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and "Traceback" not in line and len(line) < 400


def test_a_config_of_the_package_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen, _ = train.parse(["--config=configs/lora.py", "--workdir=run"])
    assert chosen.what == "lora"

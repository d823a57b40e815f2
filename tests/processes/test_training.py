"""Two processes that train together are one that trains alone; what two have saved, one goes on with."""

import json

import numpy as np
import pytest
from PIL import Image

from engine.weights.component import load_component
from launch import cli
from launch import train as train_command
from tests.long import LONG
from tests.processes.together import started
from tests.tiny import SHALLOW, tiny_folder
from tests.train.sharing import shared

pytestmark = pytest.mark.usefixtures("quick_compiler")

BLOCKS = {"down": "DownEncoderBlock2D", "up": "UpDecoderBlock2D"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    tiny_folder(folder / "model", **SHALLOW)
    (folder / "pictures").mkdir()
    for i in range(8):
        image = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(image).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(f"a red fox {i}")
    return folder


def finetuning(folder, steps, shard_params=False):
    """The flags of it."""
    return [
        "--config=configs/finetune.py",
        f"--config.model={folder / 'model'}",
        f"--config.data.paths=('{folder / 'pictures'}',)",
        f"--config.finetune.steps={steps}",
        "--config.finetune.batch_size=8",
        "--config.finetune.optim.learning_rate=1e-3",
        "--config.finetune.optim.warmup_steps=0",
        "--config.finetune.optim.decay_steps=0",
        f"--config.finetune.shard_params={shard_params}",
    ]


def alone(workdir, flags):
    """launch.train in this process, with the one device that it has."""
    with shared():
        assert cli.exit_code(train_command.main, [f"--workdir={workdir}", *flags]) == cli.DONE


def launched(workdir, flags, devices, processes):
    """launch.train in so many processes, each with so many simulated devices; what they tell."""
    return started("launch.train", [f"--workdir={workdir}", *flags], devices, processes)


def losses(folder, run, stage="finetune"):
    lines = map(json.loads, (folder / run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["stage"] == stage}


def weights(folder, run, kind="unet"):
    params = load_component(folder / run / "model" / kind, kind).params
    return np.concatenate([np.ravel(leaf) for leaf in _leaves(params)])


def _leaves(tree):
    if not isinstance(tree, dict):
        return [np.asarray(tree)]
    return [leaf for key in sorted(tree, key=str) for leaf in _leaves(tree[key])]


@pytest.mark.parametrize("shard_params", [pytest.param(False, marks=LONG), True], ids=["copies", "shards"])
def test_two_processes_train_and_save_and_one_goes_on(folder, shard_params, capsys):
    run = f"two-{shard_params}"
    told = launched(folder / run, finetuning(folder, 3, shard_params), devices=2, processes=2)
    assert "model:" in told[0] and "model:" not in told[1]
    alone(folder / run, finetuning(folder, 5))
    assert "goes on from step 3" in capsys.readouterr().out
    if not (folder / "alone").exists():
        for steps in (3, 5):
            alone(folder / "alone", finetuning(folder, steps))
    for step in (3, 5):
        assert losses(folder, run)[step] == pytest.approx(losses(folder, "alone")[step], rel=1e-4)
    np.testing.assert_allclose(weights(folder, run), weights(folder, "alone"), atol=2e-3)


@LONG  # as they draw together, and as one draws a prior
def test_two_processes_draw_a_prior_together(folder):
    """Each its share, and none twice: which picture is which does not depend on who draws it."""
    flags = [*finetuning(folder, 1), "--config.prior.prompt=a fox", "--config.prior.num_images=20"]
    told = launched(folder / "prior-two", flags, devices=1, processes=2)
    assert ["prior: drawing 16 pictures" in each for each in told] == [True, False]
    assert ["prior: drawing 4 pictures" in each for each in told] == [False, True]
    alone(folder / "prior-one", flags)
    runs = folder / "prior-two", folder / "prior-one"
    for i in range(20):
        ours, theirs = (np.asarray(Image.open(run / "prior" / f"{i:06d}.png")) for run in runs)
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert losses(folder, "prior-two")[1] == pytest.approx(losses(folder, "prior-one")[1], rel=1e-3)


@LONG  # each stage as in the tests below
def test_two_processes_train_a_model_from_scratch(folder):
    """Tokenizer, latents' scale and model are the first one's; the losses are those of a single process.

    On pictures; that hosts share each batch of drawn scenes as well is told by tests/train/test_own.py.
    """
    flags = ["--config=tests/train/tiny_run.py", "--config.words.steps=0", "--config.decoder.steps=1"]
    flags += [f"--config.{stage}.steps=3" for stage in ("autoencoder", "diffusion")]
    flags += [f"--config.{stage}.batch_size=4" for stage in ("autoencoder", "diffusion", "decoder")]
    flags += [f"--config.data.paths=('{folder / 'pictures'}',)", "--config.diffusion.easy=0.0"]
    flags += ["--config.diffusion.train_text_encoder=True", "--config.diffusion.ema=(0.9,)"]
    # two levels, not three: half of what an autoencoder takes to compile
    flags += ["--config.vae.block_out_channels=(8,8)"]
    flags += [f"--config.vae.{way}_block_types={(block,) * 2}" for way, block in BLOCKS.items()]
    told = launched(folder / "scratch-two", flags, devices=1, processes=2)
    assert "model:" in told[0] and "model:" not in told[1]
    alone(folder / "scratch-one", flags)
    for stage in ("autoencoder", "diffusion", "decoder"):
        two, one = (losses(folder, f"scratch-{run}", stage) for run in ("two", "one"))
        assert two[max(one)] == pytest.approx(one[max(one)], rel=1e-3)
    for kind in ("vae", "text_encoder", "unet"):
        two, one = (weights(folder, f"scratch-{run}", kind) for run in ("two", "one"))
        np.testing.assert_allclose(two, one, atol=2e-3)
    names = (folder / f"scratch-{run}/model/tokenizer/tokenizer.json" for run in ("two", "one"))
    assert len({name.read_bytes() for name in names}) == 1

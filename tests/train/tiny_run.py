"""A run of seconds: 32 px scenes, 8 x 8 latents, every stage, checkpoints every third step."""

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from configs import scenes
from engine.config import AutoencoderStage, DiffusionStage, OptimConfig, TrainConfig, WordsStage

STEPS, EVERY = 7, 3


def optimizing() -> OptimConfig:
    """Of each stage its own, so that a test may change it."""
    return OptimConfig(learning_rate=1e-2, warmup_steps=2, decay_steps=3)


def get_config() -> TrainConfig:
    """A config like those of configs/: launch.train reads this file too."""
    return TrainConfig(
        image_size=32,
        vocab_size=600,
        max_tokens=16,
        vae={
            "block_out_channels": (8, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "norm_num_groups": 4,
            "mid_block_add_attention": False,
            "scaling_factor": 1.0,
        },
        unet={
            "block_out_channels": (16,),
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("UpBlock2D",),
            "mid_block_type": None,
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        },
        text_encoder={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_dim": 16,
        },
        scheduler=scenes.get_config().scheduler,
        autoencoder=AutoencoderStage(steps=STEPS, batch_size=2, checkpoint_every=EVERY, optim=optimizing()),
        words=WordsStage(steps=STEPS, batch_size=4, checkpoint_every=EVERY, optim=optimizing()),
        diffusion=DiffusionStage(
            steps=STEPS,
            batch_size=2,
            accumulate=2,
            ema=(0.999, 0.9),
            ema_sigma_rel=(0.05, 0.1),
            ema_snapshot_every=EVERY,
            checkpoint_every=EVERY,
            optim=optimizing(),
            easy=0.5,
            easy_steps=5,
        ),
        decoder=AutoencoderStage(steps=2, batch_size=2, checkpoint_every=EVERY, optim=optimizing()),
    )


def plain_steps(config: TrainConfig) -> TrainConfig:
    """The same with the least around the U-Net's step and one level of the autoencoder: half to compile."""
    stage = config.diffusion
    stage.accumulate, stage.ema, stage.ema_sigma_rel, stage.ema_snapshot_every = 1, (0.9,), (), 0
    config.vae |= {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return config


def saved(folder: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, the newest by default, by its path: params, averages, optimizer state."""
    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step() if step is None else step
        names = [item.name for item in (folder / str(step)).iterdir() if item.is_dir()]
        wanted = {name: ocp.args.StandardRestore() for name in sorted(names) if name != "position"}
        items = manager.restore(step, args=ocp.args.Composite(**wanted))
        leaves = jax.tree_util.tree_leaves_with_path({name: items[name] for name in wanted})
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def steps_in(folder: pathlib.Path) -> list[int]:
    """The steps of the whole checkpoints in a folder."""
    return sorted(int(file.name) for file in folder.iterdir() if file.name.isdigit())


def assert_same_arrays(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype and array.shape == theirs[name].shape, name
        assert array.tobytes() == theirs[name].tobytes(), name

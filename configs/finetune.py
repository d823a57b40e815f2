"""All weights of a model's U-Net, trained further on your pictures.

python -m launch.train --config=configs/finetune.py --workdir=runs/mine --config.data.paths='("pictures",)'
"""

from engine.config import FinetuneConfig, FinetuneStage, OptimConfig


def get_config() -> FinetuneConfig:
    """For Stable Diffusion: --config.model=FOLDER --config.finetune.compute_dtype=bfloat16, an accelerator.

    With --config.finetune.shard_params=True the state is split over the devices; with remat="blocks" a step
    needs less memory and more time.
    """
    return FinetuneConfig(
        what="unet",
        finetune=FinetuneStage(
            steps=2000,
            batch_size=32,
            ema=(0.999,),
            checkpoint_every=250,
            optim=OptimConfig(learning_rate=1e-5, warmup_steps=100, decay_steps=500),
        ),
    )

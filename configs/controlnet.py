"""A ControlNet: pictures drawn along the edges of others, or in their colours.

python -m launch.train --config=configs/controlnet.py --workdir=runs/mosaic --config.data.paths='("scenes",)'
python -m launch.generate "a cat" --controlnet runs/mosaic/controlnet --control_image fox.png

With --config.controlnet.adapter=True a T2I-Adapter: smaller, and of no cost in the steps of drawing.
"""

from engine.config import ControlConfig, DataConfig, FinetuneConfig, FinetuneStage, OptimConfig


def get_config() -> FinetuneConfig:
    """For the model in the package, on two CPU cores."""
    return FinetuneConfig(
        what="controlnet",
        data=DataConfig(flip=0.5),
        controlnet=ControlConfig(kind="mosaic"),
        finetune=FinetuneStage(
            steps=1000,
            batch_size=8,
            ema=(0.98,),
            checkpoint_every=250,
            optim=OptimConfig(learning_rate=3e-4, warmup_steps=50, decay_steps=300),
        ),
    )

"""Textual inversion: a new word for the thing, or the style, of a few pictures, which need no captions.

python -m launch.scenes --num_images 5 --style neon --easy 1 --out neon
python -m launch.train --config=configs/inversion.py --workdir=runs/neon-word --config.data.paths='("neon",)'
python -m launch.generate "a fox, <neon>" --embedding runs/neon-word/learned_embeds.safetensors
"""

from engine.config import (
    DataConfig,
    FinetuneConfig,
    FinetuneStage,
    InversionConfig,
    OptimConfig,
    SamplesConfig,
)


def get_config() -> FinetuneConfig:
    """300 steps of 8 pictures."""
    return FinetuneConfig(
        what="textual_inversion",
        data=DataConfig(flip=0.5),
        inversion=InversionConfig(placeholder="<neon>", initializer="night"),
        finetune=FinetuneStage(
            steps=300,
            batch_size=8,
            ema=(0.98,),
            checkpoint_every=100,
            caption_dropout=0.0,
            time_mean=0.5,
            time_std=1.4,
            optim=OptimConfig(learning_rate=2e-2, warmup_steps=20, decay_steps=150, weight_decay=0.0),
        ),
        samples=SamplesConfig(prompts=("a fox, <neon>", "a car, <neon>"), every=100),
    )

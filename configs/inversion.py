"""Textual inversion: a new word for what a few pictures show, which need no captions.

python -m launch.generate "an owl wearing a crown" --num_images 5 --seed 1 --out owls
python -m launch.train --config=configs/inversion.py --workdir=runs/my-owl --config.data.paths='("owls",)'
python -m launch.generate "a <my-owl> on the beach" --embedding runs/my-owl/learned_embeds.safetensors
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
        inversion=InversionConfig(placeholder="<my-owl>", initializer="owl"),
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
        samples=SamplesConfig(prompts=("a <my-owl>", "a <my-owl> on the beach"), every=100),
    )

"""An LCM-LoRA: the model's own pictures in four steps without guidance, from a file beside it.

python -m launch.scenes --num_images 400 --easy 0.3 --out scenes
python -m launch.train --config=configs/lcm.py --workdir=runs/lcm --config.data.paths='("scenes",)'
python -m launch.generate "a fox" --lora runs/lcm/pytorch_lora_weights.safetensors --sampler lcm --steps 4 \\
  --guidance_scale 1
"""

from engine.config import (
    EVERY_LAYER,
    DataConfig,
    DistillConfig,
    FinetuneConfig,
    FinetuneStage,
    LoraConfig,
    OptimConfig,
    SamplesConfig,
)


def get_config() -> FinetuneConfig:
    """For the model in the package, on two CPU cores."""
    return FinetuneConfig(
        what="lora",
        data=DataConfig(flip=0.5),
        lora=LoraConfig(rank=32, alpha=32.0, targets=EVERY_LAYER),
        distill=DistillConfig(steps=50, guidance_scale=(4.0, 6.0)),
        finetune=FinetuneStage(
            steps=400,
            batch_size=8,
            ema=(0.98,),
            checkpoint_every=200,
            optim=OptimConfig(learning_rate=1e-4, warmup_steps=50, decay_steps=200, weight_decay=0.0),
        ),
        samples=SamplesConfig(
            prompts=("a fox", "a car at night", "two apples on the grass", "a blue dog"),
            every=100,
            sampler="lcm",
            steps=4,
            guidance_scale=1.0,
        ),
    )

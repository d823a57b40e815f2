"""A LoRA that learns from a judge: the model draws, the judge says how well, and no pictures are needed.

python -m launch.train --config=configs/reward.py --workdir=runs/reward
python -m launch.generate "a fox" --lora runs/reward/pytorch_lora_weights.safetensors

The judge is the probe of the drawn world; of any other model a CLIP, such as PickScore's:

python -m launch.train --config=configs/reward.py --workdir=runs/liked --config.model=sd15 \\
  --config.reward.judge=PickScore_v1 --config.reward.prompts=prompts.txt \\
  --config.finetune.compute_dtype=bfloat16
"""

from engine.config import (
    EVERY_LAYER,
    FinetuneConfig,
    FinetuneStage,
    LoraConfig,
    OptimConfig,
    RewardConfig,
    SamplesConfig,
)


def get_config() -> FinetuneConfig:
    """For the model in the package, on two CPU cores."""
    return FinetuneConfig(
        what="lora",
        reward=RewardConfig(judge="probe", steps=10, trained_steps=2, guidance_scale=5.0),
        lora=LoraConfig(rank=32, alpha=32.0, targets=EVERY_LAYER),
        finetune=FinetuneStage(
            steps=160,
            batch_size=8,
            ema=(0.95,),
            checkpoint_every=40,
            optim=OptimConfig(learning_rate=1e-4, warmup_steps=10, decay_steps=60, weight_decay=0.0),
        ),
        samples=SamplesConfig(
            prompts=("a fox", "a car at night", "two apples on the grass", "a blue dog"),
            every=40,
            steps=20,
            guidance_scale=5.0,
        ),
    )

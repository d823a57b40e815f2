"""A LoRA: a style or a thing from a few pictures, in a small file beside the model.

python -m launch.scenes --num_images 20 --style chalk --easy 0.5 --out chalk
python -m launch.train --config=configs/lora.py --workdir=runs/chalk --config.data.paths='("chalk",)'
python -m launch.generate "a fox, chalk" --lora runs/chalk/pytorch_lora_weights.safetensors
"""

from engine.config import DataConfig, FinetuneConfig, FinetuneStage, LoraConfig, OptimConfig, SamplesConfig


def get_config() -> FinetuneConfig:
    """400 steps of 8 pictures."""
    return FinetuneConfig(
        what="lora",
        data=DataConfig(flip=0.5),
        lora=LoraConfig(rank=16, alpha=16.0),
        finetune=FinetuneStage(
            steps=400,
            batch_size=8,
            ema=(0.98,),
            checkpoint_every=100,
            time_mean=0.5,
            time_std=1.4,
            optim=OptimConfig(learning_rate=1e-3, warmup_steps=20, decay_steps=200, weight_decay=0.0),
        ),
        samples=SamplesConfig(
            prompts=("a fox", "a car at night", "a house on the grass", "a dog"), every=100
        ),
    )

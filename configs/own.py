"""A model of 128 px from scratch, on pictures with captions of your own.

python -m launch.train --config=configs/own.py --workdir=runs/own --config.data.paths='("pictures",)'
"""

from engine.config import AutoencoderStage, DataConfig, DiffusionStage, OptimConfig, TrainConfig, WordsStage


def get_config() -> TrainConfig:
    """Autoencoder of 32 x 32 x 4 latents, U-Net of 65 M parameters, text encoder of 14 M.

    For an accelerator, and some ten thousand pictures or more: with few, it learns them by heart, and
    configs/finetune.py or configs/lora.py make more of them. It was not trained to its end. --dry_run tells
    what a step takes; --config.diffusion.compute_dtype=bfloat16 takes less.

    --config.data.buckets=5 --config.data.multiple=32 keeps tall and wide pictures in their shapes.
    """
    return TrainConfig(
        seed=0,
        image_size=128,
        vocab_size=8192,
        max_tokens=77,
        data=DataConfig(min_size=128),
        vae={
            "block_out_channels": (64, 128, 256),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 16,
            "mid_block_add_attention": False,
            "scaling_factor": 1.0,
            "force_upcast": False,
        },
        unet={
            "block_out_channels": (128, 256, 384),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "attention_head_dim": (2, 4, 6),
            "use_linear_projection": True,
        },
        text_encoder={
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "projection_dim": 384,
        },
        scheduler={
            "_class_name": "DPMSolverMultistepScheduler",
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
            "timestep_spacing": "leading",
            "steps_offset": 1,
        },
        autoencoder=AutoencoderStage(
            steps=20_000,
            batch_size=32,
            ema=(0.999,),
            checkpoint_every=1000,
            kl_weight=1e-3,
            optim=OptimConfig(learning_rate=5e-4, warmup_steps=500, decay_steps=5000, weight_decay=0.0),
        ),
        words=WordsStage(steps=0),
        diffusion=DiffusionStage(
            train_text_encoder=True,
            steps=100_000,
            batch_size=128,
            ema=(0.9995,),
            checkpoint_every=1000,
            time_mean=0.5,
            time_std=1.4,
            optim=OptimConfig(learning_rate=3e-4, warmup_steps=1000, decay_steps=20_000, weight_decay=0.01),
        ),
    )

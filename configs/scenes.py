"""The model in the package: 128 px scenes of 221 things, told in 908 words.

python -m launch.train --config=configs/scenes.py --workdir=runs/scenes
"""

from engine.config import AutoencoderStage, DataConfig, DiffusionStage, OptimConfig, TrainConfig, WordsStage


def get_config() -> TrainConfig:
    """Autoencoder of 32 x 32 x 8 latents, U-Net of 21 M parameters, text encoder of 2 M.

    In training: no model of it is in the package yet. On two CPU cores the U-Net learns first at 64 px, where
    a picture costs a quarter (50 pictures/s; 13 at 128 px), then on from those weights at 128 px:

    --workdir=runs/scenes64 --config.image_size=64
    --config.start=runs/scenes64/model --config.seed=1 --config.autoencoder.steps=0 --config.words.steps=0

    The autoencoder began with that of the 64 px model before (--config.start, 1,600 steps, 22 minutes):
    31.97 dB on 64 fresh scenes at 128 px, 27.8 at 64 px.
    """
    return TrainConfig(
        seed=0,
        image_size=128,
        vocab_size=2048,
        max_tokens=32,
        data=DataConfig(kind="world"),
        vae={
            "block_out_channels": (24, 64, 128),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 1,
            "latent_channels": 8,
            "norm_num_groups": 8,
            "mid_block_add_attention": False,
            "scaling_factor": 1.0,
            "force_upcast": False,
        },
        unet={
            "block_out_channels": (48, 96, 192, 256),
            "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": (3, 3, 6, 8),
            "norm_num_groups": 16,
            "use_linear_projection": True,
        },
        text_encoder={
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "projection_dim": 256,
        },
        scheduler={
            "_class_name": "DPMSolverMultistepScheduler",
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
            "timestep_spacing": "leading",
            "steps_offset": 1,
        },
        autoencoder=AutoencoderStage(
            steps=1200,
            batch_size=16,
            ema=(0.99,),
            kl_weight=5e-4,
            optim=OptimConfig(learning_rate=5e-4, warmup_steps=50, decay_steps=1000, weight_decay=0.0),
        ),
        words=WordsStage(
            steps=800,
            batch_size=256,
            ema=(0.98,),
            checkpoint_every=100,
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=100, decay_steps=600),
        ),
        diffusion=DiffusionStage(
            steps=12000,
            batch_size=256,
            compute_dtype="bfloat16",
            ema=(0.998,),
            checkpoint_every=2000,
            time_mean=0.5,
            time_std=1.4,
            easy=0.9,
            easy_steps=2000,
            optim=OptimConfig(learning_rate=1e-3, warmup_steps=300, decay_steps=3000, weight_decay=0.01),
        ),
    )

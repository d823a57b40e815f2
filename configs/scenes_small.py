"""The model in the package: 64 px scenes of emoji.

python -m launch.train --config=configs/scenes_small.py --workdir=runs/scenes_small
"""

from engine.config import AutoencoderStage, DiffusionStage, OptimConfig, TrainConfig, WordsStage


def get_config() -> TrainConfig:
    """Autoencoder of 16 x 16 x 8 latents, U-Net of 13 M parameters, text encoder of 1 M.

    Two CPU cores: autoencoder 26 minutes (12 images/s), words 4 minutes (490 captions/s), U-Net three to
    five hours (21 to 40 images/s, as the cores go). The model in the package saw as many pictures, but in two
    stretches, and this config in one run was not tried. The first was 3,700 steps with decay_steps=1100; the
    second began with its weights:

    --config.start=MODEL --config.seed=2 --config.autoencoder.steps=0 --config.words.steps=0
    --config.diffusion.steps=8000 --config.diffusion.easy=0 --config.diffusion.easy_steps=0
    --config.diffusion.optim.learning_rate=5e-4 --config.diffusion.optim.warmup_steps=50

    Its single things went from 87 to 96 %, its pairs from 32 to 84 % (launch.evaluate). Further differences:
    the first 1,800 steps of its autoencoder saw 8 pictures, an absolute error and kl_weight 1e-4; its words
    were learned by an earlier draft of that stage; the rate of its first stretch fell from step 2,200 on, and
    anew from 2,788 (the end was moved).
    """
    return TrainConfig(
        seed=0,
        image_size=64,
        vocab_size=1024,
        max_tokens=32,
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
            "block_out_channels": (96, 160, 192),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": (3, 5, 6),
            "use_linear_projection": True,
        },
        text_encoder={
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "projection_dim": 192,
        },
        scheduler={
            "_class_name": "DPMSolverMultistepScheduler",
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
            "timestep_spacing": "leading",
            "steps_offset": 1,
        },
        autoencoder=AutoencoderStage(
            steps=4500,
            batch_size=4,
            ema=(0.998,),
            checkpoint_every=250,
            kl_weight=1e-3,
            optim=OptimConfig(learning_rate=1e-3, warmup_steps=100, decay_steps=1500, weight_decay=0.0),
        ),
        words=WordsStage(
            steps=500,
            batch_size=256,
            ema=(0.98,),
            checkpoint_every=100,
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=100, decay_steps=400),
        ),
        diffusion=DiffusionStage(
            steps=11700,
            batch_size=32,
            ema=(0.998,),
            checkpoint_every=200,
            time_mean=0.5,
            time_std=1.4,
            easy=0.7,
            easy_steps=1500,
            optim=OptimConfig(learning_rate=7e-4, warmup_steps=100, decay_steps=3800, weight_decay=0.01),
        ),
    )

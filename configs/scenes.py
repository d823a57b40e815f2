"""The model in the package: 128 px scenes of 221 things, told in 906 words.

python -m launch.train --config=configs/scenes.py --workdir=runs/scenes
"""

from engine.config import AutoencoderStage, DataConfig, DiffusionStage, OptimConfig, TrainConfig, WordsStage


def get_config() -> TrainConfig:
    """Autoencoder of 32 x 32 x 8 latents, U-Net of 21 M parameters, text encoder of 2 M.

    The model in the package was made by the stages of this file, each in its own run (2026-11-26):

    autoencoder  on from that of the 64 px model before it: 19,200 pictures, 20 s of one H100; 32.9 dB on 64
                 fresh scenes
    words        204,800 captions, 10 minutes of two CPU cores; 95 % of what the captions' scenes hold
    diffusion    5,455 steps, 1.4 million pictures, 4 minutes of one H100 (6,400 pictures/s), and 4 more to
                 compile, twice. It was stopped early, at a fifth of the learning rate.

    XLA's autotuning is part of that: with --xla_gpu_autotune_level=0 the same H100 trains on 49 pictures/s,
    for cuDNN then chooses a slow convolution.

    How well it follows words: README.md. On an accelerator add --config.data.tellers=12; on CPUs bfloat16 is
    slower than --config.diffusion.compute_dtype=float32. To go on from it:

    --config.start=engine/assets/scenes-128 --config.seed=1
    --config.autoencoder.steps=0 --config.words.steps=0
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
            steps=6000,
            batch_size=256,
            compute_dtype="bfloat16",
            ema=(0.998,),
            checkpoint_every=2000,
            time_mean=0.5,
            time_std=1.4,
            easy=0.9,
            easy_steps=2000,
            optim=OptimConfig(learning_rate=1e-3, warmup_steps=300, decay_steps=2800, weight_decay=0.01),
        ),
    )

"""What to train, and how."""

import dataclasses

from engine.errors import UserError


@dataclasses.dataclass
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) with a warm-up, a flat stretch and a linear way down to zero.

    The flat stretch leaves the length of a run open: the way down is the last `decay_steps` of it.
    """

    learning_rate: float = 3e-4
    warmup_steps: int = 200
    decay_steps: int = 1000
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.01  # of matrices and kernels, not of norms and biases
    clip_norm: float = 1.0


@dataclasses.dataclass
class StageConfig:
    """One training run of one set of parameters."""

    steps: int = 1000
    batch_size: int = 32  # of all devices together
    ema_decay: float = 0.999
    checkpoint_every: int = 500
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)


@dataclasses.dataclass
class AutoencoderStage(StageConfig):
    """Pictures to latents and back: squared error plus a small pull towards the unit Gaussian."""

    kl_weight: float = 1e-4  # of the KL divergence, in nats per latent value


@dataclasses.dataclass
class WordsStage(StageConfig):
    """The text encoder, from captions alone: what does the scene show?"""


@dataclasses.dataclass
class DiffusionStage(StageConfig):
    """The U-Net, between an autoencoder and a text encoder that stay as they are."""

    time_sampling: str = "logit_normal"
    time_mean: float = 0.0  # of log sigma
    time_std: float = 1.0
    caption_dropout: float = 0.1  # so that guidance has an unconditional model to steer away from
    easy: float = 0.0  # the share of scenes of one big thing at the start, none after `easy_steps`
    easy_steps: int = 0


@dataclasses.dataclass
class TrainConfig:
    """A model: its autoencoder, its text encoder, its U-Net, then its decoder again.

    The last stage sharpens pictures without moving the latents that the U-Net learned; 0 steps leave it out.

    `start` names the folder of a model of the same shape whose weights and tokenizer the run begins with, in
    place of fresh ones. Then 0 steps leave out any stage, and its part stays as it is in the folder.

    `vae`, `unet`, `text_encoder` and `scheduler` are the options of the folder's config files; what
    follows from the tokenizer or from the other parts is filled in.
    """

    seed: int = 0
    image_size: int = 64
    vocab_size: int = 1024
    max_tokens: int = 32
    start: str = ""  # a folder; none: everything from scratch
    vae: dict = dataclasses.field(default_factory=dict)
    unet: dict = dataclasses.field(default_factory=dict)
    text_encoder: dict = dataclasses.field(default_factory=dict)
    scheduler: dict = dataclasses.field(default_factory=dict)
    autoencoder: AutoencoderStage = dataclasses.field(default_factory=AutoencoderStage)
    words: WordsStage = dataclasses.field(default_factory=WordsStage)
    diffusion: DiffusionStage = dataclasses.field(default_factory=DiffusionStage)
    decoder: AutoencoderStage = dataclasses.field(default_factory=lambda: AutoencoderStage(steps=0))

    def validate(self) -> None:
        """Raises UserError, saying what to write instead, before anything is compiled."""
        for name in ("autoencoder", "words", "diffusion", "decoder"):
            stage = getattr(self, name)
            for field in ("steps", "batch_size", "checkpoint_every"):
                least = 0 if field == "steps" and (self.start or name == "decoder") else 1
                if getattr(stage, field) < least:
                    raise UserError(f"{name}.{field}={getattr(stage, field)}: write a number from {least}")
            if not 0 <= stage.ema_decay < 1:
                raise UserError(f"{name}.ema_decay={stage.ema_decay}: write a number from 0 to below 1")
            if stage.optim.learning_rate <= 0:
                raise UserError(f"{name}.optim.learning_rate={stage.optim.learning_rate}: write one above 0")
        for field in ("caption_dropout", "easy"):
            if not 0 <= (share := getattr(self.diffusion, field)) <= 1:
                raise UserError(f"diffusion.{field}={share}: write 0 to 1")
        if self.diffusion.easy and self.diffusion.easy_steps < 1:
            raise UserError(
                f"diffusion.easy={self.diffusion.easy} for {self.diffusion.easy_steps} steps: "
                "write easy_steps from 1, or easy=0"
            )

"""What to train, and how."""

import dataclasses
import math
import re
import warnings

from engine.config.data import DataConfig
from engine.config.reader import check_parts, nearest
from engine.errors import UserError, UserNotice

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
DECAYS = ("linear", "cosine")
REMATS = ("none", "dots", "blocks")
MAX_SEED = 2**31  # of a training, which adds to it
MAX_SIGMA_REL = 0.28  # sqrt(1/12) is the uniform average
TIME_SAMPLINGS = ("uniform", "logit_normal")
WEIGHTINGS = ("uniform", "min_snr", "p2")


@dataclasses.dataclass
class OptimConfig:
    """An optimizer, and a learning rate with a warm-up, a flat stretch and a way down to zero.

    The flat stretch leaves the length of a run open: the way down is the last `decay_steps` of it. With 0 of
    them the rate stays; with more than the run has, it falls from the warm-up on.
    """

    learning_rate: float = 3e-4
    warmup_steps: int = 200
    decay_steps: int = 1000
    b1: float = 0.9  # of Adam and Lion
    b2: float = 0.99
    weight_decay: float = 0.01  # of matrices and kernels, not of norms and biases
    clip_norm: float = 1.0  # of all gradients together; 0: none
    name: str = "adamw"  # or "adafactor", "lion", "muon"
    decay: str = "linear"  # or "cosine"
    no_weight_decay: tuple[str, ...] = ()  # patterns of names, as in ("embedding$", "conv_out")

    def validate(self, where: str = "optim") -> None:
        """Raises UserError; `where` is what the config calls this part."""
        for field, known in (("name", OPTIMIZERS), ("decay", DECAYS)):
            _check_known(f"{where}.{field}", getattr(self, field), known)
        if not self.learning_rate > 0:
            raise UserError(f"{where}.learning_rate={self.learning_rate}: write one above 0")
        for field in ("warmup_steps", "decay_steps", "weight_decay", "clip_norm"):
            if not getattr(self, field) >= 0:
                raise UserError(f"{where}.{field}={getattr(self, field)}: write a number from 0")
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"{where}.{field}={getattr(self, field)}: write a number from 0 to below 1")
        if isinstance(self.no_weight_decay, str):
            raise UserError(f"{where}.no_weight_decay={self.no_weight_decay!r}: write a tuple, with a comma")
        for pattern in self.no_weight_decay:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{where}.no_weight_decay: {pattern!r} is no pattern ({error})") from None


@dataclasses.dataclass
class StageConfig:
    """One training run of one set of parameters."""

    steps: int = 1000
    batch_size: int = 32  # of all devices together, and of all parts of a step
    accumulate: int = 1  # the parts of a batch whose gradients are averaged: less memory, more time
    compute_dtype: str = "float32"  # or "bfloat16": of the networks; params, averages and optimizer stay
    # Params, averages and optimizer over the devices (FSDP), not a copy on each. While it is at work, a step
    # has one of the params, in compute_dtype, and of their gradient.
    shard_params: bool = False
    remat: str = "none"  # "blocks": their insides are computed again for the gradient; "dots": no products
    ema: tuple[float, ...] = (0.999,)  # decays of averages of the params; the first is what a stage ends with
    ema_sigma_rel: tuple[float, ...] = ()  # widths of power-function averages; (0.05, 0.1) serve for all
    ema_snapshot_every: int = 0  # steps between the files that keep them; 0: none
    ema_snapshot_dtype: str = "float32"  # or "float16"
    checkpoint_every: int = 500
    keep_last: int = 2  # checkpoints
    keep_best: int = 0  # and that many more, of the lowest loss
    max_skipped: int = 20  # steps in a row without finite gradients, after which the run stops
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)


def _check_known(where: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{where}={value!r} is unknown{nearest(value, known)}; write {', '.join(known)}")


def check_seed(seed: int, where: str = "seed") -> None:
    """Raises UserError where it is out of range. JAX drops what is beyond, or does not take it."""
    if not 0 <= seed < MAX_SEED:
        raise UserError(f"{where}={seed} is out of range; write 0 to {MAX_SEED - 1}")


def check_stage(name: str, stage: StageConfig, least_steps: int) -> None:
    """Raises UserError for what every stage has."""
    least = {
        **dict.fromkeys(("batch_size", "accumulate", "checkpoint_every", "keep_last", "max_skipped"), 1),
        **{"steps": least_steps, "keep_best": 0, "ema_snapshot_every": 0},
    }
    for field, number in least.items():
        if not getattr(stage, field) >= number:
            raise UserError(f"{name}.{field}={getattr(stage, field)}: write a number from {number}")
    if stage.batch_size % stage.accumulate:
        raise UserError(
            f"{name}.accumulate={stage.accumulate} does not divide {name}.batch_size={stage.batch_size}"
        )
    for field in ("ema", "ema_sigma_rel"):
        if not isinstance(getattr(stage, field), (tuple, list)):
            raise UserError(f"{name}.{field}={getattr(stage, field)!r}: write a tuple, with a comma")
    if not stage.ema or not all(0 <= decay < 1 for decay in stage.ema):
        raise UserError(f"{name}.ema={stage.ema}: write one or more numbers from 0 to below 1")
    if not all(0 < width <= MAX_SIGMA_REL for width in stage.ema_sigma_rel):
        raise UserError(
            f"{name}.ema_sigma_rel={stage.ema_sigma_rel}: write numbers above 0 and up to {MAX_SIGMA_REL}"
        )
    for field in ("ema", "ema_sigma_rel"):
        if len(set(getattr(stage, field))) < len(getattr(stage, field)):
            raise UserError(f"{name}.{field}={getattr(stage, field)}: write each number once")
    if stage.ema_snapshot_every and not stage.ema_sigma_rel:
        raise UserError(f"{name}.ema_snapshot_every without averages to keep: write {name}.ema_sigma_rel too")
    _check_known(f"{name}.ema_snapshot_dtype", stage.ema_snapshot_dtype, ("float32", "float16"))
    _check_known(f"{name}.compute_dtype", stage.compute_dtype, ("float32", "bfloat16"))
    _check_known(f"{name}.remat", stage.remat, REMATS)
    stage.optim.validate(f"{name}.optim")


@dataclasses.dataclass
class AutoencoderStage(StageConfig):
    """Pictures to latents and back: squared error plus a small pull towards the unit Gaussian."""

    kl_weight: float = 1e-4  # of the KL divergence, in nats per latent value


@dataclasses.dataclass
class WordsStage(StageConfig):
    """The text encoder, from captions alone: what does the scene show? Of the drawn scenes it is known."""


@dataclasses.dataclass
class ObjectiveConfig:
    """What a denoiser learns from: noise levels, their weights, the noise and the captions.

    What the network predicts is the scheduler's `prediction_type`. The formulas: `engine.diffusion.losses`.
    """

    time_sampling: str = "logit_normal"  # or "uniform" over the training timesteps
    time_mean: float = 0.0  # of log sigma, logit_normal
    time_std: float = 1.0
    weighting: str = "uniform"  # of the loss in the network's own target; or "min_snr", "p2"
    snr_gamma: float = 5.0  # min_snr: the signal-to-noise ratio from which on all weigh alike
    p2_k: float = 1.0  # p2: 1 / (k + SNR)^gamma
    p2_gamma: float = 1.0
    noise_offset: float = 0.0  # spread of a constant added to the noise of each channel; 0.1 is usual
    caption_dropout: float = 0.1  # so that guidance has an unconditional model to steer away from
    caption_shuffle: bool = False  # comma-separated tags in a new order each time
    keep_tags: int = 0  # that many first tags keep their places

    def validate(self, where: str = "objective") -> None:
        """Raises UserError; `where` is what the config calls this part."""
        for name, known in (("time_sampling", TIME_SAMPLINGS), ("weighting", WEIGHTINGS)):
            if (value := getattr(self, name)) not in known:
                raise UserError(
                    f"{where}.{name}={value!r} is unknown{nearest(value, known)}; write {', '.join(known)}"
                )
        for name in ("time_std", "snr_gamma", "p2_k"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise UserError(f"{where}.{name}={value}: write a number above 0")
        for name in ("time_mean", "time_std"):
            value, usual = getattr(self, name), getattr(ObjectiveConfig, name)
            if self.time_sampling == "uniform" and value != usual:
                told = f"{where}.{name}={value} does nothing with {where}.time_sampling='uniform'"
                warnings.warn(told, UserNotice, 3)
        for name in ("p2_gamma", "noise_offset", "keep_tags"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UserError(f"{where}.{name}={value}: write a number from 0")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"{where}.caption_dropout={self.caption_dropout}: write 0 to 1")
        if self.keep_tags and not self.caption_shuffle:
            raise UserError(
                f"{where}.keep_tags={self.keep_tags} without shuffling: write {where}.caption_shuffle=True"
            )

    def check_weighting(self, where: str) -> None:
        """Raises UserError for a setting of a weighting that is not the one."""
        for name, weighting in (("snr_gamma", "min_snr"), ("p2_k", "p2"), ("p2_gamma", "p2")):
            value = getattr(self, name)
            if value != getattr(ObjectiveConfig, name) and self.weighting != weighting:
                raise UserError(
                    f"{where}.{name}={value} does nothing with {where}.weighting={self.weighting!r}: "
                    f"write {where}.weighting={weighting}, or leave it out"
                )


@dataclasses.dataclass
class DiffusionStage(ObjectiveConfig, StageConfig):
    """The U-Net, behind an autoencoder that stays as it is; the text encoder stays too, or trains with it."""

    train_text_encoder: bool = False  # with the U-Net, by the same loss
    easy: float = 0.0  # the share of scenes of one big thing at the start, none after `easy_steps`
    easy_steps: int = 0
    distinct: int = 0  # drawn scenes, in turn, their latents kept in the workdir; 0: every one is new


# Targets of a LoRA: all of a U-Net that has weights of some size, as in the original of the LCM-LoRA.
EVERY_LAYER = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


@dataclasses.dataclass
class LoraConfig:
    """A LoRA (Hu et al. 2021): which layers it changes, and by matrices of which rank."""

    rank: int = 8
    alpha: float = 8.0  # the change is alpha / rank times the product of its matrices
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # ends of names, * for anything
    text_encoder: bool = False  # the projections of its attention, too

    def validate(self, where: str = "lora") -> None:
        """Raises UserError; `where` is what the config calls this part."""
        if not self.rank >= 1:
            raise UserError(f"{where}.rank={self.rank}: write a number from 1; 4 to 64 are usual")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"{where}.alpha={self.alpha}: write a number above 0; the rank is usual")
        if isinstance(self.targets, str) or not self.targets:
            raise UserError(f"{where}.targets={self.targets!r}: write a tuple, such as ('to_q', 'to_v')")


@dataclasses.dataclass
class TrainConfig:
    """A model: its autoencoder, its text encoder, its U-Net, then its decoder again.

    The last stage sharpens pictures without moving the latents that the U-Net learned; 0 steps leave it out.

    `data` names pictures with captions to learn from; none: the drawn world. The words' stage asks what a
    scene shows, which nobody knows of other pictures: there it has 0 steps, and the text encoder trains with
    the U-Net (`diffusion.train_text_encoder`).

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
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
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
        check_parts(self)
        check_seed(self.seed)
        self.data.validate("data")
        if self.data.paths:
            self._check_pictures()
        else:
            self._check_scenes()
        for name in ("autoencoder", "words", "diffusion", "decoder"):
            joined = name == "words" and self.diffusion.train_text_encoder
            left_out = self.start or name == "decoder" or joined
            check_stage(name, getattr(self, name), least_steps=0 if left_out else 1)
        self.diffusion.validate("diffusion")
        self.diffusion.check_weighting("diffusion")
        if not 0 <= self.diffusion.easy <= 1:
            raise UserError(f"diffusion.easy={self.diffusion.easy}: write 0 to 1")
        if self.diffusion.easy and self.diffusion.easy_steps < 1:
            raise UserError(
                f"diffusion.easy={self.diffusion.easy} for {self.diffusion.easy_steps} steps: "
                "write easy_steps from 1, or easy=0"
            )

        self._check_distinct()

    def _check_distinct(self) -> None:
        """Scenes that come again."""
        distinct, batch_size = self.diffusion.distinct, self.diffusion.batch_size
        if distinct and (distinct < batch_size or distinct % batch_size):
            raise UserError(
                f"diffusion.distinct={distinct}: write a multiple of diffusion.batch_size={batch_size}, "
                "or 0 for new scenes all the time"
            )
        if distinct and self.data.paths:
            raise UserError(
                f"diffusion.distinct={distinct} is a number of drawn scenes, and data.paths are other "
                "pictures: write diffusion.distinct=0"
            )
        if distinct and self.diffusion.caption_shuffle:
            raise UserError(f"diffusion.distinct={distinct} tells scenes anew: write caption_shuffle=False")

    def _check_pictures(self) -> None:
        """What goes with pictures that are not drawn."""
        if self.data.size not in (0, self.image_size):
            raise UserError(
                f"data.size={self.data.size} is not image_size={self.image_size}: write image_size alone"
            )
        if self.data.buckets > 1 and self.image_size % self.data.multiple:
            raise UserError(
                f"image_size={self.image_size}: write a multiple of data.multiple={self.data.multiple}, "
                "or another data.multiple"
            )
        if self.words.steps:
            raise UserError(
                f"words.steps={self.words.steps} asks what drawn scenes show, and data.paths are other "
                "pictures: write words.steps=0 and diffusion.train_text_encoder=True"
            )
        if not self.start and not self.diffusion.train_text_encoder:
            raise UserError(
                "data.paths from scratch leave the text encoder without training: "
                "write diffusion.train_text_encoder=True"
            )
        if self.diffusion.easy:
            raise UserError(
                f"diffusion.easy={self.diffusion.easy} is a share of drawn scenes, and data.paths are other "
                "pictures: write diffusion.easy=0"
            )

    def _check_scenes(self) -> None:
        """The scenes are drawn by the run's own seed, at its own size."""
        for name, usual in dataclasses.asdict(DataConfig()).items():
            if name not in ("kind", "tellers") and (value := getattr(self.data, name)) != usual:
                raise UserError(f"data.{name}={value!r} without pictures: write data.paths too")

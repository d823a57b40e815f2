"""What to train further of a model that exists, and on which pictures."""

import dataclasses
import math
import warnings

from engine.config.data import DataConfig
from engine.config.drawing import MAX_CLIP_SKIP, SIGHTS
from engine.config.inversion import InversionConfig
from engine.config.reader import check_parts, nearest
from engine.config.training import LoraConfig, ObjectiveConfig, StageConfig, check_seed, check_stage
from engine.errors import UserError, UserNotice

PROBE = "probe"  # the judge in the package
GIVEN = "given"  # what a ControlNet is shown stands beside the pictures
WHAT = ("unet", "unet+text_encoder", "lora", "textual_inversion", "controlnet")
REWARDED = ("unet", "unet+text_encoder", "lora")
# Settings of the data that are flags of launch.cache, too: they say what lies in a folder of latents.
OF_CACHE = ("caption_field", "size", "buckets", "max_aspect", "multiple", "min_size")


@dataclasses.dataclass
class FinetuneStage(ObjectiveConfig, StageConfig):
    """The steps of a fine-tuning."""


@dataclasses.dataclass
class SamplesConfig:
    """Pictures that are drawn during the training, of the same prompts from the same noise."""

    prompts: tuple[str, ...] = ()
    every: int = 0  # steps between them; 0: none
    sampler: str = ""  # without it the one that the model names
    steps: int = 20  # of the sampler
    guidance_scale: float = 5.0
    seed: int = 0
    images: tuple[str, ...] = ()  # files, one for each prompt: of them a ControlNet is shown what it learns

    def validate(self, where: str = "samples") -> None:
        """Raises UserError; `where` is what the config calls this part."""
        for name, example in (("prompts", "a fox"), ("images", "fox.png")):
            if isinstance(value := getattr(self, name), str):
                raise UserError(f"{where}.{name}={value!r}: write a tuple, such as ('{example}',)")
        if self.every < 0:
            raise UserError(f"{where}.every={self.every}: write a number from 0")
        if self.every and not self.prompts:
            raise UserError(f"{where}.every={self.every} without prompts: write {where}.prompts too")
        if self.steps < 1:
            raise UserError(f"{where}.steps={self.steps}: write a number from 1")
        check_seed(self.seed, f"{where}.seed")

    def check_images(self, controlled: bool, where: str = "samples") -> None:
        """UserError unless a ControlNet in training has a picture for each prompt, and others none."""
        if self.images and not controlled:
            raise UserError(f"{where}.images={self.images!r}: they are for what='controlnet'; leave them out")
        if self.images and not self.every:
            raise UserError(f"{where}.images without {where}.every: write the steps between them, too")
        if controlled and self.every and len(self.images) != len(self.prompts):
            raise UserError(
                f"{where}.images has {len(self.images)} files for {len(self.prompts)} prompts: write the "
                "path of a picture for each"
            )


@dataclasses.dataclass
class ControlConfig:
    """A ControlNet to train (Zhang et al. 2023), or a T2I-Adapter (Mou et al. 2023)."""

    kind: str = "edges"  # what it is shown of each picture: one of SIGHTS, or "given", a picture beside it
    start: str = ""  # the folder or file of one to train further; "": a copy of the U-Net, or a fresh adapter
    adapter: bool = False  # a T2I-Adapter

    def validate(self, where: str = "controlnet") -> None:
        """Raises UserError; `where` is what the config calls this part."""
        known = (*SIGHTS, GIVEN)
        if self.kind not in known:
            near = nearest(self.kind, known)
            raise UserError(f"{where}.kind={self.kind!r} is unknown{near}; write {', '.join(known)}")

    @property
    def sight(self) -> str:
        """What it is shown of the picture that it is given, see `engine.sights`."""
        return "" if self.kind == GIVEN else self.kind


@dataclasses.dataclass
class DistillConfig:
    """A LoRA that learns the model's own way in a few steps (Luo et al. 2023, LCM-LoRA), for what="lora"."""

    steps: int = 0  # into which the model's way is cut; 50 is usual; 0: no distillation
    guidance_scale: tuple[float, float] = (5.0, 8.0)  # of the model; each picture has one between these

    def validate(self, where: str = "distill") -> None:
        """Raises UserError; `where` is what the config calls this part."""
        if self.steps < 0:
            raise UserError(f"{where}.steps={self.steps}: write a number from 0")
        scale = self.guidance_scale
        if not isinstance(scale, tuple | list) or len(scale) != 2 or not 1 <= scale[0] <= scale[1] < math.inf:
            raise UserError(f"{where}.guidance_scale={scale!r}: write two numbers from 1, such as (5.0, 8.0)")


@dataclasses.dataclass
class RewardConfig:
    """Tuning by what a judge says of the pictures that the model draws itself (Wu et al. 2024, DRTune)."""

    judge: str = ""  # a CLIP's folder (OpenAI's, PickScore's), or "probe": of the drawn world; "": no judge
    prompts: str = ""  # a file of them as launch.generate takes it; the probe's come from the drawn world
    steps: int = 20  # in which a picture is drawn
    trained_steps: int = 4  # of each picture, from which the model learns; a divisor of steps
    guidance_scale: float = 5.0

    @property
    def of_world(self) -> bool:
        """Whether the judge is a probe of the drawn world: that of the package, or a file of launch.probe."""
        return self.judge == PROBE or self.judge.endswith(".safetensors")

    def validate(self, where: str = "reward") -> None:
        """Raises UserError; `where` is what the config calls this part."""
        if self.steps < 1:
            raise UserError(f"{where}.steps={self.steps}: write a number from 1")
        if self.trained_steps < 1 or self.steps % self.trained_steps:
            raise UserError(
                f"{where}.trained_steps={self.trained_steps}: write a number that divides "
                f"{where}.steps={self.steps}"
            )
        if not 1 <= self.guidance_scale < math.inf:
            raise UserError(f"{where}.guidance_scale={self.guidance_scale}: write a number from 1")


@dataclasses.dataclass
class PriorConfig:
    """Prior preservation (Ruiz et al. 2023, "DreamBooth", equation 2).

    Beside each batch the model learns pictures that it drew itself before, so that "a dog" stays any dog
    while "a sks dog" becomes the one of the pictures.
    """

    prompt: str = ""  # of the class, such as "a dog"
    num_images: int = 0  # drawn before the training; 0: none
    weight: float = 1.0  # of their loss beside that of the pictures

    def validate(self, where: str = "prior") -> None:
        """Raises UserError; `where` is what the config calls this part."""
        if self.num_images < 0:
            raise UserError(f"{where}.num_images={self.num_images}: write a number from 0")
        if bool(self.num_images) != bool(self.prompt):
            raise UserError(f"{where}: write both {where}.prompt and {where}.num_images, or neither")
        if not self.weight > 0:
            raise UserError(f"{where}.weight={self.weight}: write a number above 0")


@dataclasses.dataclass
class FinetuneConfig:
    """A model that exists, trained further on pictures with captions.

    `scheduler` holds options in place of those of the model's scheduler config: another prediction type, or
    rescale_betas_zero_snr.
    """

    model: str = "shipped"  # a folder, or this word for the one in the package
    what: str = "unet"  # or "unet+text_encoder", "lora", "textual_inversion", "controlnet"
    seed: int = 0
    clip_skip: int = 0  # layers of the text encoders that are left out at their end, as in drawing
    scheduler: dict = dataclasses.field(default_factory=dict)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    latents: str = ""  # a folder that launch.cache made with this model, in place of pictures
    finetune: FinetuneStage = dataclasses.field(default_factory=FinetuneStage)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    inversion: InversionConfig = dataclasses.field(default_factory=InversionConfig)
    controlnet: ControlConfig = dataclasses.field(default_factory=ControlConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    prior: PriorConfig = dataclasses.field(default_factory=PriorConfig)
    samples: SamplesConfig = dataclasses.field(default_factory=SamplesConfig)

    def validate(self) -> None:
        """Raises UserError, saying what to write instead, before anything is compiled."""
        check_parts(self)
        check_seed(self.seed)
        if self.what not in WHAT:
            raise UserError(
                f"what={self.what!r} is unknown{nearest(self.what, WHAT)}; write {', '.join(WHAT)}"
            )
        if not 0 <= self.clip_skip <= MAX_CLIP_SKIP:
            raise UserError(f"clip_skip={self.clip_skip} is out of range; write 0 to {MAX_CLIP_SKIP}")
        self._tell_of_idle_parts()
        check_stage("finetune", self.finetune, 1)
        self.finetune.validate("finetune")
        self.finetune.check_weighting("finetune")
        self.data.validate("data")
        self.lora.validate("lora")
        if self.what == "textual_inversion":
            self.inversion.validate("inversion")
        if self.what == "controlnet":
            self.controlnet.validate("controlnet")
            if self.controlnet.kind == GIVEN and self.prior.num_images:
                raise UserError(
                    "prior.num_images with controlnet.kind='given': beside the pictures that the model draws "
                    "there are none to show; write prior.num_images=0"
                )
        if self.reward.judge:
            self._check_reward()
        elif not self.data.paths and not self.latents:
            raise UserError(f"what={self.what!r} without pictures: write data.paths, such as ('pictures',)")
        self.reward.validate("reward")
        self.prior.validate("prior")
        self.distill.validate("distill")
        if self.distill.steps:
            self._check_distill()
        self.samples.validate("samples")
        self.samples.check_images(self.what == "controlnet")
        if self.latents:
            self._check_latents()

    def _check_distill(self) -> None:
        """Refuses what a distillation does not do."""
        given = f"distill.steps={self.distill.steps}"
        if self.what != "lora":
            raise UserError(f"{given} with what={self.what!r}: write what='lora', or distill.steps=0")
        if self.lora.text_encoder:
            raise UserError(f"{given} and lora.text_encoder: the U-Net alone is distilled; write False")
        if self.prior.num_images:
            raise UserError(f"{given} and prior.num_images: the model is its own prior; write 0")
        self._tell_of_idle_objective(given, heeded=("caption_", "keep_"))

    def _check_reward(self) -> None:
        """Refuses what a judge does not go with."""
        given, prompts = f"reward.judge={self.reward.judge!r}", self.reward.prompts
        if self.what not in REWARDED:
            raise UserError(f"{given} with what={self.what!r}: write what={' or '.join(map(repr, REWARDED))}")
        for name, value, none in (
            ("data.paths", self.data.paths, "()"),
            ("latents", self.latents, "''"),
            ("distill.steps", self.distill.steps, "0"),
            ("prior.num_images", self.prior.num_images, "0"),
        ):
            if value:
                raise UserError(
                    f"{given} and {name}: of a reward the model learns from its own pictures alone; write "
                    f"{name}={none}"
                )
        if self.reward.of_world and prompts:
            raise UserError(
                f"{given} and reward.prompts={prompts!r}: it asks for scenes of its own; write ''"
            )
        if not self.reward.of_world and not prompts:
            raise UserError(f"{given} without prompts: write reward.prompts, such as 'prompts.txt'")
        if dataclasses.replace(self.data, seed=DataConfig.seed) != DataConfig():
            warnings.warn(f"settings of data but its seed do nothing with {given}", UserNotice, 3)
        self._tell_of_idle_objective(given)

    def _tell_of_idle_objective(self, given: str, heeded: tuple[str, ...] = ()) -> None:
        for field in dataclasses.fields(ObjectiveConfig):
            value = getattr(self.finetune, field.name)
            if not field.name.startswith(heeded) and value != field.default:
                warnings.warn(f"finetune.{field.name}={value!r} does nothing with {given}", UserNotice, 4)

    def _tell_of_idle_parts(self) -> None:
        """Not refused: one config may serve for several `what`."""
        if not self.reward.judge and self.reward != RewardConfig():
            warnings.warn("settings of reward do nothing without reward.judge", UserNotice, 3)
        for part, what in (
            ("lora", "lora"),
            ("inversion", "textual_inversion"),
            ("controlnet", "controlnet"),
        ):
            if self.what != what and getattr(self, part) != getattr(FinetuneConfig(), part):
                told = f"settings of {part} do nothing with what={self.what!r}, but with what={what!r}"
                warnings.warn(told, UserNotice, 3)

    def _check_latents(self) -> None:
        """Refuses what needs the pictures or the captions themselves."""
        trains_text = self.what in ("unet+text_encoder", "textual_inversion") or (
            self.what == "lora" and self.lora.text_encoder
        )
        needs = {
            "data.paths": bool(self.data.paths),
            "prior.num_images": bool(self.prior.num_images),
            "finetune.caption_shuffle": self.finetune.caption_shuffle,
            "training the text encoder": trains_text,
            "training a ControlNet": self.what == "controlnet",
        }
        for name, wanted in needs.items():
            if wanted:
                raise UserError(
                    f"latents={self.latents!r} and {name} do not go together: latents and contexts are "
                    "fixed; leave out one of them"
                )
        self._check_data_of_latents()

    def _check_data_of_latents(self) -> None:
        """Refuses settings of pictures that are not there. Of the data, latents heed its seed alone."""
        for name, usual in dataclasses.asdict(DataConfig()).items():
            if name in ("paths", "seed") or (value := getattr(self.data, name)) == usual:
                continue
            if name == "flip":  # configs/ set it for pictures: that it does nothing is no reason to stop
                warnings.warn(f"data.flip={value}: latents are not mirrored", UserNotice, 3)
                continue
            instead = f"write data.{name}={usual!r}"
            if name in OF_CACHE:
                instead = f"give it to python -m launch.cache as --{name} {value}, and {instead} here"
            raise UserError(f"data.{name}={value!r} does nothing with latents={self.latents!r}: {instead}")

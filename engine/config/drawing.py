"""What pictures to draw: a few, or a job of many."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from engine.config.reader import nearest
from engine.config.values import control_mode, scaled, told_size
from engine.errors import UserError

MAX_PICTURES = 100_000  # of one run
MAX_INDEX = 2**32  # indices of one seed, from 0: the noise of a picture is addressed by 32 bits
MAX_BATCH_SIZE = 4096
MAX_UPSCALE = 16
MAX_TILE = 16384
MAX_CLIP_SKIP = 99
MAX_CACHE_INTERVAL = 1000
MAX_STEPS = 1000
MAX_BEST_OF = 1000
MAX_PAG_SCALE = 100

SIGHTS = ("edges", "grey", "mosaic")  # what a ControlNet may be shown of a picture: engine.sights

# What SDXL is told of sizes
TOLD = ("original_size", "crop_from", "target_size", "negative_size")

# Options of `Pipeline.settings` that say what is special on the way from noise to picture; None: nothing.
OF_THE_WAY = (
    *("refiner_start", "grid", "guidance_start", "guidance_end", "guidance_rescale"),
    *("pag_scale", "pag_layers", "cache_interval", "merge_tokens", "control_start", "control_end"),
    *("hires", "hires_strength", "hires_steps"),
    *TOLD,
    "best_of",
)


class Pictured(NamedTuple):
    """Networks of which each sees a picture of its own."""

    one: str  # of them, in words
    where: str  # FILE or FOLDER
    picture: str  # the option that names what they see,
    called: str  # and what it is called in words


# By the option that names them
PICTURED = {
    "controlnet": Pictured("a ControlNet", "FOLDER", "control_image", "control picture"),  # or a file
    "ip_adapter": Pictured("an IP-Adapter", "FILE", "image_prompt", "image prompt"),
}


def check_count(of: str, found: int, count: int) -> None:
    """UserError unless there are as many pictures for them as there are networks of this kind of PICTURED."""
    if found == count:
        return
    one, where, option, called = PICTURED[of]
    if not count:
        raise UserError(f"a picture for {one}, and there is none: write --{of} {where}, too")
    if not found:
        raise UserError(f"{one} without a picture to see: write --{option} {','.join(['FILE'] * count)}")
    each = f"{found} {called}s for {count} {one.partition(' ')[2]}s"
    raise UserError(f"{each}: write one for each, with commas between them")


def check_hires(how: Any) -> None:
    """UserError where something is asked of larger pictures, and there are none; how: has those options."""
    for name in ("hires_strength", "hires_steps"):
        if (value := getattr(how, name)) is not None and how.hires is None:
            raise UserError(f"{name}={value} without a larger picture: write --hires 2, too")


@dataclasses.dataclass
class GenerateConfig:
    """Pictures to draw into a folder. What is None is known when the model is loaded."""

    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    num_images: int = 1  # of each prompt
    seed: int | None = None  # None: a fresh one
    first_index: int = 0  # of the first picture; seed and index address its noise
    model: str = "shipped"  # a folder, or this word for the one in the package
    lora: str = ""  # FILE or FILE=SCALE, several with commas between them: see `loras`
    embedding: str = ""  # FILE, several with commas between them: see `embeddings`
    decoder: str = ""  # a folder or a file, whose autoencoder stands in for the model's own
    refiner: str = ""  # a folder, whose model goes the last part of the way
    safety_checker: str = ""  # a folder, whose network holds pictures back
    judge: str = ""  # a folder, whose CLIP says how well pictures show their prompts
    best_of: int | None = None  # candidates of each picture, of which it chooses one; None: 1
    upscaler: str = ""  # a file, whose network enlarges every picture when it is drawn
    refiner_start: float | None = None  # share of the way before that; None: 0.8
    prompt_weights: bool = False  # brackets in prompts say how much words count
    long_prompts: bool = False  # those too long for the text encoders are read in parts
    clip_skip: int = 0  # layers of the text encoders that are left out at their end
    tile: int = 0  # pixels; larger pictures are decoded in tiles of this side. 0: whole
    sampler: str | None = None  # None: the one that the model's folder names
    grid: str | None = None  # how noise levels are spread; None: as the model's folder says
    steps: int = 30
    guidance_scale: float = 5.0
    guidance_start: float | None = None  # share of the steps before which there is no guidance; None: 0
    guidance_end: float | None = None  # share of the steps behind which there is none; None: 1
    guidance_rescale: float | None = None  # share of its contrast that guidance gives back; None: 0
    pag_scale: float | None = None  # of the guidance away from perturbed attention; None: 0
    pag_layers: str | None = None  # in which it is perturbed, with commas between them; None: mid_block
    cache_interval: int | None = None  # steps from one that computes all of the U-Net to the next; None: 1
    merge_tokens: float | None = None  # share of the finest tokens that attend together with others; None: 0
    controlnet: str = ""  # FOLDER or FOLDER=SCALE, several with commas; files, too: see `controlnets`
    control_image: str = ""  # what it sees; with several ControlNets one for each, with commas between them
    control_kind: str = ""  # what of that picture it is shown, one of SIGHTS or "none"; "": as it has learned
    control_mode: str = ""  # of which kinds the pictures of a ControlNet union are: see `control_modes`
    control_start: float | None = None  # share of the steps before which it adds nothing; None: 0
    control_end: float | None = None  # share of the steps behind which it adds nothing; None: 1
    ip_adapter: str = ""  # FILE or FILE=SCALE, several with commas between them: see `ip_adapters`
    image_prompt: str = ""  # what it reads; with several IP-Adapters one for each, with commas between them
    image_encoder: str = ""  # FOLDER, by which it reads; "": the one that lies beside it
    ip_adapter_layers: str = ""  # blocks of the U-Net, with commas between them: see `adapter_layers`
    image: str = ""  # a picture to change
    mask: str = ""  # a picture, as large: what is white is drawn anew, what is black stays
    strength: float | None = None  # how much of the picture is forgotten; None: 0.8, and 1 with a mask
    image_guidance_scale: float = 1.5  # of a model that changes pictures as it is told
    height: int | None = None  # pixels; None: the size that the model was trained for
    width: int | None = None
    hires: float | None = None  # times as wide and high that the picture is drawn over; None, 1: it is not
    hires_strength: float | None = None  # how much of it is forgotten then; None: 0.5
    hires_steps: int | None = None  # of the grid for that; None: as many as `steps`
    # What SDXL is told of the size of a picture, see `told_size`; None, "": that it was not scaled or cropped
    original_size: str | None = None  # before it was
    crop_from: str | None = None  # where the crop begins
    target_size: str | None = None  # behind it
    negative_size: str | None = None  # to steer away from; None: the same
    dtype: str = "float32"
    quantize: str = ""  # kernels of the U-Net in 8 bits: int8 or fp8
    parallel: str = "shard_map"
    split_params: bool = False  # the model over the devices, where one is too small for it; parallel="jit"
    batch_size: int | None = None  # pictures that a device draws at once
    out: str = "out"
    upscale: int = 1  # times as wide and high in the end; with an upscaler 1 is as it makes them
    frames: int | None = None  # stages from static to picture, in a strip
    animate: bool = False
    words: bool = False  # a sheet of which word steered what

    def validate(self) -> None:
        """Raises UserError for what is wrong with any model; the rest is checked when it is loaded."""
        if not self.prompts:
            raise UserError("no prompt: write what to draw, such as 'a fox on a skateboard at sunset'")
        if len(self.prompts) * self.num_images > MAX_PICTURES:
            raise UserError(
                f"{len(self.prompts)} prompts with num_images={self.num_images}: write at most "
                f"{MAX_PICTURES} pictures a run, or put the prompts into a file for --prompts_file"
            )
        for name in ("mask", "strength"):
            if getattr(self, name) and not self.image:
                raise UserError(f"{name}={getattr(self, name)} without a picture: write --image FILE, too")
        if self.image_guidance_scale != GenerateConfig.image_guidance_scale and not self.image:
            told = f"image_guidance_scale={self.image_guidance_scale}"
            raise UserError(f"{told} without a picture: write --image FILE, too")
        self.check_drawing()
        for of in PICTURED:
            check_count(of, len(self.pictures_of(of)), len(self.networks(of)))
        count = len(self.prompts) * self.num_images * self.candidates
        if self.first_index + count > MAX_INDEX:
            raise UserError(
                f"first_index={self.first_index}: {count} pictures would go beyond {MAX_INDEX - 1}, the last "
                f"index of a seed; write at most {MAX_INDEX - count}, or another seed"
            )

    @property
    def candidates(self) -> int:
        """Pictures that are drawn for each that is kept."""
        return self.best_of or 1

    def check_guidance(self) -> None:
        """UserError where something is asked of guidance, and there is none; pictures may remember such."""
        none = self.guidance_scale == 1 and not self.pag_scale
        for name in ("guidance_start", "guidance_end", "guidance_rescale"):
            if none and (value := getattr(self, name)) is not None:
                raise UserError(f"{name}={value} with guidance_scale=1, which is none: leave one of them out")

    def loras(self) -> tuple[tuple[str, float], ...]:
        """The files and scales that `lora` names; UserError where it is no such list."""
        return scaled("lora", self.lora, "FILE", "a.safetensors=0.8,b.safetensors")

    def controlnets(self) -> tuple[tuple[str, float], ...]:
        """The folders, or files, and scales that `controlnet` names; UserError where it is no such list."""
        return scaled("controlnet", self.controlnet, "FOLDER", "canny=0.8,depth")

    def ip_adapters(self) -> tuple[tuple[str, float], ...]:
        """The files and scales that `ip_adapter` names; UserError where it is no such list."""
        return scaled("ip_adapter", self.ip_adapter, "FILE", "a.safetensors=0.6,b.safetensors")

    def control_modes(self) -> tuple[str, ...]:
        """What `control_mode` names; UserError where that is no list of CONTROL_MODES or numbers."""
        modes = self._listed("control_mode", "KIND", "canny,depth")
        for mode in modes:
            control_mode(mode)
        return modes

    def adapter_layers(self) -> tuple[str, ...]:
        """What `ip_adapter_layers` names; UserError where it is no such list."""
        return self._listed("ip_adapter_layers", "NAME", "up_blocks.0.attentions.1,down_blocks.2")

    def networks(self, of: str) -> tuple[tuple[str, float], ...]:
        """Those of a kind of PICTURED."""
        return self.controlnets() if of == "controlnet" else self.ip_adapters()

    def pictures_of(self, of: str, value: str | None = None) -> tuple[str, ...]:
        """The files that each network of a kind of PICTURED sees; none where none are named.

        Where there is one network, a comma is a letter like others.

        Args:
          value: names them. None: the option does.

        Raises:
          UserError: there are not as many as networks.
        """
        option, count = PICTURED[of].picture, len(self.networks(of))
        value = getattr(self, option) if value is None else value
        files = tuple(file.strip() for file in value.split(",")) if count > 1 else (value,)
        if not value:
            return ()
        check_count(of, len(files), count)
        if not all(files):
            raise UserError(f"{option}={value!r}: there is no file between two commas")
        return files

    def embeddings(self) -> tuple[str, ...]:
        """The files that `embedding` names; UserError where it is no such list."""
        return self._listed("embedding", "FILE", "a.safetensors,b.safetensors")

    def _listed(self, name: str, what: str, example: str) -> tuple[str, ...]:
        value = getattr(self, name)
        entries = tuple(entry.strip() for entry in value.split(",")) if value else ()
        if not all(entries):
            raise UserError(f"{name}={value!r}: write {what}, with commas between several, such as {example}")
        return entries

    def of_the_way(self) -> dict[str, float | str | None]:
        """Those of OF_THE_WAY."""
        return {name: getattr(self, name) for name in OF_THE_WAY}

    def _check_given(self) -> None:
        """What goes with a picture to change."""
        if not math.isfinite(self.image_guidance_scale):
            raise UserError(f"image_guidance_scale={self.image_guidance_scale}: 1.5 is usual, 1 is none")

    def check_drawing(self) -> None:
        """The part of `validate` that has nothing to do with where prompts come from."""
        self._check_given()
        if self.refiner_start is not None and not self.refiner:
            raise UserError(f"refiner_start={self.refiner_start} without one: write --refiner FOLDER, too")
        if self.pag_layers and not self.pag_scale:
            raise UserError(f"pag_layers={self.pag_layers} without such guidance: write --pag_scale 3, too")
        if self.candidates > 1 and not self.judge:
            raise UserError(f"best_of={self.best_of} without one who chooses: write --judge FOLDER, too")
        known = (*SIGHTS, "none")
        if self.control_kind and self.control_kind not in known:
            near = nearest(self.control_kind, known)
            raise UserError(f"control_kind={self.control_kind!r} is unknown{near}; write {', '.join(known)}")
        for name in ("control_image", "control_kind", "control_mode", "control_start", "control_end"):
            if (value := getattr(self, name)) not in ("", None) and not self.controlnet:
                raise UserError(f"{name}={value} without a ControlNet: write --controlnet FOLDER, too")
        for name in ("image_prompt", "image_encoder", "ip_adapter_layers"):
            if (value := getattr(self, name)) and not self.ip_adapter:
                raise UserError(f"{name}={value} without an IP-Adapter: write --ip_adapter FILE, too")
        check_hires(self)
        if self.image and self.hires not in (None, 1):
            why = f"hires={self.hires} with a picture to change"
            raise UserError(f"{why}: leave one of them out, or write --hires 1")
        for name in TOLD:
            if value := getattr(self, name):
                told_size(name, value)
        self.loras()
        self.embeddings()
        self.adapter_layers()
        self.control_modes()
        for of in PICTURED:
            self.pictures_of(of)
        shares = ("guidance_start", "guidance_end", "guidance_rescale", "control_start", "control_end")
        self.check_ranges(dict.fromkeys(shares, (0, 1)) | {"merge_tokens": (0, 0.75)})
        if self.split_params and self.parallel != "jit":
            raise UserError(f"split_params with parallel={self.parallel!r}: write --parallel jit")
        if self.quantize and self.split_params:
            raise UserError(f"quantize={self.quantize!r} with split_params: leave one of them out")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise UserError(f"seed={self.seed} is out of range; write 0 to {2**64 - 1}")
        ranges = {
            "num_images": (1, MAX_PICTURES),
            "first_index": (0, MAX_INDEX - 1),
            "batch_size": (1, MAX_BATCH_SIZE),
            "upscale": (1, MAX_UPSCALE),
            "tile": (0, MAX_TILE),
            "clip_skip": (0, MAX_CLIP_SKIP),
            "cache_interval": (1, MAX_CACHE_INTERVAL),
            "hires": (1, MAX_UPSCALE),
            "hires_strength": (0, 1),
            "hires_steps": (1, MAX_STEPS),
            "best_of": (1, MAX_BEST_OF),
            "pag_scale": (0, MAX_PAG_SCALE),
        }
        self.check_ranges(ranges)

    def check_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Raises UserError for the first number that is not within its range; None is."""
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{name}={value} is out of range; write {low} to {high}")


FORMATS = ("files", "webdataset", "arrayrecord", "parquet")


@dataclasses.dataclass
class JobConfig(GenerateConfig):
    """Pictures by the million: a file of prompts into shards of pictures.

    The options of GenerateConfig hold for every row of the file that does not say otherwise.
    """

    prompts_file: str = ""  # .txt, .jsonl, .csv or .parquet, or - for standard input
    format: str = "files"  # of the shards
    shard_size: int = 256  # pictures in a shard
    processes: int | None = None  # that share the job, each with its part; None: what the cluster says
    process_id: int | None = None  # of this one, from 0
    coordinator: str | None = None  # host:port of process 0, where split_params brings processes together
    elastic: bool = False  # take shards by claims in the output folder, so that workers may come and go
    lease: float = 60.0  # seconds without a heartbeat after which a claim is taken over
    writers: int = 4  # threads that make PNGs
    patience: float = 60.0  # seconds of trying again where the output folder fails

    @property
    def rows_folder(self) -> str:
        """Where paths in rows go on from: the folder of their file, or for standard input the current one."""
        of_stdin = self.prompts_file == "-"
        return "" if of_stdin else os.path.dirname(os.path.expanduser(self.prompts_file))

    def validate(self) -> None:
        """Raises UserError for what is wrong with any model; the rest is checked when it is loaded."""
        if self.prompts:
            raise UserError(
                "prompts stand in the file of --prompts_file; leave out those on the command line"
            )
        if self.frames is not None or self.animate or self.words:
            raise UserError("frames, animate and words are for single pictures; leave them out of a job")
        if self.format not in FORMATS:
            raise UserError(
                f"format={self.format!r} is unknown{nearest(self.format, FORMATS)}; "
                f"write {', '.join(FORMATS)}"
            )
        if self.elastic and (self.processes, self.process_id, self.coordinator) != (None, None, None):
            raise UserError("elastic workers need no numbers; leave out --processes and --process_id")
        if self.lease != JobConfig.lease and not self.elastic:
            raise UserError(f"lease={self.lease} is of claims, and there are none: write --elastic, too")
        if self.coordinator is not None and not self.split_params:
            raise UserError(
                f"coordinator={self.coordinator!r}: processes meet only where they share a model; leave it "
                "out, or write --parallel jit --split_params, too"
            )
        ranges = {"shard_size": (1, MAX_PICTURES), "writers": (1, 64), "lease": (1, 86400)}
        self.check_ranges(ranges | {"patience": (0, 86400)})
        self.check_drawing()

"""The flags of launch.evaluate for FID and CLIP score; what is done with them is in launch/judging.py."""

from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from engine.config import DRAWN, OF_THE_WAY, DataConfig, JobConfig
from engine.errors import UserError
from launch import cli

OUT = "results"
FLAGS: cli.Groups = {
    "FID and CLIP score: which pictures": {
        "prompts_file": (
            "FILE",
            "draws each row of it: .txt (a prompt a line), .jsonl, .csv or .parquet as launch.generate\n"
            "reads them, or - for standard input. --num_prompts N: the first N rows",
        ),
        "pictures": (
            "PATH",
            "in place of drawing: what launch.generate has made (a job may be on s3:// or gs://, too), a\n"
            "folder of pictures, or shards (.tar, .arrayrecord, .parquet)",
        ),
        "kind": ("KIND", "files, webdataset, arrayrecord or parquet, where --pictures holds several"),
        "caption_field": ("NAME", "in JSON and Parquet; without it caption, text or prompt"),
    },
    "FID and CLIP score: with what": {
        "clip": ("FOLDER", "a CLIP as transformers saves it, for CLIP score"),
        "inception": ("FILE", "FID's network, torch-fidelity's weights as .safetensors"),
        "reference": ("PATH", "real pictures that FID compares with: a folder, or .npz with mu and sigma"),
        "save_reference": ("FILE", "writes the statistics of that folder as .npz, for the next time"),
        "out": ("FOLDER", f"for evaluation.json and best-and-worst.png (default {OUT})"),
    },
    "FID and CLIP score: how to draw, beside the above": {
        "negative_prompt": ("TEXT", "what to steer away from"),
        "embedding": ("FILE", "as in launch.generate; several with commas between them"),
        "decoder": ("FOLDER", "as in launch.generate, and so are those below"),
        "refiner": ("FOLDER", "a second model for the last part of the way"),
        "upscaler": ("FILE", "enlarges each picture before it is judged"),
        "prompt_weights": ("", "brackets in prompts say how much words count"),
        "long_prompts": ("", "reads prompts in parts where they are too long, in place of cutting them"),
        "clip_skip": ("N", "layers of the text encoders that are left out at their end"),
        "refiner_start": ("S", "share of the way that the model goes before it"),
        "controlnet": (
            "FOLDER[=SCALE]",
            "a ControlNet or T2I-Adapter of the model; several with commas between them",
        ),
        "control_image": ("FILE", "what it sees, for the rows that have none of their own"),
        "control_kind": ("KIND", "what of it: edges, grey, mosaic or none; without this what it has learned"),
        "control_mode": ("KIND", "for a ControlNet union: canny, depth, openpose, ...; several with commas"),
        "control_start": ("S", "share of the steps before which it adds nothing"),
        "control_end": ("S", "share of the steps behind which it adds nothing"),
        "ip_adapter": ("FILE[=SCALE]", "an IP-Adapter of the model; several with commas between them"),
        "image_prompt": ("FILE", "what it reads, for the rows that have none of their own"),
        "image_encoder": ("FOLDER", "CLIP's image encoder, by which it reads"),
        "ip_adapter_layers": ("NAMES", "blocks of the U-Net to which it adds something"),
        "grid": ("NAME", "how noise levels are spread"),
        "guidance_start": ("S", "share of the steps before which there is no guidance"),
        "guidance_end": ("S", "share of the steps behind which there is none"),
        "guidance_rescale": ("S", "share of the contrast that guidance adds which is taken away again"),
        "pag_scale": ("S", "scale of the guidance away from perturbed attention"),
        "pag_layers": ("NAME", "blocks of the U-Net in which it is perturbed"),
        "cache_interval": ("N", "compute all of the U-Net at every Nth step"),
        "merge_tokens": ("S", "share of the tokens that join others like them"),
        "original_size": ("WxH", "told to SDXL, size of a picture before it was scaled and cropped"),
        "crop_from": ("X,Y", "told to SDXL, where the crop begins"),
        "target_size": ("WxH", "told to SDXL, size of the picture in the end"),
        "negative_size": ("WxH", "told to SDXL, original size of those to steer away from"),
        "hires": ("N", "draw pictures over at N times their size"),
        "hires_strength": ("S", "how much of them is forgotten then"),
        "hires_steps": ("N", "of which that is the share"),
        "judge": ("FOLDER", "a CLIP that chooses the best of several; another than --clip, to be fair"),
        "best_of": ("N", "candidates that are drawn of each picture"),
        "height": ("PIXELS", "without it the size that the model was trained for"),
        "width": ("PIXELS", "likewise"),
        "dtype": ("TYPE", "of the model: float32 or bfloat16"),
        "quantize": ("TYPE", "its U-Net in 8 bits: int8 or fp8"),
        "tile": ("PIXELS", "decodes in overlapping tiles of this side"),
        "parallel": ("MODE", "over all local devices: shard_map, jit or pmap"),
        "split_params": ("", "with --parallel jit: splits the model over the devices"),
    },
}
SHARED = ("model", "lora", "seed", "sampler", "steps", "guidance_scale", "batch_size")  # with the probe
OWN = (
    *("negative_prompt", "embedding", "decoder", "refiner", "controlnet", "control_image"),
    *("control_kind", "control_mode", "ip_adapter", "image_prompt", "image_encoder", "ip_adapter_layers"),
    *("judge", "upscaler", "prompt_weights", "long_prompts", "clip_skip", "height", "width"),
    *OF_THE_WAY,
    *("dtype", "parallel", "split_params", "quantize", "tile"),
)
DRAWING = (*SHARED, *OWN)  # options of JobConfig
READING = ("kind", "caption_field")
KINDS = dict.fromkeys(("prompts_file", "pictures", *READING), str)
KINDS |= dict.fromkeys(("clip", "inception", "reference", "save_reference", "out"), str)
KINDS |= {name: kind for name, kind in get_type_hints(JobConfig).items() if name in OWN}


def is_asked_for(options: Mapping[str, Any]) -> bool:
    """Whether a flag of FID or CLIP score alone was given; `options`: without defaults for these flags."""
    return not (KINDS.keys() - {"out"}).isdisjoint(options)


def main(argv: Sequence[str], kinds: Mapping[str, Any]) -> int:
    """From the command line to figures; returns the exit code.

    Args:
      kinds: of the flags of launch.evaluate that are not in KINDS.
    """
    _, given = cli.parse(argv, {**kinds, **KINDS}) or ([], {})
    check(given)
    with cli.stops_put_off():
        from launch import judging  # JAX comes with it: help, and mistakes in flags, should be instant

        return judging.run(given)


def check(given: Mapping[str, Any]) -> None:
    """Raises UserError for flags that are wrong in themselves, or do not go together."""
    known = {*KINDS, *DRAWING, "num_prompts"}
    if foreign := [name for name in given if name not in known]:
        raise UserError(f"--{foreign[0]} is not for FID or CLIP score; leave it out")
    if empty := [name for name in KINDS if name != "negative_prompt" and given.get(name) == ""]:
        raise UserError(f"--{empty[0]} is empty; write a value, or leave it out")
    foreign = [name for name in OWN if name in given]
    if foreign and given.keys().isdisjoint(("prompts_file", "pictures", "clip", "inception")):
        raise UserError(
            f"--{foreign[0]} is for FID and CLIP score of --prompts_file FILE; without one, leave it out"
        )
    check_instruments(given)
    if "prompts_file" in given and "pictures" in given:
        raise UserError("--prompts_file draws pictures and --pictures reads them; leave out one")
    if "prompts_file" not in given and "pictures" not in given and "save_reference" not in given:
        raise UserError(
            "no pictures to judge: write --prompts_file FILE to draw some, or --pictures PATH for some that "
            "are there"
        )
    if "prompts_file" in given:
        if given.get("num_prompts", 1) < 1:
            raise UserError(f"num_prompts={given['num_prompts']}: write 1 or more")
        of_reading = [name for name in READING if name in given]
        if of_reading:
            raise UserError(f"--{of_reading[0]} is for --pictures; leave it out")
        drawing_config(given).validate()
    elif of_drawing := [name for name in ("num_prompts", *DRAWING) if name in given]:
        raise UserError(f"--{of_drawing[0]} is for drawing; leave it out, or write --prompts_file FILE")
    if given.get("kind") == DRAWN:
        raise UserError(f"--kind={DRAWN} has no pictures to read: leave it out")
    if "kind" in given:
        with cli.data_by_flags(READING):
            DataConfig(paths=("pictures",), kind=given["kind"]).validate()


def check_instruments(given: Mapping[str, Any]) -> None:
    """The same of the flags that say with what to measure."""
    if "inception" not in given:
        for name in ("reference", "save_reference"):
            if name in given:
                raise UserError(f"--{name} is for FID; write --inception FILE, its network, too")
        if "clip" not in given:
            raise UserError(
                "nothing to measure with: write --clip FOLDER for CLIP score, --inception FILE and "
                "--reference PATH for FID, or all three"
            )
    elif "reference" not in given:
        raise UserError("--inception is for FID; write --reference PATH, pictures to compare with, too")
    if "save_reference" in given:
        if is_npz(given["reference"]):
            raise UserError(
                f"{given['reference']} is a file of statistics already; leave out --save_reference"
            )
        if not is_npz(given["save_reference"]):
            raise UserError(f"save_reference={given['save_reference']}: write a name that ends in .npz")


def is_npz(path: str) -> bool:
    """Whether it is the path of a file of statistics, by its name."""
    return path.endswith(".npz")


def drawing_config(given: Mapping[str, Any]) -> JobConfig:
    """What to draw, as launch.generate would have it in a job; seed 0, so that figures can be compared."""
    chosen = {name: given[name] for name in ("prompts_file", *DRAWING) if name in given}
    return JobConfig(**{"seed": 0, **chosen})

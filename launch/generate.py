"""Draws what sentences ask for, each into a PNG that remembers how it was made.

  python -m launch.generate PROMPT... [flags]

  python -m launch.generate "a fox on a skateboard at sunset"
  python -m launch.generate "a cat" "a dog" --num_images 4 --seed 7
  python -m launch.generate "a red car at night" --frames 8 --animate
  python -m launch.generate --like out/00000-a-cat.png --steps 100

Many pictures, as a job that goes on where it was stopped when the same command is run again:

  python -m launch.generate --prompts_file prompts.csv --out DIR --format webdataset
  python -m launch.generate --status DIR | --verify DIR | --merge DIR

Pictures are named INDEX-PROMPT.png. The index counts from 0 in every run; seed and index together are the
noise that a picture starts from, so the same command with the same seed draws the same pictures again.
Where another picture has the name already, -2, -3, ... is added; nothing is lost.

Paths of pictures (of a job: of its shards) go to stdout, all else to stderr. Exit code: 0 all drawn; 1 some
could not be drawn, or were held back (of a job: failures.jsonl says why); 2 a mistake, explained in one
line; 70 a fault of the program; 75 a network failed for longer than --patience, or hosts did not meet;
130 stopped with Ctrl-C, 143 with SIGTERM (what was drawn stays).
"""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from engine.config import GenerateConfig, JobConfig
from engine.errors import UserError
from launch import cli

FLAGS: cli.Groups = {
    "What to draw": {
        "negative_prompt": ("TEXT", "what to steer away from"),
        "num_images": ("N", "pictures of each prompt"),
        "seed": ("N", "0 to 2^64 - 1; without it a fresh one is drawn and printed"),
        "first_index": ("N", "index of the first picture"),
        "like": ("PICTURE", "draw this PNG again: its settings stand in for the defaults below and above"),
    },
    "A picture to change (in a job: for the rows that have none of their own)": {
        "image": ("FILE", "draws it anew, from --strength on; its size is brought near the model's own"),
        "mask": ("FILE", "as large: what is white is drawn anew, what is black stays as it is"),
        "strength": (
            "S",
            "0 to 1, how much of the picture is forgotten, and the share of the steps that is taken;\n"
            "without it 0.8, and with a mask 1",
        ),
        "image_guidance_scale": (
            "G",
            "how strictly InstructPix2Pix keeps to the picture; only it reads this",
        ),
    },
    "What a ControlNet or T2I-Adapter sees (in a job: for the rows that have none of their own)": {
        "controlnet": (
            "FOLDER",
            "a ControlNet or T2I-Adapter of the model, in the format of PyTorch diffusers, or a single\n"
            ".safetensors of one. FOLDER=SCALE multiplies what it adds; several with commas between them",
        ),
        "control_image": (
            "FILE",
            "the picture of edges, depth, poses, ... that it was made for; it decides on the size, as\n"
            "--image does. With several ControlNets one for each, with commas between them",
        ),
        "control_kind": (
            "KIND",
            "show it the edges, grey or mosaic of that picture, or with none all of it; without this\n"
            "what a ControlNet of launch.train has learned, and others all of it",
        ),
        "control_mode": (
            "KIND",
            "of which kind that picture is, for a ControlNet union, which sees many: canny, depth, hed,\n"
            "inpaint, lineart, mlsd, normal, openpose, scribble, segment, tile, or a number. A union that\n"
            "is named several times sees several at once; one for each, with commas between them",
        ),
        "control_start": ("S", "share of the steps before which it adds nothing; without it 0"),
        "control_end": ("S", "share of the steps behind which it adds nothing, and costs nothing"),
    },
    "Several of each, and the best of them": {
        "judge": (
            "FOLDER",
            "a CLIP, as transformers saves it, that says how well each picture shows its prompt: 100\n"
            "times their cosine, the CLIP score. It is told, and stands in the manifests of a job",
        ),
        "best_of": (
            "N",
            "draw N of each picture, and keep the one that it likes best. Its index says which it was:\n"
            "by that it is drawn again, without the others",
        ),
    },
    "What an IP-Adapter reads (in a job: for the rows that have none of their own)": {
        "ip_adapter": (
            "FILE",
            "an IP-Adapter of the model, plain, plus or full: a picture is a prompt beside the words.\n"
            "FILE=SCALE multiplies what it adds; several with commas between them",
        ),
        "image_prompt": (
            "FILE",
            "that picture; its middle, a square, is read. With several IP-Adapters one for each, with\n"
            "commas between them",
        ),
        "image_encoder": (
            "FOLDER",
            "CLIP's image encoder, by which it reads; without it image_encoder/ beside the file, or in\n"
            "the model's folder",
        ),
        "ip_adapter_layers": (
            "NAME",
            "blocks of the U-Net to which it adds something, with commas between them; without this\n"
            "all. Of SDXL, up_blocks.0.attentions.1 takes the style, and not what is seen",
        ),
    },
    "How": {
        "model": ("FOLDER", "in the layout of PyTorch diffusers, or the one in the package"),
        "lora": (
            "FILE[=SCALE]",
            "changes the model by a LoRA, in the format of PyTorch diffusers or of kohya's scripts, or by\n"
            "LyCORIS' LoHa, LoKr or LoCon: 1 is as it was trained, 0 is nothing. Several with commas\n"
            "between them",
        ),
        "embedding": (
            "FILE",
            "a new word for prompts, by textual inversion, in the format of PyTorch diffusers or of\n"
            "AUTOMATIC1111, where it is the file's name. Several with commas between them",
        ),
        "decoder": (
            "FOLDER",
            "decodes with another autoencoder than the model's own, such as TAESD: its folder, a model's\n"
            "with vae/ in it, or a .safetensors file of one that is built as the model's own",
        ),
        "safety_checker": (
            "FOLDER",
            "hold back pictures in which the safety checker of Stable Diffusion 1 finds a concept that it\n"
            "knows: its folder, or that of a model with safety_checker/ in it",
        ),
        "prompt_weights": (
            "",
            "brackets say how much words count, as in AUTOMATIC1111's web UI: (fox) 1.1 times, [fox] that\n"
            "much less, (fox:1.4) 1.4 times; a backslash before a bracket makes it a letter",
        ),
        "long_prompts": (
            "",
            "reads prompts in parts where they are too long for the model, in place of cutting them.\n"
            "BREAK begins a part anywhere",
        ),
        "clip_skip": (
            "N",
            "leave out the last N layers of the text encoders, for models that were trained so. Of\n"
            "Stable Diffusion 1, AUTOMATIC1111's 2 is 1 here; of SDXL it is 0, the usual",
        ),
        "refiner": (
            "FOLDER",
            "hands over the last part of the way to a second model, such as SDXL's refiner",
        ),
        "refiner_start": ("S", "share of the way that the model goes before its refiner; without it 0.8"),
        "sampler": (
            "NAME",
            "ddim, ddpm, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde, pndm,\n"
            "lms, deis, unipc, dpm_2, dpm_2_ancestral, lcm, tcd, dpmpp_2s_ancestral, dpmpp_sde or\n"
            "dpmpp_3m_sde;\n"
            "without it the one that the model names",
        ),
        "grid": (
            "NAME",
            "how noise levels are spread: linspace, leading, trailing, sgm_uniform, karras, exponential\n"
            "or ays; without it as the sampler and the model say. Turbo and Lightning want trailing; ays\n"
            "(Align Your Steps) is for few steps, about 10, of Stable Diffusion 1, 2 and XL",
        ),
        "steps": ("N", "more is finer and slower"),
        "guidance_scale": (
            "G",
            "how strictly to follow the prompt; 1 is no guidance, and twice as fast",
        ),
        "guidance_start": ("S", "share of the steps before which there is no guidance; without it 0"),
        "guidance_end": ("S", "share of the steps behind which there is none, so that they cost half"),
        "guidance_rescale": (
            "S",
            "share, 0 to 1, of the contrast that guidance adds which is taken away again; 0.7 suits\n"
            "models that begin at pure noise (rescale_betas_zero_snr), whose pictures burn out without it",
        ),
        "pag_scale": (
            "S",
            "lead pictures away from what the model makes of them where their pixels do not look at each\n"
            "other, for forms that hold together (perturbed-attention guidance): 3 is usual. A step costs\n"
            "half as much more; with --guidance_scale 1, twice as much",
        ),
        "pag_layers": (
            "NAME",
            "blocks of the U-Net in which they do not, with commas between them; without it mid_block",
        ),
        "cache_interval": (
            "N",
            "compute all of the U-Net at every Nth step, and between them only its first level:\n"
            "less work for almost the same picture (DeepCache)",
        ),
        "merge_tokens": (
            "S",
            "share of the tokens, up to 0.75, that join others like them where pixels attend to each\n"
            "other at the finest level (ToMe); of use for large pictures",
        ),
        "height": ("PIXELS", "without it the size that the model was trained for"),
        "width": ("PIXELS", "likewise"),
    },
    "What SDXL is told of the picture (without this: that it was neither scaled nor cropped)": {
        "original_size": ("WxH", "its size before it was, in pixels: larger ones are of finer pictures"),
        "crop_from": ("X,Y", "the place in it where the crop begins, from the left and from the top"),
        "target_size": ("WxH", "its size in the end"),
        "negative_size": (
            "WxH",
            "original size of those to steer away from: small ones are of blurred pictures",
        ),
    },
    "Larger than the model was trained for": {
        "hires": (
            "N",
            "draw the picture, enlarge it to N times its size, such as 2, and draw it over: the whole is\n"
            "as at the size that the model knows, and what it shows is finer. With --upscaler, that is\n"
            "what enlarges it between the two",
        ),
        "hires_strength": (
            "S",
            "0 to 1, how much of it is forgotten when it is drawn over, and the share of the steps that\n"
            "is taken; without it 0.5",
        ),
        "hires_steps": ("N", "of which that is the share; without it as many as --steps"),
    },
    "On which devices": {
        "parallel": ("MODE", "over all local devices: shard_map, jit or pmap"),
        "split_params": (
            "",
            "with --parallel jit: splits the model over the devices, where one is too small for it;\n"
            "the processes of a job then draw every batch together",
        ),
        "dtype": (
            "TYPE",
            "of the model: float32 or bfloat16; CPUs, which are slow in bfloat16, store it and\n"
            "compute in float32, which takes more memory than float32 alone",
        ),
        "quantize": (
            "TYPE",
            "int8 or fp8: store the U-Net's kernels in 8 bits, in half of bfloat16's memory; on CPUs\n"
            "it saves none",
        ),
        "tile": (
            "PIXELS",
            "decodes larger pictures in overlapping tiles of this side, where memory does not suffice;\n"
            "0 is whole",
        ),
        "batch_size": (
            "N",
            "pictures that each device draws at once; without it up to 16. The last batch is\n"
            "filled up: with the same N, pictures are equal bit for bit on any number of devices",
        ),
    },
    "What to write": {
        "out": ("FOLDER", "made if it is not there; a job's may be s3://BUCKET/FOLDER or gs://..., too"),
        "upscale": ("N", "enlarge pictures to N times their size"),
        "upscaler": (
            "FILE",
            "enlarge them on the devices by a network made for it: the .safetensors of an ESRGAN, a\n"
            "Real-ESRGAN or a compact one. Its own factor decides, unless --upscale says\n"
            "another, or --hires",
        ),
        "frames": ("N", "beside each picture a strip of N stages from static to picture"),
        "animate": ("", "beside each picture an animated WebP of its stages"),
        "words": (
            "",
            "beside each picture a sheet of which word steered what: the picture, lit where it heeded\n"
            "the word more than in the mean of its places (at most so many times as the number says)",
        ),
    },
    "A job": {
        "prompts_file": (
            "FILE",
            ".txt (a prompt a line, those with # in front left out), .jsonl, .csv or .parquet\n"
            "(columns: prompt; and where a row has its own: id, negative_prompt, seed, index, steps,\n"
            "sampler, width, height, guidance_scale, image, mask, strength, image_guidance_scale,\n"
            "control_image, image_prompt, lora; all others are carried through), or - for standard input.\n"
            "Paths in it go from its folder on, and do not lead out of it",
        ),
        "format": ("FORMAT", "of its shards: files, webdataset, arrayrecord or parquet"),
        "shard_size": ("N", "pictures of a shard; a shard is in memory until it is written"),
        "processes": ("N", "that share the job; without it what SLURM, Open MPI, JobSet or the TPU VM says"),
        "process_id": ("N", "which of them this is, from 0"),
        "coordinator": ("HOST:PORT", "of process 0, with --split_params; without it what the cluster says"),
        "elastic": ("", "take shards by claims in the folder: start and stop as many workers as you like"),
        "lease": ("SECONDS", "without a sign of life after which the claim of a worker is taken over"),
        "writers": ("N", "threads that make PNGs"),
        "patience": ("SECONDS", "of trying again where the folder cannot be written"),
        "status": ("FOLDER", "shards done, images/s, time left and failures of the job there"),
        "verify": (
            "FOLDER",
            "reads every picture of the job there again, and checks that each is there once",
        ),
        "merge": ("FOLDER", "writes index.jsonl, a line for each picture of the job there"),
    },
}
REPORTS = ("status", "verify", "merge")


def main(argv: Sequence[str]) -> int:
    """From the command line to pictures; returns the exit code."""
    command = read_command(argv)
    if command is None:
        cli.say(cli.help_text(__doc__ or "", FLAGS, vars(JobConfig())))
        return cli.DONE
    given, other = command
    with cli.stops_put_off():
        # JAX comes with these: help, and mistakes in flags, should be instant.
        if "prompts_file" in given:
            from launch import bulk

            return bulk.run(given)
        for kind in REPORTS:
            if kind in other:
                from launch import reports

                return reports.report(kind, other[kind])
        from launch import drawing

        return drawing.run(given, other.get("like"))


def read_command(argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]] | None:
    """The options of JobConfig that were given, and --like, --status, ...; None where help is asked for."""
    kinds = typing.get_type_hints(JobConfig)
    del kinds["prompts"]
    parsed = cli.parse(argv, kinds | dict.fromkeys(("like", *REPORTS), str))
    if parsed is None:
        return None
    prompts, given = parsed
    other = {name: given.pop(name) for name in ("like", *REPORTS) if name in given}
    if prompts:
        given["prompts"] = tuple(prompts)
    check(given, other)
    if len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        cli.tell(f"warning: {len(prompts)} prompts of one word each; put a sentence in quotes")
    return given, other


def check(given: dict[str, Any], other: dict[str, str]) -> None:
    """Raises UserError for flags that are wrong in themselves, or do not go together."""
    if report := [name for name in REPORTS if name in other]:
        if given or len(other) > 1:
            raise UserError(f"--{report[0]} FOLDER stands alone; leave out the rest")
    elif "prompts_file" in given:
        if "like" in other:
            raise UserError("--like draws one picture again; leave out it or --prompts_file")
        JobConfig(**given).validate()
    else:
        ours = {field.name for field in dataclasses.fields(GenerateConfig)}
        if foreign := [name for name in given if name not in ours]:
            raise UserError(f"--{foreign[0]} is for a job; write --prompts_file FILE too")
        if "like" not in other:
            config = GenerateConfig(**given)
            config.validate()
            config.check_guidance()


def run(argv: Sequence[str]) -> int:
    """`python -m launch.generate` inside another program: prints, and returns the exit code."""
    return cli.exit_code(main, argv)


if __name__ == "__main__":
    cli.main(main)

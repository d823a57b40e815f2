"""One picture drawn here and in PyTorch diffusers: same folder, same start latents and noise."""

import contextlib
import itertools
import pathlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import numpy as np
import tomesd
import torch
from PIL import Image

import engine
from configs import scenes
from engine.diffusion import noise
from engine.requests import Given
from tests.parity.common import nchw
from tests.tiny import tiny_controlnet, tiny_folder, tiny_t2i_adapter, tiny_union

SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"steps_offset": 1, "set_alpha_to_one": False}
V = {"prediction_type": "v_prediction"}
SCHEDULERS = {
    "pndm": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **SCALED, **LEADING},
    "ddim, v": {"_class_name": "DDIMScheduler", "clip_sample": False, **V, **SCALED, **LEADING},
    "ddim, x0": {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "prediction_type": "sample",
        **SCALED,
        **LEADING,
    },
    "euler": {"_class_name": "EulerDiscreteScheduler", **SCALED},
    "euler, v": {"_class_name": "EulerDiscreteScheduler", **V, **SCALED},
    "euler, trailing": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", **SCALED},
    "heun": {"_class_name": "HeunDiscreteScheduler", **SCALED},
    "dpm_2": {"_class_name": "KDPM2DiscreteScheduler", **SCALED},
    "lms": {"_class_name": "LMSDiscreteScheduler", **SCALED},
    "deis": {"_class_name": "DEISMultistepScheduler", **SCALED},
    "unipc": {"_class_name": "UniPCMultistepScheduler", **SCALED},
    "dpmpp_2m": scenes.get_config().scheduler,
    "lcm": {"_class_name": "LCMScheduler", **SCALED, **LEADING},
    "tcd": {"_class_name": "TCDScheduler", **SCALED, **LEADING},
    "edm": {"_class_name": "EDMDPMSolverMultistepScheduler"},
    "edm, v": {
        "_class_name": "EDMEulerScheduler",
        "sigma_max": 120.0,
        "sigma_data": 1.0,
        "sigma_schedule": "exponential",
        **V,
    },
}
PROMPTS = ["a red fox at night", "a cat above a dog"]
NEGATIVES = ["a blue car", ""]
STEPS, SCALE, SEED = 10, 4.0, 3
# Of schedulers that call the network more than once an interval: the interval of a call.
INTERVAL_OF = {"heun": lambda call: call // 2, "pndm": lambda call: max(call - 1, 0)}
IN_FLOAT32 = {"torch_dtype": torch.float32}


class How(NamedTuple):
    """How a picture is drawn."""

    steps: int = STEPS
    scale: float = SCALE
    negatives: Any = NEGATIVES
    image: bool = False
    mask: bool = False
    strength: float = 1.0
    refiner: dict | None = None  # overrides of tiny_model
    start: float = 0.4  # of the refiner
    size: tuple[int, int] = (16, 16)
    tile: int = 0
    guidance_end: float | None = None
    guidance_rescale: float | None = None
    pag_scale: float | None = None
    pag_layers: str | None = None  # None: mid_block
    cache_interval: int | None = None
    merge_tokens: float | None = None
    clip_skip: int = 0
    controls: tuple[float, ...] = ()  # ControlNets, each with its scale
    modes: tuple[int, ...] = ()  # these are one union, whose pictures are of these kinds
    adapters: tuple[float, ...] = ()  # T2I-Adapters, likewise
    adapter: dict | None = None  # overrides of tiny_t2i_adapter
    control_start: float | None = None
    control_end: float | None = None
    hires: float | None = None  # with `strength`
    told: tuple[
        tuple[int, int], ...
    ] = ()  # original size, top and left of the crop, target size, negative original
    # (folder) -> what `engine.load` is given beside it, and what does the same to a pipeline of diffusers
    beside: Callable[[pathlib.Path], tuple[dict, Callable]] | None = None


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of uint8 pictures."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def both(at: pathlib.Path, model: dict, scheduler: str, how: How) -> tuple[np.ndarray, np.ndarray]:
    """The two pictures (B H W 3) as they are drawn here and there."""
    folder = tiny_folder(at / "model", **model, scheduler=SCHEDULERS[scheduler])
    options, apply = how.beside(folder) if how.beside else ({}, lambda pipeline: None)
    if how.refiner:
        refiner = tiny_folder(at / "refiner", seed=1, **how.refiner, scheduler=SCHEDULERS[scheduler])
        options["refiner"] = refiner
    if how.modes:
        union = tiny_union(at / "union", **model["unet"])
    nets = [
        (
            union if how.modes else tiny_controlnet(at / f"controlnet-{i}", i, **model.get("unet", {})),
            scale,
        )
        for i, scale in enumerate(how.controls)
    ] + [
        (tiny_t2i_adapter(at / f"adapter-{i}", seed=i, **(how.adapter or {})), scale)
        for i, scale in enumerate(how.adapters)
    ]
    options |= {"controlnet": nets, "control_mode": how.modes}
    ours = engine.load(folder, tile=how.tile, clip_skip=how.clip_skip, **options)
    here = ours.generate(
        PROMPTS,
        how.negatives,
        steps=how.steps,
        guidance_scale=how.scale,
        height=how.size[0],
        width=how.size[1],
        latents=start_noise(how),
        seed=SEED,
        given=[Given(*each) for each in zip(*_given(how), _controls(how), strict=True)],
        strength=None if how.hires else how.strength,
        hires=how.hires,
        **_told_here(how),
        hires_strength=how.strength if how.hires else None,
        refiner_start=how.start if how.refiner else None,
        guidance_end=how.guidance_end,
        guidance_rescale=how.guidance_rescale,
        pag_scale=how.pag_scale,
        pag_layers=how.pag_layers,
        cache_interval=how.cache_interval,
        merge_tokens=how.merge_tokens,
        control_start=how.control_start,
        control_end=how.control_end,
    )
    theirs = pipeline(folder, model, how, [folder for folder, _ in nets])
    apply(theirs)
    if how.tile:
        theirs.vae.enable_tiling()
    if how.cache_interval is not None:
        _keeps_deep_features(theirs.unet, how.cache_interval, INTERVAL_OF.get(scheduler, lambda call: call))
    with _certain(theirs, how):
        there = drawn_there(theirs, options.get("refiner"), how)
    if how.hires:
        there = drawn_over(theirs, there, how)
    if how.mask:  # we put back what the mask keeps, which an autoencoder changes a little
        images, masks = _given(how)
        there = np.where(np.stack(masks)[..., None] == 1, there, np.stack(images))
    return here, there


def _told_here(how: How) -> dict[str, str]:
    if not how.told:
        return {}
    (height, width), (top, left), (high, wide), (least_high, least_wide) = how.told
    sizes = {"original_size": f"{width}x{height}", "target_size": f"{wide}x{high}"}
    return sizes | {"crop_from": f"{left},{top}", "negative_size": f"{least_wide}x{least_high}"}


def draw_in_pytorch(folder: pathlib.Path, latents: np.ndarray, **options: Any) -> np.ndarray:
    """What diffusers draws with a folder of Stable Diffusion 1 or 2."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, **IN_FLOAT32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(PROMPTS, latents=torch.from_numpy(nchw(latents).copy()), output_type="np", **options)
    return np.round(images.images * 255).astype(np.uint8)


def start_noise(how: How) -> np.ndarray:
    height, width = how.size
    return np.random.default_rng(0).standard_normal((2, height // 2, width // 2, 4), np.float32)


def _controls(how: How) -> list[tuple[np.ndarray, ...]]:
    """Of each of the two pictures, what each ControlNet sees."""
    shape = (2, len(how.controls) + len(how.adapters), *how.size, 3)
    return [tuple(each) for each in np.random.default_rng(6).integers(0, 256, shape, dtype=np.uint8)]


def _given(how: How) -> tuple[list[np.ndarray | None], list[np.ndarray | None]]:
    """Two pictures, smooth enough to be told apart, and masks along the cells of latents."""
    if not how.image:
        return [None, None], [None, None]
    noise = np.random.default_rng(5).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    images = [*noise.repeat(4, axis=1).repeat(4, axis=2)]
    if not how.mask:
        return images, [None, None]
    masks = np.zeros((2, 16, 16), np.float32)
    masks[0, 4:12, 2:10] = masks[1, :, 8:] = 1
    return images, [*masks]


def pipeline(folder: pathlib.Path, model: dict, how: How, nets: Sequence[pathlib.Path] = ()) -> Any:
    """The class of diffusers that draws so."""
    family = "StableDiffusionXL" if "text_encoder_2" in model else "StableDiffusion"
    if model.get("unet", {}).get("in_channels") == 8:
        end = "InstructPix2Pix"
    else:
        end = "Inpaint" if how.mask else "Img2Img" if how.image else ""
    options: dict[str, Any] = {} if "XL" in family else {"safety_checker": None}
    if how.adapters:
        family += "Adapter"
        found = [diffusers.T2IAdapter.from_pretrained(net) for net in nets]
        options["adapter"] = found[0] if len(found) == 1 else found
    elif how.modes:
        family += "ControlNetUnion"
        options["controlnet"] = diffusers.ControlNetUnionModel.from_pretrained(nets[0])
    elif nets:
        family += "ControlNet"
        options["controlnet"] = [diffusers.ControlNetModel.from_pretrained(net) for net in nets]
    if how.pag_scale is not None:
        family += "PAG"
        options["pag_applied_layers"] = (how.pag_layers or "mid_block").split(",")
    pipeline = getattr(diffusers, f"{family}{end}Pipeline").from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def _certain(pipeline: Any, how: How, own: np.ndarray | None = None) -> Iterator[None]:
    """Latents are the means of their distributions; the noise on given pictures is this, or `start_noise`."""
    gaussian = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    drawn = torch.from_numpy(nchw(start_noise(how) if own is None else own).copy())
    with contextlib.ExitStack() as stack:
        patch = mock.patch.object(gaussian, "sample", lambda self, generator=None: self.mean)
        stack.enter_context(patch)
        if how.image:
            where = f"{type(pipeline).__module__}.randn_tensor"
            stack.enter_context(mock.patch(where, lambda shape, **_: drawn))
        yield


def _words_less_deep(pipeline: Any, negatives: list[str], clip_skip: int) -> dict[str, Any]:
    """Theirs leaves layers out of prompts alone: negative ones are read as if they were prompts."""
    encoder = pipeline.text_encoder  # whose norm diffusers looks for where transformers 4 had it
    vars(encoder)["text_model"] = types.SimpleNamespace(final_layer_norm=encoder.final_layer_norm)
    words, _, *pooled = pipeline.encode_prompt(
        negatives,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=clip_skip,
    )
    found = {"clip_skip": clip_skip, "negative_prompt_embeds": words}
    return found | ({"negative_pooled_prompt_embeds": pooled[0]} if pooled else {})


def drawn_there(
    pipeline: Any, refiner: pathlib.Path | None, how: How, over: list[Any] | None = None
) -> np.ndarray:
    """over: pictures to change, in place of those of `_given`."""
    words = {"num_inference_steps": how.steps, "guidance_scale": how.scale}
    if how.pag_scale is not None:
        words["pag_scale"] = how.pag_scale
    if how.guidance_rescale is not None:
        words["guidance_rescale"] = how.guidance_rescale
    if how.told:
        names = "original_size", "crops_coords_top_left", "target_size", "negative_original_size"
        words |= dict(zip(names, how.told, strict=True))
        words |= {f"negative_{name}": words[name] for name in names[1:3]}
    if how.negatives is not None:
        many = isinstance(how.negatives, list) or "XL" not in type(pipeline).__name__
        words["negative_prompt"] = how.negatives if many else [how.negatives] * 2
    if how.clip_skip:
        words |= _words_less_deep(pipeline, words.pop("negative_prompt"), how.clip_skip)
    options: dict[str, Any] = {"output_type": "np"}
    if how.merge_tokens is not None:
        tomesd.apply_patch(pipeline, how.merge_tokens, use_rand=False)
    if how.guidance_end is not None:
        options["callback_on_step_end"] = _unguided_after(round(how.guidance_end * how.steps))
        options["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
    if how.adapters:
        shown = [
            torch.from_numpy(nchw(np.stack(e)).astype(np.float32) / 255)
            for e in zip(*_controls(how), strict=True)
        ]
        one = len(shown) == 1
        options["image"] = shown[0] if one else shown
        options["adapter_conditioning_scale"] = how.adapters[0] if one else list(how.adapters)
        if how.control_end is not None:  # of SDXL's alone
            options["adapter_conditioning_factor"] = how.control_end
    if how.controls:
        name = "control_image" if how.image or how.modes else "image"
        options[name] = [
            torch.from_numpy(nchw(np.stack(each)).astype(np.float32) / 255)
            for each in zip(*_controls(how), strict=True)
        ]
        options["controlnet_conditioning_scale"] = list(how.controls)
        # none, one for all, or one each: it knows no None in a list
        options["control_guidance_start"] = how.control_start or 0.0
        options["control_guidance_end"] = 1.0 if how.control_end is None else how.control_end
    if how.modes:
        options |= {"control_mode": list(how.modes), "controlnet_conditioning_scale": how.controls[0]}
    if how.image:
        images, masks = (over, []) if over else _given(how)
        options["image"] = torch.from_numpy(nchw(np.stack(images)).astype(np.float32) / 255)
        if "Pix2Pix" in type(pipeline).__name__:
            options["image_guidance_scale"] = 1.5
        else:
            options["strength"] = how.strength
        if how.mask:
            options |= {"mask_image": torch.from_numpy(np.stack(masks)[:, None])}
            options |= dict(zip(("height", "width"), how.size, strict=True))
    else:
        options["latents"] = torch.from_numpy(nchw(start_noise(how)).copy())
        options |= dict(zip(("height", "width"), how.size, strict=True))
    if how.told or how.modes:
        # Of several at once, it tells the negative sizes to some of the prompts; and the pictures that a
        # union sees are told apart by what else is in the batch.
        alone = [_alone(pipeline, options, words, row) for row in range(len(PROMPTS))]
        return np.round(np.concatenate(alone) * 255).astype(np.uint8)
    if refiner is None:
        return np.round(pipeline(PROMPTS, **options, **words).images * 255).astype(np.uint8)
    options |= {"denoising_end": how.start, "output_type": "latent"}
    half = pipeline(PROMPTS, **options, **words).images
    rest = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner, vae=pipeline.vae)
    rest.set_progress_bar_config(disable=True)
    images = rest(PROMPTS, image=half, denoising_start=how.start, output_type="np", **words).images
    return np.round(images * 255).astype(np.uint8)


def _alone(pipeline: Any, options: dict[str, Any], words: dict[str, Any], row: int) -> np.ndarray:
    """One of the pictures, drawn by itself."""
    own, rows = dict(options), slice(row, row + 1)
    for name in ("latents", "image", "control_image"):
        if name in own:
            shown = own[name]
            own[name] = [each[rows] for each in shown] if isinstance(shown, list) else shown[rows]
    words = words | {"negative_prompt": words["negative_prompt"][rows]}
    return pipeline(PROMPTS[rows], **own, **words).images


def drawn_over(pipeline: Any, images: np.ndarray, how: How) -> np.ndarray:
    """The pictures, enlarged by Pillow, as an img2img pipeline of the same parts draws them over."""
    height, width = (round(side * how.hires) for side in how.size)
    large = [Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS) for image in images]
    family = "StableDiffusionXL" if "XL" in type(pipeline).__name__ else "StableDiffusion"
    options: dict[str, Any] = {} if "XL" in family else {"requires_safety_checker": False}
    over = getattr(diffusers, f"{family}Img2ImgPipeline")(**pipeline.components, **options)
    over.set_progress_bar_config(disable=True)
    keys = noise.larger_keys(noise.image_keys(SEED, range(len(images))))
    drawn = np.asarray(noise.initial_noise(keys, (height // 2, width // 2, 4)))
    how = how._replace(hires=None, size=(height, width), image=True)
    with _certain(over, how, drawn):
        return drawn_there(over, None, how, large)


def _unguided_after(steps: int) -> Callable:
    """As the documentation of diffusers has it, for dynamic guidance."""

    def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if step + 1 != steps:
            return {}
        pipeline._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}

    return after_step


def _keeps_deep_features(unet: torch.nn.Module, every: int, interval_of: Callable[[int], int]) -> None:
    """Whatever the lower levels say, the last block hears what they said every few intervals."""
    calls, kept = itertools.count(), []

    def before(module: Any, args: tuple, options: dict) -> tuple[tuple, dict]:
        if interval_of(next(calls)) % every == 0:
            kept[:] = [options["hidden_states"]]
        # without guidance there is one pass, the second of those with it
        return args, options | {"hidden_states": kept[0][-len(options["hidden_states"]) :]}

    unet.up_blocks[-1].register_forward_pre_hook(before, with_kwargs=True)

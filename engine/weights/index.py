"""model_index.json: what a folder is, and which class each of its parts is, read and written.

`safety_checker`, `feature_extractor` and `add_watermarker` are not read: no picture depends on them, and a
folder without them is complete; so it is without `image_encoder`, which IP-Adapters alone may read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.config import nearest
from engine.types import UserError
from engine.weights.files import PICKLES, read_json, write_json
from engine.weights.kinds import DIFFUSERS_VERSION, KINDS, KNOWN

FILE = "model_index.json"
WORDS, INPAINTS, FOLLOWS = "words", "inpaints", "follows"  # what a U-Net's channels are made for
_FIRST = "StableDiffusion"  # 1 and 2
_XL = "StableDiffusionXL"
# Which class draws with a U-Net, and which starts from pictures with any.
ENDS = {WORDS: "Pipeline", INPAINTS: "InpaintPipeline", FOLLOWS: "InstructPix2PixPipeline"}
IMG2IMG = "Img2ImgPipeline"
NAMES = tuple(family + end for family in (_FIRST, _XL) for end in (*ENDS.values(), IMG2IMG))
OFFSET = tuple(_FIRST + end for end in (ENDS[WORDS], ENDS[INPAINTS], IMG2IMG))
# Of LCM, whose U-Net says by itself that it was distilled.
OF_OTHERS = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
NOT_READ = (
    *("safety_checker", "feature_extractor", "image_encoder"),
    *("requires_safety_checker", "add_watermarker", "requires_aesthetics_score"),
)
SIZED, SCORED = 6, 5  # numbers beside the words of SDXL, and of its refiner
ZEROS = "force_zeros_for_empty_prompt"
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")


class Index(NamedTuple):
    """What model_index.json says."""

    classes: Mapping[str, str]  # part -> class
    zeros: bool  # no negative prompt is zeros, in place of what the encoders say of an empty text
    offset: bool = False  # the timesteps of its grid begin at 1, see `folder.read_scheduler`

    @property
    def kinds(self) -> tuple[str, ...]:
        """The networks in the folder."""
        return tuple(kind for kind in PARTS if kind in self.classes)


PARTS = (*KINDS, "text_encoder_2")  # the networks of any folder that draws


def channels(unet: Any, vae: Any) -> str | None:
    """What the U-Net with this config takes: x alone, with it a mask and a picture, or a picture; or none."""
    latent = vae.latent_channels
    return {latent: WORDS, 2 * latent + 1: INPAINTS, 2 * latent: FOLLOWS}.get(unet.in_channels)


def numbers_beside(unet: Any, text_encoder_2: Any, where: str) -> int:
    """How many numbers the U-Net of SDXL sees: the original size, the crop, and the size, six in all; or of a
    refiner the original size, the crop, and the aesthetic score. UserError: neither."""
    each, room = unet.addition_time_embed_dim, unet.projection_class_embeddings_input_dim
    count, rest = divmod(room - text_encoder_2.projection_dim, each)
    if rest or count not in (SIZED, SCORED):
        pooled = text_encoder_2.projection_dim
        raise UserError(
            f"{where} has projection_class_embeddings_input_dim {room}: projection_dim {pooled} of "
            f"text_encoder_2/config.json and {SIZED} or {SCORED} numbers of addition_time_embed_dim {each} "
            f"are {pooled + SIZED * each} or {pooled + SCORED * each}"
        )
    return count


def read_index(folder: Path) -> Index:
    """Raises UserError for no model, and for a part or class that the engine lacks."""
    _check_is_model(folder)
    where = folder / FILE
    index = read_json(where)
    if (pipeline := index.get("_class_name")) not in (*NAMES, *OF_OTHERS):
        raise UserError(f"{where} describes a {pipeline}; the engine reads {', '.join((*NAMES, *OF_OTHERS))}")
    if index.pop("is_cosxl_edit", False):
        raise UserError(
            f"{where}: is_cosxl_edit: CosXL Edit, which sees pictures in its own way, is not read"
        )
    wanted, needed = _wanted(pipeline.startswith(_XL))
    classes = {}
    for name, value in index.items():
        if name.startswith("_") or name in (*NOT_READ, ZEROS) or value in (None, [None, None]):
            continue
        if name not in wanted:
            raise UserError(f"{where}: unknown part {name!r}{nearest(name, wanted)}")
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)):
            raise UserError(f"{where}: {name} is {value!r}, not [library, class]")
        if wanted[name] is not None and value[1] not in wanted[name]:
            raise UserError(f"{where}: {name} is a {value[1]}; the engine has {' and '.join(wanted[name])}")
        classes[name] = value[1]
    if "text_encoder" in classes or "tokenizer" in classes:  # the refiner of SDXL has neither
        needed |= {"text_encoder", "tokenizer"}
    if missing := needed - classes.keys():
        raise UserError(f"{where} names no {', '.join(sorted(missing))}")
    zeros = "tokenizer_2" in classes and index.get(ZEROS, True) is True
    return Index(classes, zeros, pipeline in OFFSET)


def _wanted(xl: bool) -> tuple[dict[str, tuple[str, ...] | None], set[str]]:
    """Part -> the classes that may stand there (None: any), and which must be there."""
    wanted: dict[str, tuple[str, ...] | None] = {kind: spec.class_names for kind, spec in KINDS.items()}
    wanted |= {"tokenizer": _TOKENIZERS, "scheduler": None}
    if not xl:
        return wanted, set(wanted)
    needed = wanted.keys() - {"text_encoder", "tokenizer"} | {"text_encoder_2", "tokenizer_2"}
    return wanted | {
        "text_encoder_2": KNOWN["text_encoder_2"].class_names,
        "tokenizer_2": _TOKENIZERS,
    }, needed


def write_index(folder: Path, configs: Mapping[str, Any], scheduler: str, zeros: bool) -> None:
    """model_index.json of a folder with these configs of networks and this class of scheduler."""
    xl = "text_encoder_2" in configs
    made_for = channels(configs["unet"], configs["vae"])
    refines = xl and numbers_beside(configs["unet"], configs["text_encoder_2"], "unet/config.json") == SCORED
    end = IMG2IMG if refines else ENDS[made_for or WORDS]
    index: dict[str, Any] = {
        "_class_name": (_XL if xl else _FIRST) + end,
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", scheduler],
    }
    if xl:
        index |= {ZEROS: zeros, "image_encoder": [None, None]}
        index |= {"requires_aesthetics_score": refines} if end in (ENDS[INPAINTS], IMG2IMG) else {}
        index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    else:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    for kind, config in configs.items():
        found = KNOWN[kind].of(config)
        index[kind] = [found.library, found.class_name]
        if kind.startswith("text_encoder"):
            index[kind.replace("text_encoder", "tokenizer")] = ["transformers", _TOKENIZERS[0]]
    write_json(folder / FILE, index)


def _check_is_model(folder: Path) -> None:
    if folder.is_file():
        check_no_pickle(folder)
        single = folder.suffix == ".safetensors"
        command = f"python -m launch.convert {folder} FOLDER --tokenizer FOLDER"
        hint = f"; make one of a single file with {command}" if single else ""
        raise UserError(
            f"{folder} is a file: a model is a folder with {FILE}, unet/, vae/, text_encoder/{hint}"
        )
    if not folder.is_dir():
        known_online = re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder))
        hint = " (nothing is fetched by name: download it first)" if known_online else ""
        raise UserError(f"no folder {folder}: a model is a folder on this disk, with {FILE} in it{hint}")
    if not (folder / FILE).is_file():
        present = ", ".join(sorted(file.name for file in folder.iterdir())[:20]) or "nothing"
        parts = ", ".join(f"{name}/" for name in (*KINDS, "tokenizer", "scheduler"))
        raise UserError(f"{folder} is no model: looked for {FILE} beside {parts}; it holds {present}")


def check_no_pickle(path: Path) -> None:
    """UserError, with what makes safetensors of it, for a file that can run code when it is opened."""
    if path.name.endswith(PICKLES):
        load = f"torch.load({str(path)!r}, map_location='cpu', weights_only=True)"
        rest = "{k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}"
        raise UserError(
            f"{path} is in a format that is never opened because it can run code; if you trust it, PyTorch "
            f'makes safetensors of it: python -c "import torch, safetensors.torch as s; d = {load}; '
            f"d = d.get('state_dict', d); s.save_file({rest}, {str(path.with_suffix('.safetensors'))!r})\""
        )

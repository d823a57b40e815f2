"""A LoRA means the same here and in PyTorch diffusers with PEFT, whoever of the two wrote its file."""

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from flax import traverse_util
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import load_file, save_file

import engine
from engine.weights import lora, lora_files, lycoris, names
from engine.weights.folder import load_folder
from engine.weights.mixing import Mixture, write_mixed
from engine.weights.safetensors_io import read_header
from tests.kohya import as_kohya
from tests.parity.common import nchw
from tests.parity.pictures import PROMPTS, STEPS, psnr
from tests.tiny import tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
OTHERS = ["proj_in", "conv1", "net.*", "conv_in", "conv_out", "time_emb_proj", "fc1"]
LATENTS = np.random.default_rng(0).standard_normal((2, 8, 8, 4), np.float32)
GUIDANCE = 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("lora") / "model")


@pytest.fixture(scope="module")
def configs(folder):
    model = load_folder(folder)
    return {kind: getattr(model, kind).config for kind in lora.KINDS}


def random_lora(configs, targets, rank=3, alpha=4.5, seed=0) -> lora.Lora:
    """With no zeros in it; it moves every layer by about half of its weights."""
    fresh = lora.fresh(jax.random.key(seed), configs, targets, rank, alpha)
    rng = np.random.default_rng(seed)
    layers = {}
    for name, layer in fresh.layers.items():
        b = 0.5 * 3**0.5 * rank**0.5 / alpha * rng.standard_normal(layer["b"].shape)
        layers[name] = {"a": np.asarray(layer["a"]), "b": b.astype(np.float32)}
    return lora.Lora(layers, fresh.alphas)


def in_pytorch(folder) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by(pipeline) -> np.ndarray:
    start = torch.from_numpy(nchw(LATENTS).copy())
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
    return np.round(pipeline(PROMPTS, latents=start, **options).images * 255).astype(np.uint8)


def drawn_here(folder, *loras) -> np.ndarray:
    pipe = engine.load(folder, lora=loras)
    return pipe.generate(PROMPTS, steps=STEPS, guidance_scale=GUIDANCE, latents=LATENTS)


def assert_same_weights(folder, file, pipeline) -> None:
    """What is loaded here with the file, and the pipeline's weights with its adapters in them."""
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    model, moved = load_folder(folder, loras=[(file, 1.0)]), 0
    base = load_folder(folder)
    for kind in lora.KINDS:
        theirs = {
            names.canonical(kind, key): value for key, value in getattr(pipeline, kind).state_dict().items()
        }
        before = traverse_util.flatten_dict(getattr(base, kind).params)
        for path, array in traverse_util.flatten_dict(getattr(model, kind).params).items():
            wanted = theirs[names.to_key(path)].numpy()
            found = names.to_torch(path, np.asarray(array))
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max(), err_msg=path)
            moved += not np.array_equal(array, before[path])
    assert moved == len(lycoris.read(file, {kind: getattr(model, kind).config for kind in lora.KINDS}))


@pytest.mark.parametrize("targets", [ATTENTION, ATTENTION + TEXT + OTHERS], ids=["attention", "all"])
def test_diffusers_draws_the_same_picture_with_our_file(folder, configs, tmp_path, targets):
    file = lora_files.save(tmp_path, random_lora(configs, targets))
    pipeline = in_pytorch(folder)
    without = drawn_by(pipeline)
    pipeline.load_lora_weights(tmp_path)
    theirs = drawn_by(pipeline)
    assert psnr(drawn_here(folder, (file, 1.0)), theirs) >= 40
    assert psnr(without, theirs) < 20  # the LoRA is seen
    assert_same_weights(folder, file, pipeline)


def test_a_file_of_kohya_means_the_same_in_diffusers(folder, configs, tmp_path):
    """Its text encoder's part, too; of the U-Net what kohya's scripts train: attention and its neighbours."""
    ours = random_lora(configs, [*ATTENTION, *TEXT, "proj_in", "net.*", "fc1"])
    tensors = as_kohya(load_file(lora_files.save(tmp_path / "ours", ours)), 4.5)
    file = tmp_path / "kohya.safetensors"
    save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, file)
    pipeline = in_pytorch(folder)
    without = drawn_by(pipeline)
    pipeline.load_lora_weights(file)
    theirs = drawn_by(pipeline)
    assert psnr(drawn_here(folder, (file, 1.0)), theirs) >= 45
    assert psnr(without, theirs) < 20


def test_diffusers_draws_the_same_picture_with_two_of_ours_and_scales(folder, configs, tmp_path):
    pipeline, loras, scales = in_pytorch(folder), [], {"one": 0.5, "two": -0.75}
    for name, rank in (("one", 2), ("two", 5)):
        ours = random_lora(configs, ATTENTION + TEXT, rank=rank, seed=rank)
        file = lora_files.save(tmp_path / f"{name}.safetensors", ours)
        pipeline.load_lora_weights(file, adapter_name=name)
        loras.append((file, scales[name]))
    pipeline.set_adapters(list(scales), list(scales.values()))
    theirs = drawn_by(pipeline)
    assert psnr(drawn_here(folder, *loras), theirs) >= 40
    write_mixed(folder, tmp_path / "merged", Mixture(loras=loras))
    assert psnr(drawn_by(in_pytorch(tmp_path / "merged")), theirs) >= 60


def test_ranks_and_alphas_of_single_layers_reach_diffusers(folder, configs, tmp_path):
    wide, narrow = (
        random_lora(configs, ATTENTION + TEXT, rank=4),
        random_lora(configs, ["to_k", "fc1"], rank=1),
    )
    alphas = {name: 1.0 + 0.25 * (i % 3) for i, name in enumerate(wide.layers | narrow.layers)}
    file = lora_files.save(tmp_path, lora.Lora(wide.layers | narrow.layers, alphas))
    pipeline = in_pytorch(folder)
    pipeline.load_lora_weights(tmp_path)
    assert_same_weights(folder, file, pipeline)


# ---- files that diffusers wrote


def adapted_by_peft(folder, **options) -> StableDiffusionPipeline:
    """With random adapters in U-Net and text encoder, in none of which a zero hides a mistake."""
    pipeline = in_pytorch(folder)
    torch.manual_seed(0)
    for part, targets in ((pipeline.unet, [*ATTENTION, "conv1", "proj_in"]), (pipeline.text_encoder, TEXT)):
        inject_adapter_in_model(LoraConfig(**{"r": 4, "target_modules": targets} | options), part)
        for name, parameter in part.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return pipeline


def write_as_diffusers(pipeline, folder, notes=True, convert=lambda weights: weights):
    parts = {kind: getattr(pipeline, kind) for kind in lora.KINDS}
    layers = {f"{kind}_lora_layers": convert(get_peft_model_state_dict(part)) for kind, part in parts.items()}
    metadata = _collate_lora_metadata(parts) if notes else {}
    pipeline.save_lora_weights(folder, **layers, **metadata)
    return folder / lora_files.FILE


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 6},
        {"lora_alpha": 6, "use_rslora": True},
        {"lora_alpha": 6, "use_dora": True},
        {
            "lora_alpha": 6,
            "rank_pattern": {"to_k": 2, "v_proj": 3},
            "alpha_pattern": {"attn1.to_q": 3, "q_proj": 1},
        },
    ],
    ids=["alpha", "rslora", "DoRA", "patterns"],
)
def test_a_file_that_diffusers_wrote_means_the_same_here(folder, tmp_path, options):
    pipeline = adapted_by_peft(folder, **options)
    file = write_as_diffusers(pipeline, tmp_path)
    assert_same_weights(folder, file, pipeline)


@pytest.mark.parametrize("convert", [dict, convert_state_dict_to_diffusers], ids=["peft", "diffusers"])
def test_without_notes_alpha_is_the_rank_in_either_naming(folder, tmp_path, convert):
    pipeline = adapted_by_peft(folder, lora_alpha=4)
    file = write_as_diffusers(pipeline, tmp_path, notes=False, convert=convert)
    assert any("lora.down" in key for key in read_header(file)) == (convert is not dict)
    assert_same_weights(folder, file, pipeline)


def test_the_picture_of_a_file_that_diffusers_wrote(folder, tmp_path):
    pipeline = adapted_by_peft(folder, lora_alpha=6)
    file = write_as_diffusers(pipeline, tmp_path)
    theirs = drawn_by(pipeline)
    assert psnr(drawn_here(folder, (file, 1.0)), theirs) >= 40
    assert psnr(drawn_here(folder), theirs) < 20

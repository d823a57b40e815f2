"""PyTorch diffusers loads what we write, without a warning, and we load what it writes."""

import json
import logging
import warnings

import diffusers
import jax
import jax.numpy as jnp
import pytest
import torch
import transformers

from engine.weights import names
from engine.weights.component import abstract, load_component
from engine.weights.folder import load_folder, save_folder
from engine.weights.kinds import KINDS
from engine.weights.random_folder import ARCHITECTURES

PARTS = tuple(KINDS)


def load_in_pytorch(folder, caplog):
    """The pipeline, in the dtype on disk; fails on any warning about the weights or the configs."""
    caplog.clear()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    return pipeline


def assert_equal_weights(one, two, dtype):
    for name in PARTS:
        ours, theirs = getattr(one, name).state_dict(), getattr(two, name).state_dict()
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(ours[key].to(dtype), tensor.to(dtype)), f"{name} {key}"


@pytest.mark.parametrize("max_shard_size", [10**9, 50_000], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pytorch_loads_what_we_write(torch_pipeline, torch_folder, tmp_path, caplog, dtype, max_shard_size):
    save_folder(tmp_path / "ours", load_folder(torch_folder), dtype, max_shard_size)
    again = load_in_pytorch(tmp_path / "ours", caplog)
    assert_equal_weights(again, torch_pipeline, getattr(torch, dtype))


def options(config):
    """Without the notes of who wrote it; a list is as good as a tuple."""
    kept = {k: v for k, v in config.items() if k[0] != "_" and k not in ("transformers_version", "dtype")}
    return json.loads(json.dumps(kept))


def test_pytorch_reads_the_configs_that_it_wrote(torch_pipeline, torch_folder, tmp_path, caplog):
    save_folder(tmp_path / "ours", load_folder(torch_folder))
    again = load_in_pytorch(tmp_path / "ours", caplog)
    for name in ("unet", "vae", "scheduler"):
        ours, theirs = getattr(again, name), getattr(torch_pipeline, name)
        assert type(ours) is type(theirs)
        assert options(ours.config) == options(theirs.config)
    ours, theirs = (p.text_encoder.config.to_dict() for p in (again, torch_pipeline))
    assert options(ours) == options(theirs)
    assert again.tokenizer.model_max_length == torch_pipeline.tokenizer.model_max_length
    prompt = "A fox, on a skateboard!"
    assert again.tokenizer(prompt)["input_ids"] == torch_pipeline.tokenizer(prompt)["input_ids"]


def test_we_load_pytorchs_shards_and_variants(torch_pipeline, torch_folder, tmp_path):
    wanted = load_folder(torch_folder)
    torch_pipeline.save_pretrained(tmp_path / "theirs", variant="fp16", max_shard_size="50KB")
    written = {file.name for file in (tmp_path / "theirs" / "unet").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.fp16.json" in written
    for variant in ("fp16", None):
        model = load_folder(tmp_path / "theirs", variant=variant)
        for name in PARTS:
            ours, theirs = getattr(model, name).params, getattr(wanted, name).params
            assert jax.tree.all(jax.tree.map(jnp.array_equal, ours, theirs))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_size_architectures_are_pytorchs(architecture, tmp_path):
    """Every key and shape of Stable Diffusion 1.5, 2.1 and XL, against PyTorch's modules without memory."""
    from engine.weights.component import write_config

    classes = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    for kind, original in classes.items():
        config = getattr(ARCHITECTURES[architecture], kind)
        if config is None or (architecture == "sdxl-refiner" and kind != "unet"):  # the rest is that of sdxl
            continue
        write_config(tmp_path, kind, config)
        with torch.device("meta"):
            if kind.startswith("text_encoder"):
                module = original(transformers.CLIPTextConfig.from_pretrained(tmp_path))
            else:
                module = original.from_config(original.load_config(tmp_path))
        theirs = {names.canonical(kind, key): tuple(t.shape) for key, t in module.state_dict().items()}
        theirs.pop(None, None)
        _, shapes = abstract(kind, config)
        ours = {names.to_key(path): names.torch_shape(path, leaf.shape) for path, leaf in shapes.items()}
        assert ours == theirs


def test_symlinks_as_in_a_download_cache(torch_folder, tmp_path):
    """Download caches keep files under their hash, and link to them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    for i, file in enumerate(f for f in torch_folder.rglob("*") if f.is_file()):
        (blobs / str(i)).write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(torch_folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(i))
    ours = load_component(snapshot / "unet", "unet").params
    wanted = load_component(torch_folder / "unet", "unet").params
    assert jax.tree.all(jax.tree.map(jnp.array_equal, ours, wanted))
    load_folder(snapshot)

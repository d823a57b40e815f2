"""Whole model folders: read, written, and what is wrong with them."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from engine.types import UserError
from engine.weights.folder import load_folder, read_scheduler, save_folder
from engine.weights.random_folder import random_folder
from tests.tiny import TINY_VAE, tiny_folder
from tests.weights.test_random_folder import TINY


@pytest.fixture
def folder(torch_folder, tmp_path):
    return shutil.copytree(torch_folder, tmp_path / "model")


def params(model):
    return [part.params for part in (model.unet, model.vae, model.text_encoder)]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_there_and_back(folder, tmp_path):
    model = load_folder(folder)
    save_folder(tmp_path / "ours", model)
    again = load_folder(tmp_path / "ours")
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params(again), params(model)))
    for name in ("unet", "vae", "text_encoder"):
        assert getattr(again, name).config == getattr(model, name).config
    assert again.scheduler == model.scheduler
    prompts = ["A fox, at sunset!", ""]
    assert (again.tokenizer.encode(prompts) == model.tokenizer.encode(prompts)).all()
    save_folder(tmp_path / "twice", again)
    assert contents(tmp_path / "twice") == contents(tmp_path / "ours")


def test_a_tiny_autoencoder_there_and_back(tmp_path):
    """The class is kept in the index and in config.json, and its keys are diffusers'."""
    wrote = tiny_folder(tmp_path / "model", vae=TINY_VAE)
    model = load_folder(wrote)
    save_folder(tmp_path / "ours", model)
    assert contents(tmp_path / "ours") == contents(wrote)
    assert json.loads((wrote / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderTiny"]
    config = json.loads((wrote / "vae" / "config.json").read_text())
    assert (config["_class_name"], config["num_encoder_blocks"]) == ("AutoencoderTiny", [1, 2])
    assert b'"decoder.layers.2.conv.4.weight"' in contents(wrote)["vae/diffusion_pytorch_model.safetensors"]


def test_dtype_and_shards_reach_every_part(folder, tmp_path):
    model = load_folder(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params(model))} == {jnp.dtype(jnp.bfloat16)}
    save_folder(tmp_path / "ours", model, dtype="float16", max_shard_size=20_000)
    written = contents(tmp_path / "ours")
    for stem in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert f"{stem}.safetensors.index.json" in written
        assert f"{stem}.safetensors" not in written
        assert b'"dtype":"F16"' in next(data for name, data in written.items() if f"{stem}-00001" in name)
    again = load_folder(tmp_path / "ours", dtype="float16")
    wanted = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params(model))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params(again), wanted))


def test_place_sees_every_part(folder):
    seen = set()

    def place(name, array):
        seen.add(name.split(".")[0])
        return jax.device_put(array)

    load_folder(folder, place=place)
    assert seen == {"unet", "vae", "text_encoder"}


def test_a_value_that_overflows_leaves_no_folder(folder, tmp_path):
    model = load_folder(folder)
    model.vae.params["encoder"]["conv_in"]["bias"] = jnp.full(8, 1e6)
    with pytest.raises(UserError, match=r"vae: encoder\.conv_in\.bias has values beyond float16's 65504"):
        save_folder(tmp_path / "ours", model, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_folder_is_replaced_only_when_asked(folder, tmp_path):
    model = load_folder(folder)
    with pytest.raises(UserError, match="model already exists"):
        save_folder(folder, model)
    save_folder(folder, model, dtype="float16", overwrite=True)
    assert b'"dtype":"F16"' in contents(folder)["vae/diffusion_pytorch_model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_safety_checker_is_not_read(folder):
    """As the folder of Stable Diffusion 1.5 has it: an entry in the index, with its folder or without."""
    change_index(
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )(folder)
    load_folder(folder)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "pytorch_model.bin").write_text("never read")
    load_folder(folder)


def change_json(name, **options):
    def change(folder):
        changed = json.loads((folder / name).read_text()) | options
        (folder / name).write_text(json.dumps({k: v for k, v in changed.items() if v != "delete"}))

    return change


def change_index(**options):
    return change_json("model_index.json", **options)


def test_old_folders_are_read_as_diffusers_pipelines_read_them(folder):
    ddim = {"_class_name": "DDIMScheduler", "steps_offset": 0, "clip_sample": True, "predict_epsilon": True}
    old = change_json("scheduler/scheduler_config.json", **ddim, tensor_format="pt", timestep_values=None)
    old(folder)
    change_index(scheduler=["diffusers", "DDIMScheduler"])(folder)
    assert load_folder(folder).scheduler.steps_offset == 1
    assert read_scheduler(folder, {"steps_offset": 0}).steps_offset == 0  # as somebody wants it
    change_json("scheduler/scheduler_config.json", timestep_spacing="trailing")(folder)
    assert load_folder(folder).scheduler.steps_offset == 0  # of which nothing comes
    change_index(_class_name="StableDiffusionInstructPix2PixPipeline")(folder)
    with pytest.raises(UserError, match="clip_sample=True"):  # which does not mend it
        read_scheduler(folder)

    change_index(_class_name="LatentConsistencyModelPipeline")(folder)
    change_json("scheduler/scheduler_config.json", clip_sample=False)(folder)
    change_json("unet/config.json", _diffusers_version="0.6.0.dev0", sample_size=8)(folder)
    model = load_folder(folder)
    assert model.unet.config.sample_size == 64
    change_json("unet/config.json", _diffusers_version="0.10.0", sample_size=8)(folder)
    assert load_folder(folder).unet.config.sample_size == 8


WRONG = {
    "no index": (lambda f: (f / "model_index.json").unlink(), r"is no model: looked for model_index\.json"),
    "index cut": (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json is not JSON"),
    "other pipeline": (
        change_index(_class_name="FluxPipeline"),
        r"model_index\.json describes a FluxPipeline; the engine reads StableDiffusionPipeline",
    ),
    "unknown part": (
        change_index(text_encoder_2=["transformers", "CLIPTextModelWithProjection"]),
        r"model_index\.json: unknown part 'text_encoder_2' \(did you mean text_encoder\?\)",
    ),
    "unknown class": (
        change_index(vae=["diffusers", "AsymmetricAutoencoderKL"]),
        r"model_index\.json: vae is a AsymmetricAutoencoderKL; the engine has AutoencoderKL",
    ),
    "classes disagree": (
        change_index(vae=["diffusers", "AutoencoderTiny"]),
        r"model_index\.json: vae is a AutoencoderTiny; vae/config\.json describes a AutoencoderKL",
    ),
    "no class": (change_index(vae="AutoencoderKL"), r"vae is 'AutoencoderKL', not \[library, class\]"),
    "part not named": (
        change_index(vae="delete", unet=[None, None]),
        r"model_index\.json names no unet, vae",
    ),
    "unknown scheduler": (
        change_index(scheduler=["diffusers", "VQDiffusionScheduler"]),
        r"scheduler_config\.json: .*VQDiffusionScheduler",
    ),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), r"unet/config\.json cannot be read"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), r"tokenizer"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), r"scheduler/scheduler_config\.json cannot be"),
    "scheduler option": (
        change_json("scheduler/scheduler_config.json", beta_strat=1),
        r"scheduler_config\.json: unknown option 'beta_strat' \(did you mean beta_start\?\)",
    ),
}


@pytest.mark.parametrize(("spoil", "pattern"), WRONG.values(), ids=WRONG.keys())
def test_wrong_folders(folder, spoil, pattern):
    spoil(folder)
    with pytest.raises(UserError, match=pattern) as error:
        load_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("runwayml/stable-diffusion-v1-5", r"no folder runwayml/stable-diffusion-v1-5: .*download it first"),
        ("/no/such/folder", r"no folder /no/such/folder: a model is a folder on this disk"),
        (__file__, r"test_folder\.py is a file: a model is a folder with model_index\.json"),
    ],
)
def test_what_is_no_folder(path, pattern):
    with pytest.raises(UserError, match=pattern) as error:
        load_folder(path)
    assert ("download" in str(error.value)) == path.startswith("runwayml")


@pytest.mark.parametrize(
    ("part", "options", "pattern"),
    [
        ("text_encoder", {"vocab_size": 515}, None),
        ("tokenizer", {"vocab_size": 515}, r"tokenizer/ has 515 ids, .* vocab_size 514"),
        ("text_encoder", {"hidden_size": 32}, r"cross_attention_dim 24, .* hidden_size 32"),
        ("vae", {"latent_channels": 8}, r"unet/config\.json has out_channels 4, .* latent_channels 8"),
    ],
)
def test_parts_of_different_models(folder, tmp_path, part, options, pattern):
    kind = "text_encoder" if part == "tokenizer" else part
    config = dataclasses.replace(getattr(TINY, kind), **options)
    random_folder(tmp_path / "other", TINY._replace(**{kind: config}))
    shutil.rmtree(folder / part)
    shutil.copytree(tmp_path / "other" / part, folder / part)
    if pattern is None:
        load_folder(folder)
    else:
        with pytest.raises(UserError, match=f"the parts are of different models: .*{pattern}"):
            load_folder(folder)

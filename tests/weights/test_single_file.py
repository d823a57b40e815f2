"""Single files in the original layout: what is made of them, and what is refused."""

import json
import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.types import UserError
from engine.weights import single_file, single_file_written
from engine.weights.folder import load_folder, save_folder
from engine.weights.index import PARTS
from engine.weights.original_names import CLIP, OPEN_CLIP, UNET, VAE
from engine.weights.random_folder import ARCHITECTURES
from engine.weights.safetensors_io import read_header
from engine.weights.single_file import to_folder, understand
from engine.weights.single_file_written import to_file
from tests.single import (
    contents,
    foreign,
    like,
    padded_with_the_first,
    published,
    rewritten,
    weights,
    whole_open_clip,
)
from tests.tiny import tiny_folder, tiny_tokenizer

POSITIONS = f"{CLIP}text_model.embeddings.position_ids"


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """sd1/ and sd2/, and the files sd1.safetensors and sd2.safetensors, without notes. Do not write here."""
    at = tmp_path_factory.mktemp("singles")
    for number in (1, 2):
        foreign(like(number, at / f"sd{number}"), at / f"sd{number}.safetensors")
    return at


def changed(at: Path, number: int, file: Path, changes: dict[str, np.ndarray | None]) -> Path:
    return rewritten(at / f"sd{number}.safetensors", file, changes)


# ---- there and back


@pytest.mark.parametrize("number", [1, 2])
def test_a_file_of_others_becomes_the_folder_that_it_was(at, tmp_path, number):
    """Its configs are those that the conventions give to its shapes."""
    to_folder(at / f"sd{number}.safetensors", tmp_path / "back", at / f"sd{number}" / "tokenizer")
    assert contents(tmp_path / "back") == contents(at / f"sd{number}")


STRANGE = {
    "three sizes, unequal layers": {
        "unet": {
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": (2, 1, 3),
            "transformer_layers_per_block": (1, 2, 1),
            "attention_head_dim": (2, 4, 8),
        },
    },
    "one size, nine channels": {
        "unet": {
            "block_out_channels": (16,),
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
            "in_channels": 9,
            "use_linear_projection": True,
        },
        "vae": {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False},
        "text_encoder": {"hidden_act": "gelu"},
    },
}


@pytest.mark.parametrize("case", STRANGE)
def test_there_and_back_is_the_identity(tmp_path, case):
    """Whatever the convention: the configs are in the file."""
    folder = tiny_folder(tmp_path / "model", **STRANGE[case])
    (told,) = to_file(folder, tmp_path / "model.safetensors")
    assert "programs that do not read its metadata take it for" in told
    assert "vae scaling_factor 0.18215, not 0.5" in told
    to_folder(tmp_path / "model.safetensors", tmp_path / "back", folder)
    assert contents(tmp_path / "back") == contents(folder)


def test_what_shapes_tell_of_a_file_without_notes(tmp_path):
    """Found again where notes are left out: all that shapes can tell."""
    options = STRANGE["three sizes, unequal layers"]["unet"]
    wide = options | {"block_out_channels": (32, 64, 32), "attention_head_dim": 8, "norm_num_groups": 32}
    folder = like(1, tmp_path / "model", **wide, in_channels=8, out_channels=4)
    told = understand(foreign(folder, tmp_path / "model.safetensors"))
    assert told.configs["unet"] == load_folder(folder).unet.config
    assert ["draws with --image FILE" in line for line in told.notes] == [True]


LAST = f"{OPEN_CLIP}transformer.resblocks.23."
PUBLISHED = [("sd15", ()), ("sd21", ()), ("sdxl", ()), ("sdxl-refiner", ())]
CHANGES = {"sdxl": ("2.2", "5.2"), "sdxl-refiner": ("2.1", "5.2", "8.2")}  # of size, on the way up
PRUNED = [
    ("sd21", (LAST,)),
    ("sd21", (f"{OPEN_CLIP}text_projection",)),
    ("sd21", (LAST, f"{OPEN_CLIP}text_")),
]


@pytest.mark.parametrize(("name", "lost"), PUBLISHED + PRUNED)
def test_files_of_full_size_are_read_as_what_they_are(tmp_path, name, lost):
    """The configs are those of the published folders."""
    published(name, tmp_path / "model.safetensors", *lost)
    told = understand(tmp_path / "model.safetensors")
    assert told.configs == {
        kind: config for kind in PARTS if (config := getattr(ARCHITECTURES[name], kind)) is not None
    }
    assert told.scheduler.to_json().items() >= ARCHITECTURES[name].scheduler.items()
    # diffusers' reader takes 1 for the 2, too; its writer (convert_diffusers_to_original_...) knows it
    changes = {
        f"{UNET}output_blocks.{block}.conv.weight" for block in CHANGES.get(name, ("2.1", "5.2", "8.2"))
    }
    header = read_header(tmp_path / "model.safetensors")
    assert {key for key in header if re.search(r"output_blocks.+\.conv\.weight", key)} == changes


def test_dtypes(at, tmp_path):
    file = tmp_path / "half.safetensors"
    to_file(at / "sd2", file, dtype="float16")
    assert {str(tensor.dtype) for tensor in load_file(file).values()} == {"float16"}
    to_folder(file, tmp_path / "kept", at / "sd2")
    to_folder(file, tmp_path / "wide", at / "sd2", dtype="bfloat16")
    kept, wide, exact = weights(tmp_path / "kept"), weights(tmp_path / "wide"), weights(at / "sd2")
    for key, tensor in exact.items():
        np.testing.assert_array_equal(kept[key], tensor.astype(np.float16))
        np.testing.assert_array_equal(wide[key], kept[key].astype(ml_dtypes.bfloat16))


def test_a_folder_in_shards_and_with_an_old_autoencoder(at, tmp_path):
    save_folder(tmp_path / "shards", load_folder(at / "sd1"), max_shard_size=100_000)
    assert len([*(tmp_path / "shards" / "unet").glob("*.safetensors")]) > 3
    vae = tmp_path / "shards" / "vae"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for file in vae.glob("*.safetensors*"):
        file.unlink()
    old = {}
    for key, tensor in load_file(at / "sd1" / "vae" / "diffusion_pytorch_model.safetensors").items():
        for new, before in names.items():
            key = key.replace(f".{new}.", f".{before}.")
        old[key] = tensor
    save_file(old, vae / "diffusion_pytorch_model.safetensors")
    to_file(tmp_path / "shards", tmp_path / "again.safetensors")
    again, wanted = load_file(tmp_path / "again.safetensors"), load_file(at / "sd1.safetensors")
    assert again.keys() == wanted.keys()
    assert all((again[key] == tensor).all() for key, tensor in wanted.items())


# ---- what files carry beside the weights


def test_crumbs_are_not_read_and_it_is_said(at, tmp_path):
    one = np.ones(1, np.float32)
    crumbs = {"betas": one, "alphas_cumprod": one, "sqrt_one_minus_alphas_cumprod": one, "logvar": one}
    crumbs |= {"model_ema.decay": one, "model_ema.diffusion_modelout0weight": one, "cond_stage_model.x": one}
    crumbs |= {"posterior_mean_coef1": one, "optimizer_states": one, f"{VAE}loss.logvar": one}
    crumbs |= {POSITIONS: np.arange(16)[None]}
    file = changed(at, 1, tmp_path / "full.safetensors", crumbs)
    told = to_folder(file, tmp_path / "back", at / "sd1")
    assert told == [
        f"not read: 2 averaged weights (model_ema.*); {UNET}* were",
        "not read, because they are no weights of the model: (1) cond_stage_model.x",
    ]
    assert contents(tmp_path / "back") == contents(at / "sd1")


def test_the_last_layer_of_open_clip_is_not_used(at, tmp_path):
    whole = whole_open_clip(load_file(at / "sd2.safetensors"))
    file = changed(at, 2, tmp_path / "whole.safetensors", whole)
    to_folder(file, tmp_path / "back", at / "sd2")
    assert contents(tmp_path / "back") == contents(at / "sd2")


def test_matrices_of_the_autoencoder_may_be_convolutions_or_not(at, tmp_path):
    flat = {key: t for key, t in load_file(at / "sd1.safetensors").items() if ".mid.attn_1." in key}
    assert {t.shape for t in flat.values() if t.ndim > 1} == {(64, 64, 1, 1)}
    for axes in (2, 3):
        shaped = {key: t.reshape(t.shape[:axes]) for key, t in flat.items()}
        file = changed(at, 1, tmp_path / f"{axes}.safetensors", shaped)
        to_folder(file, tmp_path / f"back{axes}", at / "sd1")
        assert contents(tmp_path / f"back{axes}") == contents(at / "sd1")


def test_names_of_a_newer_transformers(at, tmp_path):
    own = {key: t for key, t in load_file(at / "sd1.safetensors").items() if key.startswith(CLIP)}
    short = {key.replace("text_model.", ""): t for key, t in own.items()}
    file = changed(at, 1, tmp_path / "short.safetensors", dict.fromkeys(own) | short)
    to_folder(file, tmp_path / "back", at / "sd1")
    assert contents(tmp_path / "back") == contents(at / "sd1")


# ---- what is predicted


@pytest.mark.parametrize(
    ("number", "extra", "given", "predicted", "told"),
    [
        (1, {}, None, "epsilon", 0),
        (1, {}, "v_prediction", "v_prediction", 0),
        (1, {"v_pred": np.zeros(0, np.float32)}, None, "v_prediction", 0),
        (2, {}, None, "v_prediction", 1),
        (2, {}, "epsilon", "epsilon", 0),
        (2, {"v_pred": np.zeros(0, np.float32)}, None, "v_prediction", 0),
    ],
)
def test_what_is_predicted(at, tmp_path, number, extra, given, predicted, told):
    found = understand(changed(at, number, tmp_path / "model.safetensors", extra), given)
    assert found.scheduler.prediction_type == predicted
    assert len(found.notes) == told
    assert found.configs["unet"].sample_size == (96 if number == 2 and predicted == "v_prediction" else 64)


def test_inpainting_of_2_predicts_eps(at, tmp_path):
    wide = {f"{UNET}input_blocks.0.0.weight": np.ones((64, 9, 3, 3), np.float32)}
    found = understand(changed(at, 2, tmp_path / "model.safetensors", wide))
    assert found.scheduler.prediction_type == "epsilon" and found.configs["unet"].in_channels == 9
    assert "what it becomes draws with --image FILE --mask FILE" in found.notes[0]


def test_a_measured_scale(at, tmp_path):
    file = changed(at, 1, tmp_path / "model.safetensors", {"scale_factor": np.full((), 0.25, np.float32)})
    assert understand(file).configs["vae"].scaling_factor == 0.25


def test_edms(at, tmp_path):
    """Playground 2.5 and CosXL are told by what they have beside the networks, in any shape."""
    mean, std = np.float32([[[[-1.5]], [[2]], [[0]], [[1]]]]), np.full(4, 8, np.float32)
    latents = {"edm_mean": mean, "edm_std": std}
    found = understand(changed(at, 1, tmp_path / "playground.safetensors", latents))
    assert found.scheduler.to_json() == {
        "_class_name": "EDMDPMSolverMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        **{"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0},
        **{"solver_order": 2, "lower_order_final": True, "algorithm_type": "dpmsolver++"},
        **{"euler_at_final": False, "final_sigmas_type": "zero"},
    }
    vae = found.configs["vae"]
    assert (vae.latents_mean, vae.latents_std) == ((-1.5, 2.0, 0.0, 1.0), (8.0,) * 4)
    assert vae.scaling_factor == 0.5 and not found.notes

    ends = {"edm_vpred.sigma_max": np.float32([120]), "edm_vpred.sigma_min": np.full((), 0.01, np.float32)}
    found = understand(changed(at, 1, tmp_path / "cosxl.safetensors", ends))
    assert found.scheduler.class_name == "EDMEulerScheduler" and not found.notes
    assert found.scheduler.prediction_type == "v_prediction"
    assert (found.scheduler.sigma_min, found.scheduler.sigma_max) == (pytest.approx(0.01), 120)
    assert (found.scheduler.sigma_data, found.scheduler.sigma_schedule) == (1.0, "exponential")
    assert found.configs["vae"].latents_mean is None

    wide = {f"{UNET}input_blocks.0.0.weight": np.ones((64, 8, 3, 3), np.float32)}
    with pytest.raises(UserError, match="is CosXL Edit, which sees pictures in its own way"):
        understand(changed(at, 1, tmp_path / "edit.safetensors", ends | wide))

    folder = tmp_path / "folder"
    to_folder(tmp_path / "playground.safetensors", folder, at / "sd1")
    assert load_folder(folder).vae.config.latents_std == (8.0,) * 4
    (told,) = to_file(folder, tmp_path / "again.safetensors")
    assert "scheduler of an EDM False, not True" in told and "vae latents_mean" in told
    again = understand(tmp_path / "again.safetensors")
    assert (again.scheduler, again.configs["vae"]) == (load_folder(folder).scheduler, vae)


# ---- refused


def only(*keys: str):
    return dict.fromkeys(keys, np.ones((4, 4), np.float32))


STRANGERS = {
    "SDXL with one text encoder": (
        only("conditioner.embedders.0.transformer.x", f"{UNET}input_blocks.0.0.weight", f"{VAE}x"),
        "has the text encoders conditioner.embedders.0.transformer.*: leave those of one model",
    ),
    "a LoRA of kohya": (only("lora_unet_down_blocks_0.lora_up.weight"), "it is a LoRA: give it to --lora"),
    "a LoRA of diffusers": (only("unet.down_blocks.0.attn1.to_q.lora_A.weight"), "it is a LoRA"),
    "a word": (only("emb_params"), "a word of textual inversion: give it to --embedding"),
    "a ControlNet": (only("control_model.input_blocks.0.0.weight"), "it is a ControlNet"),
    "Flux": (only("double_blocks.0.img_attn.qkv.weight"), "Stable Diffusion 3, Flux or another newer"),
    "SD3": (only(f"{UNET}joint_blocks.0.x", f"{VAE}x"), "Stable Diffusion 3, Flux or another newer"),
    "a U-Net of diffusers": (only("down_blocks.0.x", "conv_in.weight"), "one part of a diffusers folder"),
    "an autoencoder of diffusers": (only("encoder.down_blocks.0.x"), "one part of a diffusers folder"),
    "an autoencoder": (only(f"{VAE}decoder.conv_in.weight"), "is an autoencoder alone: give a file with"),
    "a bare autoencoder": (only("decoder.up.0.block.0.conv1.weight"), "is an autoencoder alone"),
    "no text encoder": (
        only(f"{UNET}out.2.weight", f"{VAE}x"),
        f"is no whole model: it has no text encoder ({CLIP}* or {OPEN_CLIP}* or conditioner.embedders.0",
    ),
    "two text encoders": (
        only(f"{UNET}x", f"{VAE}x", f"{CLIP}x", f"{OPEN_CLIP}x"),
        "leave those of one model",
    ),
    "something": (only("a", "b", "c", "d"), "it holds (4) a, b, c and 1 more"),
    "nothing": ({}, "it holds nothing"),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_it_says_what_a_file_is(tmp_path, case):
    tensors, told = STRANGERS[case]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as refused:
        to_folder(tmp_path / "x.safetensors", tmp_path / "out", tmp_path)
    assert told in str(refused.value) and "x.safetensors" in str(refused.value)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_one_line_tells_all_that_does_not_fit(at, tmp_path):
    sound = load_file(at / "sd2.safetensors")
    lost = [key for key in sound if key.startswith(f"{UNET}output_blocks.") and key.endswith(".bias")]
    fused = f"{OPEN_CLIP}transformer.resblocks.1.attn.in_proj_weight"
    changes = dict.fromkeys(lost) | {
        fused: sound[fused][:-1],
        f"{VAE}encoder.mid.attn_1.q.weight": np.ones((64, 64, 3, 3), np.float32),
        f"{UNET}label_emb.0.0.weight": np.ones(3, np.float32),
        f"{UNET}out.2.bias": np.ones(4, np.float64),
    }
    with pytest.raises(UserError) as refused:
        understand(changed(at, 2, tmp_path / "x.safetensors", changes))
    told = str(refused.value)
    assert f"missing: ({len(lost)}) {UNET}output_blocks." in told and f"and {len(lost) - 20} more" in told
    assert f"unexpected: (1) {UNET}label_emb.0.0.weight" in told
    assert f"{fused} is (191, 64), not (192, 64)" in told and "(64, 64, 3, 3), not (64, 64, 1, 1)" in told
    assert f"no type of F32, F16, BF16: (1) {UNET}out.2.bias is F64" in told
    assert told.count(fused) == 1 and "\n" not in told


ESSENTIAL = [
    f"{UNET}input_blocks.0.0.weight",
    f"{UNET}input_blocks.2.0.out_layers.3.weight",
    f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    f"{VAE}decoder.conv_in.weight",
    f"{CLIP}text_model.embeddings.token_embedding.weight",
]


@pytest.mark.parametrize("key", ESSENTIAL)
def test_without_what_tells_its_shape(at, tmp_path, key):
    with pytest.raises(UserError, match="is missing, which tells its shape"):
        understand(changed(at, 1, tmp_path / "x.safetensors", {key: None}))
    with pytest.raises(UserError, match=r"is \(3,\), where . numbers should be"):
        understand(changed(at, 1, tmp_path / "y.safetensors", {key: np.ones(3, np.float32)}))


def truncated(file: Path, data: bytes) -> None:
    file.write_bytes(data[: len(data) // 2])


def endless(file: Path, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", 2**60) + data[8:])


def no_header(file: Path, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", 16) + b"{" * 16)


@pytest.mark.parametrize("broken", [truncated, endless, no_header])
def test_broken_files(at, tmp_path, broken):
    broken(tmp_path / "x.safetensors", (at / "sd1.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"x\.safetensors is broken, or a download that stopped early"):
        understand(tmp_path / "x.safetensors")


def test_notes_that_are_none(at, tmp_path):
    tensors = load_file(at / "sd1.safetensors")
    for text in ("{", "[]", '{"unet": {}}', "[" * 100_000):
        save_file(tensors, tmp_path / "x.safetensors", {"fogsculpt": text})
        with pytest.raises(UserError, match="metadata fogsculpt are no configs of a model"):
            understand(tmp_path / "x.safetensors")
    strange = {"unet": {"in_channel": 4}, "vae": {}, "text_encoder": {}, "scheduler": {}}
    save_file(tensors, tmp_path / "x.safetensors", {"fogsculpt": json.dumps(strange)})
    with pytest.raises(UserError, match=r"metadata fogsculpt: unet: unknown option 'in_channel' \(did you"):
        understand(tmp_path / "x.safetensors")


def test_tokenizers_of_other_models(at, tmp_path):
    def refused(number, folder, told):
        with pytest.raises(UserError, match=told):
            to_folder(at / f"sd{number}.safetensors", tmp_path / "out", folder)
        assert not (tmp_path / "out").exists()

    refused(1, at / "sd2", "fills prompts up with id 0, Stable Diffusion 1 with 5")
    refused(2, at / "sd1", "fills prompts up with id 5.., Stable Diffusion 2 with 0")
    refused(1, None, "has no tokenizer, as no single file has: write --tokenizer FOLDER")
    refused(1, tmp_path, "tokenizer_config.json is missing")
    larger = padded_with_the_first(tiny_tokenizer()).with_token("<thing>", 1)[0]
    larger.save(tmp_path / "larger")
    refused(2, tmp_path / "larger", "the parts are of different models: tokenizer/ has 5.. ids")
    longer = tiny_tokenizer()
    longer.model_max_length = 77
    longer.save(tmp_path / "longer")
    refused(1, tmp_path / "longer", "has texts of 77 tokens")


def test_a_unet_without_a_place_in_the_layout(tmp_path):
    folder = tiny_folder(tmp_path / "model", unet={"mid_block_type": "UNetMidBlock2D"})
    with pytest.raises(UserError, match=r"config\.json: mid_block_type='UNetMidBlock2D': a single file in"):
        to_file(folder, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_nothing_is_left_of_what_was_stopped(at, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(single_file_written, "read_tensor", full)
    with pytest.raises(OSError, match="No space"):
        to_file(at / "sd1", tmp_path / "x.safetensors")
    monkeypatch.setattr(single_file, "read_tensor", full)
    with pytest.raises(OSError, match="No space"):
        to_folder(at / "sd1.safetensors", tmp_path / "x", at / "sd1")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(at, tmp_path):
    file, folder = tmp_path / "x.safetensors", tmp_path / "x"
    file.write_text("mine")
    with pytest.raises(UserError, match=r"x\.safetensors already exists"):
        to_file(at / "sd1", file)
    assert file.read_text() == "mine"
    to_file(at / "sd1", file, overwrite=True)
    to_folder(file, folder, at / "sd1")
    with pytest.raises(UserError, match="x already exists"):
        to_folder(file, folder, at / "sd1")
    inside = folder / "x.safetensors"
    inside.write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"holds .*, which it would replace"):
        to_folder(inside, folder, at / "sd1", overwrite=True)
    part = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=r"is a part of .*, which would be lost: choose another file"):
        to_file(folder, part, overwrite=True)
    assert contents(folder / "unet") == contents(at / "sd1" / "unet")
    with pytest.raises(UserError, match="is a folder: choose another name for the file"):
        to_file(at / "sd1", folder, overwrite=True)

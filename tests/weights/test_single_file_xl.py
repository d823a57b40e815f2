"""Single files of SDXL and its refiner: what is made of them, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.diffusion.schedules import schedule_for, sigmas_for
from engine.types import UserError
from engine.weights.folder import load_folder, save_folder
from engine.weights.original_names import REFINER_OPEN_CLIP, UNET, XL_CLIP, XL_OPEN_CLIP
from engine.weights.single_file import to_folder, understand
from engine.weights.single_file_written import to_file
from launch import cli, convert
from tests.single import contents, foreign, like_xl, rewritten
from tests.tiny import XL, tiny_folder

NAMES = ("base", "refiner")


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """base/ and refiner/, and files of the same names, without notes. Do not write here."""
    at = tmp_path_factory.mktemp("xl")
    for name in NAMES:
        foreign(like_xl(at / name, refines=name == "refiner"), at / f"{name}.safetensors")
    return at


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_others_becomes_the_folder_that_it_was(at, tmp_path, name):
    """Its configs are those that the conventions give to its shapes."""
    told = to_folder(at / f"{name}.safetensors", tmp_path / "back", at / name)
    assert contents(tmp_path / "back") == contents(at / name)
    assert told == []


def test_inpainting(at, tmp_path):
    wide = {f"{UNET}input_blocks.0.0.weight": np.ones((64, 9, 3, 3), np.float32)}
    file = rewritten(at / "base.safetensors", tmp_path / "x.safetensors", wide)
    (told,) = to_folder(file, tmp_path / "back", at / "base")
    assert "draws with --image FILE --mask FILE" in told
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLInpaintPipeline"
    assert load_folder(tmp_path / "back").unet.config.in_channels == 9


def test_the_projection_as_a_layer_of_pytorch(at, tmp_path):
    """Playground 2 and others have it so, turned."""
    key = f"{XL_OPEN_CLIP}text_projection"
    turned = load_file(at / "base.safetensors")[key].T.copy()
    file = rewritten(
        at / "base.safetensors", tmp_path / "x.safetensors", {key: None, f"{key}.weight": turned}
    )
    assert to_folder(file, tmp_path / "back", at / "base") == []
    assert contents(tmp_path / "back") == contents(at / "base")


def test_what_comfyui_leaves_in_files_is_not_read(at, tmp_path):
    beside = {
        f"{XL_CLIP}text_projection.weight": np.eye(64, dtype=np.float32),
        f"{XL_CLIP}logit_scale": np.ones((), np.float32),
        f"{XL_OPEN_CLIP}transformer.text_model.embeddings.position_ids": np.arange(16)[None],
    }
    file = rewritten(at / "base.safetensors", tmp_path / "x.safetensors", beside)
    to_folder(file, tmp_path / "back", at / "base")
    assert contents(tmp_path / "back") == contents(at / "base")


NOISE = {
    "v": ({"prediction_type": "v_prediction"}, {"v_pred"}),
    "v that ends in noise alone": (
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"v_pred", "ztsnr"},
    ),
    "CosXL": (
        {
            "_class_name": "EDMEulerScheduler",
            "prediction_type": "v_prediction",
            "sigma_max": 120.0,
            "sigma_data": 1.0,
            "sigma_schedule": "exponential",
        },
        {"edm_vpred.sigma_min", "edm_vpred.sigma_max"},
    ),
    "Playground 2.5": ({"_class_name": "EDMDPMSolverMultistepScheduler"}, {"edm_mean", "edm_std"}),
}


@pytest.mark.parametrize("noise", NOISE)
def test_marks_tell_programs_that_do_not_read_notes(at, tmp_path, noise):
    """What they predict, and in which noise; and such a file is read here, too."""
    changes, marks = NOISE[noise]
    folder = tmp_path / "model"
    shutil.copytree(at / "base", folder)
    file = folder / "scheduler" / "scheduler_config.json"
    options = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(options))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"][1] = options["_class_name"]
    (folder / "model_index.json").write_text(json.dumps(index))
    if noise == "Playground 2.5":
        vae = folder / "vae" / "config.json"
        own = {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4, "scaling_factor": 0.5}
        vae.write_text(json.dumps(json.loads(vae.read_text()) | own))
    told = to_file(folder, tmp_path / "x.safetensors")
    assert not any("prediction_type" in line or "an EDM" in line for line in told)

    tensors = load_file(tmp_path / "x.safetensors")
    assert marks <= tensors.keys()
    save_file(tensors, tmp_path / "bare.safetensors")  # without notes
    found, meant = understand(tmp_path / "bare.safetensors"), load_folder(folder)
    assert schedule_for(found.scheduler).sigma_data == schedule_for(meant.scheduler).sigma_data
    np.testing.assert_allclose(sigmas_for(found.scheduler, 8), sigmas_for(meant.scheduler, 8), rtol=1e-6)
    assert found.scheduler.prediction_type == meant.scheduler.prediction_type
    assert found.configs["vae"].latents_std == meant.vae.config.latents_std
    assert found.notes == []


def test_the_keys_are_the_original_ones(at):
    base, refiner = (load_file(at / f"{name}.safetensors") for name in ("base", "refiner"))
    assert base[f"{UNET}label_emb.0.0.weight"].shape == (256, 32 + 6 * 256)
    assert base[f"{XL_CLIP}text_model.embeddings.position_embedding.weight"].shape == (16, 64)
    assert base[f"{XL_OPEN_CLIP}transformer.resblocks.1.attn.in_proj_weight"].shape == (3 * 128, 128)
    assert base[f"{XL_OPEN_CLIP}text_projection"].shape == (128, 32)
    assert {key.split(".model")[0] for key in refiner if key.startswith("cond")} == {
        "conditioner.embedders.0"
    }
    assert f"{REFINER_OPEN_CLIP}positional_embedding" in refiner


def test_there_and_back_is_the_identity(tmp_path):
    """Whatever the convention: the configs are in the file, and so is what no negative prompt means."""
    folder = tiny_folder(tmp_path / "model", **XL)
    save_folder(folder, dataclasses.replace(load_folder(folder), zeros=False), overwrite=True)
    (told,) = to_file(folder, tmp_path / "model.safetensors")
    assert "take it for a Stable Diffusion XL, and draw other pictures" in told
    assert "index force_zeros_for_empty_prompt True, not False" in told
    to_folder(tmp_path / "model.safetensors", tmp_path / "back", folder)
    assert contents(tmp_path / "back") == contents(folder)


@pytest.mark.parametrize("name", NAMES)
def test_one_tokenizer_is_enough(at, tmp_path, name):
    """The second is the same, filling prompts up with "!"."""
    one, around = at / "base" / "tokenizer", tmp_path / "around"
    (around / "tokenizer").mkdir(parents=True)
    for file in one.iterdir():
        (around / "tokenizer" / file.name).write_bytes(file.read_bytes())
    for number, folder in enumerate((one, around)):
        to_folder(at / f"{name}.safetensors", tmp_path / str(number), folder)
        assert contents(tmp_path / str(number)) == contents(at / name)


def test_the_refiner_takes_a_second_tokenizer_alone(at, tmp_path):
    to_folder(at / "refiner.safetensors", tmp_path / "back", at / "base" / "tokenizer_2")
    assert contents(tmp_path / "back") == contents(at / "refiner")


def test_marks(at, tmp_path):
    extra = dict.fromkeys(("v_pred", "ztsnr"), np.zeros(0, np.float32))
    extra |= {"denoiser.sigmas": np.ones(4, np.float32), f"{XL_OPEN_CLIP}logit_scale": np.ones(1, np.float32)}
    extra |= {f"{XL_CLIP}text_model.embeddings.position_ids": np.arange(16)[None]}
    found = understand(rewritten(at / "base.safetensors", tmp_path / "x.safetensors", extra))
    assert found.scheduler.prediction_type == "v_prediction" and found.scheduler.rescale_betas_zero_snr
    assert found.notes == [] and found.zeros
    plain = understand(at / "base.safetensors")
    assert plain.scheduler.prediction_type == "epsilon" and not plain.scheduler.rescale_betas_zero_snr


def test_tokenizers_of_other_models(at, tmp_path):
    def refused(folder, told, name="base"):
        with pytest.raises(UserError, match=told):
            to_folder(at / f"{name}.safetensors", tmp_path / "out", folder)
        assert not (tmp_path / "out").exists()

    model = load_folder(at / "base")
    swapped = {"tokenizer": model.tokenizer_2, "tokenizer_2": model.tokenizer}
    for name, tokenizer in swapped.items():
        tokenizer.save(tmp_path / "swapped" / name)
    (tmp_path / "second").mkdir()
    model.tokenizer_2.save(tmp_path / "second" / "tokenizer_2")
    refused(tmp_path / "swapped", r"tokenizer fills prompts up with id 0, Stable Diffusion XL with 5")
    refused(at / "base" / "tokenizer_2", "fills prompts up with id 0, Stable Diffusion XL with 5")
    refused(tmp_path / "swapped", "tokenizer_2 fills prompts up with id 5.., .*refiner with 0", "refiner")
    refused(tmp_path / "second", "second/tokenizer: no such folder")
    refused(None, "the one with tokenizer/ and tokenizer_2/ of a folder of Stable Diffusion XL$")


def test_what_does_not_fit_is_one_line(at, tmp_path):
    def refused(told, **changes):
        with pytest.raises(UserError, match=told) as error:
            understand(rewritten(at / "base.safetensors", tmp_path / "x.safetensors", changes))
        assert "\n" not in str(error.value)

    projection, label = f"{XL_OPEN_CLIP}text_projection", f"{UNET}label_emb.0.0.weight"
    refused("label_emb.0.0.weight is missing, which tells its shape", **{label: None})
    refused("text_projection is missing, which tells its shape", **{projection: None})
    refused(r"missing: \(1\) model\S+label_emb.0.2.bias$", **{label.replace("0.0.weight", "0.2.bias"): None})
    wrong = np.ones((127, 32), np.float32)
    refused(r"text_projection is \(127, 32\), not \(128, 32\)", **{projection: wrong})


def test_the_command(at, tmp_path, capsys):
    source, back = at / "base.safetensors", tmp_path / "back"
    argv = [str(source), str(back), "--tokenizer", str(at / "base" / "tokenizer")]
    assert cli.exit_code(convert.main, argv) == cli.DONE
    assert cli.exit_code(convert.main, [str(back), str(tmp_path / "again.safetensors")]) == cli.DONE
    again, wanted = load_file(tmp_path / "again.safetensors"), load_file(source)
    assert again.keys() == wanted.keys()
    assert all((again[key] == tensor).all() for key, tensor in wanted.items())
    assert capsys.readouterr().err == ""

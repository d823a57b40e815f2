"""The config files of model folders: published ones load; what the engine cannot do is refused by name."""

import inspect
import json
import re

import diffusers
import pytest
import transformers

from engine.config import to_json
from engine.models import autoencoder, clip, unet_config
from engine.models.autoencoder import AutoencoderConfig
from engine.models.clip import CLIPTextConfig
from engine.models.unet_config import UNetConfig
from engine.types import UserError
from engine.weights.component import read_config

BLOCKS_1 = {
    "down_block_types": [
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
UNET_1_5 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
} | BLOCKS_1
UNET_2_1 = UNET_1_5 | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "use_linear_projection": True,
    "upcast_attention": True,
}
VAE_1_5 = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAE_2_1 = VAE_1_5 | {
    "_diffusers_version": "0.10.0.dev0",
    "_name_or_path": "hf-models/stable-diffusion-v2-768x768/vae",
    "sample_size": 768,
}
TEXT_1_5 = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
TEXT_2_1 = TEXT_1_5 | {
    "_name_or_path": "hf-models/stable-diffusion-v2-768x768/text_encoder",
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
    "transformers_version": "4.25.0.dev0",
}

# name: (our config, its fixed options, a published file, the class that writes such files)
KINDS = {
    "unet": (UNetConfig, unet_config.FIXED, UNET_1_5, diffusers.UNet2DConditionModel),
    "vae": (AutoencoderConfig, autoencoder.FIXED, VAE_1_5, diffusers.AutoencoderKL),
    "text_encoder": (CLIPTextConfig, clip.FIXED, TEXT_1_5, transformers.CLIPTextConfig),
}
FIXED = [(kind, option) for kind, (_, fixed, *_) in KINDS.items() for option in fixed]


def refused(kind: str, options: dict) -> str:
    """The message with which `options` are refused; it is one line and begins with the file."""
    with pytest.raises(UserError) as error:
        KINDS[kind][0].from_json(options, f"{kind}/config.json")
    message = str(error.value)
    assert message.startswith(f"{kind}/config.json: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("config", "file"),
    [
        (UNetConfig, UNET_1_5),
        (UNetConfig, UNET_2_1),
        (AutoencoderConfig, VAE_1_5),
        (AutoencoderConfig, VAE_2_1),
        (CLIPTextConfig, TEXT_1_5),
        (CLIPTextConfig, TEXT_2_1),
    ],
    ids=["unet 1.5", "unet 2.1", "vae 1.5", "vae 2.1", "text 1.5", "text 2.1"],
)
def test_published_files_load(config, file):
    """Every option arrives, and what is written back reads as the same config."""
    loaded = config.from_json(json.loads(json.dumps(file)), "config.json")
    written = json.loads(json.dumps(to_json(loaded, file.get("_class_name", "CLIPTextModel"))))
    fixed = {*unet_config.FIXED, *autoencoder.FIXED, *clip.FIXED, *clip.UNREAD}
    expected = {k: v for k, v in file.items() if not k.startswith("_") and k not in fixed}
    assert expected.items() <= written.items()
    assert config.from_json(written, "config.json") == loaded


def test_defaults_are_the_originals():
    for kind, (config, _, _, original) in KINDS.items():
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(original.__init__).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        ours = vars(config())
        different = {k: (v, defaults[k]) for k, v in ours.items() if k in defaults and v != defaults[k]}
        assert not different, f"{kind}: {different}"


@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_every_option_of_the_original_is_known(kind):
    """Its defaults load: no option of diffusers' classes is unknown here, and none is fixed elsewhere."""
    config, _, _, original = KINDS[kind]
    parameters = inspect.signature(original.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    assert config.from_json(json.loads(json.dumps(defaults)), "config.json") == config()


def test_every_key_of_the_current_transformers_is_known():
    written = json.loads(transformers.CLIPTextConfig().to_json_string(use_diff=False))
    assert CLIPTextConfig.from_json(written, "config.json") == CLIPTextConfig()


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_options_are_refused_by_name(kind):
    config, _, file, _ = KINDS[kind]
    assert "'speed'" in refused(kind, file | {"speed": 1})
    for name in vars(config()):
        assert f"'{name}x' (did you mean {name}?)" in refused(kind, file | {name + "x": 1})


def test_options_of_another_model_are_refused(tmp_path):
    """Of SDXL, of an inpainting helper, of CLIP's generic keys that could change a forward pass."""
    for name, value in (("addition_embed_type", "image"), ("class_embed_type", "timestep")):
        assert name in refused("unet", UNET_1_5 | {name: value})
    assert "latents_std go together" in refused("vae", VAE_1_5 | {"latents_mean": [0.0] * 4})
    ends = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 3}
    assert "latents_std has 3 numbers for latent_channels=4" in refused("vae", VAE_1_5 | ends)
    ends["latents_std"] = [1.0, 1.0, 0.0, 1.0]
    assert "write numbers above 0" in refused("vae", VAE_1_5 | ends)
    assert "pruned_heads" in refused("text_encoder", TEXT_1_5 | {"pruned_heads": {"0": [1]}})
    file = tmp_path / "config.json"
    for kind, name, wanted in (
        ("text_encoder", "CLIPTextModelWithProjection", "CLIPTextModel"),
        ("text_encoder_2", "CLIPTextModel", "CLIPTextModelWithProjection"),
    ):
        file.write_text(json.dumps(TEXT_1_5 | {"architectures": [name]}))
        with pytest.raises(UserError, match=f"describes a {name}; the engine reads {wanted}$"):
            read_config(file, kind)


@pytest.mark.parametrize(("kind", "option"), FIXED, ids=str)
def test_fixed_options_are_refused_at_another_value(kind, option):
    _, fixed, file, _ = KINDS[kind]
    for value in fixed[option]:
        KINDS[kind][0].from_json(file | {option: value}, "config.json")
    others = [v for v in (True, False, None, 0.5, 2, "other", [1, 2], ["other"]) if v not in fixed[option]]
    for value in others:
        message = refused(kind, file | {option: value})
        assert f"{option}={value!r} is not supported; supported: " in message


@pytest.mark.parametrize(
    ("kind", "option"),
    [(kind, option) for kind, (config, *_) in KINDS.items() for option in vars(config())],
    ids=str,
)
def test_null_and_other_types_are_refused(kind, option):
    """An object is no value of any option; null is one only where the default may be null."""
    config, _, file, _ = KINDS[kind]
    assert re.search(rf"{option}=.*: write ", refused(kind, file | {option: {}}))
    nullable = {"mid_block_type", "projection_dim", "pad_token_id", "bos_token_id", "upcast_attention"}
    if option in nullable or getattr(config(), option) is None:
        assert getattr(config.from_json(file | {option: None}, "config.json"), option) is None
    else:
        assert f"{option}=null: write " in refused(kind, file | {option: None})


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("unet", "act_fn", "tanh"),
        ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("unet", "down_block_types", ["AttnDownBlock2D", *BLOCKS_1["down_block_types"][1:]]),
        ("unet", "up_block_types", [*BLOCKS_1["up_block_types"][:3], "SkipUpBlock2D"]),
        ("unet", "resnet_time_scale_shift", "ada_group"),
        ("unet", "downsample_padding", 2),
        ("unet", "block_out_channels", [320, 640, 1280]),
        ("unet", "block_out_channels", [320, 640, 1280, 1304]),
        ("unet", "block_out_channels", []),
        ("unet", "up_block_types", BLOCKS_1["up_block_types"][1:]),
        ("unet", "down_block_types", BLOCKS_1["down_block_types"][1:]),
        ("unet", "layers_per_block", [2, 2]),
        ("unet", "layers_per_block", 0),
        ("unet", "layers_per_block", 2.5),
        ("unet", "layers_per_block", True),
        ("unet", "attention_head_dim", [8, 8, 8]),
        ("unet", "attention_head_dim", 7),
        ("unet", "attention_head_dim", -8),
        ("unet", "cross_attention_dim", [768] * 5),
        ("unet", "transformer_layers_per_block", [1, 2]),
        ("unet", "transformer_layers_per_block", [[1, 1], [1], [1], [1]]),
        ("unet", "only_cross_attention", [True]),
        ("unet", "only_cross_attention", 1),
        ("unet", "norm_num_groups", 0),
        ("unet", "norm_num_groups", 31),
        ("unet", "norm_eps", "1e-5"),
        ("unet", "in_channels", 0),
        ("vae", "act_fn", "sine"),
        ("vae", "down_block_types", ["DownBlock2D"] * 4),
        ("vae", "up_block_types", ["UpDecoderBlock2D"] * 3),
        ("vae", "block_out_channels", [128, 256, 512]),
        ("vae", "norm_num_groups", 0),
        ("vae", "norm_num_groups", 3),
        ("vae", "layers_per_block", [2, 2, 2, 2]),
        ("vae", "latent_channels", 0),
        ("vae", "scaling_factor", float("nan")),
        ("vae", "scaling_factor", 10**400),
        ("text_encoder", "hidden_act", "sine"),
        ("text_encoder", "num_attention_heads", 11),
        ("text_encoder", "num_attention_heads", 0),
        ("text_encoder", "num_hidden_layers", 0),
        ("text_encoder", "vocab_size", -1),
        ("text_encoder", "max_position_embeddings", "77"),
    ],
    ids=str,
)
def test_values_that_no_model_has_are_refused(kind, option, value):
    """The message names the option, or the one that it does not agree with."""
    message = refused(kind, KINDS[kind][2] | {option: value})
    partners = {
        "down_block_types": "block_out_channels",
        "up_block_types": "block_out_channels",
        "block_out_channels": "norm_num_groups",
    }
    assert option in message or partners[option] in message

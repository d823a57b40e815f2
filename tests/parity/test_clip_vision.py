"""CLIP's image encoder and the whole of CLIP against transformers': random weights, one config a row."""

import json

import jax
import jax.numpy as jnp
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig as OriginalConfig
from transformers import CLIPModel as Original

from engine.models.clip_vision import GENERATION, CLIPConfig, CLIPModel
from engine.types import UserError
from engine.weights.component import load_component, save_component
from tests.parity.common import Twin, assert_same, nchw, normal
from tests.parity.test_clip import BASE as TEXT
from tests.parity.test_clip import EOS, ids

VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 12,
    "patch_size": 4,
}
# what text_config, vision_config and the whole say beside the above
CONFIGS = {
    "openai": ({"eos_token_id": 2}, {}, {}),
    "gelu in both": ({"hidden_act": "gelu"}, {"hidden_act": "gelu"}, {}),
    "wide epsilon, one head": ({}, {"layer_norm_eps": 0.1, "num_attention_heads": 1}, {"projection_dim": 5}),
    "patches that leave pixels over": ({}, {"image_size": 11, "patch_size": 3}, {"projection_dim": 30}),
}


def twin_of(name: str) -> Twin:
    text, vision, whole = CONFIGS[name]
    theirs = OriginalConfig(
        text_config=TEXT | text, vision_config=VISION | vision, **{"projection_dim": 8} | whole
    )
    config = CLIPConfig.from_json(json.loads(theirs.to_json_string(use_diff=False)), "config.json")
    return Twin(lambda rngs: CLIPModel(config, rngs), Original(theirs), "clip")


@pytest.mark.parametrize("name", CONFIGS)
def test_whole(name):
    """Every layer of the image encoder, the unit vectors of pictures and texts, and the logits."""
    twin = twin_of(name)
    size = twin.original.config.vision_config.image_size
    pixels, texts = normal(3, size, size, 3), ids(EOS, 11)
    with torch.no_grad():
        vision = twin.original.vision_model(torch.from_numpy(nchw(pixels)), output_hidden_states=True)
        whole = twin.original(torch.from_numpy(texts), torch.from_numpy(nchw(pixels)))

    found = twin(pixels, method="vision_model")
    assert_same(found.last_hidden_state, vision.last_hidden_state)
    assert_same(found.pooled, vision.pooler_output)
    assert len(found.hidden_states) == len(vision.hidden_states) == VISION["num_hidden_layers"] + 1
    for ours, theirs in zip(found.hidden_states, vision.hidden_states, strict=True):
        assert_same(ours, theirs)
    assert_same(twin(pixels, method="image_features"), whole.image_embeds)
    assert_same(twin(texts, method="text_features"), whole.text_embeds)
    assert_same(twin(texts, pixels), whole.logits_per_image)


# ---- folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model in transformers, and its folder. Read it, do not write into it."""
    folder = tmp_path_factory.mktemp("clip")
    model = twin_of("openai").original
    model.save_pretrained(folder)
    return model, folder


def test_a_folder_of_transformers_comes_back_the_same(saved, tmp_path):
    model, folder = saved
    loaded = load_component(folder, "clip")
    save_component(tmp_path / "ours", loaded)
    back, theirs = Original.from_pretrained(tmp_path / "ours").state_dict(), model.state_dict()
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)
    assert load_component(tmp_path / "ours", "clip").config == loaded.config


def test_shards_and_the_positions_in_old_checkpoints(saved, tmp_path):
    """transformers before 4.31 saved arange(77) and arange(50) with the weights."""
    model, folder = saved
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    whole = tmp_path / "model.safetensors.index.json"
    index = json.loads(whole.read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    old = {
        f"{part}.embeddings.position_ids": torch.arange(5)[None] for part in ("text_model", "vision_model")
    }
    save_file(load_file(tmp_path / shards[0]) | old, tmp_path / shards[0])
    index["weight_map"] |= dict.fromkeys(old, shards[0])
    whole.write_text(json.dumps(index))
    found, wanted = (load_component(where, "clip").params for where in (tmp_path, folder))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, wanted))


def test_what_does_not_fit_is_told_in_one_line(saved, tmp_path):
    _, folder = saved
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_model.post_layrnorm.weight"] = tensors.pop("vision_model.post_layernorm.weight")
    tensors["logit_scale"] = tensors["logit_scale"][None]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as told:
        load_component(tmp_path, "clip")
    for part in (
        "missing: (1) vision_model.post_layernorm.weight",
        "unexpected: (1) vision_model.post_layrnorm.weight",
        "logit_scale is (1,), not ()",
    ):
        assert part in str(told.value)


# ---- config.json

# What transformers 4.16 wrote for openai/clip-vit-base-patch32, in both parts.
GENERIC = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "attention_dropout": 0.0,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "dropout": 0.0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "return_dict": True,
    "torch_dtype": None,
    "transformers_version": "4.16.0.dev0",
    **dict.fromkeys(GENERATION),
}
OPENAI = {
    "architectures": ["CLIPModel"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 512,
    "text_config": GENERIC | {"eos_token_id": 2, "bos_token_id": 0, "model_type": "clip_text_model"},
    "text_config_dict": None,
    "transformers_version": None,
    "vision_config": GENERIC
    | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "model_type": "clip_vision_model"},
    "vision_config_dict": None,
}
LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
FILES = {
    "nothing but the class": {"model_type": "clip"},
    "openai": OPENAI,
    "some keys left out": {"projection_dim": 768, "text_config": LARGE, "vision_config": {"patch_size": 14}},
    "the older spelling alone": {"text_config_dict": LARGE, "vision_config_dict": {"patch_size": 16}},
    # what the older one leaves out is a default, whatever the newer one says
    "both spellings": {
        "text_config": {"hidden_size": 1024, "vocab_size": 99, "hidden_act": "gelu"},
        "text_config_dict": LARGE,
        "vision_config": {"image_size": 336},
        "vision_config_dict": {},
    },
}


@pytest.mark.parametrize("name", FILES)
def test_configs_are_read_as_transformers_reads_them(name):
    ours, theirs = CLIPConfig.from_json(FILES[name], "config.json"), OriginalConfig(**FILES[name])
    for one, other in (
        (ours, theirs),
        (ours.text_config, theirs.text_config),
        (ours.vision_config, theirs.vision_config),
    ):
        read = {key: value for key, value in vars(one).items() if not key.endswith("_config")}
        assert read == {key: getattr(other, key) for key in read}
    assert CLIPConfig.from_json(json.loads(theirs.to_json_string(use_diff=False)), "config.json") == ours


@pytest.mark.parametrize(
    ("whole", "text", "vision", "told"),
    [
        ({"model_type": "siglip"}, {}, {}, "model_type='siglip' is not supported; supported: 'clip'"),
        ({"speed": 1}, {}, {}, "config.json: unknown option 'speed'"),
        ({}, {"num_heads": 8}, {}, "text_config: unknown option 'num_heads'"),
        ({}, {}, {"patchsize": 8}, "vision_config: unknown option 'patchsize' (did you mean patch_size?)"),
        ({}, {}, {"num_channels": 4}, "vision_config: num_channels=4 is not supported; supported: 3"),
        ({}, {}, {"pruned_heads": {"0": [1]}}, "vision_config: pruned_heads={'0': [1]} is not supported"),
        ({}, {}, {"image_size": [224, 224]}, "image_size=[224, 224]: write a whole number"),
        ({}, {}, {"patch_size": 500}, "patch_size=500: write at most image_size=224"),
        ({}, {}, {"num_attention_heads": 7}, "num_attention_heads=7 does not divide hidden_size=768"),
        ({}, {}, {"hidden_act": "sin"}, "vision_config: hidden_act: unknown activation 'sin'"),
        ({"projection_dim": 0}, {}, {}, "projection_dim=0: write whole numbers from 1"),
        ({"vision_config": "ViT-B/32"}, {}, {}, "vision_config='ViT-B/32': write an object of options"),
    ],
)
def test_what_the_engine_lacks_is_refused(whole, text, vision, told):
    options = OPENAI | {"text_config": OPENAI["text_config"] | text}
    options |= {"vision_config": OPENAI["vision_config"] | vision} | whole
    with pytest.raises(UserError) as error:
        CLIPConfig.from_json(options, "config.json")
    assert told in str(error.value)

"""LoRAs: what they change, which layers they may change, and their files. PyTorch's view: tests/parity."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from safetensors.numpy import load_file, save_file

from engine.types import UserError
from engine.weights import lora, lora_files
from engine.weights.folder import load_folder
from engine.weights.safetensors_io import read_metadata
from tests.kohya import as_kohya

pytestmark = pytest.mark.usefixtures("quick_compiler")

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def configs(model):
    return {kind: getattr(model, kind).config for kind in lora.KINDS}


@pytest.fixture(scope="module")
def parts(model):
    return {kind: getattr(model, kind).params for kind in lora.KINDS}


def random_lora(configs, targets=("*",), rank=2, alpha=3.0) -> lora.Lora:
    fresh = lora.fresh(KEY, configs, targets, rank, alpha)
    rng = np.random.default_rng(0)
    layers = jax.tree.map(lambda array: rng.standard_normal(array.shape, np.float32), fresh.layers)
    return lora.Lora(layers, fresh.alphas)


def leaves(parts):
    return traverse_util.flatten_dict(parts)


# ---- what a LoRA changes


def test_a_fresh_one_changes_nothing(configs, parts):
    fresh = lora.fresh(KEY, configs, ("*",), 4, 8.0)
    assert fresh.layers.keys() == lora.layers_of(configs).keys()
    after = lora.merged(parts, fresh)
    jax.tree.map(np.testing.assert_array_equal, after, dict(parts))


def test_a_is_uniform_as_in_peft_and_b_is_zero(configs):
    """torch.nn.init.kaiming_uniform_(a=sqrt(5)): +-1 / sqrt(inputs), of a window too."""
    fresh = lora.fresh(KEY, configs, ("conv1", "to_q"), 64, 64)
    for name, layer in fresh.layers.items():
        bound = layer["a"][..., 0].size ** -0.5
        assert 0.9 * bound < np.abs(layer["a"]).max() <= bound, name
        assert np.std(layer["a"]) == pytest.approx(bound / 3**0.5, rel=0.1), name
        assert not layer["b"].any()


def test_a_layer_begins_alike_whatever_else_is_adapted_and_unlike_its_neighbours(configs):
    one = lora.fresh(KEY, configs, ("to_q",), 4, 4).layers
    all_of_them = lora.fresh(KEY, configs, ATTENTION, 4, 4).layers
    for name, layer in one.items():
        np.testing.assert_array_equal(layer["a"], all_of_them[name]["a"])
    arrays = [layer["a"] for layer in one.values() if layer["a"].shape == (16, 4)]
    assert len(arrays) > 1 and not np.array_equal(arrays[0], arrays[1])
    other = lora.fresh(jax.random.key(1), configs, ("to_q",), 4, 4).layers
    assert not np.array_equal(next(iter(one.values()))["a"], next(iter(other.values()))["a"])


@pytest.mark.parametrize(
    "layer",
    [
        nnx.Linear(6, 5, use_bias=False, rngs=nnx.Rngs(0)),
        nnx.Conv(6, 5, (3, 3), strides=2, padding=1, use_bias=False, rngs=nnx.Rngs(0)),
    ],
    ids=["linear", "conv"],
)
def test_merged_is_the_layer_beside_the_two_of_the_lora(layer):
    """W x + factor B (A x): A in the layer's own way, B on each place by itself."""
    rng = np.random.default_rng(0)
    kernel, x = layer.kernel[...], rng.standard_normal((2, 8, 8, 6), np.float32)
    shapes = lora.Layer("unet", ("conv", "kernel"), kernel.shape).shapes(rank=3)
    a, b = (rng.standard_normal(shapes[side], np.float32) for side in "ab")

    def call(kernel):
        layer.kernel = nnx.Param(kernel)
        return layer(x)

    beside = call(kernel) + 2 * 1.5 / 3 * call(jnp.asarray(a)) @ b.reshape(b.shape[-2:])
    adapter = lora.Lora({"unet.conv": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}, {"unet.conv": 1.5})
    merged = lora.merged({"unet": {"conv": {"kernel": kernel}}}, adapter, scale=2)
    np.testing.assert_allclose(call(merged["unet"]["conv"]["kernel"]), beside, rtol=1e-4, atol=1e-4)


def test_the_host_merges_as_the_device_does(folder, configs, parts, tmp_path):
    one, two = random_lora(configs), random_lora(configs, ATTENTION, rank=3, alpha=1.0)
    files = [lora_files.save(tmp_path / str(i), each) for i, each in enumerate((one, two))]
    loaded = load_folder(folder, loras=[(files[0], 0.3), (files[1], -2.0)])
    wanted = jax.jit(lambda parts: lora.merged(lora.merged(parts, one, 0.3), two, -2.0))(parts)
    ours = leaves({kind: getattr(loaded, kind).params for kind in lora.KINDS})
    for path, array in leaves(wanted).items():
        np.testing.assert_allclose(ours[path], array, rtol=1e-5, atol=1e-5, err_msg=str(path))


def test_only_targets_change(configs, parts):
    adapter = random_lora(configs, ATTENTION)
    after = leaves(lora.merged(parts, adapter))
    changed = {path for path, array in leaves(parts).items() if not np.array_equal(array, after[path])}
    assert {".".join(map(str, path[:-1])) for path in changed} == set(adapter.layers)
    assert {path[-1] for path in changed} == {"kernel"}


def test_merged_in_float32_then_cast(folder, configs, tmp_path):
    """What is small beside the weights is not lost in bfloat16 before it is added up."""
    file = lora_files.save(tmp_path, random_lora(configs))
    half = load_folder(folder, dtype=jnp.bfloat16, loras=[(file, 0.1), (file, 0.1)])
    whole = load_folder(folder, loras=[(file, 0.1), (file, 0.1)])
    for path, array in leaves(whole.unet.params).items():
        np.testing.assert_array_equal(leaves(half.unet.params)[path], array.astype(jnp.bfloat16))
    assert (
        leaves(lora.merged({"unet": half.unet.params}, random_lora({"unet": configs["unet"]})))[
            ("unet", "conv_in", "kernel")
        ].dtype
        == jnp.bfloat16
    )


def test_a_layer_that_is_not_there_is_a_programming_error(configs, parts):
    with pytest.raises(ValueError, match=r"no such layers.*text_encoder\.text_model"):
        lora.merged({"unet": parts["unet"]}, random_lora(configs))


# ---- targets

LAYERS = ["unet.down.0.attn1.to_q", "unet.down.0.attn1.to_out.0", "unet.up.1.attn1.to_q", "unet.conv_in"]


@pytest.mark.parametrize(
    "targets, hits",
    [
        (["to_q"], [0, 2]),
        (["to_out.0", "conv_in"], [1, 3]),
        (["up.*.to_q"], [2]),
        (["unet.*"], [0, 1, 2, 3]),
        (["unet.up.1.attn1.to_q", "to_q"], [0, 2]),
    ],
    ids=str,
)
def test_targets_are_names_ends_of_names_and_patterns(targets, hits):
    assert lora.matching(LAYERS, targets) == [LAYERS[i] for i in hits]


@pytest.mark.parametrize(
    "target, near",
    [("to_qu", "did you mean to_q?"), ("q", "end in conv_in, to_out.0, to_q"), ("TO_Q", "TO_Q"), ("in", "")],
)
def test_a_target_that_matches_nothing_is_told_with_what_there_is(target, near):
    with pytest.raises(UserError, match=f"LoRA target '{target}' matches no layer") as error:
        lora.matching(LAYERS, ["to_q", target])
    assert near in str(error.value) and "\n" not in str(error.value)


# ---- files


def test_export_after_import_is_the_identity(configs, tmp_path):
    one, two = random_lora(configs), random_lora(configs, ("to_k", "fc1"), rank=5, alpha=1.25)
    mixed = lora.Lora(one.layers | two.layers, one.alphas | two.alphas)
    file = lora_files.save(tmp_path / "a" / "one.safetensors", mixed)
    read = lora_files.read(file, configs)
    jax.tree.map(np.testing.assert_array_equal, read.layers, mixed.layers)
    assert read.alphas == mixed.alphas
    again = lora_files.save(tmp_path / "b", read)
    assert again == tmp_path / "b" / "pytorch_lora_weights.safetensors"
    assert again.read_bytes() == file.read_bytes()
    assert [path.name for path in file.parent.iterdir()] == ["one.safetensors"]  # nothing unfinished beside


def test_what_stands_in_the_file(configs, tmp_path):
    file = lora_files.save(tmp_path, random_lora(configs, ("to_q", "conv_in", "q_proj"), rank=2, alpha=3.0))
    tensors = load_file(file)
    assert tensors[lora_files.EXAMPLE].shape == (2, 32)
    assert tensors[lora_files.EXAMPLE.replace("_A", "_B")].shape == (32, 2)
    assert tensors["unet.conv_in.lora_A.weight"].shape == (2, 4, 3, 3)
    assert tensors["unet.conv_in.lora_B.weight"].shape == (16, 2, 1, 1)
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight" in tensors
    metadata = read_metadata(file)
    assert metadata["format"] == "pt"
    notes = json.loads(metadata["lora_adapter_metadata"])
    assert notes["unet.r"] == 2 and notes["text_encoder.lora_alpha"] == 3.0
    assert notes["text_encoder.target_modules"] == [f"encoder.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def written(path, tensors, **metadata):
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path, metadata or None)
    return path


@pytest.fixture
def tensors(configs, tmp_path):
    """A sound file's, for the layers to_q of the U-Net."""
    return load_file(lora_files.save(tmp_path / "sound", random_lora({"unet": configs["unet"]}, ("to_q",))))


SPELLINGS = {
    "diffusers 0.17": lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    "diffusers 0.14": lambda key: key.replace(".to_q.lora_A", ".processor.to_q_lora.down").replace(
        ".to_q.lora_B", ".processor.to_q_lora.up"
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_of_earlier_diffusers(configs, tensors, tmp_path, spelling):
    old = {SPELLINGS[spelling](key): array for key, array in tensors.items()}
    assert old.keys().isdisjoint(tensors)
    read = lora_files.read(written(tmp_path / "old.safetensors", old), configs)
    new = lora_files.read(written(tmp_path / "new.safetensors", tensors), configs)
    jax.tree.map(np.testing.assert_array_equal, read.layers, new.layers)
    assert set(read.alphas.values()) == {2.0}  # the rank, where nothing is said


def test_the_oldest_name_of_the_way_out_and_a_text_encoder_without_prefix(configs, tmp_path):
    ours = random_lora(configs, ("to_out.0", "q_proj"))
    tensors = load_file(lora_files.save(tmp_path, ours))
    old = {
        key.replace(".to_out.0.lora_A", ".processor.to_out_lora.down")
        .replace(".to_out.0.lora_B", ".processor.to_out_lora.up")
        .replace("text_model.", ""): array
        for key, array in tensors.items()
    }
    read = lora_files.read(written(tmp_path / "old.safetensors", old), configs)
    jax.tree.map(np.testing.assert_array_equal, read.layers, ours.layers)


def test_an_alpha_beside_a_layer_is_read(configs, tensors, tmp_path):
    layers = {key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key}
    alphas = {f"{layer}.alpha": np.float32(7) for layer in layers}
    read = lora_files.read(written(tmp_path / "file.safetensors", tensors | alphas), configs)
    assert read.alphas == dict.fromkeys(layers, 7.0)


def test_a_file_of_kohya_is_read_as_that_of_diffusers(configs, tmp_path):
    """Windows, and parts of the text encoder, too."""
    ours = random_lora(configs, alpha=5.0)
    path = written(tmp_path / "kohya.safetensors", as_kohya(load_file(lora_files.save(tmp_path, ours)), 5.0))
    read = lora_files.read(path, configs)
    jax.tree.map(np.testing.assert_array_equal, read.layers, ours.layers)
    assert read.alphas == ours.alphas


def test_linear_layers_as_convolutions_of_one_pixel_and_whole_alphas(configs, tmp_path):
    """As kohya's scripts write those of Stable Diffusion 2, and what its merger of LoRAs makes of alphas."""
    ours = random_lora(configs, ("to_q", "conv1"), alpha=5.0)
    tensors = as_kohya(load_file(lora_files.save(tmp_path, ours)), 5.0)
    wide = {
        key: np.int64(5) if key.endswith("alpha") else array[..., None, None] if array.ndim == 2 else array
        for key, array in tensors.items()
    }
    read = lora_files.read(written(tmp_path / "kohya.safetensors", wide), configs)
    jax.tree.map(np.testing.assert_array_equal, read.layers, ours.layers)
    assert read.alphas == ours.alphas


def test_layers_under_either_name_of_kohya_are_read_once(configs, tensors, tmp_path):
    """As in files that are to be read by any program."""
    blocks = {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": ORIGINAL}
    plain, original = (as_kohya(tensors, 2.0, blocks=names) for names in ({}, blocks))
    both = plain | {key: 2 * array for key, array in original.items() if key not in plain}
    assert len(both) == len(plain) + 3
    read, wanted = (
        lora_files.read(written(tmp_path / "x.safetensors", each), configs) for each in (both, plain)
    )
    jax.tree.map(np.testing.assert_array_equal, read.layers, wanted.layers)
    moved = lora_files.read(written(tmp_path / "x.safetensors", original), configs)
    jax.tree.map(np.testing.assert_array_equal, moved.layers, wanted.layers)


def without(tensors, *keys):
    return {key: array for key, array in tensors.items() if key not in keys}


def renamed(tensors, old, new):
    return {key.replace(old, new): array for key, array in tensors.items()}


ORIGINAL = "middle_block.1.transformer_blocks.0.attn1.to_q"
A, B = lora_files.EXAMPLE, lora_files.EXAMPLE.replace("lora_A", "lora_B")
WRONG = {
    "no LoRA": (
        lambda t: {"decoder.weight": t[A]},
        "holds no LoRA.*such as unet.*it holds .1. decoder.weight",
    ),
    "empty": (lambda t: {}, "holds no LoRA"),
    "kohya, of SDXL": (
        lambda t: {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": t[A]},
        "does not have: .1. lora_unet_input_blocks_4_1_proj_in.lora_down.weight$",
    ),
    "of SDXL": (
        lambda t: {f"text_encoder_2.{A.removeprefix('unet.')}": t[A]},
        "does not have: .1. text_encoder_2.mid_block",
    ),
    "twice": (
        lambda t: t | {A.replace("lora_A", "lora.down"): t[A]},
        r"given twice: \(1\) unet.mid_block\S+to_q.lora",
    ),
    "kohya, of another kind": (
        lambda t: {"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": t[A]},
        "holds no LoRA of PyTorch diffusers, .*nor of kohya, such as lora_unet_mid.*holds .1. lora_unet_mid",
    ),
    "another model": (
        lambda t: renamed(t, "mid_block.", "mid_block.more."),
        r"does not have: \(4\) unet.mid_block",
    ),
    "half": (lambda t: without(t, B), r"A without B or B without A: \(1\) unet.mid_block\S+to_q$"),
    "wrong shape": (lambda t: t | {A: t[A][:, 1:]}, rf"wrong shape: \(1\) {A} is \(2, 31\), not \(2, 32\)"),
    "ranks that differ": (lambda t: t | {B: t[B][:, 1:]}, rf"{B} is \(32, 1\), not \(32, 2\)"),
    "rank 0": (lambda t: t | {A: t[A][:0], B: t[B][:, :0]}, "wrong shape"),
    "scalar": (lambda t: t | {A: np.float32(1)}, "wrong shape"),
    "integers": (lambda t: t | {A: t[A].astype(np.int32)}, f"wrong type: .1. {A} is I32"),
    "DoRA": (
        lambda t: t | {A.replace("lora_A.weight", "lora_magnitude_vector"): t[A][0]},
        "unknown keys: .1. unet.*lora_magnitude_vector",
    ),
    "alpha of a window": (
        lambda t: t | {A.replace("lora_A.weight", "alpha"): np.ones(3, np.float32)},
        "no single number",
    ),
    "alpha that is none": (
        lambda t: t | {A.replace("lora_A.weight", "alpha"): np.float32(np.nan)},
        "alpha is no number for .1. unet",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_do_not_fit_are_told_in_one_line(configs, tensors, tmp_path, name):
    change, message = WRONG[name]
    path = written(tmp_path / "wrong.safetensors", change(tensors))
    with pytest.raises(UserError, match=message) as error:
        lora_files.read(path, configs)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "notes, message",
    [
        ("{", "no JSON object"),
        ("[]", "no JSON object"),
        ('{"unet.lora_alpha": "large"}', "strange alpha for unet"),
        ('{"unet.lora_alpha": [1]}', "strange alpha for unet"),
        ('{"unet.alpha_pattern": {"(": 1}}', "strange alpha for unet"),
        ('{"unet.lora_alpha": NaN}', "alpha is no number"),
    ],
)
def test_strange_notes_are_told_in_one_line(configs, tensors, tmp_path, notes, message):
    path = written(tmp_path / "wrong.safetensors", tensors, lora_adapter_metadata=notes)
    with pytest.raises(UserError, match=message) as error:
        lora_files.read(path, configs)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_missing_broken_or_pickled(configs, tensors, tmp_path):
    with pytest.raises(UserError, match=r"no LoRA .*nowhere: write the path of a .safetensors file"):
        lora_files.read(tmp_path / "nowhere", configs)
    with pytest.raises(UserError, match=r"no LoRA .*pytorch_lora_weights.safetensors"):
        lora_files.read(tmp_path, configs)
    path = written(tmp_path / "short.safetensors", tensors)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is broken, or a download that stopped early"):
        lora_files.read(path, configs)
    path = path.rename(tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(UserError, match="never opened because it can run code"):
        lora_files.read(path, configs)

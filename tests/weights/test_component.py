"""unet/, vae/ and text_encoder/ on disk <-> config and params."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from safetensors.numpy import load_file, save_file

from engine.types import UserError
from engine.weights import names
from engine.weights.component import load_component, save_component
from engine.weights.kinds import KINDS

DTYPES = [np.float32, np.float16, jnp.bfloat16]
FILES = {kind: f"{spec.stem}.safetensors" for kind, spec in KINDS.items()}


@pytest.fixture
def unet(torch_folder, tmp_path):
    return shutil.copytree(torch_folder / "unet", tmp_path / "unet")


@pytest.fixture
def vae(torch_folder, tmp_path):
    return shutil.copytree(torch_folder / "vae", tmp_path / "vae")


def tensors(folder, kind):
    """Every tensor of a folder under the models' own name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= {names.canonical(kind, key): array for key, array in load_file(file).items()}
    return found


def rewrite(file, change):
    """Writes the file anew with what `change` makes of its tensors; None keeps what it changed in place."""
    contents = load_file(file)
    save_file(change(contents) or contents, file, metadata={"format": "pt"})


def assert_same_tensors(one, two):
    assert one.keys() == two.keys()
    for key, array in one.items():
        assert array.dtype == two[key].dtype
        assert array.shape == two[key].shape
        assert array.tobytes() == two[key].tobytes(), key


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("kind", KINDS)
def test_export_after_import_is_the_identity(torch_folder, tmp_path, kind, dtype):
    source = shutil.copytree(torch_folder / kind, tmp_path / "source")
    rewrite(source / FILES[kind], lambda t: {k: v.astype(dtype) for k, v in t.items()})
    component = load_component(source, kind, dtype)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(component.params))
    save_component(tmp_path / "ours", component)
    assert_same_tensors(tensors(source, kind), tensors(tmp_path / "ours", kind))
    assert load_component(tmp_path / "ours", kind).config == component.config


@pytest.mark.parametrize("stored", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("asked", DTYPES, ids=lambda d: np.dtype(d).name)
def test_any_dtype_is_read_as_any_other(unet, tmp_path, stored, asked):
    rewrite(unet / FILES["unet"], lambda t: {k: v.astype(stored) for k, v in t.items()})
    save_component(tmp_path / "ours", load_component(unet, "unet", asked))
    wanted = {key: array.astype(asked) for key, array in tensors(unet, "unet").items()}
    assert_same_tensors(wanted, tensors(tmp_path / "ours", "unet"))


def test_saving_casts(unet, tmp_path):
    save_component(tmp_path / "ours", load_component(unet, "unet"), dtype="bfloat16")
    wanted = {key: array.astype(jnp.bfloat16) for key, array in tensors(unet, "unet").items()}
    assert_same_tensors(wanted, tensors(tmp_path / "ours", "unet"))


def test_the_module_computes_with_what_was_read(vae):
    """A 1x1 convolution of the file, applied to one pixel by hand."""
    component = load_component(vae, "vae")
    module = nnx.merge(component.graphdef, nnx.State(component.params))
    stored = load_file(vae / FILES["vae"])
    pixel = np.arange(4, dtype=np.float32)
    by_hand = stored["post_quant_conv.weight"][:, :, 0, 0] @ pixel + stored["post_quant_conv.bias"]
    np.testing.assert_allclose(module.post_quant_conv(pixel[None, None, None])[0, 0, 0], by_hand, rtol=1e-5)


def test_the_outline_is_that_of_the_model(unet):
    """What is built without memory has the structure of what is built with it."""
    component = load_component(unet, "unet")
    graphdef, params = nnx.split(KINDS["unet"].module(component.config, nnx.Rngs(0)), nnx.Param)
    assert graphdef == component.graphdef
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(params))
    assert shapes == jax.tree.map(jnp.shape, component.params)


def test_place_puts_every_leaf(unet):
    placed = {}

    def place(name, array):
        placed[name] = array.shape
        return jnp.full(array.shape, len(placed), jnp.int32)

    params = load_component(unet, "unet", place=place).params
    shapes = {
        ".".join(map(str, ("unet", *path))): leaf.shape
        for path, leaf in traverse_util.flatten_dict(params).items()
    }
    assert placed == shapes
    assert "unet.down_blocks.0.resnets.0.conv1.kernel" in placed
    assert sorted(int(leaf.max()) for leaf in jax.tree.leaves(params)) == list(range(1, len(placed) + 1))


@pytest.mark.parametrize("limit", [1, 20_000, 10**9])
def test_shards(torch_folder, tmp_path, limit):
    source, ours = torch_folder / "text_encoder", tmp_path / "ours"
    component = load_component(source, "text_encoder")
    save_component(ours, component, max_shard_size=limit)
    wanted = tensors(source, "text_encoder")
    assert_same_tensors(wanted, tensors(ours, "text_encoder"))
    files = sorted(file.name for file in ours.glob("*.safetensors"))
    if limit == 10**9:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((ours / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in wanted.values())
        assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        for file in files:
            sizes = [array.nbytes for array in load_file(ours / file).values()]
            assert sum(sizes) <= limit or len(sizes) == 1
    again = load_component(ours, "text_encoder")
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again.params, component.params))


def test_old_names_of_the_autoencoders_attention(vae, tmp_path):
    """As stored by Stable Diffusion 1 and 2, as matrices and as 1x1 convolutions."""
    wanted = load_component(vae, "vae").params
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(contents):
        renamed = {}
        for key, array in contents.items():
            for new_name, old_name in old.items():
                key = key.replace(f".{new_name}.", f".{old_name}.")
            if key.endswith("value.weight"):
                array = array[:, :, None, None]
            renamed[key] = array
        assert sum("proj_attn" in key for key in renamed) == 4
        return renamed

    rewrite(vae / FILES["vae"], rename)
    component = load_component(vae, "vae")
    assert jax.tree.all(jax.tree.map(jnp.array_equal, component.params, wanted))
    save_component(tmp_path / "ours", component)
    assert not any("proj_attn" in key for key in load_file(tmp_path / "ours" / FILES["vae"]))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_the_text_encoder_with_and_without_its_prefix(torch_folder, tmp_path, prefix):
    wanted = load_component(torch_folder / "text_encoder", "text_encoder").params
    folder = shutil.copytree(torch_folder / "text_encoder", tmp_path / "text_encoder")
    position_ids = {prefix + "embeddings.position_ids": np.arange(77)[None]}  # int64, and no weight
    rewrite(
        folder / FILES["text_encoder"],
        lambda t: {prefix + key.removeprefix("text_model."): a for key, a in t.items()} | position_ids,
    )
    params = load_component(folder, "text_encoder").params
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params, wanted))


def test_variants(unet):
    """The plain file is read unless there is none, or another is asked for."""
    plain = unet / FILES["unet"]
    half = unet / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(plain, half)
    rewrite(half, lambda t: {key: np.full_like(array, 2) for key, array in t.items()})

    def is_half(**options):
        return all(
            (leaf == 2).all() for leaf in jax.tree.leaves(load_component(unet, "unet", **options).params)
        )

    assert not is_half()
    assert is_half(variant="fp16")
    plain.unlink()
    assert is_half()
    with pytest.raises(UserError, match=r"has no .*model\.ema\.safetensors.*it holds config\.json, .*fp16"):
        load_component(unet, "unet", variant="ema")


def drop(*keys):
    return lambda t: {k: v for k, v in t.items() if k not in keys}


def add(**arrays):
    return lambda t: t | arrays


def reshape(contents):
    return contents | {"conv_in.weight": contents["conv_in.weight"].transpose(2, 3, 1, 0).copy()}


def retype(dtype):
    return lambda t: t | {"conv_in.bias": t["conv_in.bias"].astype(dtype)}


STRICT = {
    "missing": (drop("conv_in.bias", "conv_out.bias"), [r"missing: \(2\) conv_in\.bias, conv_out\.bias"]),
    "unexpected": (add(extra=np.zeros(2, np.float32)), [r"unexpected: \(1\) extra"]),
    "shape": (reshape, [r"wrong shape: \(1\) conv_in\.weight is \(3, 3, 4, 8\), not \(8, 4, 3, 3\)"]),
    "int8": (retype(np.int8), [r"no type of F32, F16, BF16: \(1\) conv_in\.bias is I8"]),
    "float64": (retype(np.float64), [r"conv_in\.bias is F64"]),
    "float8": (retype(jnp.float8_e4m3fn), [r"conv_in\.bias is F8_E4M3"]),
    "renamed": (
        lambda t: drop("conv_in.bias")(t) | {"conv_in.bais": t["conv_in.bias"]},
        [r"missing: \(1\) conv_in\.bias", r"unexpected: \(1\) conv_in\.bais"],
    ),
    "all at once": (
        lambda t: drop("conv_out.bias")(retype(np.int8)(reshape(t))) | {"extra": np.zeros(1, np.float32)},
        [r"missing: \(1\)", r"unexpected: \(1\)", r"wrong shape: \(1\)", r"no type of"],
    ),
    "nothing": (lambda t: {"x": np.zeros(1, np.float32)}, [r"missing: \(208\)", r"and 188 more"]),
}


@pytest.mark.parametrize(("change", "patterns"), STRICT.values(), ids=STRICT.keys())
def test_loading_is_strict(unet, change, patterns):
    rewrite(unet / FILES["unet"], change)
    with pytest.raises(
        UserError, match=r"unet/diffusion.*\.safetensors does not fit .*unet/config\.json"
    ) as error:
        load_component(unet, "unet")
    assert "\n" not in str(error.value)
    for pattern in patterns:
        assert re.search(pattern, str(error.value))


def test_one_weight_under_two_names(vae):
    key = "encoder.mid_block.attentions.0.{}.bias"
    rewrite(vae / FILES["vae"], lambda t: t | {key.format("query"): t[key.format("to_q")]})
    with pytest.raises(
        UserError, match=r"given twice: \(1\) encoder\.mid_block\.attentions\.0\.(to_q|query)"
    ):
        load_component(vae, "vae")


def write_index(folder, change):
    """Splits the weights in two, and lets `change` spoil the index's weight_map."""
    contents = load_file(folder / FILES["unet"])
    (folder / FILES["unet"]).unlink()
    weight_map = {}
    for number, part in enumerate((sorted(contents)[:100], sorted(contents)[100:])):
        save_file({key: contents[key] for key in part}, folder / f"{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"{number}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(change(index) or index))


def other_shard(index):
    index["weight_map"]["conv_in.bias"] = "1.safetensors"


def forgotten(index):
    del index["weight_map"]["conv_in.bias"]


def pointing(shard):
    def change(index):
        index["weight_map"]["conv_in.bias"] = shard

    return change


INDEXES = {
    "other shard": (other_shard, r"index\.json and 0\.safetensors disagree on \(1\) conv_in\.bias"),
    "forgotten": (forgotten, r"index\.json and 0\.safetensors disagree on \(1\) conv_in\.bias"),
    "absent shard": (pointing("2.safetensors"), r"2\.safetensors cannot be read"),
    "outside": (pointing("../../x.safetensors"), r"names '\.\./\.\./x\.safetensors', which is not a safe"),
    "absolute": (pointing("/etc/x.safetensors"), r"names '/etc/x\.safetensors', which is not"),
    "pickle": (pointing("x.bin"), r"names 'x\.bin', which is not a safetensors file"),
    "number": (pointing(3), r"has no weight_map"),
    "no map": (lambda index: {"metadata": {}}, r"has no weight_map"),
    "empty map": (lambda index: {"weight_map": {}}, r"has no weight_map"),
}


@pytest.mark.parametrize(("change", "pattern"), INDEXES.values(), ids=INDEXES.keys())
def test_indexes_that_lead_astray(unet, change, pattern):
    write_index(unet, change)
    with pytest.raises(UserError, match=pattern):
        load_component(unet, "unet")


def test_an_index_that_is_right(unet):
    wanted = load_component(unet, "unet").params
    write_index(unet, lambda index: None)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, load_component(unet, "unet").params, wanted))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "weights.pt"])
def test_pickles_are_never_opened(unet, name):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    import pickle

    (unet / FILES["unet"]).unlink()
    (unet / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=rf"{name} alone, .*never opened.*safe_serialization=True"):
        load_component(unet, "unet")


def change_config(**options):
    def change(folder):
        config = json.loads((folder / "config.json").read_text()) | options
        (folder / "config.json").write_text(json.dumps(config))

    return change


FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), r"unet/config\.json cannot be read: No such file"),
    "config cut": (lambda f: (f / "config.json").write_text('{"a": '), r"unet/config\.json is not JSON"),
    "config no UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"\xff": 1}'), r"is not JSON"),
    "config deep": (lambda f: (f / "config.json").write_text("[" * 10**5), r"config\.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"holds a JSON list, not an object"),
    "other class": (
        change_config(_class_name="UNet3D"),
        r"config\.json describes a UNet3D; the engine reads",
    ),
    "unknown option": (change_config(atention=1), r"unet/config\.json: unknown option 'atention'"),
    "bad value": (change_config(act_fn="sine"), r"unet/config\.json: .*sine"),
    "no weights": (lambda f: (f / FILES["unet"]).unlink(), r"has no diffusion_pytorch_model\.safetensors or"),
    "weights cut": (
        lambda f: (f / FILES["unet"]).write_bytes((f / FILES["unet"]).read_bytes()[:-1]),
        r"model\.safetensors is broken",
    ),
    "no folder": (shutil.rmtree, r"unet/config\.json cannot be read"),
}


@pytest.mark.parametrize(("spoil", "pattern"), FOLDERS.values(), ids=FOLDERS.keys())
def test_broken_folders(unet, spoil, pattern):
    spoil(unet)
    with pytest.raises(UserError, match=pattern) as error:
        load_component(unet, "unet")
    assert "\n" not in str(error.value)


def test_params_of_another_shape_are_not_saved(unet, tmp_path):
    """Such as those that pmap replicated, which have one axis more."""
    component = load_component(unet, "unet")
    component.params["conv_in"]["bias"] = component.params["conv_in"]["bias"][None]
    with pytest.raises(ValueError, match=r"conv_in\.bias is float32\(1, 8\)"):
        save_component(tmp_path / "ours", component)
    del component.params["conv_in"]["bias"]
    with pytest.raises(ValueError, match=r"disagree on \(1\) conv_in\.bias"):
        save_component(tmp_path / "ours", component)
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]

"""Models made of others: the arithmetic of their files, and what cannot be mixed."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from engine.text.tokenizer import Tokenizer
from engine.types import UserError
from engine.weights import lora, lora_files
from engine.weights.folder import load_folder, save_folder
from engine.weights.mixing import Mixture, write_mixed
from tests.single import contents
from tests.tiny import SCHEDULER, SHALLOW, XL, shallow, tiny_folder, tiny_model
from tests.weights.test_lora import random_lora

UNET, TEXT, VAE = (
    f"{kind}/{stem}.safetensors"
    for kind, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("vae", "diffusion_pytorch_model"),
    )
)


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """Folders `a`, `b`, `c` of one architecture; `wide`, which paints into masks; and others. Only read."""
    at = tmp_path_factory.mktemp("mixing")
    for seed, name in enumerate("abc"):
        tiny_folder(at / name, seed, **SHALLOW)
    tiny_folder(at / "wide", 3, **shallow({"unet": {"in_channels": 9}}))
    tiny_folder(at / "deep", **shallow({"unet": {"layers_per_block": 2}}))
    tiny_folder(at / "eps", **SHALLOW, scheduler=SCHEDULER | {"prediction_type": "epsilon"})
    model = tiny_model(**SHALLOW)
    ids, merges = model.tokenizer.vocabulary, model.tokenizer.merges
    other = Tokenizer(ids | {"a": ids["b"], "b": ids["a"]}, merges, model.tokenizer.model_max_length)
    save_folder(at / "words", dataclasses.replace(model, tokenizer=other))
    return at


def weights(folder: pathlib.Path, file: str) -> dict[str, np.ndarray]:
    return load_file(folder / file)


def same(found: dict, wanted: dict) -> None:
    """To float32's last bits: sums may be taken in another order."""
    assert found.keys() == wanted.keys()
    for key, array in wanted.items():
        np.testing.assert_allclose(found[key], array, rtol=1e-5, atol=1e-6, err_msg=key)


def test_a_weighted_sum(at, tmp_path):
    write_mixed(at / "a", tmp_path / "new", Mixture(toward=[(at / "b", 0.3), (at / "c", -0.2)]))
    for file in (UNET, TEXT):
        a, b, c = (weights(at / name, file) for name in "abc")
        same(weights(tmp_path / "new", file), {key: 0.9 * a[key] + 0.3 * b[key] - 0.2 * c[key] for key in a})
    ours, new = (contents(folder) for folder in (at / "a", tmp_path / "new"))
    assert {file for file in ours if ours[file] != new[file]} == {UNET, TEXT}
    assert load_folder(tmp_path / "new").unet.config == load_folder(at / "a").unet.config


def test_toward_itself_and_without_weight_nothing_changes(at, tmp_path):
    mixture = Mixture(toward=[(at / "a", 0.7), (at / "b", 0.0)], plus=[(at / "c", 1)], minus=[(at / "c", 1)])
    write_mixed(at / "a", tmp_path / "new", mixture)
    assert contents(tmp_path / "new") == contents(at / "a")


def test_the_parts_that_are_named(at, tmp_path):
    write_mixed(at / "a", tmp_path / "new", Mixture(toward=[(at / "b", 1.0)], parts=["vae"]))
    same(weights(tmp_path / "new", VAE), weights(at / "b", VAE))
    for file in (UNET, TEXT):
        assert (tmp_path / "new" / file).read_bytes() == (at / "a" / file).read_bytes()


def test_a_difference_is_added(at, tmp_path):
    write_mixed(at / "a", tmp_path / "new", Mixture(plus=[(at / "b", 0.5)], minus=[(at / "c", 0.5)]))
    a, b, c = (weights(at / name, UNET) for name in "abc")
    same(weights(tmp_path / "new", UNET), {key: a[key] + 0.5 * (b[key] - c[key]) for key in a})


def test_what_sees_more_keeps_what_it_sees_it_with(at, tmp_path):
    """The inpainting model of another."""
    write_mixed(at / "wide", tmp_path / "new", Mixture(plus=[(at / "b", 1)], minus=[(at / "a", 1)]))
    wide, a, b = (weights(at / name, UNET) for name in ("wide", "a", "b"))
    new, first = weights(tmp_path / "new", UNET), "conv_in.weight"
    np.testing.assert_array_equal(new[first][:, 4:], wide[first][:, 4:])
    wanted = {key: b[key] - a[key] for key in a}
    wanted[first] = np.pad(wanted[first], [(0, 0), (0, 5), (0, 0), (0, 0)])
    same(new, {key: wide[key] + wanted[key] for key in wide})
    assert load_folder(tmp_path / "new").unet.config.in_channels == 9


@pytest.mark.parametrize("overrides", [SHALLOW, shallow(XL)], ids=["SD", "SDXL"])
def test_loras_are_those_that_a_model_is_loaded_with(overrides, tmp_path):
    model = load_folder(tiny_folder(tmp_path / "a", **overrides))
    configs = {kind: part.config for kind, part in model.parts.items() if kind in lora.XL_KINDS}
    lora_files.save(tmp_path / "lora.safetensors", random_lora(configs))
    given = [(tmp_path / "lora.safetensors", 0.7)]
    write_mixed(tmp_path / "a", tmp_path / "new", Mixture(loras=given))
    wanted, found = load_folder(tmp_path / "a", loras=given), load_folder(tmp_path / "new")
    jax.tree.map(
        np.testing.assert_array_equal,
        *({kind: part.params for kind, part in each.parts.items()} for each in (found, wanted)),
    )
    assert not np.array_equal(found.unet.params["conv_in"]["kernel"], model.unet.params["conv_in"]["kernel"])


def test_a_lora_on_top_of_a_sum(at, tmp_path):
    configs = {"unet": load_folder(at / "a").unet.config}
    lora_files.save(tmp_path / "lora.safetensors", random_lora(configs))
    given = [(tmp_path / "lora.safetensors", 1.0)]
    write_mixed(at / "a", tmp_path / "sum", Mixture(toward=[(at / "b", 0.3)]))
    write_mixed(tmp_path / "sum", tmp_path / "one", Mixture(loras=given))
    write_mixed(at / "a", tmp_path / "two", Mixture(toward=[(at / "b", 0.3)], loras=given))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_types(at, tmp_path):
    """Sums are of float32 and rounded once; without a type it is the one that each tensor has."""
    write_mixed(at / "a", tmp_path / "half", Mixture(), "bfloat16")
    write_mixed(tmp_path / "half", tmp_path / "new", Mixture(toward=[(at / "b", 0.25)]))
    half, b = weights(tmp_path / "half", UNET), weights(at / "b", UNET)
    for key, array in weights(tmp_path / "new", UNET).items():
        wide = half[key].astype(np.float32)
        assert array.dtype == half[key].dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, (wide + np.float32(0.25) * (b[key] - wide)).astype(jnp.bfloat16))


def test_its_own_folder(at, tmp_path):
    tiny_folder(tmp_path / "a", **SHALLOW)
    with pytest.raises(UserError, match="a already exists"):
        write_mixed(tmp_path / "a", tmp_path / "a", Mixture(toward=[(at / "b", 1.0)]))
    write_mixed(tmp_path / "a", tmp_path / "a", Mixture(toward=[(at / "b", 1.0)]), overwrite=True)
    same(weights(tmp_path / "a", UNET), weights(at / "b", UNET))
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("role", ["source", "toward", "lora"])
def test_what_it_is_made_of_is_not_replaced(at, tmp_path, role):
    target = tiny_folder(tmp_path / "old", **SHALLOW)
    inside = tiny_folder(target / "inside", 1, **SHALLOW)
    lora_files.save(inside / "a.safetensors", random_lora({"unet": load_folder(at / "a").unet.config}))
    source, mixture = {
        "source": (inside, Mixture(toward=[(at / "b", 0.5)])),
        "toward": (at / "a", Mixture(toward=[(inside, 0.5)])),
        "lora": (at / "a", Mixture(loras=[(inside / "a.safetensors", 1.0)])),
    }[role]
    before = contents(target)
    with pytest.raises(UserError, match=r"old holds .*inside.*, which it would replace: choose another"):
        write_mixed(source, target, mixture, overwrite=True)
    assert contents(target) == before


MISTAKES = {
    "nothing": (Mixture(), "nothing is to be changed"),
    "no folder": (Mixture(toward=[("{at}/nothing", 1)]), "no folder {at}/nothing"),
    "no difference": (Mixture(plus=[("{at}/b", 1)]), "plus 1 and minus 0: what is added is the difference"),
    "more than is taken": (Mixture(plus=[("{at}/b", 1)], minus=[("{at}/c", 0.5)]), "plus 1 and minus 0.5"),
    "only nothing is added": (Mixture(plus=[("{at}/b", 0)]), "plus 0 and minus 0"),
    "an unknown part": (
        Mixture(toward=[("{at}/b", 1)], parts=["unets"]),
        "{at}/a has no part 'unets' (did you mean unet?); write some of unet, vae, text_encoder",
    ),
    "other layers": (
        Mixture(toward=[("{at}/deep", 1)]),
        "{at}/deep: its unet is not built as that of {at}/a: they differ in (",
    ),
    "toward one that sees more": (
        Mixture(toward=[("{at}/wide", 1)]),
        "{at}/wide: its unet is not built as that of {at}/a: they differ in (1) conv_in.kernel",
    ),
    "more than it sees": (
        Mixture(plus=[("{at}/wide", 1)], minus=[("{at}/wide", 1)]),
        "{at}/wide: its unet is not built as that of {at}/a",
    ),
    "of another prediction": (
        Mixture(toward=[("{at}/eps", 1)]),
        "{at}/eps predicts epsilon and {at}/a v_prediction",
    ),
    "of other words": (Mixture(toward=[("{at}/words", 1)]), "words: its tokenizer numbers words otherwise"),
    "no LoRA": (Mixture(loras=[("{at}/no.safetensors", 1)]), "no.safetensors"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_mixed(mistake, at, tmp_path):
    mixture, message = MISTAKES[mistake]
    placed = (
        [(str(path).format(at=at), weight) for path, weight in each]
        for each in (mixture.toward, mixture.plus, mixture.minus, mixture.loras)
    )
    with pytest.raises(UserError) as error:
        write_mixed(at / "a", tmp_path / "new", Mixture(*placed, mixture.parts))
    assert message.format(at=at) in str(error.value) and "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_what_adds_and_what_takes_away_see_alike(at, tmp_path):
    with pytest.raises(UserError, match="sees 4 and 9 channels, which have no difference"):
        write_mixed(at / "wide", tmp_path / "new", Mixture(plus=[(at / "wide", 1)], minus=[(at / "a", 1)]))

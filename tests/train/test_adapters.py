"""A LoRA in training: it begins as nothing, learns what it should, and leaves the model as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from engine.config import LoraConfig, ObjectiveConfig, OptimConfig, StageConfig
from engine.train import adapters, loop, objectives, optim
from engine.train.step import computed
from engine.types import UserError
from engine.weights import lora_files
from engine.weights.folder import load_folder, save_folder
from engine.weights.lora import KINDS, Lora, merged, merged_on_host
from tests.tiny import CAPTIONS, SHALLOW, tiny_model
from tests.train.tiny_run import assert_same_arrays, saved

KEY = jax.random.key(3)
BOTH = LoraConfig(rank=3, alpha=6.0, text_encoder=True)
STAGE = StageConfig(
    steps=6,
    batch_size=4,
    checkpoint_every=3,
    ema=(0.0,),
    optim=OptimConfig(learning_rate=3e-2, warmup_steps=0, decay_steps=0),
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(**SHALLOW)


@pytest.fixture(scope="module")
def parts(model):
    return {kind: getattr(model, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def loss(model):
    return objectives.text_to_image_loss(model.graphdefs, model.scheduler, ObjectiveConfig())


@pytest.fixture(scope="module")
def frozen(model):
    return {
        "vae": model.vae.params,
        "text_encoder": model.text_encoder.params,
        "empty_ids": model.tokenizer.encode([""])[0],
    }


@pytest.fixture(scope="module")
def batch(model):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    return {"image": images, "ids": model.tokenizer.encode(CAPTIONS)}


@pytest.fixture(scope="module")
def gradients(loss, parts):
    """Of the loss over a LoRA, compiled once: (layers, frozen, batch) -> (loss, gradients)."""
    alphas = adapters.begin(parts, BOTH, 0).alphas

    def value(layers, frozen, batch):
        return adapters.lora_loss(loss, alphas)(layers, frozen, batch, KEY)[0]

    return jax.jit(jax.value_and_grad(value))


@pytest.fixture(scope="module")
def full_gradients(loss):
    """Of the loss over all weights of U-Net and text encoder."""

    def value(weights, frozen, batch):
        return loss(weights["unet"], {**frozen, "text_encoder": weights["text_encoder"]}, batch, KEY)[0]

    return jax.jit(jax.value_and_grad(value))


def weights_of(parts):
    return {kind: part.params for kind, part in parts.items()}


def moved(lora: Lora) -> Lora:
    rng = np.random.default_rng(1)
    layers = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), lora.layers)
    return Lora(layers, lora.alphas)


def test_a_fresh_lora_changes_nothing_and_its_b_learns_first(gradients, full_gradients, parts, frozen, batch):
    fresh = adapters.begin(parts, BOTH, 0)
    value, grads = gradients(fresh.layers, frozen | {"unet": parts["unet"].params}, batch)
    assert float(value) == pytest.approx(float(full_gradients(weights_of(parts), frozen, batch)[0]), rel=1e-6)
    assert all(not grad["a"].any() and grad["b"].any() for grad in grads.values())


def test_gradients_are_those_of_the_weights_and_reach_a_and_b_alone(
    gradients, full_gradients, parts, frozen, batch
):
    """dL/dA = factor dL/dW B^T and dL/dB = factor A^T dL/dW, at the merged weights."""
    lora = moved(adapters.begin(parts, BOTH, 0))
    value, grads = gradients(lora.layers, frozen | {"unet": parts["unet"].params}, batch)
    wanted, full = full_gradients(merged(weights_of(parts), lora), frozen, batch)
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(lora.layers)
    assert {name.split(".")[0] for name in grads} == set(KINDS)
    kernels = {
        ".".join(map(str, path[:-1])): grad
        for path, grad in traverse_util.flatten_dict(full).items()
        if path[-1] == "kernel"
    }
    for name, layer in lora.layers.items():
        scaled = 2.0 * np.asarray(kernels[name])
        for side, by_hand in (("a", scaled @ layer["b"].T), ("b", layer["a"].T @ scaled)):
            tolerance = 1e-4 * np.abs(by_hand).max()
            np.testing.assert_allclose(grads[name][side], by_hand, rtol=0, atol=tolerance, err_msg=name)
            assert np.abs(by_hand).max() > 0


def test_training_writes_a_file_that_does_what_was_learned(
    gradients, parts, model, loss, frozen, batch, tmp_path
):
    before = jax.tree.map(np.array, weights_of(parts))
    begun, base = adapters.begin(parts, BOTH, 0), frozen | {"unet": parts["unet"].params}

    def train(workdir, steps):
        stage = dataclasses.replace(STAGE, steps=steps)
        layers = loop.fit(
            "lora",
            loss,
            begun.layers,
            base,
            optim.optimizer(stage.optim, steps),
            stage,
            seed=0,
            batch_at=lambda step: batch,
            workdir=workdir,
            around=functools.partial(adapters.lora_loss, alphas=begun.alphas),
        )
        return lora_files.save(workdir, Lora(layers, begun.alphas))

    file = train(tmp_path / "whole", 6)
    jax.tree.map(np.testing.assert_array_equal, weights_of(parts), before)
    trained = lora_files.read(file, {kind: part.config for kind, part in parts.items()})
    assert set(trained.alphas.values()) == {6.0}

    first, _ = gradients(begun.layers, base, batch)
    last, _ = gradients(trained.layers, base, batch)
    assert last < 0.95 * first

    save_folder(tmp_path / "model", model)
    loaded = load_folder(tmp_path / "model", loras=[(file, 1.0)])
    on_host = jax.tree.map(np.asarray, weights_of(parts))
    for kind, params in merged(weights_of(parts), trained).items():
        for ours in (getattr(loaded, kind).params, merged_on_host(on_host, trained)[kind]):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, params)

    # stopped after three steps, it goes on as if it had not been
    train(tmp_path / "stopped", 3)
    again = train(tmp_path / "stopped", 6)
    assert_same_arrays(saved(tmp_path / "stopped" / "lora"), saved(tmp_path / "whole" / "lora"))
    assert again.read_bytes() == file.read_bytes()


def test_a_change_less_than_half_precision_shows_is_not_lost_beside_the_weights(parts, frozen):
    """bfloat16 has eight bits: a hundredth of the weights' last bit must move some of them to the next."""
    lora = moved(adapters.begin(parts, LoraConfig(), 0))
    name = next(iter(lora.layers))
    kind, *path, leaf = *(int(part) if part.isdigit() else part for part in name.split(".")), "kernel"
    kernel = functools.reduce(lambda tree, key: tree[key], [*path, leaf], parts[kind].params)
    a, b = np.ones_like(lora.layers[name]["a"]), np.ones_like(lora.layers[name]["b"])
    change = 1e-3 * np.abs(kernel).mean() / a.shape[-1]
    lora.layers[name].update(a=a, b=b * change)

    def shown(params, frozen, batch, key):
        leaf = functools.reduce(lambda tree, key: tree[key], [*path, "kernel"], params)
        assert leaf.dtype == params["conv_in"]["kernel"].dtype == jnp.bfloat16
        return leaf.astype(jnp.float32).sum(), {}

    stage = dataclasses.replace(STAGE, compute_dtype="bfloat16")
    kept = adapters.kept(frozen | {"unet": parts["unet"].params}, lora, stage.compute_dtype)
    around = adapters.lora_loss(computed(shown, stage), lora.alphas)
    moved_by = float(around(lora.layers, kept, {}, KEY)[0]) - float(
        kernel.astype(jnp.bfloat16).astype(jnp.float32).sum()
    )
    expected = 1e-3 * np.abs(kernel).sum() * lora.factor(name)
    assert moved_by == pytest.approx(expected, rel=0.3)
    own = {leaf.dtype for leaf in jax.tree.leaves(kept["vae"])}
    assert own == {jnp.dtype(jnp.bfloat16)} and kept["empty_ids"].dtype == np.int32


def test_what_begins(parts):
    unet = adapters.begin(parts, LoraConfig(), 0)
    assert {name.split(".")[0] for name in unet.layers} == {"unet"}
    assert {name.rsplit("attn", 1)[-1][2:] for name in unet.layers} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert all(layer["a"].shape[-1] == 8 for layer in unet.layers.values())
    assert set(unet.alphas.values()) == {8.0}
    assert any(name.endswith("self_attn.q_proj") for name in adapters.begin(parts, BOTH, 0).layers)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "lora.rank=0: write a number from 1"),
        ({"alpha": 0.0}, "lora.alpha=0.0: write a number above 0"),
        ({"alpha": float("nan")}, "lora.alpha=nan"),
        ({"targets": ()}, r"lora.targets=\(\): write a tuple"),
        ({"targets": ("to_qq",)}, r"'to_qq' matches no layer \(did you mean to_q\?\)"),
        ({"targets": ("q_proj",)}, "'q_proj' matches no layer"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(parts, options, message):
    with pytest.raises(UserError, match=message) as error:
        adapters.begin(parts, LoraConfig(**options), 0)
    assert "\n" not in str(error.value)

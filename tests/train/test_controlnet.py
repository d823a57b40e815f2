"""A ControlNet in training: begins as nothing, learns alone, goes on, is exported here and for PyTorch."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import engine
from engine import sights
from engine.config import ControlConfig, PriorConfig, SamplesConfig
from engine.models.controlnet import ControlNetModel
from engine.requests import Given
from engine.train import controlling, dry_run, finetune
from engine.types import UserError
from engine.weights.component import load_component
from engine.weights.controlnet import kind_of
from engine.weights.folder import load_folder
from launch import export as export_command
from tests.tiny import SHALLOW, THREE_LEVELS, XL, shallow, tiny_controlnet, tiny_model

MOSAIC = ControlConfig(kind="mosaic")
KEY = jax.random.key(0, impl="threefry2x32")


def leaves(params) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def same(a, b) -> bool:
    return all(map(np.array_equal, leaves(a), leaves(b)))


@pytest.mark.parametrize("overrides", [{}, {**XL, "unet": XL["unet"]}], ids=["SD", "SDXL"])
def test_it_begins_as_a_copy_that_adds_nothing(overrides):
    model = tiny_model(**overrides)
    net = controlling.begin(model, MOSAIC, 0)
    for name in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
        assert same(net.params[name], model.unet.params[name]), name
    zeros = net.params["controlnet_down_blocks"], net.params["controlnet_mid_block"]
    assert all((leaf == 0).all() for leaf in leaves(zeros))
    seen = leaves(net.params["controlnet_cond_embedding"]["conv_in"])
    assert any(leaf.std() > 0.01 for leaf in seen)  # what is shown can come through
    assert net.config.scale == model.vae.config.scale


def test_at_first_its_loss_is_the_models_and_steps_lower_it(config, tmp_path):
    own = config("controlnet", controlnet=MOSAIC)
    plain = config("unet")
    task, usual = finetune.begin(own), finetune.begin(plain)
    batch = jax.tree.map(jnp.asarray, finetune.batches(own, task, tmp_path)(0))
    with_net, without = (finetune.objective(each, begun) for each, begun in ((own, task), (plain, usual)))
    loss = jax.jit(lambda params: with_net.loss(params, with_net.frozen, batch, KEY)[0])
    first = float(loss(task.params))
    before = jax.jit(lambda params: without.loss(params, without.frozen, batch, KEY)[0])(usual.params)
    np.testing.assert_allclose(first, float(before), rtol=1e-5)

    steps = jax.jit(jax.grad(loss))
    params = task.params
    for _ in range(3):
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, steps(params))
    assert float(loss(params)) < 0.99 * first


def with_effect(task, amount: float = 0.05):
    """The params of one that has learned something."""
    return jax.tree.map(lambda p: p + amount, task.params)


@pytest.mark.parametrize("kind", ["edges", "grey", "mosaic"])
def test_it_is_shown_what_is_its_kind_of_each_picture(config, tmp_path, kind, monkeypatch):
    own = config("controlnet", controlnet=ControlConfig(kind=kind))
    task = finetune.begin(own)
    batch = jax.tree.map(jnp.asarray, finetune.batches(own, task, tmp_path)(0))
    looked, look = [], ControlNetModel.look
    monkeypatch.setattr(ControlNetModel, "look", lambda self, x: (looked.append(x), look(self, x))[1])
    aim = finetune.objective(own, task)
    loss = float(aim.loss(with_effect(task), aim.frozen, batch, KEY)[0])
    wanted = [sights.seen(kind, image) for image in np.asarray(batch["image"])]
    assert np.abs(255 * np.asarray(looked[0]) - np.stack(wanted)).max() <= 1.01  # each its own
    control = controlling.control

    def of_others(graphdef, kind):
        of_batch = control(graphdef, kind)
        return lambda frozen, batch: of_batch(frozen, {**batch, "image": batch["image"][::-1]})

    monkeypatch.setattr(controlling, "control", of_others)
    aim = finetune.objective(own, task)
    assert float(aim.loss(with_effect(task), aim.frozen, batch, KEY)[0]) != loss


def test_it_alone_is_trained_and_goes_here_and_to_pytorch(config, model, tmp_path):
    before = {file: file.read_bytes() for file in model.rglob("*.safetensors")}
    folder = finetune.train(config("controlnet", controlnet=MOSAIC), tmp_path / "run")
    assert folder == tmp_path / "run" / "controlnet" and not (tmp_path / "run" / "model").exists()
    assert {file: file.read_bytes() for file in model.rglob("*.safetensors")} == before
    trained = load_component(folder, "controlnet")
    assert any(leaf.any() for leaf in leaves(trained.params["controlnet_down_blocks"]))
    theirs = diffusers.ControlNetModel.from_pretrained(folder)
    assert sum(p.numel() for p in theirs.parameters()) == sum(x.size for x in leaves(trained.params))
    pipe = engine.load(model, controlnet=[(folder, 1.0)])
    shown = Given(control=(np.zeros((16, 16, 3), np.uint8),))
    assert pipe.generate(["a red car"], given=[shown], seed=1, steps=2).shape == (1, 16, 16, 3)
    assert kind_of(folder) == "mosaic" and pipe.programs.nets[0].kind == "mosaic"
    out = tmp_path / "exported"
    assert export_command.main(["--workdir", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert same(load_component(out, "controlnet").params, trained.params)


def test_a_run_that_stopped_ends_as_one_that_did_not(config, tmp_path):
    whole = finetune.train(config("controlnet", controlnet=MOSAIC, steps=4), tmp_path / "whole")
    finetune.train(config("controlnet", controlnet=MOSAIC, steps=2), tmp_path / "parts")
    parts = finetune.train(config("controlnet", controlnet=MOSAIC, steps=4), tmp_path / "parts")
    assert same(load_component(whole, "controlnet").params, load_component(parts, "controlnet").params)
    with pytest.raises(UserError, match=r"holds a run with controlnet.kind='mosaic', not 'grey'"):
        finetune.train(
            config("controlnet", controlnet=ControlConfig(kind="grey"), steps=5), tmp_path / "parts"
        )


def test_one_that_exists_is_trained_further(config, model, tmp_path):
    net = tiny_controlnet(tmp_path / "net", **SHALLOW["unet"])
    task = finetune.begin(config("controlnet", controlnet=ControlConfig(kind="grey", start=str(net))))
    assert same(task.params["controlnet"], load_component(net, "controlnet").params)
    other = tiny_controlnet(tmp_path / "other", **shallow({"unet": {"block_out_channels": (32,)}})["unet"])
    with pytest.raises(UserError, match="other was made for another model"):
        finetune.begin(config("controlnet", controlnet=ControlConfig(kind="grey", start=str(other))))
    further = config("controlnet", controlnet=ControlConfig(kind="grey", start=str(net)), steps=1)
    finetune.train(further, tmp_path / "run")
    moved = net.rename(tmp_path / "moved")  # its place is no setting of the run
    further.controlnet.start, further.finetune.steps = str(moved), 2
    assert kind_of(finetune.train(further, tmp_path / "run")) == "grey"


ADAPTER = ControlConfig(kind="mosaic", adapter=True)


@pytest.mark.parametrize(
    "overrides, built",
    [
        ({}, ("full_adapter", (16, 32), 2)),
        (THREE_LEVELS, ("full_adapter_xl", (16, 32, 32, 32), 4)),
        (
            {"unet": {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",)}},
            ("full_adapter", (16,), 2),
        ),
    ],
    ids=["SD", "SDXL", "one level"],
)
def test_an_adapter_adds_to_all_levels(overrides, built):
    overrides = overrides if len(built[1]) > 1 else shallow(overrides)
    net = controlling.begin(tiny_model(**overrides), ADAPTER, 0)
    assert (net.config.adapter_type, net.config.channels, net.config.downscale_factor) == built
    other = controlling.begin(tiny_model(**overrides), ADAPTER, 1)
    assert not same(net.params, other.params)


def test_an_adapter_is_trained_and_goes_here_and_to_pytorch(config, model, tmp_path):
    whole = finetune.train(config("controlnet", controlnet=ADAPTER, steps=4), tmp_path / "whole")
    finetune.train(config("controlnet", controlnet=ADAPTER, steps=2), tmp_path / "parts")
    parts = finetune.train(config("controlnet", controlnet=ADAPTER, steps=4), tmp_path / "parts")
    trained = load_component(whole, "controlnet")
    assert same(trained.params, load_component(parts, "controlnet").params)
    begun = controlling.begin(load_folder(model), ADAPTER, 0)
    moved = [abs(a - b).max() for a, b in zip(leaves(trained.params), leaves(begun.params), strict=True)]
    assert min(moved) > 0  # every part of it
    theirs = diffusers.T2IAdapter.from_pretrained(whole)
    assert sum(p.numel() for p in theirs.parameters()) == sum(x.size for x in leaves(trained.params))
    pipe = engine.load(model, controlnet=[(whole, 1.0)])
    assert pipe.programs.nets[0].kind == "mosaic"
    with pytest.raises(UserError, match=r"holds a run with controlnet.adapter=True, not False"):
        finetune.train(config("controlnet", controlnet=MOSAIC, steps=5), tmp_path / "parts")
    with pytest.raises(UserError, match=r"is a T2I-Adapter: write controlnet.adapter=True"):
        finetune.begin(config("controlnet", controlnet=ControlConfig(kind="grey", start=str(whole))))
    further = finetune.begin(config("controlnet", controlnet=dataclasses.replace(ADAPTER, start=str(whole))))
    assert same(further.params["controlnet"], trained.params)


def test_samples_show_what_it_was_shown_beside_what_it_drew(config, pictures, tmp_path):
    files = tuple(str(pictures / f"{colour}-above.png") for colour in ("red", "blue"))
    samples = SamplesConfig(prompts=("a red car", "a blue car"), every=2, steps=2, images=files)
    finetune.train(config("controlnet", controlnet=MOSAIC, samples=samples, steps=2), tmp_path / "run")
    (sheet,) = (tmp_path / "run" / "samples").glob("*.png")
    pixels = np.asarray(Image.open(sheet).convert("RGB")).reshape(-1, 3)
    shown = sights.seen("mosaic", np.asarray(Image.open(files[0]).convert("RGB")))
    colours = {tuple(colour) for colour in shown.reshape(-1, 3)}
    assert colours <= {tuple(colour) for colour in pixels}
    missing = dataclasses.replace(samples, images=(files[0], str(tmp_path / "none.png")))
    with pytest.raises(UserError, match=r"samples.images: .*none.png: No such file"):
        finetune.train(config("controlnet", controlnet=MOSAIC, samples=missing), tmp_path / "other")


def test_a_prior_is_shown_its_own_pictures(config, tmp_path):
    own = config("controlnet", controlnet=MOSAIC, prior=PriorConfig(prompt="a car", num_images=4), steps=1)
    task = finetune.begin(own)
    batch = jax.tree.map(jnp.asarray, finetune.batches(own, task, tmp_path)(0))
    aim, params = finetune.objective(own, task), with_effect(task)
    value, metrics = aim.loss(params, aim.frozen, batch, KEY)
    assert float(metrics["prior_loss"]) > 0
    other = {**batch, "prior": {**batch["prior"], "image": 255 - batch["prior"]["image"]}}
    moved, others = aim.loss(params, aim.frozen, other, KEY)
    assert float(others["prior_loss"]) != float(metrics["prior_loss"])
    np.testing.assert_allclose(
        value - metrics["prior_loss"], moved - others["prior_loss"], rtol=1e-4
    )  # the loss of the pictures alone


def test_a_dry_run_tells_what_is_trained(config, tmp_path, capsys):
    own = config("controlnet", controlnet=MOSAIC)
    finetune.train(own, tmp_path / "run", dry_run.fit)
    count = sum(leaf.size for leaf in leaves(finetune.begin(own).params))
    assert f"parameters that are trained   {count:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"controlnet": ControlConfig("edge")}, r"controlnet.kind='edge' is unknown \(did you mean edges"),
        ({"latents": "somewhere"}, "do not go together"),
        (
            {"samples": SamplesConfig(prompts=("a", "b"), every=1, images=("x.png",))},
            "samples.images has 1 files for 2 prompts: write the path of a picture for each",
        ),
        ({"samples": SamplesConfig(images=("x.png",))}, "samples.images without samples.every"),
        (
            {"what": "unet", "samples": SamplesConfig(prompts=("a",), every=1, images=("x.png",))},
            "they are for what='controlnet'; leave them out",
        ),
    ],
)
def test_mistakes_are_one_line(config, options, message):
    with pytest.raises(UserError, match=message):
        config(**{"what": "controlnet", **options}).validate()

"""The loop on eight devices, in every mode. test_eight_devices.py runs this file in a process of its own."""

import functools
import json
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from PIL import Image

import engine
from engine import flops, parallel
from engine.benchmark import outline, scaling
from engine.benchmark.compiled import collectives
from engine.benchmark.drawing import Asked, Case
from engine.config import AutoencoderStage, OptimConfig, SamplesConfig
from engine.enlarging import Enlarging
from engine.models import attention, kernels
from engine.models.attention import attend
from engine.parallel import MODES, SPLIT, Devices
from engine.pipeline import Pipeline
from engine.requests import Given
from engine.train import checkpoint, loop, optim, stages, step
from engine.train.objectives import autoencoder_loss
from engine.train.samples import Samples
from engine.types import UserError
from engine.weights.network import load
from engine.weights.upscaler import look
from tests import long
from tests.adapters import tiny_adapter, tiny_encoder
from tests.compiled import COMPILED
from tests.instruments import tiny_clip
from tests.tiny import (
    REFINER,
    SHALLOW,
    UNET,
    XL,
    shallow,
    tiny_controlnet,
    tiny_folder,
    tiny_model,
    tiny_tokenizer,
)
from tests.train.tiny_run import get_config
from tests.upscalers import tiny_upscaler

PROMPTS = [f"{color} {thing}" for color in ("a red", "a blue") for thing in ("fox", "car", "cat", "dog")]
LONG = [*PROMPTS, "two green trees", "a fox at night", "grass"]
STEPS = 3
COLLECTIVES = re.compile(
    r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)"
)


class Call(NamedTuple):
    """One run of a stage: the compiled function, what it was given, and what it made of it."""

    mapped: Any
    arguments: tuple
    result: Any

    def compiled(self) -> jax.stages.Compiled:
        return self.mapped.lower(*self.arguments).compile()


class Watched(Devices):
    """Devices that keep the last call of each stage, and on which a transfer inside a stage raises."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls: dict[str, Call] = {}

    def map(self, f):
        mapped = super().map(f)

        def run(shared, batched):
            # explicit transfers to and from the devices are made outside of the stages
            with jax.transfer_guard("disallow"):
                result = mapped(shared, batched)
            self.calls[f.__name__] = Call(mapped, (shared, batched), result)
            return result

        run.lower, run.eval_shape = mapped.lower, getattr(mapped, "eval_shape", None)  # pmap has none
        return run


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model", **SHALLOW)


@pytest.fixture(scope="session")
def pipelines(folder):
    """mode -> a pipeline over all eight devices."""
    assert jax.device_count() == 8
    return {mode: engine.load(folder, parallel=Watched(mode)) for mode in MODES}


@pytest.fixture(scope="session", params=MODES)
def pipeline(request, pipelines):
    return pipelines[request.param]


@pytest.fixture(scope="session")
def alone(folder):
    """A pipeline over one of them."""
    return engine.load(folder, parallel=Watched(devices=jax.devices()[:1]))


def draw(pipeline, prompts=PROMPTS, **options):
    return pipeline.generate(prompts, **{"seed": 7, "steps": STEPS, "batch_size": 1} | options)


def latents(pipeline) -> np.ndarray:
    """What the sampler ended with, in the last batch."""
    return np.asarray(pipeline.devices.calls["segment"].result[0].carry.x)


def largest_difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_the_three_modes_agree_bit_for_bit(pipelines):
    images = {mode: draw(pipeline) for mode, pipeline in pipelines.items()}
    for mode in MODES:
        np.testing.assert_array_equal(images[mode], images["shard_map"], err_msg=mode)
        np.testing.assert_array_equal(latents(pipelines[mode]), latents(pipelines["shard_map"]), err_msg=mode)


def test_one_device_and_eight_agree_bit_for_bit_with_one_batch_size(pipeline, alone):
    np.testing.assert_array_equal(draw(pipeline), draw(alone))
    np.testing.assert_array_equal(latents(pipeline)[-1:], latents(alone))


def test_one_device_and_eight_agree_within_a_level_with_another_batch_size(pipelines, alone):
    images = draw(pipelines["shard_map"])
    assert largest_difference(draw(alone, batch_size=len(PROMPTS)), images) <= 1
    assert latents(alone).shape[0] == len(PROMPTS)


@pytest.mark.parametrize("count", [1, 5, 11])
def test_uneven_batches_are_padded_and_cut(pipeline, alone, count):
    images = draw(pipeline, LONG[:count])
    np.testing.assert_array_equal(images, draw(alone, LONG[:count]))


def test_a_picture_is_the_same_alone_in_company_and_in_other_places(pipeline):
    company = draw(pipeline, LONG)
    np.testing.assert_array_equal(draw(pipeline, LONG[4:5], first_index=4), company[4:5])
    np.testing.assert_array_equal(draw(pipeline, LONG[3:], first_index=3), company[3:])
    assert largest_difference(draw(pipeline, LONG[4:5], first_index=5), company[4:5]) > 8


def test_no_stage_communicates(pipeline):
    draw(pipeline)
    for name, call in pipeline.devices.calls.items():
        program = call.compiled().as_text()
        assert COLLECTIVES.findall(program) == [], name
        assert f"num_partitions={pipeline.devices.count}" in program or pipeline.devices.count == 1
    assert pipeline.devices.calls.keys() == {"_encode", "<lambda>", "begin", "segment", "_decode"}


def test_kernels_work_on_each_devices_part_where_the_compiler_partitions(folder, monkeypatch):
    """Interpreted, as on TPUs: in mode jit a kernel sees one device's rows; other modes have no more."""
    two = jax.devices()[:2]

    def drawn(devices: Devices) -> np.ndarray:
        return engine.load(folder, parallel=devices).generate(PROMPTS[:2], seed=7, steps=2)

    expected = drawn(Devices("jit", two))
    monkeypatch.setattr(kernels, "MIN_TOKENS", 1)
    monkeypatch.setattr(Devices, "platform", "tpu")
    with pltpu.force_tpu_interpret_mode():
        found = drawn(Devices("jit", two))
    assert largest_difference(found, expected) <= 1


def test_growth_is_measured_with_the_same_work_for_each_device(folder):
    asked = Asked(None, 5.0, "float32", "shard_map", rounds=2)
    rows = list(scaling.rows(folder, asked, Case(1, steps=STEPS), [2, 1]))
    assert [row["devices"] for row in rows] == [1, 2]
    assert rows[0]["a device"] == 1.0 and rows[0]["together"] == "1.00 (1.00 to 1.00)"
    assert all(row["images/s"] > 0 and len(row["_seconds"]) == 3 for row in rows)
    with pytest.raises(UserError, match="devices=9: there are 8"):
        list(scaling.rows(folder, asked, Case(1), [9]))


def test_a_stage_that_communicates_would_be_seen():
    devices = Devices("jit")
    mapped = devices.map(lambda shared, x: x - x.mean(0))
    program = mapped.lower(None, devices.shard_batch(np.ones((8, 2), np.float32))).compile().as_text()
    assert COLLECTIVES.findall(program)


def test_other_words_seeds_and_scales_compile_nothing(pipeline):
    draw(pipeline, negative_prompts="grass")
    COMPILED.clear()
    images = [
        draw(
            pipeline,
            [f"{prompt} number {i}" for prompt in PROMPTS],
            negative_prompts=f"not {i}",
            seed=i + 2**40,
            first_index=i,
            guidance_scale=2.0 + i / 3,
        )
        for i in range(5)
    ]
    assert COMPILED == {}
    assert len({image.tobytes() for image in images}) == 5
    draw(pipeline, steps=STEPS + 1)  # one more sigma
    assert COMPILED.total() > 0


def test_params_lie_whole_on_every_device_and_stay_there(pipeline):
    """`Watched` raises when a stage moves anything: here, that it sees what is not placed."""
    model = pipeline.model
    for part in (model.unet, model.vae, model.text_encoder):
        for leaf in jax.tree.leaves(part.params):
            assert leaf.is_fully_replicated and len(leaf.sharding.device_set) == 8
    draw(pipeline)
    mapped, (shared, batched), _ = pipeline.devices.calls["_encode"]
    elsewhere = jax.tree.map(np.asarray, shared)
    with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
        mapped(elsewhere, batched)


def test_scale_one_runs_no_unconditional_pass(pipelines):
    def flops(pipeline, scale):
        draw(pipeline, guidance_scale=scale)
        return pipeline.devices.calls["segment"].compiled().cost_analysis()["flops"]

    pipeline = pipelines["shard_map"]
    assert 0.45 < flops(pipeline, 1.0) / flops(pipeline, 1.5) < 0.55


def test_split_params_draw_the_same_picture(folder, pipelines):
    rules = [
        (r"^(unet|vae).*resnets.*conv\d\.kernel", PartitionSpec(None, None, None, "data")),
        (r"(to_q|to_k|to_v|q_proj|fc1)\.kernel", PartitionSpec(None, "data")),
        (r"^(unet|vae|text_encoder)\.", PartitionSpec()),  # a name begins with the part
    ]
    split = engine.load(folder, parallel=Watched("jit", rules=rules))
    kernel = split.model.unet.params["down_blocks"][0]["resnets"][0]["conv1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[-1] * 8 == kernel.shape[-1]
    assert largest_difference(draw(split), draw(pipelines["jit"])) <= 1
    assert COLLECTIVES.findall(split.devices.calls["segment"].compiled().as_text())


def test_a_split_xl_and_its_refiner_draw_the_same_picture(tmp_path, monkeypatch):
    base = tiny_folder(tmp_path / "base", **shallow(XL))
    refiner = tiny_folder(tmp_path / "refiner", seed=1, **shallow(REFINER))
    monkeypatch.setattr(attention, "CPU_SCORES", 1)  # in blocks, as larger pictures attend
    split = engine.load(base, parallel=Watched("jit", rules=SPLIT), refiner=refiner)
    whole = engine.load(base, parallel=Watched(devices=jax.devices()[:1]), refiner=refiner)
    for part in (*split.model.parts.values(), *split.refiner.model.parts.values()):
        kernels = [leaf for leaf in jax.tree.leaves(part.params) if leaf.ndim > 1]
        assert any(not kernel.is_fully_replicated for kernel in kernels), part.kind
    images = draw(split, refiner_start=0.5)
    assert largest_difference(images, draw(whole, refiner_start=0.5)) <= 1
    assert largest_difference(images, draw(whole, refiner_start=0.9, steps=10)) > 8
    for stage in ("_encode", "segment", "_decode"):  # params come to the pictures, and not the other way
        call = split.devices.calls[stage]
        kinds, moved = collectives(call.compiled().as_text(), 8)
        assert set(kinds) == {"all-gather"}
        assert moved < sum(leaf.nbytes for leaf in jax.tree.leaves(call.arguments[0])), stage


def test_networks_beside_it_draw_the_same_picture_in_every_mode_and_split(folder, tmp_path):
    net = tiny_controlnet(tmp_path / "net", **SHALLOW["unet"])
    tiny_encoder(tmp_path / "image_encoder")
    adapter = tiny_adapter(tmp_path / "a.safetensors", {1: 16}, UNET["cross_attention_dim"], "plus")
    judge = tiny_clip(tmp_path / "clip")
    beside = {"controlnet": [(net, 1.0)], "ip_adapter": [(adapter, 1.0)], "judge": judge}
    seen = np.random.default_rng(0).integers(0, 256, (len(PROMPTS), 16, 16, 3), np.uint8)
    part = {"control_end": 0.5, "cache_interval": 2, "best_of": 2}
    part |= {"pag_scale": 2.0, "pag_layers": "down_blocks.0"}
    options = {"given": [Given(control=(one,), image_prompt=(one,)) for one in seen], **part}

    def drawn(devices: Devices) -> np.ndarray:
        return draw(engine.load(folder, parallel=devices, **beside), **options)

    watched = {mode: Watched(mode) for mode in MODES}
    images = {mode: drawn(devices) for mode, devices in watched.items()}
    for mode, devices in watched.items():
        np.testing.assert_array_equal(images[mode], images["shard_map"], err_msg=mode)
        for stage in ("_prompted", "begin", "segment", "_text_features", "_cosines", "_chosen"):
            assert COLLECTIVES.findall(devices.calls[stage].compiled().as_text()) == [], (mode, stage)
    one = Devices(devices=jax.devices()[:1])
    np.testing.assert_array_equal(drawn(one), images["shard_map"])
    split = Watched("jit", rules=SPLIT)
    assert largest_difference(drawn(split), images["jit"]) <= 1
    text = split.calls["segment"].compiled().as_text()
    always, all_of_it = collectives(text[text.index("ENTRY") :], 8), collectives(text, 8)
    assert set(all_of_it[0]) == {"all-gather"}
    assert always[1] < 0.5 * all_of_it[1]  # what is not computed does not come together


def test_pictures_are_enlarged_where_they_were_drawn(folder, pipelines, tmp_path):
    net = tiny_upscaler(tmp_path / "net.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)

    def enlarged(pipeline) -> tuple[np.ndarray, Watched]:
        devices = pipeline.devices
        enlarging = Enlarging(load(look(net), place=devices.place), devices)
        batch = devices.shard_batch((images, np.ones(len(images), bool)))
        return np.asarray(enlarging(*batch)[0]), devices

    expected, _ = enlarged(pipelines["shard_map"])
    assert expected.shape == (16, 64, 64, 3)
    for mode in MODES:
        found, devices = enlarged(pipelines[mode])
        np.testing.assert_array_equal(found, expected, err_msg=mode)
        assert COLLECTIVES.findall(devices.calls["_enlarged"].compiled().as_text()) == [], mode
    found, devices = enlarged(engine.load(folder, parallel=Watched("jit", rules=SPLIT)))
    assert largest_difference(found, expected) <= 1
    kinds, _ = collectives(devices.calls["_enlarged"].compiled().as_text(), 8)
    assert set(kinds) == {"all-gather"}  # of the weights


def test_larger_pictures_are_drawn_over_where_the_small_ones_were_drawn(folder, pipelines):
    larger = {"steps": 2, "hires": 1.5, "hires_strength": 0.5}
    expected = draw(pipelines["shard_map"], **larger)
    assert expected.shape == (8, 24, 24, 3)
    for mode in MODES:
        np.testing.assert_array_equal(draw(pipelines[mode], **larger), expected, err_msg=mode)
        for stage in ("sized", "_looked_at", "segment"):
            text = pipelines[mode].devices.calls[stage].compiled().as_text()
            assert COLLECTIVES.findall(text) == [], (mode, stage)
    split = engine.load(folder, parallel=Watched("jit", rules=SPLIT))
    assert largest_difference(draw(split, **larger), expected) <= 1


def test_split_params_come_together_at_each_step_and_not_before_all():
    program = outline.drawing(tiny_model(), Devices("jit", rules=SPLIT), 32, 1)["sampler"]
    text = program.function.lower(*program.arguments).compile().as_text()
    assert collectives(text, 8)[1] > 0 == collectives(text[text.index("ENTRY") :], 8)[1]


def test_split_params_of_the_lower_levels_come_together_where_these_are_computed(folder, pipelines):
    split = engine.load(folder, parallel=Watched("jit", rules=SPLIT))
    images = draw(split, cache_interval=2)
    assert largest_difference(images, draw(pipelines["jit"], cache_interval=2)) <= 1
    text = split.devices.calls["segment"].compiled().as_text()
    always, all_of_it = collectives(text[text.index("ENTRY") :], 8)[1], collectives(text, 8)[1]
    assert 0 <= always < 0.5 * all_of_it


def test_a_parameter_without_a_rule_stops_the_loading(folder):
    rules = [("unet|vae", PartitionSpec())]
    with pytest.raises(UserError, match=r"no sharding rule matches the parameter text_encoder\.text_model"):
        engine.load(folder, parallel=Devices("jit", rules=rules))


# Copies of a model train as one in tests/processes, too.
@pytest.mark.parametrize(
    "shard_params", [pytest.param(False, marks=long.LONG), True], ids=["copies", "shards"]
)
def test_training_over_eight_devices_is_training_over_one(tmp_path, capsys, shard_params):
    config = get_config()
    optimizing = OptimConfig(learning_rate=1e-3, warmup_steps=0)
    stage = AutoencoderStage(steps=3, batch_size=8, optim=optimizing, shard_params=shard_params)
    vae = stages.components(config, tiny_tokenizer())["vae"]
    loss, optimizer = autoencoder_loss(vae.graphdef, stage), optim.optimizer(stage.optim, 5)
    shape = stage.batch_size, config.image_size, config.image_size, 3

    def batch_at(step):
        return {"image": np.random.default_rng(step).integers(0, 256, shape, np.uint8)}

    def fit():
        COMPILED.clear()
        params = loop.fit(
            "vae", loss, vae.params, {}, optimizer, stage, seed=0, batch_at=batch_at, workdir=tmp_path
        )
        assert COMPILED["jit(step)"] == 1
        split = [leaf for leaf in jax.tree.leaves(params) if not leaf.is_fully_replicated]
        assert all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in split)
        weights = sum(leaf.size for leaf in split) / sum(leaf.size for leaf in jax.tree.leaves(params))
        assert weights > 0.9 if shard_params else weights == 0
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)} == {8}

    fit()
    stage.steps = 5
    fit()
    assert "vae: goes on from step 3" in capsys.readouterr().out
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    told = {line["step"]: line["loss"] for line in lines}  # slow machines tell of more steps

    state, key = step.init(vae.params, optimizer, stage), jax.random.key(0, impl="threefry2x32")
    train_step, losses = jax.jit(step.train_step(loss, optimizer, stage)), []
    for i in range(5):
        state, metrics = train_step(state, {}, batch_at(i), key)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose([told[3], told[5]], [losses[2], losses[4]], rtol=1e-4)


def test_a_checkpoint_of_eight_devices_is_restored_on_four_and_on_one(tmp_path):
    """Each array lies as the new devices have it, and its sum of bits is the one that eight devices took."""
    stage = AutoencoderStage(ema=(0.9,), ema_sigma_rel=(0.1,))
    params = stages.components(get_config(), tiny_tokenizer())["vae"].params
    state = step.init(params, optim.optimizer(stage.optim, 5), stage)._replace(step=np.int32(3))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(Devices("jit").share(state), {})
    for count in (4, 1):
        few = Devices("jit", devices=jax.devices()[:count])
        with checkpoint.Checkpoints(tmp_path) as checkpoints:
            found = checkpoints.restore(few.share(jax.tree.map(np.zeros_like, state)))
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(found)} == {count}
        jax.tree.map(np.testing.assert_array_equal, found, state)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.restore_params(tmp_path, "ema_0.9"), params)


def test_samples_of_a_training_can_be_drawn_with_a_split_model(tmp_path, monkeypatch):
    model = tiny_model(**SHALLOW)
    config = SamplesConfig(prompts=("a cat", "a red fox"), every=1, steps=2)
    pixels, parts, draw = {}, {}, Pipeline.generate

    def generate(pipe, *args, **options):
        kernel = pipe.model.unet.params["conv_in"]["kernel"]
        parts[split] = kernel.size // kernel.addressable_shards[0].data.size
        return draw(pipe, *args, **options)

    monkeypatch.setattr(Pipeline, "generate", generate)
    for split in (False, True):
        stage = AutoencoderStage(shard_params=split)  # or any
        samples = Samples(config, model, stage, tmp_path / str(split))
        pixels[split] = np.asarray(Image.open(samples.draw(1, {"unet": model.unet.params})), np.int32)
    assert parts == {False: 1, True: 8}
    assert np.abs(pixels[True] - pixels[False]).max() <= 1


@pytest.mark.parametrize("shard_params", [False, True], ids=["copies", "shards"])
def test_a_training_has_kernels_on_each_devices_part(monkeypatch, shard_params):
    """With their derivatives, interpreted: three steps on two devices are the ones without kernels."""
    monkeypatch.setattr(kernels, "MIN_TOKENS", 1)
    stage = AutoencoderStage(batch_size=8, accumulate=2, ema=(), shard_params=shard_params)
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 32, 32))}
    batch = {"x": np.asarray(jax.random.normal(jax.random.key(1), (8, 136, 32)))}

    def loss(params, frozen, batch, key):
        rows, tokens, _ = batch["x"].shape
        q, k, v = ((batch["x"] @ w).reshape(rows, tokens, 2, 16) for w in params["kernel"])
        return jnp.square(attend(q, k, v)).mean(), {}

    def trained(kernel: bool) -> step.TrainState:
        optimizer = optim.optimizer(stage.optim, 5)
        program = loop.program("vae", loss, params, optimizer, stage, jax.devices()[:2])
        state, parts = program.init(params), program.devices.shard_batch(batch)
        traced = program.step.trace(state, {}, parts, jax.random.key(0))
        assert ("pallas_call" in str(traced.jaxpr)) == kernel
        for _ in range(3):
            state, _ = program.step(state, {}, parts, jax.random.key(0))
        return state

    expected = trained(kernel=False)
    monkeypatch.setattr(Devices, "platform", "tpu")
    monkeypatch.setattr(parallel, "options_for", lambda _: parallel.ON_CPUS)  # the same products
    # Not by the interpreter for TPUs: there the two kernels of a derivative wait for each other for good.
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), trained(True), expected)


def test_arithmetic_is_that_of_all_devices():
    x, w = np.ones((8, 4), np.float32), np.ones((4, 3), np.float32)
    for count in (1, 2, 8):
        devices = Devices("shard_map", jax.devices()[:count])
        mapped = devices.map(lambda shared, batched: batched @ shared)
        assert flops.count(mapped, devices.share(w), devices.shard_batch(x)) == 2 * 8 * 4 * 3


def test_parts_of_a_batch_stay_on_their_devices():
    """Four parts on eight devices: the gradients are summed over the devices, and no image moves."""
    stage = AutoencoderStage(batch_size=64, accumulate=4, ema=(0.9,))
    params, optimizer = {"kernel": np.ones((4, 4), np.float32)}, optim.optimizer(stage.optim, 5)

    def squares(params, frozen, batch, key):
        return ((batch["x"] @ params["kernel"]) ** 2).mean(), {}

    devices = Devices("jit")
    state = devices.share(step.init(params, optimizer, stage))
    batch = devices.shard_batch({"x": np.ones((64, 4), np.float32)})
    train = jax.jit(step.train_step(squares, optimizer, stage))
    program = train.lower(state, {}, batch, jax.random.key(0)).compile().as_text()
    used = re.findall(r"(all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", program)
    assert set(used) == {"all-reduce"}

"""What of engine.parallel needs no second device."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from engine import parallel
from engine.parallel import MODES, Devices, pad, spec_for
from engine.types import UserError


def test_an_unknown_mode_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"parallel='shardmap' is unknown \(did you mean shard_map\?\)"):
        Devices("shardmap")


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_rules_are_refused_where_the_params_cannot_be_split(mode):
    with pytest.raises(UserError, match="rules need parallel='jit'"):
        Devices(mode, rules=[(".*", PartitionSpec())])


def test_the_first_rule_that_matches_decides():
    rules = [(r"conv\d\.kernel", PartitionSpec(None, "data")), ("conv", PartitionSpec())]
    assert spec_for("unet.conv1.kernel", rules) == PartitionSpec(None, "data")
    assert spec_for("unet.conv_in.kernel", rules) == PartitionSpec()


def test_a_parameter_that_no_rule_matches_is_named():
    with pytest.raises(UserError, match=r"no sharding rule matches the parameter vae\.mid\.bias"):
        spec_for("vae.mid.bias", [("unet", PartitionSpec())])


def test_pad_repeats_the_last_row():
    array = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(pad(array, 5), array[[0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(pad(array, 3), array)


@pytest.mark.parametrize("mode", MODES)
def test_map_hands_over_trees_and_lowers(mode):
    devices = Devices(mode, devices=jax.local_devices()[:1])
    mapped = devices.map(lambda shared, batched: {"y": batched["x"] * shared["w"]})
    arguments = (
        devices.share({"w": np.float32(3)}),
        devices.shard_batch({"x": np.arange(4, dtype=np.float32)}),
    )
    np.testing.assert_array_equal(mapped(*arguments)["y"], [0, 3, 6, 9])
    assert "multiply" in mapped.lower(*arguments).as_text()


def test_cpus_have_options_of_their_own_where_the_compiler_knows_them(monkeypatch):
    assert Devices().compiler_options == parallel.ON_CPUS
    program = Devices().map(lambda _, x: x + 1).lower((), np.ones(8, np.float32)).compile()
    assert program is not None
    assert parallel.options_for("tpu") is None
    monkeypatch.setattr(parallel, "ON_CPUS", {"xla_cpu_no_such_option": "1"})
    assert parallel.options_for.__wrapped__("cpu") is None

"""Networks that enlarge pictures, against PyTorch, in every layout in which their files go around."""

import re

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import save_file

from engine.models.upscalers import CompactConfig, ResidualDenseBlock, RRDBConfig
from engine.types import UserError
from engine.weights.network import load
from engine.weights.upscaler import look
from tests.parity.common import nchw
from tests.upscalers import Compact, RRDBNet, randomised

pytestmark = pytest.mark.usefixtures("quick_compiler")

# Layers before and after the blocks, in the first layout of ESRGAN, by the number of doublings.
NUMBERED = {
    0: {"conv_hr": 2, "conv_last": 4},
    1: {"conv_up1": 3, "conv_hr": 5, "conv_last": 7},
    2: {"conv_up1": 3, "conv_up2": 6, "conv_hr": 8, "conv_last": 10},
    3: {"conv_up1": 3, "conv_up2": 6, "conv_up3": 9, "conv_hr": 11, "conv_last": 13},
}


def first_layout(state: dict, ups: int, blocks: int) -> dict:
    names = {"conv_first": "model.0", "conv_body": f"model.1.sub.{blocks}"}
    names |= {name: f"model.{place}" for name, place in NUMBERED[ups].items()}

    def named(key: str) -> str:
        key = re.sub(r"^body\.(\d+)\.rdb(\d)\.conv(\d)", r"model.1.sub.\1.RDB\2.conv\3.0", key)
        layer, _, leaf = key.rpartition(".")
        return f"{names.get(layer, layer)}.{leaf}"

    return {named(key): tensor for key, tensor in state.items()}


def second_layout(state: dict, *_) -> dict:
    names = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2", "conv_hr": "HRconv"}

    def named(key: str) -> str:
        key = re.sub(r"^body\.(\d+)\.rdb(\d)", r"RRDB_trunk.\1.RDB\2", key)
        return re.sub(r"^\w+", lambda found: names.get(found[0], found[0]), key)

    return {named(key): tensor for key, tensor in state.items()}


def as_it_is(state: dict, *_) -> dict:
    return state


def prefixed(state: dict, *_) -> dict:
    return {f"params_ema.{key}": tensor for key, tensor in state.items()}


def enlarged(file, x: np.ndarray) -> np.ndarray:
    found = load(look(file))
    net = jax.jit(lambda params, x: nnx.merge(found.graphdef, nnx.State(params))(x))
    return np.asarray(net(found.params, x))


def picture(height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).random((2, height, width, 3), np.float32)


def there(net: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(nchw(x).copy())).numpy().transpose(0, 2, 3, 1)


EVERY = [0, 1, 2, 3]
LAYOUTS = {as_it_is: EVERY, prefixed: EVERY, first_layout: EVERY, second_layout: [2]}


@pytest.mark.parametrize(("layout", "ups"), [(each, ups) for each, all_ in LAYOUTS.items() for ups in all_])
def test_esrgan_in_every_layout(tmp_path, layout, ups):
    net = randomised(RRDBNet(ups=ups))
    save_file(layout(net.state_dict(), ups, 2), file := tmp_path / "net.safetensors")
    assert look(file).config == RRDBConfig(features=8, growth=4, blocks=2, ups=ups)
    assert look(file).config.scale == 2**ups
    x = picture()
    np.testing.assert_allclose(enlarged(file, x), there(net, x), atol=1e-4)


@pytest.mark.parametrize("fold", [2, 4])
def test_real_esrgan_of_smaller_factors_folds_pictures_first(tmp_path, fold):
    net = randomised(RRDBNet(fold=fold))
    save_file(net.state_dict(), file := tmp_path / "net.safetensors")
    assert look(file).config.scale == 4 // fold
    x = picture()
    np.testing.assert_allclose(enlarged(file, x), there(net, x), atol=1e-4)
    odd = picture(11, 13)  # which does not fold: it is filled up by its mirror image, and cut again
    filled = np.pad(odd, ((0, 0), (0, -11 % fold), (0, -13 % fold), (0, 0)), mode="reflect")
    scale = 4 // fold
    expected = there(net, filled)[:, : 11 * scale, : 13 * scale]
    np.testing.assert_allclose(enlarged(file, odd), expected, atol=1e-4)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", [as_it_is, prefixed])
def test_the_compact_one(tmp_path, scale, layout):
    net = randomised(Compact(scale=scale))
    save_file(layout(net.state_dict()), file := tmp_path / "net.safetensors")
    assert look(file).config == CompactConfig(features=8, layers=2, scale=scale)
    x = picture(9, 7)
    np.testing.assert_allclose(enlarged(file, x), there(net, x), atol=1e-4)


def test_float16_files(tmp_path):
    net = randomised(Compact()).half()
    save_file(net.state_dict(), file := tmp_path / "net.safetensors")
    x = picture()
    np.testing.assert_allclose(enlarged(file, x), there(net.float(), x), atol=1e-4)


def broken(change):
    state = randomised(RRDBNet()).state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.zeros(3)}, r"does not hold an ESRGAN or Real-ESRGAN \(RRDBNet\), or a compact one"),
        (broken(lambda s: s.pop("body.1.rdb2.conv3.bias")), r"missing: \(1\) body.1.rdb2.conv3.bias$"),
        (broken(lambda s: s.update(extra=torch.zeros(1))), r"unexpected: \(1\) extra$"),
        (
            broken(lambda s: s.update({"conv_hr.weight": torch.zeros(8, 8, 1, 1)})),
            r"wrong shape: \(1\) conv_hr.weight is \(8, 8, 1, 1\), not \(8, 8, 3, 3\)$",
        ),
        (
            broken(lambda s: s.update({"conv_first.weight": torch.zeros(8, 5, 3, 3)})),
            "does not hold an ESRGAN",
        ),
        (
            broken(lambda s: s.update({"conv_first.weight": torch.zeros(8, 1, 3, 3)})),
            "does not hold an ESRGAN",
        ),
        (
            broken(lambda s: s.update({"body.0.rdb1.conv1.weight": torch.zeros(())})),
            "does not hold an ESRGAN",
        ),
        (
            broken(lambda s: s.update({"body.1000000.rdb1.conv1.weight": torch.zeros(4, 8, 3, 3)})),
            "does not hold an ESRGAN",
        ),
        (
            {"body.0.weight": torch.zeros(8, 3, 3, 3), "body.1000000.weight": torch.zeros(48, 8, 3, 3)},
            "does not hold",
        ),
        (
            {"body.0.weight": torch.zeros(8, 3, 3, 3), "body.2.weight": torch.zeros(())},
            "does not hold an ESRGAN",
        ),
        (broken(lambda s: s.update({"model.0.bias": torch.zeros(8)})), r"given twice: \(1\) model.0.bias$"),
        (
            {"body.0.weight": torch.zeros(8, 3, 3, 3), "body.0.bias": torch.zeros(8)},
            "does not hold an ESRGAN",
        ),
    ],
)
def test_another_network_is_one_line(tmp_path, state, message):
    save_file(state, file := tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=message) as error:
        look(file)
    assert "\n" not in str(error.value)


def test_files_that_are_never_opened_or_not_there(tmp_path):
    (tmp_path / "RealESRGAN_x4plus.pth").write_bytes(b"code")
    with pytest.raises(
        UserError, match=r"never opened because it can run code: convert it .*RealESRGAN_x4plus.safe"
    ):
        look(tmp_path / "RealESRGAN_x4plus.pth")
    with pytest.raises(
        UserError, match=r"no upscaler .*none\.safetensors: write the path of a \.safetensors file"
    ):
        look(tmp_path / "none.safetensors")


def test_the_advice_for_pickles_works(tmp_path):
    """The line that it prints makes the file, of the averages where a checkpoint has them."""
    net = randomised(Compact())
    torch.save({"params": {}, "params_ema": net.state_dict()}, tmp_path / "net.pth")
    with pytest.raises(UserError) as error:
        look(tmp_path / "net.pth")
    code = str(error.value).partition('python -c "')[2].removesuffix('"')
    exec(code, {})
    assert look(tmp_path / "net.safetensors").config == CompactConfig(8, 2, 4)


def test_blocks_in_parts_are_blocks_together():
    """As TPUs have them, and as all others."""
    block = ResidualDenseBlock(8, 4, nnx.Rngs(0))
    for layer in (block.conv1, block.conv5):
        layer.bias[...] = jax.random.normal(jax.random.key(1), layer.bias.shape)
    x = picture()[..., [0, 1, 2, 0, 1, 2, 0, 1]]
    together, parts = jax.jit(lambda x: (block.together(x), block.in_parts(x)))(x)
    np.testing.assert_allclose(parts, together, atol=1e-5)
    assert np.abs(together - x).max() > 0.01

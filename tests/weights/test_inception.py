"""The file of FID's network: strict about its keys, and never a pickle."""

import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file, save_file

from engine.types import UserError
from engine.weights.inception import load_inception
from tests.parity.inception import original


@pytest.fixture(scope="module")
def network():
    return original()


def test_read(network, tmp_path):
    """Each in its place; the classes, the second ones and the training's counters are left unread."""
    state = network.state_dict()
    state |= {"AuxLogits.conv0.conv.weight": torch.zeros(2, 2, 1, 1)}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    params = load_inception(tmp_path / "a.safetensors").params
    block = params["Mixed_6b"]["branch7x7_2"]
    theirs = network.Mixed_6b.branch7x7_2
    np.testing.assert_array_equal(block["conv"]["kernel"], theirs.conv.weight.permute(2, 3, 1, 0))
    np.testing.assert_array_equal(block["bn"]["scale"], theirs.bn.weight)
    np.testing.assert_array_equal(block["bn"]["bias"], theirs.bn.bias)
    np.testing.assert_array_equal(block["bn"]["running_mean"], theirs.bn.running_mean)
    np.testing.assert_array_equal(block["bn"]["running_var"], theirs.bn.running_var)
    assert "fc" not in params and "AuxLogits" not in params


def test_pytorch_fid_has_the_same_keys(network):
    """Its file is loaded into torchvision's network of 1008 classes, whose names it takes."""
    torchvision = pytest.importorskip("torchvision")
    other = torchvision.models.inception_v3(
        num_classes=1008, aux_logits=False, weights=None, init_weights=False
    )
    ours, theirs = ({k: v.shape for k, v in m.state_dict().items()} for m in (network, other))
    assert ours == theirs


def test_another_network_is_refused_in_one_line(tmp_path):
    file = tmp_path / "b.safetensors"
    tensors = {
        "Conv2d_1a_3x3.conv.weight": np.zeros((32, 3, 5, 5), np.float32),
        "Conv2d_1a_3x3.bn.weight": np.zeros(32, np.int64),
        "layer1.weight": np.zeros(1, np.float32),
        "fc.weight": np.zeros(1, np.float32),
    }
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        load_inception(file)
    message = str(error.value)
    assert message.startswith(f"{file} does not hold the InceptionV3 of FID")
    assert "missing: (468) Conv2d_1a_3x3.bn.bias" in message
    assert "unexpected: (1) layer1.weight;" in message
    assert "wrong shape: (1) Conv2d_1a_3x3.conv.weight is (32, 3, 5, 5), not (32, 3, 3, 3);" in message
    assert "Conv2d_1a_3x3.bn.weight is I64" in message
    assert "fc." not in message and "\n" not in message


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"no weights .*: write the path of a \.safetensors file"):
        load_inception(tmp_path / "none.safetensors")


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path):
    """And the command does what it says."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "n": torch.tensor(3)}
    torch.save(tensors, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="never opened because it can run code") as error:
        load_inception(tmp_path / "weights.pth")
    message = str(error.value)
    assert "\n" not in message
    code = message[message.index('python -c "') + len('python -c "') : message.rindex('"')]
    subprocess.run([sys.executable, "-c", code], check=True)
    found = load_file(tmp_path / "weights.safetensors")
    np.testing.assert_array_equal(found["a"], tensors["a"])
    assert found["n"] == 3

"""One safetensors file: what is written is what the library writes, and broken files say so in one line."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.types import UserError
from engine.weights import safetensors_io

DTYPES = [np.float32, np.float16, jnp.bfloat16]


def arrays(*dtypes):
    rng = np.random.default_rng(0)
    shapes = {"b.weight": (3, 4), "a.weight": (2, 3, 1, 5), "c": (7,), "é": (1,), "none": (0, 4)}
    return {
        name: rng.standard_normal(shape).astype(dtypes[i % len(dtypes)])
        for i, (name, shape) in enumerate(shapes.items())
    }


def write(path, tensors):
    shapes = {name: array.shape for name, array in tensors.items()}
    dtypes = {name: array.dtype for name, array in tensors.items()}
    safetensors_io.write(path, shapes, dtypes, tensors.__getitem__)


def read(path):
    with open(path, "rb") as file:
        return {
            name: safetensors_io.read_tensor(file, name, tensor)
            for name, tensor in safetensors_io.read_header(path).items()
        }


@pytest.mark.parametrize("dtypes", [[dtype] for dtype in DTYPES] + [DTYPES], ids=str)
def test_the_bytes_are_those_of_the_library(tmp_path, dtypes):
    tensors = arrays(*dtypes)
    write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_the_library_writes(tmp_path, dtype):
    tensors = arrays(dtype)
    save_file(tensors, tmp_path / "file")
    ours = read(tmp_path / "file")
    assert ours.keys() == tensors.keys()
    for name, array in tensors.items():
        assert ours[name].dtype == dtype
        assert ours[name].tobytes() == array.tobytes()
        assert ours[name].shape == array.shape


def test_a_transposed_view_is_written_in_its_own_order(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write(tmp_path / "file", {"a": array})
    np.testing.assert_array_equal(load_file(tmp_path / "file")["a"], array)


def test_a_tensor_that_is_not_as_announced_is_a_programming_error(tmp_path):
    with pytest.raises(ValueError, match="a is float32"):
        safetensors_io.write(
            tmp_path / "file", {"a": (2,)}, {"a": np.dtype(np.float32)}, lambda _: np.zeros(3, np.float32)
        )


HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def raw(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes):
    return {"a": HEADER["a"] | changes}


BROKEN = {
    "empty": b"",
    "three bytes": b"abc",
    "text": b"<!DOCTYPE html><html>not found</html>",
    "header longer than the file": raw(HEADER, bytes(8), length=10**6),
    "header of 2^60 bytes": raw(HEADER, bytes(8), length=2**60),
    "header of 2^64 - 1 bytes": raw(HEADER, bytes(8), length=2**64 - 1),
    "header cut": raw(HEADER, bytes(8))[:30],
    "data cut": raw(HEADER, bytes(7)),
    "data left over": raw(HEADER, bytes(9)),
    "header no JSON": raw(b"{not json", bytes(8)),
    "header no UTF-8": raw(b'{"\xff": 1}', bytes(8)),
    "header a list": raw(b"[]", b""),
    "unknown dtype": raw(entry(dtype="F12"), bytes(8)),
    "shape and bytes disagree": raw(entry(shape=[3]), bytes(8)),
    "negative shape": raw(entry(shape=[-2]), bytes(8)),
    "shape beyond 64 bits": raw(entry(shape=[2**40, 2**40]), bytes(8)),
    "offsets reversed": raw(entry(data_offsets=[8, 0]), bytes(8)),
    "offsets beyond the file": raw(entry(data_offsets=[8, 16]), bytes(8)),
    "offset of 2^62": raw(entry(data_offsets=[2**62, 2**62 + 8]), bytes(8)),
    "overlap": raw(HEADER | {"b": HEADER["a"] | {"data_offsets": [4, 12]}}, bytes(12)),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is broken.*fetch it again") as error:
        safetensors_io.read_header(file)
    assert "\n" not in str(error.value)


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 492265880\n")
    with pytest.raises(UserError, match="Git LFS pointer"):
        safetensors_io.read_header(file)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["absent", "folder"])
def test_what_is_no_file(tmp_path, make):
    make(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        safetensors_io.read_header(tmp_path / "model.safetensors")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw(HEADER, bytes(8)))
    header = safetensors_io.read_header(file)
    file.write_bytes(raw(HEADER, bytes(4)))
    with open(file, "rb") as opened, pytest.raises(UserError, match=r"a is not whole"):
        safetensors_io.read_tensor(opened, "a", header["a"])


@pytest.mark.parametrize("dtype", ["float32", np.float16, jnp.bfloat16, "bfloat16", jnp.float32])
def test_dtypes_by_any_name(dtype):
    assert safetensors_io.as_dtype(dtype) == jnp.dtype(dtype)


@pytest.mark.parametrize("dtype", ["float64", "int8", "float33", np.int32])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(UserError, match="float32, float16 or bfloat16"):
        safetensors_io.as_dtype(dtype)

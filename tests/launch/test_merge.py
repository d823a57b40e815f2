"""python -m launch.merge."""

import pathlib
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from engine.weights import lora_files
from engine.weights.folder import load_folder
from launch import cli, merge
from tests.single import contents
from tests.tiny import SHALLOW, shallow, tiny_folder
from tests.weights.test_lora import random_lora

UNET = pathlib.Path("unet", "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """What the README's commands name, tiny. Do not write here."""
    at = tmp_path_factory.mktemp("merge")
    tiny_folder(at / "sd15", 0, **SHALLOW)
    tiny_folder(at / "dreamy", 1, **SHALLOW)
    tiny_folder(at / "sd15-inpainting", 2, **shallow({"unet": {"in_channels": 9}}))
    lora_files.save(at / "ink.safetensors", random_lora({"unet": load_folder(at / "sd15").unet.config}))
    return at


@pytest.fixture
def run(at, monkeypatch, capsys):
    monkeypatch.chdir(at)

    def run(*argv: object) -> tuple[int, str, list[str]]:
        code = cli.exit_code(merge.main, [str(arg) for arg in argv])
        said, told = capsys.readouterr()
        return code, said, told.splitlines()

    return run


def unet(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return load_file(folder / UNET)


def test_the_commands_of_the_readme(at, run, tmp_path):
    page = (pathlib.Path(merge.__file__).parent / "README.md").read_text()
    found = [line.split()[3:] for line in page.splitlines() if line.startswith("    python -m launch.merge")]
    about = [line.split()[3:] for line in merge.__doc__.splitlines() if "python -m launch.merge" in line]
    assert found[:3] == about and len(found) == 4  # the last is of the model in the package
    for source, target, *rest in about:
        assert run(source, tmp_path / target, *rest) == (cli.DONE, f"{tmp_path / target}\n", [])
    base, other, wide = (unet(at / name) for name in ("sd15", "dreamy", "sd15-inpainting"))
    key = "conv_in.weight"
    between = unet(tmp_path / "between")[key]
    np.testing.assert_allclose(between, 0.7 * base[key] + 0.3 * other[key], atol=1e-6)
    moved = wide[key][:, :4] + other[key] - base[key]
    np.testing.assert_allclose(unet(tmp_path / "dreamy-inpainting")[key][:, :4], moved, atol=1e-6)
    with_lora = load_folder("sd15", loras=[("ink.safetensors", 0.8)]).unet.params["conv_in"]["kernel"]
    np.testing.assert_array_equal(load_folder(tmp_path / "inked").unet.params["conv_in"]["kernel"], with_lora)


def test_half_way_in_another_type(at, run, tmp_path):
    assert run("sd15", tmp_path / "new", "--toward", "dreamy", "--dtype=bfloat16")[0] == cli.DONE
    half = tmp_path / "half"
    assert run("sd15", half, "--toward=dreamy=0.5", "--dtype", "bfloat16")[0] == cli.DONE
    assert contents(half) == contents(tmp_path / "new")
    assert {str(tensor.dtype) for tensor in unet(half).values()} == {"bfloat16"}
    again = run("sd15", half, "--dtype=float32", "--overwrite")
    assert again == (cli.DONE, f"{half}\n", []) and contents(half) == contents(at / "sd15")


def test_parts(at, run, tmp_path):
    assert run("sd15", tmp_path / "new", "--toward=dreamy=1", "--parts", "text_encoder, vae")[0] == cli.DONE
    assert (tmp_path / "new" / UNET).read_bytes() == (at / "sd15" / UNET).read_bytes()
    for file in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        theirs = load_file(at / "dreamy" / file)
        for key, array in load_file(tmp_path / "new" / file).items():
            np.testing.assert_allclose(array, theirs[key], atol=1e-6)


MISTAKES = {
    "nothing": ([], "write what to begin with and what to write: python -m launch.merge MODEL NEW"),
    "no target": (["sd15", "--toward=dreamy"], "python -m launch.merge MODEL NEW"),
    "nothing to do": (["sd15", "{tmp}/x"], "write what to go toward, to add, or a LoRA, or a dtype"),
    "a file": (
        ["sd15", "{tmp}/x.safetensors", "--toward=dreamy"],
        "launch.convert makes a single file",
    ),
    "no model": (["sd16", "{tmp}/x", "--toward=dreamy"], "no folder sd16: a model is a folder"),
    "a share that is none": (["sd15", "{tmp}/x", "--toward=dreamy=x"], "such as a=0.3,b=0.2"),
    "plus alone": (
        ["sd15", "{tmp}/x", "--plus=dreamy"],
        "plus 1 and minus 0: what is added",
    ),
    "a type": (
        ["sd15", "{tmp}/x", "--toward=dreamy", "--dtype=float64"],
        "float16 or bfloat16",
    ),
    "a flag": (["sd15", "{tmp}/x", "--to=dreamy"], "--to"),
    "no place": (["sd15", "/proc/x", "--toward=dreamy"], "/proc/x cannot be written"),
    "it exists": (["sd15", "{at}/dreamy", "--toward=dreamy"], "dreamy already exists"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(at, run, tmp_path, case):
    argv, told = MISTAKES[case]
    before = contents(at)
    code, said, lines = run(*(arg.format(at=at, tmp=tmp_path) for arg in argv))
    assert (code, said, len(lines)) == (cli.MISTAKE, "", 1)
    assert told in lines[0]
    assert contents(at) == before and not any(tmp_path.iterdir())


def test_help_names_every_flag(run):
    code, said, _ = run("--help")
    assert code == cli.DONE
    assert set(re.findall(r"^  --(\w+)", said, re.M)) == merge.KINDS.keys()

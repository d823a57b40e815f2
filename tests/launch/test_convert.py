"""python -m launch.convert."""

import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import engine
from engine.types import UserError
from engine.weights.folder import load_folder
from launch import cli, convert
from tests.single import contents, foreign, like, like_xl
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A folder `model`, and the single file of it. Do not write here."""
    at = tmp_path_factory.mktemp("convert")
    tiny_folder(at / "model")
    assert cli.exit_code(convert.main, [str(at / "model"), str(at / "model.safetensors")]) == cli.DONE
    return at


@pytest.fixture
def run(capsys):
    def run(*argv: object) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        code = cli.exit_code(convert.main, [str(arg) for arg in argv])
        said, told = capsys.readouterr()
        return code, said, told.splitlines()

    return run


def test_there_and_back(at, run, tmp_path):
    code, said, told = run(at / "model", tmp_path / "new" / "one.safetensors")
    assert (code, said) == (cli.DONE, f"{tmp_path / 'new' / 'one.safetensors'}\n")
    assert len(told) == 1 and told[0].startswith("note: ") and "take it for a Stable Diffusion 1" in told[0]
    back = run(
        tmp_path / "new" / "one.safetensors", tmp_path / "back", "--tokenizer", at / "model" / "tokenizer"
    )
    assert back == (cli.DONE, f"{tmp_path / 'back'}\n", [])
    assert contents(tmp_path / "back") == contents(at / "model")


def test_flags(at, run, tmp_path):
    half, back = tmp_path / "half.safetensors", tmp_path / "back"
    assert run(at / "model", half, "--dtype=float16")[0] == cli.DONE
    assert {str(tensor.dtype) for tensor in load_file(half).values()} == {"float16"}
    flags = ("--tokenizer", at / "model", "--dtype=float32")
    assert run(half, back, *flags)[0] == cli.DONE
    assert run(half, back, *flags, "--prediction_type=epsilon", "--overwrite")[0] == cli.DONE
    assert '"prediction_type": "epsilon"' in (back / "scheduler" / "scheduler_config.json").read_text()
    weights = load_file(back / "unet" / "diffusion_pytorch_model.safetensors")
    exact = load_file(at / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {"float32"}
    for key, tensor in exact.items():
        np.testing.assert_array_equal(weights[key], tensor.astype(np.float16))
    assert run(at / "model", half, "--overwrite")[0] == cli.DONE
    assert {str(tensor.dtype) for tensor in load_file(half).values()} == {"float32"}


ONE, TWO = "{at}/model.safetensors", "{at}/model"
MISTAKES = {
    "nothing": ([], "write what to read and what to write: python -m launch.convert SRC DST"),
    "no target": ([ONE], "python -m launch.convert SRC DST"),
    "no source": (["{tmp}/no.safetensors", "{tmp}/x"], "no.safetensors: write the path of a .safetensors"),
    "no tokenizer": ([ONE, "{tmp}/x"], "has no tokenizer, as no single file has: write --tokenizer FOLDER"),
    "no such tokenizer": ([ONE, "{tmp}/x", "--tokenizer={tmp}/t"], "t: no such folder"),
    "a type": ([TWO, "{tmp}/x.safetensors", "--dtype=float64"], "write float32, float16 or bfloat16"),
    "a prediction": (
        [ONE, "{tmp}/x", "--prediction_type=v_predict"],
        "--prediction_type=v_predict is unknown (did you mean v_prediction?); write epsilon or",
    ),
    "a flag": ([ONE, "{tmp}/x", "--tokeniser=x"], "--tokeniser (did you mean --tokenizer?)"),
    "a folder, no file": ([TWO, "{tmp}/x"], "becomes a single file: write {tmp}/x.safetensors"),
    "a file, no folder": ([ONE, "{tmp}/x.safetensors"], "becomes a folder: write {tmp}/x"),
    "no flag of folders": ([TWO, "{tmp}/x.safetensors", "--tokenizer=y"], "--tokenizer is for a file that"),
    "the file exists": (
        [TWO, ONE],
        "model.safetensors already exists: choose another name, or write --overw",
    ),
    "the folder exists": ([ONE, TWO, "--tokenizer", TWO], "model already exists: choose another name, or"),
    "its own folder": ([ONE, "{at}", "--tokenizer", TWO, "--overwrite"], "which it would replace"),
    "no model": (["{at}/model/unet", "{tmp}/x.safetensors"], "unet is no model: looked for model_index.json"),
    "no place": ([TWO, "/proc/x.safetensors"], "/proc/x.safetensors cannot be written"),
    "no place for a folder": ([ONE, "/proc/x", "--tokenizer", TWO], "/proc/x cannot be written"),
    "a pickle": (["{tmp}/m.ckpt", "{tmp}/x"], "m.ckpt is in a format that is never opened"),
    "a LoRA": (["{tmp}/lora.safetensors", "{tmp}/x"], "it is a LoRA: give it to --lora"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(at, run, tmp_path, case):
    argv, told = MISTAKES[case]
    (tmp_path / "m.ckpt").write_bytes(b"PK")
    save_file({"lora_unet_x.lora_up.weight": np.ones((2, 2), np.float32)}, tmp_path / "lora.safetensors")
    before = contents(tmp_path), contents(at)
    code, said, lines = run(*(arg.format(at=at, tmp=tmp_path) for arg in argv))
    assert (code, said, len(lines)) == (cli.MISTAKE, "", 1)
    assert told.format(tmp=tmp_path) in lines[0]
    assert (contents(tmp_path), contents(at)) == before


def test_a_file_in_place_of_a_model_is_told_what_to_do(at, tmp_path):
    with pytest.raises(UserError) as refused:
        engine.load(at / "model.safetensors")
    command = f"python -m launch.convert {at / 'model.safetensors'} FOLDER --tokenizer FOLDER"
    assert str(refused.value).endswith(command)
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"model\.ckpt is in a format that is never opened"):
        engine.load(tmp_path / "model.ckpt")


def test_the_commands_of_the_readme(run, tmp_path, monkeypatch):
    """On tiny files of the same names."""
    monkeypatch.chdir(tmp_path)
    page = (pathlib.Path(convert.__file__).parent / "README.md").read_text()
    commands = [
        line.split()[3:] for line in page.splitlines() if line.startswith("    python -m launch.convert")
    ]
    assert len(commands) == 4
    for number, name in enumerate(("v1-5-pruned-emaonly", "v2-base"), 1):
        foreign(like(number, tmp_path / f"like{number}"), tmp_path / f"{name}.safetensors")
    foreign(like_xl(tmp_path / "like3"), tmp_path / "sd_xl_base_1.0.safetensors")
    for number, command in zip((1, 2, 3, 1), commands, strict=True):
        arguments = [f"like{number}/tokenizer" if arg == "path/to/tokenizer" else arg for arg in command]
        code, said, told = run(*arguments)
        assert (code, said, told) == (cli.DONE, f"{command[1]}\n", []), told
    assert contents(tmp_path / "sd15") == contents(tmp_path / "like1")
    assert {str(tensor.dtype) for tensor in load_file("sd15.safetensors").values()} == {"float16"}
    assert contents(tmp_path / "sdxl") == contents(tmp_path / "like3")
    assert load_folder("sd2-base").scheduler.prediction_type == "epsilon"


def test_help_names_every_flag(capsys):
    assert cli.exit_code(convert.main, ["--help"]) == cli.DONE
    text = capsys.readouterr().out
    assert all(f"--{flag}" in text for flag in convert.KINDS)

"""What the README shows is run as it is written there, but in fewer steps."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from launch import generate
from tests.adapters import tiny_adapter, tiny_encoder
from tests.tiny import REFINER, UNET, XL, tiny_controlnet, tiny_folder
from tests.upscalers import tiny_upscaler

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [README, (ROOT / "launch" / "README.md").read_text()]


def commands(*pages: str) -> list[str]:
    """Of launch, as they stand in a line of their own."""
    lines = [line for page in pages for line in page.splitlines()]
    return [line.strip() for line in lines if line.startswith("    python -m launch.")]


COMMANDS = commands(README)

# What a reader fills in, and what would take hours or gigabytes: those commands have tests of their own.
MODELS = {  # overrides of a tiny one in its place
    "path/to/stable-diffusion-v1-5": {},
    "path/to/sdxl-base": XL,
    "path/to/sdxl-refiner": REFINER,
}
USAGE = "PROMPT..."
LONG = ("train", "evaluate", "random_model", "scenes", "convert", "benchmark")
LONG = tuple(f"launch.{name}" for name in LONG)
# In place of thirty, which take minutes: five, of which a refiner takes the last, or as many as stages are
# shown. With FOGSCULPT_LONG=1, all is run to the letter.
FEW_STEPS = "" if os.environ.get("FOGSCULPT_LONG") else "5"


def test_the_readme_shows_commands():
    assert (
        len([command for command in COMMANDS if "launch.generate" in command and USAGE not in command]) >= 3
    )


def test_commands_that_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path, overrides in MODELS.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        tiny_folder(tmp_path / path, **overrides)
    tiny_controlnet(tmp_path / "path/to/sd-controlnet-canny")
    for name in ("edges", "painting"):
        Image.new("RGB", (16, 16), "white").save(tmp_path / f"path/to/{name}.png")
    tiny_encoder(tmp_path / "path/to/image_encoder")
    adapter, words = tmp_path / "path/to/ip-adapter-plus_sd15.safetensors", UNET["cross_attention_dim"]
    tiny_adapter(adapter, {1: 16, 3: 16, 5: 16, 7: 32}, words, "plus")
    tiny_upscaler(tmp_path / "path/to/RealESRGAN_x4plus.safetensors")
    (csv,) = re.findall(r"```csv\n(.*?)```", README, re.DOTALL)
    (tmp_path / "prompts.csv").write_text(csv)
    (jsonl,) = re.findall(r"```jsonl\n(.*?)```", README, re.DOTALL)
    (tmp_path / "edits.jsonl").write_text(jsonl)
    first = re.search(r'&& python -m (launch\.generate ".+")', README)
    assert first, "the README begins with a command that draws"
    for command in [first[1], *(c.removeprefix("python -m ") for c in COMMANDS)]:
        module, *arguments = shlex.split(command)
        if module in LONG or USAGE in arguments:
            continue
        draws = not {"--status", "--verify", "--merge"} & set(arguments)
        if draws and FEW_STEPS and "--steps" not in arguments:
            frames = arguments[arguments.index("--frames") + 1] if "--frames" in arguments else FEW_STEPS
            arguments += ["--steps", frames]
        assert generate.run(arguments) == 0, command
        said = capsys.readouterr().out.splitlines()
        for line in () if {"--status", "--verify"} & set(arguments) else said:
            assert pathlib.Path(line).stat().st_size > 0
    rows = len(csv.splitlines()) - 1
    assert len(pathlib.Path("pictures/index.jsonl").read_text().splitlines()) == rows


@pytest.mark.parametrize("module", LONG)
def test_long_commands_are_read_at_least(module):
    shown = [command for command in commands(*PAGES) if module in command]
    assert shown, f"the README does not show {module}"
    flags = {flag.split("=")[0] for command in shown for flag in re.findall(r"--[\w.]+", command)}
    page = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    known = page.stdout + page.stderr
    for flag in flags:
        name = flag.removeprefix("--").split(".")[0]
        assert re.search(rf"--(\[no\])?{name}\b", known), f"{module} --help does not know {flag}"


def test_python_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        names: dict = {}
        exec(re.sub(r"steps=\d+", f"steps={FEW_STEPS}", block) if FEW_STEPS else block, names)
        assert names["images"].shape == (2, *names["pipe"].default_size, 3)
        assert names["images"].dtype == np.uint8

"""The order in which modules may know each other, read from their imports; and what a picture must not load.

Imports inside functions and under TYPE_CHECKING count too.
"""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# A module imports from the lines above its own. Units on one line do not know each other.
LAYERS = [
    ["engine.errors"],
    ["engine.types", "engine.requests", "engine.emoji", "engine.chips", "engine.flops"],
    ["engine.config"],
    [
        *("engine.diffusion", "engine.models", "engine.text", "engine.parallel", "engine.finish"),
        "engine.pixels",
        "engine.sights",
        "engine.world",
    ],
    ["engine.weights"],
    [
        *("engine.conditions", "engine.edits", "engine.controls", "engine.adapters", "engine.way"),
        *("engine.parts", "engine.sizing", "engine.compiling"),
    ],
    ["engine.texts", "engine.denoising"],
    ["engine.programs"],
    ["engine.ways", "engine.enlarging", "engine.checking", "engine.prompting", "engine.judging"],
    ["engine.passes"],
    ["engine.pipeline"],
    ["engine.loading"],
    ["engine"],  # engine/__init__.py, the public API
    ["engine.evaluate"],
    ["engine.jobs", "engine.train"],
    ["engine.benchmark"],
    ["launch"],
]
ONLY = {"configs": {"engine.config"}}  # units outside the layers: all that they may know of us

# package -> the units that may import it; everything under engine, launch and configs is held to this.
PACKAGES = {
    "pickle": set(),
    "cloudpickle": set(),
    "dill": set(),
    "joblib": set(),
    "transformers": set(),
    "diffusers": {"engine.benchmark"},  # a peer
    "torch": {"engine.benchmark"},
    "tensorflow": set(),
    "optax": {"engine.train", "engine.evaluate"},
    "orbax": {"engine.train", "engine.evaluate"},
    "flax": {unit for layer in LAYERS for unit in layer} - {"engine.diffusion"},
}
# What only parallel.py names: whoever else wants devices asks it.
PARALLEL = {"Mesh", "PartitionSpec", "shard_map", "pmap"}


def modules() -> dict[str, pathlib.Path]:
    """Dotted name -> file, for everything that is installed."""
    files = (f for top in ("engine", "launch", "configs") for f in (ROOT / top).rglob("*.py"))
    return {dotted(file.relative_to(ROOT)): file for file in files}


def dotted(file: pathlib.Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(name: str) -> str | None:
    """The layer entry that the dotted name is, or is inside of; None if there is none."""
    units = [unit for layer in LAYERS for unit in layer if unit != "engine"] + list(ONLY)
    inside = (unit for unit in units if name == unit or name.startswith(f"{unit}."))
    return "engine" if name == "engine" else next(inside, None)


def imported(module: str, tree: ast.AST, is_package: bool, known: set[str]) -> set[str]:
    """Every dotted name that the source imports; `from engine import finish` is engine.finish."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            full = {f"{base}.{alias.name}" for alias in node.names}
            names |= {name if name in known else base for name in full}
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            literal = node.args and isinstance(node.args[0], ast.Constant)
            names.add(str(node.args[0].value) if literal else "an import of a computed name")
    return names


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", None) or getattr(node.func, "id", "")


def violations(
    module: str, source: str, is_package: bool = False, known: set[str] | None = None
) -> list[str]:
    """What the source of `module` may not do, in words."""
    tree = ast.parse(source)
    rank = {unit: i for i, layer in enumerate(LAYERS) for unit in layer}
    mine, found = unit_of(module), []
    if mine is None:
        return [f"{module} is in no layer: give it its place in LAYERS"]
    for name in sorted(imported(module, tree, is_package, known or set(modules()))):
        theirs = unit_of(name)
        if name == "an import of a computed name":
            found.append(f"{module} hides {name}")
        elif theirs is None:
            package = name.split(".")[0]
            if package == "engine":
                found.append(f"{module} imports {name}")
            if package in PACKAGES and mine not in PACKAGES[package]:
                found.append(f"{module} imports {package}")
        elif theirs == mine:
            continue
        elif mine in ONLY:
            if theirs not in ONLY[mine]:
                found.append(f"{module} imports {name}")
        elif theirs not in rank or rank[theirs] >= rank[mine]:
            found.append(f"{module} imports {name}")
    if module != "engine.parallel":
        found += [f"{module} names {name}" for name in sorted(PARALLEL & identifiers(tree))]
    return found


def identifiers(tree: ast.AST) -> set[str]:
    """Names that are read, attributes, and what imports bring in. Strings and keywords are not names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found |= {*node.name.split("."), node.asname or ""}
        elif isinstance(node, ast.ImportFrom):
            found |= set((node.module or "").split("."))
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_module_knows_only_what_is_below_it(module):
    file = modules()[module]
    assert violations(module, file.read_text(), file.name == "__init__.py") == []


FORBIDDEN = [
    ("engine.types", "import engine.config", "imports engine.config"),
    ("engine.models.unet", "def f():\n from engine.diffusion import noise", "imports engine.diffusion.noise"),
    ("engine.models.unet", "from ..text import tokenizer", "imports engine.text.tokenizer"),
    ("engine.models.unet", "from .. import finish", "imports engine.finish"),
    ("engine.models.unet", "import engine", "imports engine"),
    ("engine.models.unet", "from engine import __version__", "imports engine"),
    ("engine.models.unet", "import engine.novelty", "imports engine.novelty"),
    ("engine.weights.folder", "import engine.pipeline as p", "imports engine.pipeline"),
    ("engine.train.loop", "import engine.jobs", "imports engine.jobs"),
    ("engine.train.loop", "import launch.train", "imports launch.train"),
    ("engine.pipeline", "import orbax.checkpoint", "imports orbax"),
    ("engine.pipeline", "import configs.x", "imports configs.x"),
    ("engine.text.tokenizer", "from transformers import CLIPTokenizer", "imports transformers"),
    ("engine.diffusion.noise", "from flax import nnx", "imports flax"),
    ("engine.novelty", "", "is in no layer: give it its place in LAYERS"),
    ("configs.x", "from engine import world", "imports engine.world"),
    ("launch.generate", "import configs.x", "imports configs.x"),
    ("launch.generate", "if TYPE_CHECKING:\n import torch.nn", "imports torch"),
    ("launch.generate", "import pickle", "imports pickle"),
    ("launch.generate", "__import__('pickle')", "imports pickle"),
    ("launch.generate", "importlib.import_module('torch.nn')", "imports torch"),
    ("launch.generate", "importlib.import_module(name)", "hides an import of a computed name"),
    ("engine.pipeline", "from jax.sharding import Mesh as M", "names Mesh"),
    ("engine.pipeline", "jax.pmap(f)", "names pmap"),
    ("engine.pipeline", "from jax.experimental import shard_map", "names shard_map"),
]
ALLOWED = [
    ("engine.config", "from engine.types import UserError"),
    (
        "engine.models.unet",
        "from engine.models import layers\nfrom .layers import conv\nfrom . import layers",
    ),
    ("engine.train.loop", "from engine import weights, pipeline, load"),
    ("engine.train.loop", "import optax, orbax.checkpoint"),
    ("configs.x", "from engine.config import TrainConfig\nimport dataclasses"),
    ("launch.generate", "import engine, engine.train.loop, engine.finish, launch.flags"),
    ("engine.diffusion.noise", "import jax.numpy"),
    ("engine.pipeline", "f(mode='shard_map', pmap=1)  # Mesh"),
    ("engine.parallel", "jax.shard_map(f); jax.sharding.Mesh; jax.pmap"),
]


@pytest.mark.parametrize(("module", "source", "found"), FORBIDDEN)
def test_what_is_forbidden_is_found(module, source, found):
    assert violations(module, source) == [f"{module} {found}"]


@pytest.mark.parametrize(("module", "source"), ALLOWED)
def test_what_is_allowed_passes(module, source):
    assert violations(module, source) == []


def test_every_unit_exists_or_has_its_place_in_the_design():
    """A typo in LAYERS would let a whole package go free."""
    later = {"engine.jobs"}
    named = {unit for layer in LAYERS for unit in layer} | set(ONLY)
    assert named - {unit_of(module) for module in modules()} <= later


# Seconds of start-up that no picture needs. (flax itself imports optax.)
HEAVY = [
    "transformers",
    "diffusers",
    "torch",
    "orbax",
    "tensorflow",
    "tensorboardX",
    "grain",
    "sklearn",
    "pandas",
]
OURS_IN_TRAINING = ["engine.train", "engine.evaluate", "engine.world"]


def loaded_by(code: str) -> set[str]:
    """Names of the modules in a fresh interpreter after `code`."""
    listing = "import sys, json; sys.stdout.write('\\n' + json.dumps(sorted(sys.modules)))"
    program = f"try: exec({code!r})\nfinally: exec({listing!r})"  # --help ends by SystemExit
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in result.stderr, result.stderr  # the status of --help is another test's business
    return set(json.loads(result.stdout.splitlines()[-1]))


HELP = (
    "import runpy, sys; sys.argv[1:] = ['--help']\nrunpy.run_module('launch.generate', run_name='__main__')"
)
RUNS = {
    "engine": "import engine",
    "engine.pipeline": "import engine.pipeline",
    "engine.finish": "import engine.finish",
    "engine.text": "import engine.text.prompts",
    "launch.generate": HELP,
}


@pytest.mark.parametrize("module", [module for module in RUNS if module in modules()])
def test_nothing_heavy_is_loaded(module):
    loaded = loaded_by(RUNS[module])
    assert loaded.isdisjoint([*HEAVY, *OURS_IN_TRAINING])


def test_words_need_no_model():
    """Prompts are read, and mistakes in them reported, without the models and their libraries."""
    loaded = loaded_by("import engine.text.prompts")
    assert loaded.isdisjoint(["flax", "optax", "engine.models", "engine.diffusion"])
    assert "engine.text.tokenizer" in loaded

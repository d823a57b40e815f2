"""How the tests have XLA compile: quickly. Loads nothing of JAX, which reads this when it starts."""

import importlib.util
import mmap
import pathlib
from collections.abc import MutableMapping

# A sixth of the compiler's time for tiny models, and their programs are no slower.
LEAST = "JAX_DISABLE_MOST_OPTIMIZATIONS"
# Where in the source each operation comes from, which no test asks for: a twelfth of the time of all.
PLACES = "JAX_TRACEBACK_IN_LOCATIONS_LIMIT"
# In one piece, since each of many pieces takes time of its own, and the workers have the cores: a fifth less.
FLAGS = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")

# compiler_options of single functions
FUSING = {"xla_cpu_use_fusion_emitters": True}  # as users have it
LOOPING = {"xla_backend_optimization_level": 1}  # where much is computed: a tenth of the time that it runs


def quickly(environment: MutableMapping[str, str]) -> None:
    """Writes into it what makes JAX compile quickly rather than well."""
    environment[LEAST] = "1"
    environment.setdefault(PLACES, "0")
    given = environment.get("XLA_FLAGS", "").split()
    flags = [flag for flag in FLAGS if flag not in given and known(flag)]
    environment["XLA_FLAGS"] = " ".join([*given, *flags])


def known(flag: str) -> bool:
    """Whether this jaxlib's XLA has the flag: of one that it has not, it dies."""
    spec = importlib.util.find_spec("jaxlib")
    name = flag.removeprefix("--").partition("=")[0].encode()
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in sorted(pathlib.Path(folder).glob("*.so*")):
            with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as code:
                if code.find(name) >= 0:
                    return True
    return False

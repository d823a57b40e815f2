"""What the compiled programs of a tiny model take, for test_budget.py. After a change that is meant to cost:

  python -m tests.benchmark.budget --write

The programs are those of CPUs, compiled as users have them: bytes, temporaries and collectives say little of
TPUs in numbers, but a needless copy, a lost fusion or a new exchange between devices shows in them, too.
"""

import json
import os
import pathlib
import sys
import tempfile

FILE = pathlib.Path(__file__).with_suffix(".json")
DEVICES = 8
SIDE, BATCH = 64, 2  # 1,024 latent pixels: attention is done in blocks


def measured() -> dict:
    """jaxlib's version; program -> what it takes; how the devices of a training whose state is split exchange
    its params; and how many programs a job compiles."""
    import jax
    import jaxlib

    from engine.benchmark import compiled, outline
    from engine.parallel import SPLIT, Devices
    from tests.tiny import tiny_model

    model = tiny_model(unet={"sample_size": 32})
    programs = outline.drawing(model, Devices(), SIDE, BATCH, "dpmpp_2m")
    del programs["unet"]  # it is in the sampler
    programs["train"] = outline.training(model, Devices("jit", rules=SPLIT), SIDE, BATCH)
    found, costs = {}, {name: compiled.cost(program) for name, program in programs.items()}
    for name, cost in costs.items():
        found[name] = {
            "flops": cost.flops,
            "accessed": cost.accessed,
            "temporaries": cost.temporaries,
            "collectives": sum(cost.collectives.values()),
            "moved": cost.moved,
        }
    params = 4 * sum(leaf.size for leaf in jax.tree.leaves(model.unet.params))
    exchange = {"kinds": sorted(costs["train"].collectives), "params": params}
    return {
        "jaxlib": jaxlib.__version__,
        "programs": found,
        "exchange": exchange,
        "compilations": compilations(),
    }


def compilations() -> int:
    """Of drawing two batches, with other words, seeds and scales for the second."""
    import engine
    from tests.compiled import COMPILED
    from tests.tiny import tiny_folder

    with tempfile.TemporaryDirectory() as work:
        pipe = engine.load(tiny_folder(pathlib.Path(work) / "model"))
        COMPILED.clear()
        pipe.generate(["a fox"] * DEVICES, seed=1, steps=4)
        pipe.generate(["a car at night"] * DEVICES, "grass", seed=2, steps=4, guidance_scale=3.0)
    return sum(COMPILED.values())


if __name__ == "__main__":
    # as users have it, but for the simulated devices
    os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
    text = json.dumps(measured(), indent=2) + "\n"
    if "--write" in sys.argv:
        FILE.write_text(text)
    print(text)

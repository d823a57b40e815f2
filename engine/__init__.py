"""fogsculpt: words become vectors, noise is drawn, a U-Net takes away what does not belong.

import engine
pipe = engine.load()                                  # the model in the package
images = pipe.generate(["a fox on a skateboard"], seed=7)   # uint8 (B, H, W, 3)
"""

from typing import TYPE_CHECKING, Any

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.diffusion.noise import fresh_seed
    from engine.loading import load
    from engine.pipeline import Pipeline
    from engine.requests import Given

__version__ = "0.1.0"
__all__ = ["Given", "Pipeline", "UserError", "fresh_seed", "load"]


def __getattr__(name: str) -> Any:
    """These bring JAX with them: only when they are asked for."""
    if name in ("load", "Pipeline"):
        from engine import loading

        return getattr(loading, name)
    if name == "Given":
        from engine.requests import Given

        return Given
    if name == "fresh_seed":
        from engine.diffusion.noise import fresh_seed

        return fresh_seed
    raise AttributeError(f"module 'engine' has no attribute {name!r}")

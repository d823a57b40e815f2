"""Every test checks the jaxtyping annotations of the engine at run time."""

from jaxtyping import install_import_hook

install_import_hook("engine", "beartype.beartype")

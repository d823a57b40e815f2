"""Every test checks the jaxtyping annotations of the engine at run time."""

from jaxtyping import install_import_hook

# PEP 484: where a float is asked for, an int will do.
install_import_hook("engine", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

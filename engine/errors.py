"""The one error that a user can cause. Apart from engine.types, whose array types bring JAX with them."""


class UserError(ValueError):
    """Something a user wrote is wrong. The message is one line: what, where, and what to write instead."""

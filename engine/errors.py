"""What users are told. Apart from engine.types, whose array types bring JAX with them."""


class UserError(ValueError):
    """Something a user wrote is wrong. The message is one line: what, where, and what to write instead."""


class UserNotice(UserWarning):
    """Something works, but not as well as a user would expect. The message is one line: what, and why."""

"""What users are told. Apart from engine.types, whose array types bring JAX with them."""


class UserError(ValueError):
    """Something a user wrote is wrong. The message is one line: what, where, and what to write instead."""


class Trouble(UserError):
    """Nothing was wrong with what a user wrote: a network or a machine failed. The same again may go well."""


class UserNotice(UserWarning):
    """Something works, but not as well as a user would expect. The message is one line: what, and why."""

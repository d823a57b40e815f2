"""The annotations of the engine, checked at run time.

jaxtyping holds the shapes of a function's arrays against each other. That takes it tens of microseconds
a call, a tenth of the time of the tests, so functions without arrays in their signature are beartype's alone.
"""

import inspect
import typing

import jaxtyping

# PEP 484: where a float is asked for, an int will do.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"


def check_annotations(package: str) -> None:
    """Of all modules of a package that are imported from now on."""
    jaxtyped = jaxtyping.jaxtyped

    def checked(*, typechecker):
        def decorate(function):
            alone = inspect.isfunction(function) and not any(
                map(of_arrays, function.__annotations__.values())
            )
            return typechecker(function) if alone else jaxtyped(typechecker=typechecker)(function)

        return decorate

    jaxtyping.jaxtyped = checked  # what the hook writes before each function
    jaxtyping.install_import_hook(package, CHECKER)


def of_arrays(annotation) -> bool:
    """Whether an annotation may say something of an array's shape."""
    if isinstance(annotation, str):
        return True  # of a type that is not there yet, or that does not take brackets
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(of_arrays, typing.get_args(annotation)))

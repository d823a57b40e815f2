"""The strict reader of JSON configs, as in model folders, and how mistakes in settings are told."""

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from engine.errors import UserError

T = TypeVar("T")

# What JSON calls the types of our annotations.
IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
}


def nearest(word: str, words: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest of `words`, or '' if none is close."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _alternatives(annotation: Any) -> tuple:
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def _is_a(value: Any, annotation: Any) -> bool:
    """Whether a value from JSON has the annotated type. A whole number is a number; true is neither."""
    if len(alternatives := _alternatives(annotation)) > 1:
        return any(_is_a(value, one) for one in alternatives)
    if typing.get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(_is_a(v, typing.get_args(annotation)[0]) for v in value)
    if annotation in (int, float):
        number = isinstance(value, (int, annotation)) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # neither NaN nor beyond all floats
    return annotation is Any or isinstance(value, annotation)


def _in_words(annotation: Any) -> str:
    if len(alternatives := _alternatives(annotation)) > 1:
        return " or ".join(map(_in_words, alternatives))
    if typing.get_origin(annotation) is tuple:
        return f"a list, each {_in_words(typing.get_args(annotation)[0])}"
    return IN_WORDS.get(annotation, "a list")


def check_parts(config: Any, where: str = "") -> None:
    """What no flag's own type refuses: tuples of something else, and parts that are none.

    Args:
      where: what the config is called in a larger one, with a dot behind it.

    Raises:
      UserError: there is one in the config, or in one inside of it.
    """
    for name, kind in typing.get_type_hints(type(config)).items():
        place, value = where + name, getattr(config, name)
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, kind):
                raise UserError(f"{place}={value!r}: leave it out, or write {place}.NAME=VALUE")
            check_parts(value, f"{place}.")
        elif isinstance(value, (tuple, list)) and not _is_a(tuple(value), kind):
            raise UserError(f"{place}={value!r}: write {_in_words(kind)}")


def _frozen(value: Any) -> Any:
    """Lists as tuples, at any depth."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def from_json(
    cls: type[T], options: Mapping[str, Any], where: str, fixed: Mapping[str, tuple] | None = None
) -> T:
    """Builds the dataclass `cls` from a JSON object, and refuses what it does not know.

    Args:
      options: the JSON object. Keys that start with '_' are the writer's own notes and are dropped.
      where: the file, for the messages.
      fixed: options of the original that the engine implements for some values only: name -> those
        values. They are checked, not stored.

    Raises:
      UserError: an unknown option, a value of another type than the field's, or a fixed option with a
        value that the engine does not implement.
    """
    known = typing.get_type_hints(cls)
    kept = {}
    for name, value in options.items():
        if name.startswith("_"):
            continue
        if name in known:
            kept[name] = _frozen(value)
            if not _is_a(kept[name], known[name]):
                raise UserError(f"{where}: {name}={json.dumps(value)}: write {_in_words(known[name])}")
        elif name in (fixed or {}):
            allowed = fixed[name]
            if (list(value) if isinstance(value, tuple) else value) not in allowed:
                raise UserError(
                    f"{where}: {name}={value!r} is not supported; supported: {', '.join(map(repr, allowed))}"
                )
        else:
            raise UserError(f"{where}: unknown option {name!r}{nearest(name, known)}")
    try:
        return cls(**kept)
    except (TypeError, UserError) as error:
        raise UserError(f"{where}: {error}") from None


def to_json(config: Any, class_name: str) -> dict[str, Any]:
    """The JSON object that `from_json` reads back: `_class_name` first, then every option."""
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return {"_class_name": class_name, **options}

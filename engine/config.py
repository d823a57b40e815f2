"""Typed dataclasses for every job, and the strict reader for the JSON configs of model folders."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from engine.types import UserError

T = TypeVar("T")


def nearest(word: str, words: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest of `words`, or '' if none is close."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


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
      UserError: an unknown option, or a fixed one with a value that the engine does not implement.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    kept = {}
    for name, value in options.items():
        if name.startswith("_"):
            continue
        if name in known:
            kept[name] = tuple(value) if isinstance(value, list) else value
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

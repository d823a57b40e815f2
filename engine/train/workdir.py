"""What a run keeps beside its checkpoints: the config that it began with."""

import dataclasses
import functools
import json
import pathlib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from engine.config import FinetuneConfig, TrainConfig
from engine.types import UserError
from engine.weights.files import new_file, read_json, write_json

FILE = "config.json"
STAGE = "finetune"  # the stage of a fine-tuning, and the folder of its checkpoints


def check_same_run(config: Any, workdir: pathlib.Path, settled: Sequence[str]) -> None:
    """Refuses to go on with another run: one that differs in the settings `settled`."""
    file = workdir / FILE
    if not file.exists():
        return
    # tuples become lists; what an older version did not know yet was as it is by default
    usual, now = (json.loads(json.dumps(dataclasses.asdict(each))) for each in (type(config)(), config))
    before = usual | {name: _joined(usual.get(name), own) for name, own in read_json(file).items()}
    for name in settled:  # those of a part are PART.NAME
        was, is_now = (
            functools.reduce(lambda part, key: part[key], name.split("."), each) for each in (before, now)
        )
        if was != is_now:
            raise UserError(
                f"{workdir} holds a run with {name}={was!r}, not {is_now!r}: "
                "give another --workdir, or the config that it began with"
            )


def _joined(usual: Any, own: Any) -> Any:
    """A part of a config, with what it does not say as it is by default."""
    return usual | own if isinstance(usual, dict) and isinstance(own, dict) else own


def check_same_pictures(config: TrainConfig, workdir: pathlib.Path) -> None:
    """Refuses to go on with drawn scenes where a run began with pictures, and the other way round.

    Pictures may move and change, as in a fine-tuning.
    """
    file = workdir / FILE
    if not file.exists():
        return
    before, now = _learned_from(read_json(file).get("data", {})), _learned_from(vars(config.data))
    if before != now:
        raise UserError(
            f"{workdir} holds a run on {before}, not on {now}: give another --workdir, or the config that it "
            "began with"
        )


def _learned_from(data: Mapping[str, Any]) -> str:
    return "data.paths" if data.get("paths") else "the drawn world"


def recall(workdir: pathlib.Path) -> TrainConfig | FinetuneConfig:
    """The config of the run there; UserError where there is none."""
    file = workdir / FILE
    if not file.exists():
        raise UserError(f"{workdir} holds no run: write the --workdir of a training")
    options = read_json(file)
    return _built(FinetuneConfig if STAGE in options else TrainConfig, options)


def _built(cls: type, options: dict[str, Any]) -> Any:
    """A dataclass from its JSON, with those inside of it."""
    kinds = typing.get_type_hints(cls)

    def value_of(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(kinds[name]):
            return _built(kinds[name], value)
        return tuple(value) if isinstance(value, list) else value

    if unknown := options.keys() - kinds.keys():
        raise UserError(f"{FILE} is of another version: it has {', '.join(sorted(unknown))}")
    return cls(**{name: value_of(name, value) for name, value in options.items()})


def remember(config: Any, workdir: pathlib.Path) -> None:
    """Writes the config, now that it is known to be sound."""
    workdir.mkdir(parents=True, exist_ok=True)
    with new_file(workdir / FILE) as new:
        write_json(new, dataclasses.asdict(config))

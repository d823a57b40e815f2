"""Trains a text-to-image model; a stopped run goes on with the same command.

  python -m launch.train --config=configs/scenes.py --workdir=runs/scenes
  python -m launch.train --config=configs/scenes.py --workdir=runs/short --config.diffusion.steps=500
  python -m launch.train --config=configs/scenes.py --workdir=runs/longer --config.seed=1 \\
    --config.start=runs/scenes/model --config.autoencoder.steps=0 --config.words.steps=0

On your own pictures with captions, from scratch; or the decoder of such a model alone:

  python -m launch.train --config=configs/own.py --workdir=runs/own --config.data.paths='("pictures",)'
  python -m launch.train --config=configs/own.py --workdir=runs/sharp --config.data.paths='("pictures",)' \\
    --config.start=runs/own/model --config.autoencoder.steps=0 --config.diffusion.steps=0 \\
    --config.decoder.steps=5000

Or trains a model that exists further, on your own pictures:

  python -m launch.train --config=configs/finetune.py --workdir=runs/mine --config.data.paths='("pictures",)'
  python -m launch.train --config=configs/lora.py --workdir=runs/style --config.data.paths='("sketches",)'
  python -m launch.train --config=configs/inversion.py --workdir=runs/word --config.data.paths='("owls",)'
  python -m launch.train --config=configs/controlnet.py --workdir=runs/net --config.data.paths='("pictures",)'
  python -m launch.train --config=configs/lcm.py --workdir=runs/fast --config.data.paths='("pictures",)'

Or on what a judge, a CLIP such as PickScore's, says of the pictures that it draws itself:

  python -m launch.train --config=configs/reward.py --workdir=runs/liked --config.model=FOLDER \\
    --config.reward.judge=PickScore_v1 --config.reward.prompts=prompts.txt

--dry_run builds and compiles all of it, says what it takes in memory and arithmetic, and stops.

From scratch: autoencoder, then text encoder, then U-Net, then the decoder again, then the export to
WORKDIR/model. The text encoder's stage knows the drawn scenes alone: with pictures of your own it has no
steps (words.steps=0) and trains with the U-Net (diffusion.train_text_encoder=True). With --config.start, a
folder, the run begins with its weights, and 0 steps leave a stage out.

Loss, images/s, TFLOP/s a device, time left and, on accelerators, the share of their peak rate (mfu) go to
stdout, to WORKDIR/metrics.jsonl and to WORKDIR/tensorboard; WORKDIR/loss-STAGE.png is drawn at the end of a
stage. Ctrl-C and SIGTERM save before they end the program; what a kill or a power cut leaves
is the newest checkpoint.

Exit code: 0 trained, or stopped and saved; 2 a mistake, explained in one line; 75 the processes did not
find each other, which may pass; 130 stopped with Ctrl-C where there was nothing to save.
"""

import ast
import dataclasses
import pathlib
import re
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from engine.config import FinetuneConfig
from engine.config.reader import nearest
from engine.errors import UserError
from launch import cli

# A scheduler's config says what differs from that of the model: it is empty, and knows no name beforehand.
SCHEDULER = re.compile(r"--?config\.scheduler\.(\w+)=(.*)", re.DOTALL)
FLAGS: cli.Groups = {
    "What to train": {
        "config": ("FILE", "of Python, whose get_config() gives a TrainConfig or a FinetuneConfig"),
        "config.NAME": ("VALUE", "in place of what FILE says, as in --config.autoencoder.batch_size=16"),
    },
    "Where": {
        "workdir": ("DIR", "for checkpoints, metrics and the model; another run of it goes on"),
    },
    "On how many hosts": {
        "processes": ("N", "that train together; without it what SLURM, Open MPI or the TPU pod says"),
        "process_id": ("N", "which of them this is, from 0"),
        "coordinator": ("HOST:PORT", "of process 0; without it what the cluster says"),
    },
    "Whether": {
        "dry_run": ("", "compile, report parameters, memory and arithmetic of a step, and stop"),
    },
}


def main(argv: Sequence[str]) -> int:
    """From the command line to a model; returns the exit code."""
    if {"--help", "-help", "-h"} & set(argv):
        cli.say(cli.help_text(__doc__ or "", FLAGS, {}))
        return cli.DONE
    config, given = parse(argv)
    workdir = given["workdir"]
    # JAX comes with these: --help should be quick.
    from engine.jobs.processes import find_processes
    from engine.loading import use_compilation_cache
    from engine.parallel import meet
    from engine.train import dry_run, finetune, stages
    from launch.drawing import advice_where_memory_runs_out

    logging.set_verbosity(logging.WARNING)  # Orbax tells much
    # The tasks of an array are trainings of their own.
    processes = find_processes(given["processes"], given["process_id"], array=False)
    if processes.count == 1 and given["coordinator"]:
        raise UserError(
            f"coordinator={given['coordinator']!r}, and one process that trains alone: write --processes N "
            "--process_id I, too"
        )
    if processes.count > 1:
        meet(given["coordinator"], processes.count, processes.id)
    train = finetune.train if isinstance(config, FinetuneConfig) else stages.train
    if given["dry_run"]:
        with tempfile.TemporaryDirectory() as nowhere:
            train(config, pathlib.Path(nowhere), dry_run.fit)
        return cli.DONE
    use_compilation_cache()  # a run that goes on need not compile again
    try:
        with advice_where_memory_runs_out(*less_memory(config)):
            result = train(config, pathlib.Path(workdir).expanduser())
    except OSError as error:
        raise UserError(f"{workdir} cannot be written: {error.strerror or error}") from None
    if result is not None:
        cli.say(f"model: {result}")
    return cli.DONE


def less_memory(config: Any) -> list[str]:
    """What to write for a step that takes less memory."""
    stage = "--config.finetune" if isinstance(config, FinetuneConfig) else "--config.STAGE"
    return [
        f"a smaller {stage}.batch_size",
        f"{stage}.accumulate=2, which has half of a batch in memory",
        f"{stage}.remat=blocks",
        f"{stage}.compute_dtype=bfloat16",
        f"{stage}.shard_params=True with several devices; --dry_run says what a step takes",
    ]


def literal(text: str) -> Any:
    """A number, True, False, None or a list of them as Python writes it; else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def in_package(arg: str) -> str:
    """--config=configs/NAME.py, wherever one is: where there is no such file, that of the package."""
    flag, found, name = arg.partition("=")
    path = pathlib.Path(name)
    if flag.lstrip("-") == "config" and found and path.parts[:1] == ("configs",) and not path.exists():
        own = pathlib.Path(cli.__file__).parents[1] / path
        return f"{flag}={own}" if own.is_file() else arg
    return arg


def parse(argv: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The config, with its overrides, and the other flags.

    Raises:
      UserError: for whatever of `argv` cannot be read.
    """
    of_scheduler = dict(found.groups() for arg in argv if (found := SCHEDULER.fullmatch(arg)))
    argv = [in_package(arg) for arg in argv if not SCHEDULER.fullmatch(arg)]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", flag_values=values, lock_config=False, sys_argv=["", *argv]
    )
    workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
    dry_run = flags.DEFINE_bool("dry_run", False, "", flag_values=values)
    flags.DEFINE_integer("processes", None, "", flag_values=values)
    flags.DEFINE_integer("process_id", None, "", flag_values=values)
    flags.DEFINE_string("coordinator", None, "", flag_values=values)
    try:
        _, *others = values(["", *argv])
        chosen = config.value
        fits = hasattr(chosen, "validate")  # the first look at what could not be read raises
    except flags.Error as error:
        if isinstance(error, flags.UnrecognizedFlagError) and error.flagname.startswith("config."):
            raise UserError(f"--{error.flagname} overrides nothing: write --config=FILE too") from None
        if found := re.findall(r'File "([^"]+)", line (\d+)', str(error)):  # a traceback, of a config file
            (file, line), (*_, last) = found[-1], str(error).strip().splitlines()
            own = next((each for each in reversed(found) if each[0] == config_file(argv)), (file, line))
            raise UserError(f"--config cannot be read: {own[0]}, line {own[1]}: {last}") from None
        raise cli.mistake(error, values) from None
    except KeyError as error:  # a field of a dataclass, or a key of a dict, in the words of ml_collections
        own, frames = pathlib.Path(config_file(argv)), traceback.extract_tb(error.__traceback__)
        if any(pathlib.Path(frame.filename).resolve() == own.resolve() for frame in frames):
            raise UserError(f"--config cannot be read: {_where(error)}") from None
        unknown = [a for a in argv if a.partition("=")[0].rpartition(".")[2] in str(error)]
        name = unknown[0].partition("=")[0].lstrip("-").removeprefix("config.") if unknown else ""
        near = nearest(name, settings(argv))
        raise UserError(f"the config has no such setting: {' '.join(unknown) or error}{near}") from None
    except (OSError, SyntaxError) as error:
        raise UserError(f"--config cannot be read: {' '.join(str(error).split())}") from None
    except Exception as error:  # whatever a config file of one's own does
        raise UserError(f"--config cannot be read: {_where(error)}") from None
    if others:
        raise UserError(f"{others[0]!r} is no flag: write --config={others[0]}")
    for flag in (config,) if dry_run.value else (config, workdir):
        if flag.value in (None, ""):
            raise UserError(f"write --{flag.name}; --help explains it")
    if not fits:
        raise UserError(
            f"--config: get_config() gives a {type(chosen).__name__}, "
            "neither a TrainConfig nor a FinetuneConfig of engine.config"
        )
    chosen.scheduler.update({name: literal(text) for name, text in of_scheduler.items()})
    names = ("workdir", "dry_run", "processes", "process_id", "coordinator")
    return chosen, {name: values[name].value for name in names}


def settings(argv: Sequence[str]) -> list[str]:
    """Names of all that --config.NAME overrides."""
    values, argv = flags.FlagValues(), [f"--config={config_file(argv)}"]
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["", *argv])
    values(["", *argv])

    def names(of: Any, path: str) -> list[str]:
        if not dataclasses.is_dataclass(of):
            return [path.rstrip(".")]
        fields = dataclasses.fields(of)
        return [name for f in fields for name in names(getattr(of, f.name), f"{path}{f.name}.")]

    return names(config.value, "")


def config_file(argv: Sequence[str]) -> str:
    """The value of --config."""
    found = re.search(r"(?<=\0)--?config[=\0]([^\0]+)", "\0" + "\0".join(argv))
    return found[1] if found else ""


def _where(error: Exception) -> str:
    """An error that a config file made, and its line there."""
    told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{last.filename}, line {last.lineno}: {told}"


if __name__ == "__main__":
    cli.main(main)

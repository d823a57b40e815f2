"""What entry points share: flags that fill a config, help worth reading, and one line for each mistake."""

import atexit
import contextlib
import functools
import gc
import io
import os
import pathlib
import re
import signal
import sys
import threading
import time
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NoReturn

from absl import flags
from tqdm import tqdm

from engine.config import IN_WORDS, nearest
from engine.errors import Trouble, UserError, UserNotice

# Exit codes, as shells and schedulers read them.
DONE, FAILED, MISTAKE, CRASHED, STOPPED, TERMINATED = 0, 1, 2, 70, 130, 143
PASSING = 75  # sysexits.h's EX_TEMPFAIL: the same command may go well later

# Programs are traced from objects by the million, and next to none of them is in a cycle: Python's own pace
# (700, 10, 10) goes through all of them so often that half a second of a start is spent on it.
FEW_COLLECTIONS = (100_000, 10, 10)

# heading -> flag -> (what stands for its value, what it does)
Groups = Mapping[str, Mapping[str, tuple[str, str]]]
Job = Callable[[Sequence[str]], int]  # arguments without the program's name -> exit code


def main(job: Job) -> NoReturn:
    """Runs an entry point on the command line's arguments, and exits with its code."""
    nowhere = open(os.devnull, "w")  # noqa: SIM115, stands in for closed streams to the end
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    sys.stdout.reconfigure(errors="surrogateescape")  # a path may hold any bytes; print them as they are
    warnings.showwarning = functools.partial(_warned, warnings.showwarning)
    gc.set_threshold(*FEW_COLLECTIONS)
    ended: list[int] = []
    atexit.register(_leave, ended)
    try:
        code = exit_code(job, sys.argv[1:])
    except Exception:  # a fault of ours; Python's own code for it is 1, which says something else here
        with contextlib.suppress(OSError):
            traceback.print_exc()
        code = CRASHED
    try:
        sys.stdout.flush()
    except OSError as error:  # nobody reads it any more, or the disk is full
        os.dup2(nowhere.fileno(), sys.stdout.fileno())  # or Python complains at the end
        if code == DONE and not isinstance(error, BrokenPipeError):
            tell(f"error: standard output: {error.strerror}")
            code = MISTAKE
    ended.append(code)
    sys.exit(code)


def _leave(ended: Sequence[int]) -> None:
    """Ends the program after `main`, with its code, without taking Python and a model apart, for 0.4 s.

    To be registered with atexit before JAX is imported, so that it comes behind all that JAX has to do.
    """
    if ended:  # or something else ends the program, in its own way
        with contextlib.suppress(OSError, ValueError):  # full, or closed
            sys.stdout.flush()
        os._exit(ended[0])


def exit_code(job: Job, argv: Sequence[str]) -> int:
    """Runs an entry point. A user's mistake, and Ctrl-C, are one line on stderr and an exit code."""
    # Before JAX is imported: XLA's notes on its own start-up help nobody. Errors still show.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        return job(argv)
    except UserError as error:
        tell(f"error: {error}")
        return PASSING if isinstance(error, Trouble) else MISTAKE
    except KeyboardInterrupt as stop:
        tell(f"stopped: {stop}" if str(stop) else "stopped")
        return TERMINATED if isinstance(stop, Terminated) else STOPPED
    except BrokenPipeError:  # whoever read our stdout has gone, as in `... | head -1`
        return FAILED


def stdin() -> BinaryIO:
    """Standard input as bytes; none, where it is closed."""
    return sys.stdin.buffer if sys.stdin else io.BytesIO()


def _warned(as_python: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any):
    """What the engine warns of is for users, whom a place in its code would not help; others are Python's.

    But for Pillow's of a large picture: whoever is to decode one has a limit and a line of his own for it.
    """
    if issubclass(category, UserNotice):
        tell(f"warning: {message}")
    elif category.__name__ != "DecompressionBombWarning":
        as_python(message, category, *where)


class Terminated(KeyboardInterrupt):
    """SIGTERM: a scheduler wants the machine back."""


_signals: list[int] = []  # every Ctrl-C and SIGTERM inside of `stops_put_off`


def stop_if_asked() -> None:
    """Raises KeyboardInterrupt after a stop that was put off. To be called often, where it is safe."""
    if _signals:
        raise Terminated if _signals[0] == signal.SIGTERM else KeyboardInterrupt


STOP_POLL = 0.1  # seconds between looks at whether the program is to stop


def pause(seconds: float) -> None:
    """Waits, and stops where the program is asked to."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if threading.current_thread() is threading.main_thread():
            stop_if_asked()
        time.sleep(min(left, STOP_POLL))


@contextlib.contextmanager
def stops_put_off() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the next `stop_if_asked`; a second Ctrl-C ends the program at once.

    For all that imports or runs JAX: raised on the spot, as Python does, KeyboardInterrupt crashes imports of
    modules in C, is lost in JAX's callbacks, and leaves XLA at work while Python is taken down.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not for other threads
        return

    def note(number: int, _: types.FrameType | None) -> None:
        # Schedulers send SIGTERM to a process and to its group: twice is no impatience.
        if number == signal.SIGINT and number in _signals:
            os.write(2, b"stopped\n")  # print may be at work already
            os._exit(STOPPED)
        _signals.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signals.clear()


def say(text: str) -> None:
    """One line on stdout, above a progress bar if there is one: what other programs may read."""
    try:
        tqdm.write(text, file=sys.stdout)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, mostly
        raise UserError(f"standard output: {error.strerror}") from None


def tell(text: str) -> None:
    """One line on stderr, above a progress bar if there is one. Where that is full, nothing is lost by it."""
    with contextlib.suppress(OSError):
        tqdm.write(one_line(text), file=sys.stderr)


def one_line(text: str) -> str:
    """The text with what could move the cursor, colour it or turn the writing direction escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def parse(argv: Sequence[str], kinds: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]] | None:
    """Reads flags, anywhere between the other arguments; `--` ends them.

    Args:
      kinds: flag -> the type of its value, as `typing.get_type_hints` gives it for a config's fields.

    Returns:
      The other arguments, and the flags that were given with their values; None where --help is among them.

    Raises:
      UserError: an unknown flag, or a value of another type.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    for name, kind in {**kinds, "help": bool, "h": bool}.items():
        (kind,) = set(typing.get_args(kind) or (kind,)) - {types.NoneType}
        flags.DEFINE_flag(flags.Flag(_Parser(kind), None, name, None, "", boolean=kind is bool), values)
    try:
        _, *others = values(["", *argv])
    except (flags.Error, ValueError) as error:
        raise mistake(error, kinds) from None
    if values["help"].value or values["h"].value:
        return None
    return others, {name: values[name].value for name in kinds if values[name].present}


def options(
    argv: Sequence[str],
    about: str | None,
    groups: Groups,
    kinds: Mapping[str, Any],
    defaults: Mapping[str, Any],
    needed: Mapping[str, str],
    meant: str = "",
) -> dict[str, Any] | None:
    """The flags of a program that takes nothing else, over their defaults; None where --help was answered.

    Args:
      needed: flags that must be given, with what stands for their values.
      meant: the flag that a word without one is likely to belong to.

    Raises:
      UserError: a flag is unknown, wrong or missing, or a word has none.
    """
    parsed = parse(argv, kinds)
    if parsed is None:
        say(help_text(about or "", groups, defaults))
        return None
    others, given = parsed
    if others:
        advice = f"write --{meant} {others[0]}" if meant else "--help lists them all"
        raise UserError(f"{others[0]!r} is no flag: {advice}")
    for name, value in needed.items():
        if given.get(name) in (None, ""):
            raise UserError(f"write --{name} {value}; --help explains it")
    return {**defaults, **given}


def source_and_target(
    argv: Sequence[str], about: str | None, groups: Groups, kinds: Mapping[str, Any], advice: str
) -> tuple[pathlib.Path, pathlib.Path, dict[str, Any]] | None:
    """The two paths of a program that makes one of the other, and its flags; None where --help was answered.

    Raises:
      UserError: a flag is unknown or wrong; or there are not two paths, with the advice.
    """
    parsed = parse(argv, kinds)
    if parsed is None:
        say(help_text(about or "", groups, {}))
        return None
    paths, given = parsed
    if len(paths) != 2:
        raise UserError(advice)
    source, target = (pathlib.Path(os.path.expanduser(path)) for path in paths)
    return source, target, given


@contextlib.contextmanager
def data_by_flags(names: Iterable[str]) -> Iterator[None]:
    """Mistakes in settings that a config calls data.NAME are told by the names of their flags."""
    try:
        yield
    except UserError as error:
        told = re.sub(rf"\bdata\.({'|'.join(names)})=", r"--\1=", str(error))
        raise type(error)(told) from None


def mistake(error: flags.Error | ValueError, known: Iterable[str]) -> UserError:
    """What absl says of a command line, in one line that says what to write; `known`: the flags' names."""
    if isinstance(error, flags.UnrecognizedFlagError):
        near = nearest(f"--{error.flagname}", [f"--{name}" for name in known])
        return UserError(f"unknown flag --{error.flagname}{near}; --help lists them all")
    what = str(error).removeprefix("flag ").replace("Missing value for flag", "write a value after")
    return UserError(what)


READERS = {str: str, int: int, float: float, bool: {"true": True, "false": False}.__getitem__}


class _Parser(flags.ArgumentParser):
    """Reads a flag's value, or says what to write."""

    def __init__(self, kind: type):
        self.kind = kind

    def parse(self, argument: Any) -> Any:
        try:
            return READERS[self.kind](argument)
        except (ValueError, KeyError):
            raise ValueError(f"write {IN_WORDS[self.kind]}") from None


def help_text(about: str, groups: Groups, defaults: Mapping[str, Any]) -> str:
    """The page that --help prints: `about`, then the flags under their headings, with their defaults."""
    lines = [about.strip()]
    described = [(flag, *rest) for group in groups.values() for flag, rest in group.items()]
    width = max(len(flag) + len(value) for flag, value, _ in described) + 3
    for heading, group in groups.items():
        lines += ["", f"{heading}:"]
        for flag, (value, what) in group.items():
            default = defaults.get(flag)
            shown = f" (default {default})" if default not in (None, "", False) else ""
            left = f"--{flag} {value}"
            first, *more = what.split("\n")
            lines.append(f"  {left:{width}}  {first}{'' if more else shown}")
            lines += [f"  {'':{width}}  {line}{shown * (line is more[-1])}" for line in more]
    return "\n".join(lines)

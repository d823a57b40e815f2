"""What people write: prompt files, lists of prompts, and what the model will not read of them."""

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from engine.text.tokenizer import Tokenizer
from engine.types import UserError

SHOWN_LETTERS = 30  # of a prompt on either side of the place where it is cut
SHOWN_WORDS = 12  # of the words that the model does not know


def read_prompt_file(path: str | os.PathLike) -> list[str]:
    """The prompts of a text file in UTF-8, one a line. Blank lines and lines that start with # are skipped.

    Raises:
      UserError: the file cannot be read, is no text, or holds no prompt.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; write the path of a text file with one prompt a line"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; write the path of a text file, one prompt a line"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8 text") from None
    # Not splitlines: it would also split at U+2028 and at form feeds, which may stand inside a prompt.
    lines = (line.strip() for line in text.split("\n"))
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"{path}: no prompt in it; write one a line (lines that start with # are comments)")
    return prompts


def check_prompt(prompt: Any) -> str:
    """The prompt itself, if it is text that can be encoded. An empty one is: it means no condition.

    Raises:
      UserError: it is no string, or holds lone surrogates (command-line bytes that are no UTF-8).
    """
    if not isinstance(prompt, str):
        raise UserError(f"prompt {prompt!r:.60}: a {type(prompt).__name__}; write a string")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"prompt {prompt[:60]!r}: character {error.start + 1} is not Unicode text; use UTF-8"
        ) from None
    return prompt


def check_prompts(prompts: Any) -> list[str]:
    """A list of at least one prompt, each checked. A bare string is refused: it would be read by letters."""
    if isinstance(prompts, str):
        raise UserError(f"prompts={prompts[:60]!r} is one string; write a list: [{prompts[:60]!r}]")
    if not isinstance(prompts, Sequence) or not prompts:
        raise UserError(f"prompts={prompts!r:.60}: write a list of at least one string")
    return [check_prompt(prompt) for prompt in prompts]


def check_negative_prompts(negative_prompts: Any, count: int) -> list[str]:
    """One negative prompt for each of `count` prompts: none (None), the same one (a string), or a list."""
    if negative_prompts is None:
        return [""] * count
    if isinstance(negative_prompts, str):
        return [check_prompt(negative_prompts)] * count
    negatives = check_prompts(negative_prompts)
    if len(negatives) != count:
        raise UserError(
            f"{len(negatives)} negative prompts for {count} prompts; write one string, or {count}"
        )
    return negatives


def unread(prompts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Warnings, a line each: which prompts are cut and where, and which words the model does not know.

    Equal prompts are named once, unknown words once for all prompts. Safe to print: no control
    characters and no change of writing direction.
    """
    warnings = []
    unknown: dict[str, None] = {}
    for prompt in dict.fromkeys(prompts):
        rest = tokenizer.cut(prompt)
        if rest is not None:
            kept = prompt.removesuffix(rest)
            # The stump of a word that the cut goes through is no word.
            whole = re.sub(r"\w+$", "", kept) if re.match(r"\w", rest) else kept
            unknown.update(dict.fromkeys(tokenizer.unknown_words(whole)))
            warnings.append(
                f"prompt too long: the model reads {tokenizer.model_max_length - 2} tokens; cut at | in "
                f'"{_tail(kept)}|{_head(rest)}" ({len(rest)} characters dropped)'
            )
        else:
            unknown.update(dict.fromkeys(tokenizer.unknown_words(prompt)))
    if unknown:
        words = list(unknown)
        more = f" and {len(words) - SHOWN_WORDS} more" if len(words) > SHOWN_WORDS else ""
        warnings.append(f"words that the model never saw: {', '.join(words[:SHOWN_WORDS])}{more}")
    return warnings


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _tail(kept: str) -> str:
    dots = "..." if len(kept) > SHOWN_LETTERS else ""
    return dots + _printable(kept[-SHOWN_LETTERS:])


def _head(rest: str) -> str:
    dots = "..." if len(rest) > SHOWN_LETTERS else ""
    return _printable(rest[:SHOWN_LETTERS]) + dots

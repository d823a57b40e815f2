"""What people write: prompts, lists of them, and what the model will not read of them."""

import re
from collections.abc import Sequence
from typing import Any

from engine.text.reading import PLAIN, Reading, cut, said
from engine.text.tokenizer import Tokenizer
from engine.types import UserError

SHOWN_LETTERS = 30  # of a prompt on either side of the place where it is cut
SHOWN_WORDS = 12  # of the words that the model does not know


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


def unread(prompts: Sequence[str], tokenizer: Tokenizer, reading: Reading = PLAIN) -> list[str]:
    """Warnings, a line each: which prompts are cut and where, and which words the model does not know.

    Equal prompts are named once, unknown words once for all prompts. Safe to print: no control
    characters and no change of writing direction.
    """
    warnings = []
    unknown: dict[str, None] = {}
    for prompt in dict.fromkeys(prompts):
        text, rest = said(prompt, reading), cut(prompt, tokenizer, reading)
        if rest is not None:
            kept, most = text[: len(text) - len(rest)], f"{tokenizer.model_max_length - 2} tokens"
            most = f"{reading.most_parts} parts of at most {most}" if reading.long else most
            # The stump of a word that the cut goes through is no word.
            whole = re.sub(r"\w+$", "", kept) if re.match(r"\w", rest) else kept
            unknown.update(dict.fromkeys(tokenizer.unknown_words(whole)))
            warnings.append(
                f"prompt too long: the model reads {most}; cut at | in "
                f'"{_tail(kept)}|{_head(rest)}" ({len(rest)} characters dropped)'
                + ("" if reading.long else "; --long_prompts reads them, too")
            )
        else:
            unknown.update(dict.fromkeys(tokenizer.unknown_words(text)))
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

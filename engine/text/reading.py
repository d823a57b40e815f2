"""How a prompt is read: as it stands; with weights; in parts, where it is longer than a text encoder reads.

Weights are written as in AUTOMATIC1111's web UI: a (word) counts 1.1 times, a [word] 1 / 1.1 times, and a
(word:1.4) 1.4 times; within each other they multiply, up to 100. A bracket that is not closed holds to the
end, and a backslash before a bracket makes it a letter. Of a token that counts w times, the U-Net attends to

    z' = z_empty + w (z - z_empty)

where z is what the text encoder says of it, and z_empty what it says at that place of a prompt of no words.
(As in ComfyUI, and for w > 1 in compel. AUTOMATIC1111 has w z instead, and then scales all of the prompt
until its mean is what it was, so that the weight of one word moves all others.)

A part is what a text encoder reads at once: 75 tokens of Stable Diffusion's. What it says of the parts stands
behind each other, and the U-Net attends to all of it. A part ends behind a comma, if one is near enough to
where it has to end, or else between two words; BREAK ends it at once.
"""

import bisect
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from engine.text.tokenizer import Tokenizer

MARK = re.compile(
    r"\\[\\()\[\]] | [(\[] | : \s* (?P<weight> [+-]? (?: \d+(?:\.\d*)? | \.\d+ )) \s* \) | [)\]]", re.VERBOSE
)
ROUND, SQUARE = 1.1, 1 / 1.1
DEEPEST = 100  # of so many brackets inside of each other those further in change nothing
MOST = 100.0  # times that a word counts, or less than none
BREAK = re.compile(r"\bBREAK\b")
BREAK_AT_END = re.compile(r"\bBREAK$")
WORDS_MEET = re.compile(r"\w\w")
MOST_PARTS = 16  # of a long prompt
NEAR = 4 / 15  # of a part, at its end: where a comma is near enough. 20 of 75 tokens, as in AUTOMATIC1111's


class Reading(NamedTuple):
    """How prompts are read."""

    weights: bool = False  # brackets are marks, and no letters
    long: bool = False  # in as many parts as it takes

    @property
    def most_parts(self) -> int:
        """Of a prompt; what is behind them is cut."""
        return MOST_PARTS if self.long else 1


class Part(NamedTuple):
    """What a text encoder reads at once."""

    ids: tuple[int, ...]  # without those of the beginning, the end and the padding
    starts: tuple[int, ...]  # where in the text each begins
    weights: tuple[float, ...]  # of each


PLAIN, NOTHING = Reading(), Part((), (), ())


def text_of(prompt: str, reading: Reading = PLAIN) -> str:
    """The prompt without marks, which starts of tokens count in."""
    return "".join(piece for piece, _ in _marked(prompt, reading))


def said(prompt: str, reading: Reading = PLAIN) -> str:
    """What a prompt says: without marks, and without BREAK where that is one."""
    text = text_of(prompt, reading)
    return BREAK.sub(lambda found: " " * len(found[0]), text) if reading.long else text


def parts(prompt: str, tokenizer: Tokenizer, reading: Reading = PLAIN) -> list[Part]:
    """What is read of a prompt, part after part; one that is empty if there is nothing to read."""
    return _all_parts(prompt, tokenizer, reading)[: reading.most_parts]


def cut(prompt: str, tokenizer: Tokenizer, reading: Reading = PLAIN) -> str | None:
    """The end of the text of a prompt that is not read because it is too long, or None.

    A token of several vectors that are not all read is dropped, as people see it.
    """
    rest = _all_parts(prompt, tokenizer, reading)[reading.most_parts :]
    return text_of(prompt, reading)[rest[0].starts[0] :] if rest else None


def words(prompt: str, tokenizer: Tokenizer, reading: Reading = PLAIN) -> list[tuple[str, list[int]]]:
    """The words of a prompt, in their order, and at which places of what the U-Net attends to each stands.

    A word is what stands between spaces, and is named without the punctuation around it. What is cut is
    left out.
    """
    spans = [(found.span(), found[0]) for found in re.finditer(r"\S+", text_of(prompt, reading))]
    length = tokenizer.model_max_length
    starts = {
        length * number + place + 1: start
        for number, part in enumerate(parts(prompt, tokenizer, reading))
        for place, start in enumerate(part.starts)
    }
    places = ([place for place, at in starts.items() if first <= at < end] for (first, end), _ in spans)
    named = (word.strip(".,;:!?'\"()[]") or word for _, word in spans)
    return [(word, found) for word, found in zip(named, places, strict=True) if found]


def pieces(prompt: str) -> list[tuple[str, float]]:
    """The text between the marks of a prompt, and how many times each piece of it counts."""
    marks = list(MARK.finditer(prompt))
    factors = _factors(marks, len(prompt))
    opened = {end: place for place, (_, end) in factors.items()}
    found, inside, last = [], dict[int, float](), 0

    def add(text: str) -> None:
        if text:
            weight = math.prod(itertools.islice(inside.values(), DEEPEST), start=1.0)
            found.append((text, _bounded(weight)))

    for mark in marks:
        add(prompt[last : mark.start()])
        last = mark.end()
        if mark.start() in factors:
            inside[mark.start()] = factors[mark.start()][0]
        elif mark.start() in opened:
            del inside[opened[mark.start()]]
        else:
            add(mark[0].removeprefix("\\"))
    add(prompt[last:])
    return found


def _factors(marks: Sequence[re.Match], end: int) -> dict[int, tuple[float, int]]:
    """Of each bracket that opens: where it stands -> what it multiplies by, and where it is closed."""
    found: dict[int, tuple[float, int]] = {}
    open_: dict[str, list[int]] = {"(": [], "[": []}
    for mark in marks:
        kind = "[" if mark[0] == "]" else "("
        if mark[0] in open_:
            open_[mark[0]].append(mark.start())
        elif not mark[0].startswith("\\") and open_[kind]:
            plain = SQUARE if kind == "[" else ROUND
            factor = _bounded(float(mark["weight"])) if mark["weight"] else plain
            found[open_[kind].pop()] = factor, mark.start()
    for kind, factor in (("(", ROUND), ("[", SQUARE)):
        found |= {place: (factor, end) for place in open_[kind]}
    return found


def _bounded(weight: float) -> float:
    return min(max(weight, -MOST), MOST)


def _marked(prompt: str, reading: Reading) -> list[tuple[str, float]]:
    """Pieces of the text that is read, and how many times each counts; neighbours count differently.

    Words that a mark divides are two if they count differently, or one of them is BREAK: there is a space
    between them.
    """
    if not reading.weights:
        return [(prompt, 1.0)]
    found: list[tuple[list[str], float]] = []
    for piece, weight in pieces(prompt):
        if found and WORDS_MEET.fullmatch((last := found[-1][0][-1])[-1] + piece[0]):
            ends = reading.long and (BREAK_AT_END.search(last[-9:]) or BREAK.match(piece))
            if weight != found[-1][1] or ends:
                piece = f" {piece}"
        if found and found[-1][1] == weight:
            found[-1][0].append(piece)
        else:
            found.append(([piece], weight))
    return [("".join(some), weight) for some, weight in found]


def _all_parts(prompt: str, tokenizer: Tokenizer, reading: Reading) -> list[Part]:
    """All of the prompt, even if there are more parts than are read; of those, one."""
    marked = _marked(prompt, reading)
    text = "".join(piece for piece, _ in marked)
    behind = list(itertools.accumulate(len(piece) for piece, _ in marked))  # where each piece ends
    found, piece = [], 0
    split = _split(tokenizer.tokens(text), text, tokenizer.model_max_length - 2, reading.long)
    for tokens in itertools.islice(split, reading.most_parts + 1):
        weights = []
        for _, start in tokens:
            while behind[piece] <= start:
                piece += 1
            weights.append(marked[piece][1])
        ids, starts = zip(*tokens, strict=True)
        found.append(Part(ids, starts, tuple(weights)))
    return found or [NOTHING]


Tokens = Sequence[tuple[int, int]]  # each its id, and where in the text it begins


def _split(tokens: Tokens, text: str, room: int, long: bool) -> Iterator[Tokens]:
    """Tokens in parts of at most `room`."""
    for section in _sections(tokens, text) if long else [tokens]:
        while section:
            end = len(section) if len(section) <= room else _end(section, text, room) if long else room
            yield section[:end]
            section = section[end:]


def _sections(tokens: Tokens, text: str) -> Iterator[Tokens]:
    """The tokens between each BREAK and the next."""
    starts, first = [start for _, start in tokens], 0
    for found in BREAK.finditer(text):
        yield tokens[first : bisect.bisect_left(starts, found.start())]
        first = bisect.bisect_left(starts, found.end())
    yield tokens[first:]


def _end(tokens: Tokens, text: str, room: int) -> int:
    """How many of the tokens are to make a part of at most `room` of more that there are."""
    starts = [start for _, start in tokens[: room + 1]]

    def begins(place: int) -> bool:
        return starts[place] != starts[place - 1] and text[starts[place] - 1].isspace()

    def behind_comma(place: int) -> bool:
        return text[starts[place - 1] : starts[place]].rstrip().endswith(",")

    ends = range(room, 0, -1)
    near = (place for place in ends[: round(NEAR * room)] if behind_comma(place))
    return next(itertools.chain(near, (place for place in ends if begins(place))), room)

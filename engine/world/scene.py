"""What a scene of the drawn world can be: all that a caption may state, and nothing else."""

import dataclasses

COLOURS = (
    *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey"),
)
SIZES = ("small", "big")
PLACES = ("middle", "left", "right", "top", "bottom")  # of a single thing
RELATIONS = ("left of", "above", "on", "under", "riding", "wearing", "holding", "next to")
BACKGROUNDS = (
    *("meadow", "forest", "beach", "sea", "underwater", "desert", "mountains", "snow", "city", "street"),
    *("farm", "garden", "jungle", "sky", "space", "kitchen", "living room", "stage", "plain white"),
    *("plain blue", "plain yellow", "plain pink"),
)
TIMES = ("day", "sunset", "night", "rain")  # of outdoor backgrounds; "day" is what goes without saying
OUTDOORS = frozenset(BACKGROUNDS[:14]) - {"underwater"}
STYLES = ("plain", "watercolour", "pencil sketch", "pixel art", "neon", "photo")
MOST = 4  # of a kind


@dataclasses.dataclass(frozen=True)
class Scene:
    """One thing, several of a kind, or two things in a relation, before a background.

    Attributes:
      things: the names of one or two different things.
      colours: for each, a name from COLOURS that it is painted in, or None: as it is.
      sizes: 'small' or 'big' for each.
      count: of the thing, 1 to MOST; more than one only of a single kind, which then has no place.
      place: where a single thing is (one of PLACES); None where there are several.
      relation: how the first of two stands to the second (one of RELATIONS); None for one kind.
      background, time, style: of BACKGROUNDS, TIMES, STYLES.
    """

    things: tuple[str, ...]
    colours: tuple[str | None, ...]
    sizes: tuple[str, ...]
    count: int
    place: str | None
    relation: str | None
    background: str
    time: str
    style: str

    def __post_init__(self):
        two = len(self.things) == 2
        if len(self.things) not in (1, 2) or len(set(self.things)) != len(self.things):
            raise ValueError(f"a scene has one kind of thing or two, not {self.things}")
        if not len(self.things) == len(self.colours) == len(self.sizes):
            raise ValueError(f"{self.things} with {len(self.colours)} colours and {len(self.sizes)} sizes")
        if not 1 <= self.count <= MOST or (two and self.count > 1):
            raise ValueError(f"count={self.count} of {self.things}")
        if (self.relation is not None) != two or (self.place is not None) != (not two and self.count == 1):
            raise ValueError(f"place {self.place!r} and relation {self.relation!r} of {self.things}")
        for value, known in (
            *((colour, (None, *COLOURS)) for colour in self.colours),
            *((size, SIZES) for size in self.sizes),
            *((self.place, (None, *PLACES)), (self.relation, (None, *RELATIONS))),
            *((self.background, BACKGROUNDS), (self.time, TIMES), (self.style, STYLES)),
        ):
            if value not in known:
                raise ValueError(f"unknown {value!r}; known: {known}")
        if self.time != "day" and self.background not in OUTDOORS:
            raise ValueError(f"{self.background} has no {self.time}")


@dataclasses.dataclass(frozen=True)
class Thing:
    """One kind of thing: its picture and the words for it.

    Attributes:
      emoji: the character that is drawn.
      nouns: one to four nouns; the first is the thing's name, and no two things share it.
      plurals: of the nouns, for counting; () for what is never counted.
      kind: 'animal', 'person', 'food', 'vehicle', 'plant', 'tool', 'music', 'weather', 'clothes', 'building',
        'sport' or 'object'.
      true_colours: words that are true of the picture as it is ("red"). Often empty.
      paints: whether it may be painted in any of COLOURS and stay what it is (a car; not the moon, not fire).
      pair: the noun is a plural and takes no article ("sunglasses").
      turn: degrees by which the sprite is turned counter-clockwise, to make it stand level.
      eyes: (x, y, width) of the pair of eyes as fractions of the sprite's width, height and width, for
        a thing that can wear something; None for the rest.
      worn: where it is worn: 'eyes', 'head', or '' for what is never worn.
      hand: (x, y) as fractions, where what it holds is drawn, for a thing that can hold something; or None.
      held: whether it is small enough to be held.
      rides: whether it may ride on something.
      carries: whether things may ride on it.
    """

    emoji: str
    nouns: tuple[str, ...]
    plurals: tuple[str, ...] = ()
    kind: str = "object"
    true_colours: tuple[str, ...] = ()
    paints: bool = False
    pair: bool = False
    turn: float = 0.0
    eyes: tuple[float, float, float] | None = None
    worn: str = ""
    hand: tuple[float, float] | None = None
    held: bool = False
    rides: bool = False
    carries: bool = False

    @property
    def name(self) -> str:
        return self.nouns[0]

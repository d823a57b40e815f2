"""The things of the drawn world, as data."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Thing:
    """One kind of thing: its picture and the words for it.

    Attributes:
      emoji: the character that is drawn.
      nouns: one to four nouns; the first is the thing's name.
      colours: words that are true of the picture ("red"), so that captions may say them. Often empty.
      plural: the nouns take no article ("sunglasses").
      turn: degrees by which the sprite is turned counter-clockwise, to make it stand level.
      eyes: (x, y, width) of the pair of eyes as fractions of the sprite's width, height and width, for
        a thing that can wear something; None for the rest.
      worn: where it is worn: 'eyes', 'head', or '' for what is never worn.
      carries: things are often drawn riding on it.
    """

    emoji: str
    nouns: tuple[str, ...]
    colours: tuple[str, ...] = ()
    plural: bool = False
    turn: float = 0.0
    eyes: tuple[float, float, float] | None = None
    worn: str = ""
    carries: bool = False

    @property
    def name(self) -> str:
        return self.nouns[0]


THINGS: tuple[Thing, ...] = (
    Thing("🦊", ("fox",), ("orange",), eyes=(0.50, 0.57, 0.72)),
    Thing("🐱", ("cat", "kitten", "kitty"), eyes=(0.50, 0.56, 0.74)),
    Thing("🐶", ("dog", "puppy", "doggy"), eyes=(0.50, 0.42, 0.64)),
    Thing("🐼", ("panda", "panda bear"), eyes=(0.50, 0.52, 0.78)),
    Thing("🦁", ("lion",), eyes=(0.50, 0.47, 0.66)),
    Thing("🐸", ("frog", "toad"), ("green",), eyes=(0.50, 0.28, 0.84)),
    Thing("🦉", ("owl",), ("brown",), eyes=(0.50, 0.33, 0.80)),
    Thing("🤖", ("robot", "android"), eyes=(0.50, 0.53, 0.72)),
    Thing("🐎", ("horse", "pony", "stallion"), ("brown",), carries=True),
    Thing("🐘", ("elephant",), ("grey", "gray"), carries=True),
    Thing("🐧", ("penguin",)),
    Thing("🐟", ("fish",), ("blue",)),
    Thing("🦋", ("butterfly",), ("orange",)),
    Thing("🚗", ("car", "auto", "automobile"), ("red", "scarlet", "crimson"), carries=True),
    Thing("🛹", ("skateboard", "board"), turn=-26.0, carries=True),
    Thing("🚲", ("bicycle", "bike", "cycle"), ("blue",), carries=True),
    Thing("⛵", ("boat", "sailboat", "ship"), carries=True),
    Thing("✈️", ("airplane", "plane", "aeroplane", "aircraft"), carries=True),
    Thing("🚀", ("rocket", "spaceship"), carries=True),
    Thing("🏠", ("house", "home", "cottage")),
    Thing("🌳", ("tree", "oak"), ("green",)),
    Thing("🌵", ("cactus",), ("green",)),
    Thing("🌻", ("sunflower", "flower"), ("yellow",)),
    Thing("🍄", ("mushroom", "toadstool"), ("red",)),
    Thing("🎃", ("pumpkin", "jack-o-lantern"), ("orange",)),
    Thing("🍎", ("apple",), ("red", "scarlet", "crimson")),
    Thing("🍌", ("banana",), ("yellow",)),
    Thing("🍕", ("pizza", "slice of pizza", "pizza slice")),
    Thing("🎂", ("cake", "birthday cake")),
    Thing("⚽", ("ball", "football", "soccer ball")),
    Thing("⭐", ("star",), ("yellow", "golden")),
    Thing("🌙", ("moon", "crescent moon", "crescent"), ("yellow", "golden")),
    Thing("❤️", ("heart",), ("red", "scarlet", "crimson")),
    Thing("🎈", ("balloon",), ("red", "scarlet", "crimson")),
    Thing("🎸", ("guitar", "electric guitar"), ("red",)),
    Thing("⏰", ("clock", "alarm clock"), ("red",)),
    Thing("☂️", ("umbrella",), ("purple", "violet")),
    Thing("🔑", ("key",), ("yellow", "golden")),
    Thing("🕶️", ("sunglasses", "shades", "dark glasses"), ("black",), plural=True, worn="eyes"),
    Thing("👑", ("crown",), ("golden", "gold"), worn="head"),
)

INDEX: dict[str, int] = {thing.name: index for index, thing in enumerate(THINGS)}

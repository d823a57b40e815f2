"""How the tables of things are written: nouns in one string, their plurals by rule."""

from engine.world.scene import Thing

IRREGULAR = {
    **{"mouse": "mice", "wolf": "wolves", "sheep": "sheep", "deer": "deer", "fish": "fish"},
    **{"loaf": "loaves", "leaf": "leaves", "scarf": "scarves", "volcano": "volcanoes", "hero": "heroes"},
    **{"superhero": "superheroes", "santa claus": "santa clauses", "aircraft": "aircraft"},
    **{"policeman": "policemen", "fireman": "firemen", "snowman": "snowmen", "spaceman": "spacemen"},
}


def plural_of(noun: str) -> str:
    """ "foxes" of "fox", "slices of pizza" of "slice of pizza": what is counted stands before the "of"."""
    head, of, rest = noun.partition(" of ")
    *before, last = head.split(" ")
    if head in IRREGULAR:
        return IRREGULAR[head] + of + rest
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join((*before, last)) + of + rest


def thing(emoji: str, nouns: str, colours: str = "", **traits) -> Thing:
    """A row of a table.

    Args:
      nouns: separated by "/"; the first is the name.
      colours: that are true of the picture, separated by blanks.
      traits: Thing's other attributes. A `pair` has no plurals: its nouns are plurals.
    """
    each = tuple(nouns.split("/"))
    plurals = () if traits.get("pair") else tuple(map(plural_of, each))
    return Thing(emoji, each, plurals, true_colours=tuple(colours.split()), **traits)

"""All things of the world, in the order of their sprites, and the words for colours."""

from engine.world import living, objects
from engine.world.scene import Thing

THINGS: tuple[Thing, ...] = (
    *(*living.ANIMALS, *living.PEOPLE, *living.PLANTS),
    *(*objects.FOOD, *objects.VEHICLES, *objects.TOOLS, *objects.MUSIC, *objects.CLOTHES),
    *(*objects.BUILDINGS, *objects.SPORT, *objects.WEATHER, *objects.ITEMS),
)
INDEX: dict[str, int] = {thing.name: index for index, thing in enumerate(THINGS)}

# Whose picture has something on the head already: they wear glasses, but no hats.
HATTED = frozenset(
    (
        *("astronaut", "cook", "farmer", "firefighter", "police officer", "builder", "pilot"),
        *("princess", "wizard", "santa claus", "cowboy", "snowman"),
    )
)

# How people say the colours; the first is the plain word. Each word means one colour.
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "scarlet", "crimson", "ruby"),
    "orange": ("orange", "amber"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure", "sapphire"),
    "purple": ("purple", "violet", "lilac"),
    "pink": ("pink", "magenta"),
    "brown": ("brown", "chestnut"),
    "black": ("black", "jet-black"),
    "white": ("white", "snow-white"),
    "grey": ("grey", "gray", "silver"),
}

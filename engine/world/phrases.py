"""The phrases of captions, as data. No phrase names a thing of the world that it does not mean.

In templates, {0} is the scene's first thing and {1} its second.
"""

COUNT_WORDS = {
    2: ("two", "two", "a pair of", "a couple of", "2"),
    3: ("three", "three", "3"),
    4: ("four", "four", "4"),
}
VAGUE_COUNTS = {
    2: ("some",),
    3: ("several", "some", "a few", "a group of"),
    4: ("several", "some", "a group of"),
}
EXACT_COUNTS = {2: "two", 3: "three", 4: "four"}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge", "giant")}
ARTICLES = ("a",) * 14 + ("the",) * 2 + ("one", "", "", "")
PAIR_OF = "a pair of"
PAINTED = (
    "{} painted {}",
    "{} coloured {}",
    "{} colored {}",
    "{} in the colour {}",
    "{} dyed {}",
)  # a noun and a colour

PLACE_WORDS = {
    "middle": ("in the middle", "in the center", "in the centre"),
    "left": ("on the left", "on the left side", "at the left", "on the left-hand side"),
    "right": ("on the right", "on the right side", "at the right", "on the right-hand side"),
    "top": ("at the top", "near the top", "high up"),
    "bottom": ("at the bottom", "low down", "near the bottom"),
}
PLACE_NAMES = {  # of keywords
    "middle": ("centered", "in the middle"),
    "left": ("left side", "on the left"),
    "right": ("right side", "on the right"),
    "top": ("top", "at the top"),
    "bottom": ("bottom", "at the bottom"),
}

# Relation -> templates that mean it and no other.
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left of": (
        *("{0} to the left of {1}", "{0} left of {1}", "{0} on the left of {1}"),
        *("{1} to the right of {0}", "{1} right of {0}", "{1} on the right of {0}"),
        *("{0} on the left and {1} on the right", "{0} on the left, {1} on the right"),
    ),
    "above": (
        *("{0} above {1}", "{0} above {1}", "{0} high above {1}", "{0} floating above {1}"),
        *("{0} hovering over {1}", "{1} below {0}", "{1} far below {0}", "{1} with {0} above it"),
    ),
    "on": (
        *("{0} on {1}", "{0} on {1}", "{0} on {1}", "{0} on top of {1}", "{0} standing on {1}"),
        *("{0} stands on {1}", "{0} placed on {1}", "{1} with {0} on top"),
    ),
    "under": (
        *("{0} under {1}", "{0} under {1}", "{0} underneath {1}", "{0} beneath {1}", "{0} right under {1}"),
        *("{1} sheltering {0}", "{0} sheltered by {1}"),
    ),
    "riding": (
        *("{0} riding {1}", "{0} riding {1}", "{0} riding {1}", "{0} riding on {1}", "{0} rides {1}"),
        *("{0} rides on {1}", "{1} ridden by {0}"),
    ),
    "wearing": (
        *("{0} wearing {1}", "{0} wearing {1}", "{0} wearing {1}", "{0} wears {1}"),
        *("{0} that wears {1}", "{1} worn by {0}"),
    ),
    "holding": (
        *("{0} holding {1}", "{0} holding {1}", "{0} holding {1}", "{0} holds {1}", "{1} held by {0}"),
        *("{0} that holds {1}",),
    ),
    "next to": (
        *("{0} next to {1}", "{0} next to {1}", "{0} beside {1}", "{0} close to {1}", "{0} right by {1}"),
        *("{0} and {1} side by side", "{0} stands next to {1}"),
    ),
}
# True of the relation, and of others too.
VAGUE_RELATIONS: dict[str, tuple[str, ...]] = {
    "left of": ("{0} and {1}", "{1} and {0}", "{0} with {1}"),
    "above": ("{0} over {1}", "{0} and {1}", "{1} and {0}"),
    "on": ("{0} and {1}", "{1} carrying {0}", "{1} under {0}"),
    "under": ("{1} over {0}", "{0} and {1}", "{1} with {0}"),
    "riding": ("{0} on {1}", "{1} carrying {0}", "{0} and {1}", "{0} on top of {1}"),
    "wearing": ("{0} with {1}", "{0} in {1}", "{0} with {1}", "{1} on {0}"),
    "holding": ("{0} with {1}", "{0} and {1}", "{0} with {1}"),
    "next to": ("{0} and {1}", "{1} and {0}", "{0} with {1}"),
}
# What riding is called on some things, beside the words above.
RIDING_WORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("car", "bus", "truck", "racing car", "fire engine", "tractor", "train"),
        ("{0} driving {1}", "{0} drives {1}"),
    ),
    **dict.fromkeys(
        ("airplane", "helicopter", "rocket", "flying saucer"), ("{0} flying {1}", "{0} flies {1}")
    ),
    **dict.fromkeys(("sailboat", "ship"), ("{0} sailing {1}", "{0} sails {1}")),
}
FINITE = frozenset(("rides", "wears", "holds", "stands", "drives", "flies", "sails"))  # whole sentences

# Backgrounds: phrases that follow the subject, then single names that stand before or behind a comma.
BACKGROUND_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "meadow": (
        ("in a meadow", "on the grass", "in a field", "on a green meadow"),
        ("meadow", "grass", "field"),
    ),
    "forest": (("in the forest", "in a forest", "in the woods", "in the deep forest"), ("forest", "woods")),
    "beach": (("on the beach", "at the beach", "at the seaside", "on the shore"), ("beach", "seaside")),
    "sea": (("at sea", "on the sea", "on the ocean", "out on the open sea"), ("sea", "ocean", "open sea")),
    "underwater": (
        ("under water", "underwater", "under the sea", "deep in the ocean"),
        ("underwater", "deep sea"),
    ),
    "desert": (("in the desert", "in a desert", "on the sand dunes", "among the dunes"), ("desert", "dunes")),
    "mountains": (
        ("in the mountains", "in front of the mountains", "in the alps", "among high peaks"),
        ("mountains", "alps"),
    ),
    "snow": (("in the snow", "in a snowy landscape", "in winter", "on snowy ground"), ("snow", "winter")),
    "city": (("in the city", "in town", "downtown", "in front of skyscrapers"), ("city", "skyline")),
    "street": (("on the street", "in the street", "on a road", "in a street"), ("street", "road")),
    "farm": (("on a farm", "on the farm", "in a farmyard", "in front of a barn"), ("farm", "farmyard")),
    "garden": (("in the garden", "in a garden", "in a backyard"), ("garden", "backyard")),
    "jungle": (
        ("in the jungle", "in a jungle", "in the rainforest", "in a tropical jungle"),
        ("jungle", "rainforest"),
    ),
    "sky": (("in the sky", "up in the sky", "up in the air", "in mid-air"), ("sky", "open sky")),
    "space": (("in space", "in outer space", "in the universe"), ("space", "outer space", "cosmos")),
    "kitchen": (("in the kitchen", "in a kitchen"), ("kitchen",)),
    "living room": (("in the living room", "in a living room", "in the lounge"), ("living room", "lounge")),
    "stage": (("on stage", "on a stage", "on the stage", "in the theatre"), ("stage", "theatre")),
    **{
        f"plain {colour}": (
            (
                f"on a {colour} background",
                f"on a plain {colour} background",
                f"in front of a {colour} wall",
                f"against a {colour} backdrop",
            ),
            (f"{colour} background", f"plain {colour} background"),
        )
        for colour in ("white", "blue", "yellow", "pink")
    },
}
TIME_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "day": (("by day", "in daylight", "during the day"), ("day", "daylight")),
    "sunset": (
        ("at sunset", "at sunset", "at dusk", "in the evening"),
        ("sunset", "dusk", "evening"),
    ),
    "night": (("at night", "at night", "by night", "in the dark", "at midnight"), ("night", "nighttime")),
    "rain": (
        ("in the rain", "on a rainy day", "in rainy weather", "while it rains"),
        ("rain", "rainy", "rainy day"),
    ),
}
# Styles: openings before the subject, phrases that follow everything, names for commas.
STYLE_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "watercolour": (
        ("a watercolour of", "a watercolor of", "a watercolour painting of", "a watercolor painting of"),
        ("in watercolour", "in watercolor", "painted in watercolours", "in watercolour style"),
        ("watercolour", "watercolor", "watercolour painting"),
    ),
    "pencil sketch": (
        ("a pencil sketch of", "a sketch of", "a pencil drawing of", "pencil sketch of"),
        ("drawn in pencil", "as a pencil sketch", "as a sketch"),
        ("pencil sketch", "sketch", "pencil drawing"),
    ),
    "pixel art": (
        ("a pixel art picture of", "pixel art of", "a pixelated picture of"),
        ("in pixel art", "as pixel art", "in pixel art style", "in 8-bit style"),
        ("pixel art", "pixelated", "8-bit"),
    ),
    "neon": (
        ("a neon sign of", "a neon picture of", "a glowing neon picture of"),
        ("in neon", "in neon colours", "in neon style", "in glowing neon"),
        ("neon", "neon glow", "glowing neon", "neon style"),
    ),
    "photo": (
        ("a photo of", "a photograph of", "photo of", "a realistic photo of"),
        ("as a photo", "in a photograph", "in photo style"),
        ("photo", "photograph", "realistic photo"),
    ),
}
OPENINGS = (
    "a picture of",
    "picture of",
    "an image of",
    "an illustration of",
    "a scene with",
)  # of any style

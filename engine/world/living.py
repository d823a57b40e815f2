"""The living things of the world, as data: animals, people (and who is like them), plants.

Positions of eyes and hands were read from the font's pictures of 2023. People are single pictures of
several code points (a person, a joiner, a rocket), which Pillow joins where it has raqm.
"""

import functools

from engine.world.nouns import thing

animal = functools.partial(thing, kind="animal", paints=True, rides=True)
mount = functools.partial(animal, carries=True)
sea = functools.partial(thing, kind="animal", paints=True)
person = functools.partial(thing, kind="person", rides=True)
plant = functools.partial(thing, kind="plant", paints=True)
flower = functools.partial(plant, held=True)

ANIMALS = (
    animal("🦊", "fox", "orange", eyes=(0.50, 0.57, 0.72)),
    animal("🐱", "cat/kitten/kitty", "yellow", eyes=(0.50, 0.55, 0.74)),
    animal("🐶", "dog/puppy/doggy", eyes=(0.50, 0.42, 0.64)),
    animal("🐼", "panda/panda bear", eyes=(0.50, 0.50, 0.76)),
    animal("🦁", "lion", eyes=(0.50, 0.40, 0.62)),
    animal("🐯", "tiger", "orange", eyes=(0.50, 0.33, 0.70)),
    animal("🐸", "frog/toad", "green", eyes=(0.50, 0.27, 0.84)),
    animal("🦉", "owl", "brown", eyes=(0.50, 0.31, 0.80)),
    animal("🐻", "bear/brown bear", "brown", eyes=(0.50, 0.46, 0.64)),
    animal("🐨", "koala/koala bear", "grey", eyes=(0.50, 0.49, 0.58)),
    animal("🐵", "monkey/chimp", "brown", eyes=(0.50, 0.54, 0.48)),
    animal("🐷", "pig/piglet/piggy", "pink", eyes=(0.50, 0.52, 0.68)),
    animal("🐭", "mouse", "grey", eyes=(0.51, 0.66, 0.50)),
    animal("🐰", "rabbit/bunny/hare", "grey", eyes=(0.50, 0.61, 0.70)),
    animal("🐺", "wolf", "grey", eyes=(0.49, 0.46, 0.64)),
    animal("🦝", "raccoon", "grey", eyes=(0.50, 0.51, 0.62)),
    animal("🦄", "unicorn", "white"),
    animal("🐔", "chicken/hen", "white"),
    mount("🐎", "horse/pony/stallion", "brown"),
    mount("🐄", "cow"),
    mount("🐘", "elephant", "grey"),
    animal("🐧", "penguin", hand=(0.12, 0.60)),
    sea("🐟", "fish", "blue", rides=True),
    animal("🦋", "butterfly", "orange"),
    mount("🐢", "turtle/tortoise", "green"),
    animal("🐍", "snake/serpent", "green"),
    mount("🐊", "crocodile/alligator", "green"),
    sea("🐳", "whale", "blue", carries=True),
    sea("🐬", "dolphin", "blue", carries=True, rides=True),
    sea("🦈", "shark", "grey", carries=True, rides=True),
    sea("🐙", "octopus", rides=True, hand=(0.12, 0.72)),
    sea("🦀", "crab", "orange", rides=True),
    animal("🐌", "snail", "brown"),
    animal("🐝", "bee/honeybee"),
    animal("🐞", "ladybug/ladybird", "red"),
    animal("🕷️", "spider"),
    mount("🐫", "camel"),
    animal("🦒", "giraffe"),
    animal("🦓", "zebra"),
    animal("🦍", "gorilla/ape", "grey", hand=(0.12, 0.92)),
    animal("🦘", "kangaroo", hand=(0.38, 0.52)),
    mount("🐑", "sheep/lamb", "white"),
    animal("🦌", "deer", "brown"),
    animal("🦔", "hedgehog", "brown"),
    animal("🦆", "duck/mallard"),
    animal("🦢", "swan", "white"),
    animal("🦜", "parrot", "green"),
    animal("🐦", "bird", "blue"),
    animal("🦩", "flamingo", "pink"),
    animal("🐿️", "squirrel/chipmunk", "brown", hand=(0.22, 0.62)),
    mount("🦕", "dinosaur/brontosaurus", "green"),
    mount("🦖", "t-rex/tyrannosaurus", "green"),
    mount("🐉", "dragon", "green"),
)

PEOPLE = (
    person("🧑‍🚀", "astronaut/cosmonaut/spaceman", eyes=(0.50, 0.475, 0.50), hand=(0.85, 0.88)),
    person("🧑‍🍳", "cook/chef", eyes=(0.38, 0.475, 0.48), hand=(0.86, 0.72)),
    person("🧑‍🌾", "farmer", eyes=(0.36, 0.44, 0.44), hand=(0.12, 0.88)),
    person("🧑‍⚕️", "doctor/physician", eyes=(0.50, 0.475, 0.58), hand=(0.85, 0.88)),
    person("🧑‍🎨", "artist/painter", eyes=(0.39, 0.475, 0.48), hand=(0.12, 0.88)),
    person("🧑‍🚒", "firefighter/fireman", eyes=(0.50, 0.475, 0.56), hand=(0.85, 0.88)),
    person("👮", "police officer/policeman/cop", eyes=(0.50, 0.455, 0.58), hand=(0.85, 0.88)),
    person("🕵️", "detective/spy", hand=(0.10, 0.88)),
    person("👷", "builder/construction worker", eyes=(0.50, 0.455, 0.56), hand=(0.85, 0.88)),
    person("🧑‍✈️", "pilot/captain", eyes=(0.50, 0.455, 0.58), hand=(0.85, 0.88)),
    person("👸", "princess/queen", eyes=(0.50, 0.63, 0.56), hand=(0.85, 0.90)),
    person("🧙", "wizard/magician/sorcerer", eyes=(0.40, 0.455, 0.42), hand=(0.12, 0.88)),
    person("🧛", "vampire", eyes=(0.50, 0.455, 0.44), hand=(0.85, 0.88)),
    person("🧜‍♀️", "mermaid", hand=(0.90, 0.30)),
    person("🎅", "santa claus/santa", eyes=(0.52, 0.455, 0.52), hand=(0.85, 0.90)),
    person("🥷", "ninja", "black", eyes=(0.50, 0.455, 0.42), hand=(0.85, 0.88)),
    person("🦸", "superhero/hero", hand=(0.92, 0.10)),
    person("👶", "baby/infant", eyes=(0.50, 0.61, 0.62)),
    person("💃", "dancer/flamenco dancer", hand=(0.72, 0.06)),
    person("🤠", "cowboy", eyes=(0.46, 0.54, 0.44)),
    person("🤡", "clown", eyes=(0.50, 0.38, 0.62)),
    person("🤖", "robot/android", "grey", eyes=(0.50, 0.52, 0.72), paints=True),
    person("👽", "alien/extraterrestrial", "grey", eyes=(0.50, 0.53, 0.74), paints=True),
    person("👻", "ghost", "white", eyes=(0.52, 0.27, 0.46), hand=(0.92, 0.60), paints=True),
    person("💀", "skull", "white", eyes=(0.50, 0.50, 0.70), paints=True),
    person("⛄", "snowman", "white", eyes=(0.42, 0.38, 0.36), hand=(0.95, 0.50)),
)

PLANTS = (
    plant("🌳", "tree/oak", "green"),
    plant("🌴", "palm tree/palm", "green"),
    plant("🌲", "pine tree/fir", "green"),
    plant("🌵", "cactus", "green"),
    plant("🎄", "christmas tree", "green"),
    flower("🌻", "sunflower", "yellow"),
    flower("🌷", "tulip", "pink"),
    flower("🌹", "rose", "red"),
    flower("🌸", "cherry blossom", "pink"),
    flower("🌺", "hibiscus/flower", "pink"),
    flower("🍄", "mushroom/toadstool", "red"),
    flower("🍀", "four-leaf clover/clover", "green"),
    flower("🍁", "maple leaf/autumn leaf"),
    plant("🪴", "potted plant/houseplant", paints=False),
)

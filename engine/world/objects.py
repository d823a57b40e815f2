"""What does not live, as data: food, vehicles, tools, music, clothes, buildings, sport, weather and more."""

import functools

from engine.world.nouns import thing

food = functools.partial(thing, kind="food", held=True)
fruit = functools.partial(food, paints=True)
vehicle = functools.partial(thing, kind="vehicle", paints=True, carries=True)
tool = functools.partial(thing, kind="tool", paints=True, held=True)
music = functools.partial(thing, kind="music", paints=True, held=True)
clothes = functools.partial(thing, kind="clothes", paints=True, held=True)
building = functools.partial(thing, kind="building", paints=True)
sport = functools.partial(thing, kind="sport", paints=True, held=True)
weather = functools.partial(thing, kind="weather")
item = functools.partial(thing, paints=True, held=True)
furniture = functools.partial(thing, paints=True)

FOOD = (
    fruit("🍎", "apple", "red"),
    fruit("🍐", "pear", "green"),
    food("🍊", "orange/tangerine/mandarin", "orange"),
    food("🍋", "lemon", "yellow"),
    fruit("🍌", "banana", "yellow"),
    food("🍉", "watermelon/slice of watermelon"),
    fruit("🍇", "grapes", "purple", pair=True),
    fruit("🍓", "strawberry", "red"),
    fruit("🍒", "cherries", "red", pair=True),
    food("🍍", "pineapple"),
    food("🥑", "avocado", "green"),
    food("🥕", "carrot", "orange"),
    food("🌽", "ear of corn/corn cob"),
    fruit("🌶️", "chili pepper/chilli/hot pepper", "red"),
    food("🥦", "broccoli floret/head of broccoli", "green"),
    fruit("🥚", "egg"),
    food("🍞", "loaf of bread/loaf"),
    food("🥐", "croissant"),
    food("🧀", "piece of cheese/wedge of cheese/cheese wedge", "yellow"),
    food("🍔", "hamburger/burger/cheeseburger"),
    food("🍟", "french fries/fries", pair=True),
    food("🍕", "slice of pizza/pizza/pizza slice"),
    food("🌭", "hot dog"),
    food("🥪", "sandwich"),
    food("🍿", "box of popcorn/bucket of popcorn"),
    fruit("🍦", "ice cream/ice cream cone"),
    fruit("🍩", "doughnut/donut"),
    food("🍪", "cookie/chocolate chip cookie"),
    fruit("🎂", "cake/birthday cake"),
    fruit("🧁", "cupcake/muffin"),
    food("🍭", "lollipop"),
    food("☕", "cup of coffee/coffee/coffee cup"),
    food("🍺", "beer/mug of beer/glass of beer"),
    fruit("🎃", "pumpkin/jack-o-lantern", "orange"),
)

VEHICLES = (
    vehicle("🚙", "car/auto/automobile", "blue"),  # the font's other car is red: "a red car" could not be new
    vehicle("🚌", "bus"),
    vehicle("🚚", "truck/lorry"),
    vehicle("🏎️", "racing car/race car", "red"),
    vehicle("🚒", "fire engine/fire truck", "red", paints=False),
    vehicle("🚜", "tractor", "green"),
    vehicle("🏍️", "motorcycle/motorbike", "red"),
    vehicle("🛴", "kick scooter/scooter", "blue"),
    vehicle("🚲", "bicycle/bike/cycle"),
    vehicle("🛹", "skateboard/board", turn=-26.0),
    vehicle("🛷", "sled/sledge/sleigh"),
    vehicle("🚂", "train/steam train/locomotive"),
    vehicle("⛵", "sailboat/boat/sailing boat"),
    vehicle("🚢", "ship/steamship"),
    vehicle("✈️", "airplane/plane/aeroplane/aircraft"),
    vehicle("🚁", "helicopter/chopper", "yellow"),
    vehicle("🚀", "rocket/spaceship"),
    vehicle("🛸", "flying saucer/ufo"),
)

TOOLS = (
    tool("🔨", "hammer"),
    tool("🪓", "axe/hatchet"),
    tool("✂️", "scissors", "red", pair=True),
    tool("✏️", "pencil", "yellow"),
    tool("🗡️", "sword/dagger"),
    tool("🛡️", "shield", "grey"),
    tool("🏹", "bow/longbow"),
    tool("🧹", "broom", "yellow"),
    tool("🪣", "bucket/pail", "blue"),
    tool("🪜", "ladder", "brown"),
    tool("🔑", "key", "yellow"),
    tool("🕯️", "candle", "white"),
    tool("🔭", "telescope"),
    tool("☂️", "umbrella", "purple"),
    tool("💡", "light bulb/bulb/lightbulb", "yellow"),
)

MUSIC = (
    music("🎸", "guitar/electric guitar", "red"),
    music("🎻", "violin/fiddle", "brown"),
    music("🎺", "trumpet", "yellow"),
    music("🎷", "saxophone/sax", "yellow"),
    music("🥁", "drum/snare drum", "red"),
    music("🎹", "piano/piano keyboard", paints=False, held=False),
    music("🪗", "accordion", "red"),
    music("🎤", "microphone/mic"),
    music("🔔", "bell", "yellow"),
)

CLOTHES = (
    clothes("🕶️", "sunglasses/shades/dark glasses", "black", pair=True, worn="eyes"),
    clothes("👓", "glasses/spectacles/eyeglasses", "brown", pair=True, worn="eyes"),
    clothes("🥽", "goggles/diving goggles", "grey", pair=True, worn="eyes"),
    clothes("👑", "crown", "yellow", worn="head"),
    clothes("🎩", "top hat/hat", "black", worn="head"),
    clothes("🧢", "cap/baseball cap", "blue", worn="head"),
    clothes("👒", "straw hat/sun hat", "yellow", turn=30.0, worn="head"),
    clothes("⛑️", "helmet", "red"),
    clothes("👕", "t-shirt/shirt/tee", "blue"),
    clothes("👗", "dress", "blue"),
    clothes("👟", "sneaker/running shoe", "blue"),
    clothes("🥾", "hiking boot/boot", "brown"),
    clothes("🧣", "scarf", "red"),
    clothes("🎒", "backpack/rucksack/school bag", "red"),
)

BUILDINGS = (
    building("🏠", "house/home/cottage"),
    building("🏰", "castle"),
    building("⛪", "church/chapel"),
    building("⛺", "tent", "orange"),
    building("🎡", "ferris wheel"),
    building("🏯", "japanese castle/pagoda"),
)

SPORT = (
    sport("⚽", "soccer ball/ball/football"),
    sport("🏀", "basketball", "orange"),
    sport("🎾", "tennis racket/racket"),
    sport("⚾", "baseball", "white"),
    sport("🎯", "target/dartboard", paints=False),
    sport("🪁", "kite"),
    sport("🏆", "trophy", "yellow"),
)

WEATHER = (
    weather("☀️", "sun", "yellow"),
    weather("🌙", "moon/crescent moon/crescent", "yellow"),
    weather("⭐", "star", "yellow", paints=True),
    weather("☁️", "cloud", paints=True),
    weather("🌈", "rainbow"),
    weather("⚡", "lightning bolt/bolt of lightning", "yellow"),
    weather("❄️", "snowflake", "blue"),
    weather("🔥", "fire/flame/campfire"),
    weather("🌋", "volcano"),
)

ITEMS = (
    item("❤️", "heart", "red"),
    item("🎈", "balloon", "red"),
    item("⏰", "alarm clock/clock", "red"),
    item("📕", "book", "red"),
    item("📷", "camera"),
    furniture("📺", "television/tv/tv set"),
    item("📱", "phone/smartphone/mobile phone", paints=False),
    item("💻", "laptop/computer/notebook"),
    furniture("🪑", "chair/wooden chair", "brown"),
    furniture("🛏️", "bed", "blue"),
    furniture("🛋️", "sofa/couch", "blue"),
    item("🧸", "teddy bear/teddy", "brown", eyes=(0.51, 0.24, 0.38), hand=(0.90, 0.62), rides=True),
    item("🎁", "present/gift/gift box"),
    item("💎", "diamond/gem", "blue"),
    item("🧺", "basket/wicker basket", "brown"),
    item("🚩", "flag/pennant", "red"),
)

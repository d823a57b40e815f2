"""Painters of the outdoor backgrounds: each draws from far to near on a `Canvas`, by daylight."""

import numpy as np

from engine.world.canvas import Canvas


def meadow(c: Canvas) -> None:
    horizon = c.rng.uniform(0.45, 0.56)
    c.gradient([(0.0, 0x7CC4F5), (1.0, 0xE3F5FC)], 0.0, 0.75, sky=1)
    c.clouds(int(c.rng.integers(0, 3)), 0xFFFFFF, 0.1, horizon - 0.1, 0.9)
    c.ground(horizon + 0.06 * c.wave(2, 0.6, 1.6), 0x8CCB5A)
    c.ground(horizon + 0.12 + 0.05 * c.wave(2, 0.6, 1.8), 0x63B444, 0.25)
    flowers = int(c.rng.choice([0xFFFFFF, 0xFFE45C, 0xF59AC0]))
    c.dots(int(c.rng.integers(12, 26)), flowers, 0.7, 1.0, 0.012, 0.9)


def forest(c: Canvas) -> None:
    c.gradient([(0.0, 0x9CC7A0), (1.0, 0xD5E8C8)], 0.0, 0.85, sky=1)
    for rgb, foot, count in ((0x6FA37C, 0.62, 12), (0x3F7A55, 0.70, 9), (0x23573B, 0.78, 7)):
        for x in np.linspace(-0.05, 1.05, count) + c.rng.uniform(-0.04, 0.04, count):
            height, width = c.rng.uniform(0.38, 0.6), c.rng.uniform(0.07, 0.11)
            c.box(x - 0.012, foot - 0.03, x + 0.012, foot + 0.05, 0x4A3526)
            for tier in range(3):  # the skirts of a fir, the lowest the widest
                tip = foot - height * (1 - 0.24 * tier)
                c.triangle(x, tip, tip + 0.52 * height, width * (0.55 + 0.22 * tier), rgb, 4.0)
    c.ground(c.rng.uniform(0.7, 0.76) + 0.03 * c.wave(2), 0x3E6B35, 0.35)


def beach(c: Canvas) -> None:
    horizon, shore = c.rng.uniform(0.34, 0.4), c.rng.uniform(0.55, 0.62)
    c.gradient([(0.0, 0x55B4F0), (1.0, 0xCDEEFB)], 0.0, horizon, sky=1)
    c.gradient([(0.0, 0x1F9CC4), (1.0, 0x6FDAD6)], horizon, shore + 0.1)
    line = shore + 0.03 * c.wave(2, 0.8, 2.0)
    c.ground(line - 0.02, 0xF5FFFF)
    c.ground(line + 0.015, 0xF2DCA4, 0.12)
    side = c.rng.choice([-1, 1])  # a palm leans in from one side
    foot, top = 0.5 - side * c.rng.uniform(0.4, 0.46), 0.5 - side * c.rng.uniform(0.3, 0.36)
    crown = c.rng.uniform(0.16, 0.24)
    c.line(foot, 0.75, (foot + top) / 2 - 0.02 * side, 0.45, 0.035, 0x8A6238)
    c.line((foot + top) / 2 - 0.02 * side, 0.45, top, crown, 0.03, 0x8A6238)
    for turn in (-0.35, 0.15, 0.7, 2.45, 3.0, 3.5):
        mid = (top + 0.1 * np.cos(turn), crown + 0.1 * np.sin(turn) - 0.035)
        c.line(top, crown, *mid, 0.03, 0x2F8F3E)
        c.line(*mid, top + 0.18 * np.cos(turn), crown + 0.18 * np.sin(turn) + 0.05, 0.024, 0x3BA34B)


def sea(c: Canvas) -> None:
    horizon = c.rng.uniform(0.36, 0.46)
    c.gradient([(0.0, 0x6FB7EE), (1.0, 0xD8F0FB)], 0.0, horizon, sky=1)
    c.clouds(int(c.rng.integers(0, 3)), 0xFFFFFF, 0.08, horizon - 0.08, 0.9)
    c.gradient([(0.0, 0x2F8FCB), (1.0, 0x0B4C8F)], horizon, 1.0)
    for row in np.linspace(horizon + 0.05, 0.98, 7):
        near = (row - horizon) / (1 - horizon)
        line = row + (0.006 + 0.02 * near) * c.wave(3, 3.0, 9 - 4 * near)
        thickness = 0.004 + 0.014 * near
        crest = np.clip(1 - np.abs(c.y - line) / thickness, 0, 1) * (0.5 + 0.5 * c.wave(2, 2.0, 5.0))
        c.fill(0xBFE6F7, 0.65 * crest)


def desert(c: Canvas) -> None:
    horizon = c.rng.uniform(0.48, 0.58)
    c.gradient([(0.0, 0x79BDE8), (1.0, 0xFBE7C0)], 0.0, 0.7, sky=1)
    c.ground(horizon + 0.07 * c.wave(2, 0.5, 1.4), 0xE9BE78)
    for x in c.rng.uniform(0, 1, 2):  # cacti in the distance
        foot, tall = horizon + 0.08, c.rng.uniform(0.16, 0.26)
        c.line(x, foot, x, foot - tall, 0.032, 0x4E8A4B)
        for side in (-1, 1):
            elbow, at = x + 0.05 * side, foot - tall * c.rng.uniform(0.4, 0.6)
            c.line(x, at, elbow, at, 0.022, 0x4E8A4B)
            c.line(elbow, at, elbow, at - 0.08, 0.022, 0x4E8A4B)
    c.ground(horizon + 0.13 + 0.07 * c.wave(2, 0.5, 1.4), 0xDDA75A)
    c.ground(horizon + 0.27 + 0.05 * c.wave(2, 0.5, 1.4), 0xCF9146, 0.2)


def mountains(c: Canvas) -> None:
    c.gradient([(0.0, 0x5FA5DD), (1.0, 0xDCEBF5)], 0.0, 0.8, sky=1)
    for rgb, foot, count in ((0x8493AE, 0.70, 4), (0x5B6B88, 0.74, 3)):
        for x in (np.arange(count) + c.rng.uniform(0.2, 0.8, count)) / count:
            height, slope = c.rng.uniform(0.36, 0.54), c.rng.uniform(1.2, 1.7)
            depth = c.y - (foot - height) - slope * np.abs(c.x - x)
            mask = np.clip(depth * c.size / slope + 0.5, 0, 1)
            c.fill(rgb, mask * (c.y < foot + 0.08))
            c.fill(0x2E3A55, 0.25 * mask * (c.x > x) * (c.y < foot + 0.08))  # the side in shadow
            cap = c.y - (foot - height) < 0.12 + 0.025 * c.wave(2, 5.0, 9.0)
            c.fill(0xF7FAFF, mask * cap, 2.0)
    c.ground(c.rng.uniform(0.7, 0.75) + 0.03 * c.wave(2), 0x6C9A58, 0.3)


def snow(c: Canvas) -> None:
    horizon = c.rng.uniform(0.5, 0.6)
    c.gradient([(0.0, 0x8FAAC8), (1.0, 0xD5E2EC)], 0.0, 0.85, sky=1)
    for x in c.rng.uniform(0, 1, 5):  # firs under snow
        tall = c.rng.uniform(0.18, 0.3)
        c.triangle(x, horizon + 0.05 - tall, horizon + 0.05, 0.3 * tall, 0x4D6F73)
        c.triangle(x, horizon + 0.05 - tall, horizon + 0.05 - 0.5 * tall, 0.16 * tall, 0xF4F8FC)
    c.ground(horizon + 0.04 * c.wave(2, 0.6, 1.6), 0xDCE8F3)
    c.ground(horizon + 0.13 + 0.04 * c.wave(2, 0.6, 1.8), 0xFAFCFF, 0.08)
    sky = c.sky
    c.dots(int(c.rng.integers(40, 60)), 0xFFFFFF, 0.0, 0.95, 0.013, 1.0)
    c.sky = np.minimum(sky, c.sky + 0.35)  # flakes are seen at night too


def _block(c: Canvas, x: float, width: float, roof: float, foot: float, rgb: int) -> None:
    """One house of a city, with rows of windows that are lit at night."""
    c.box(x, roof, x + width, foot, rgb, 9.0)
    column, row = (c.x - x) / 0.055 % 1, (c.y - roof) / 0.075 % 1
    inside = (c.x > x + 0.005) & (c.x < x + width - 0.01) & (c.y > roof) & (c.y < foot)
    windows = inside & (abs(column - 0.5) < 0.26) & (abs(row - 0.6) < 0.23)
    lit = c.rng.random((32, 32))[
        np.clip((c.y - roof) / 0.075, 0, 31).astype(int), np.clip((c.x - x) / 0.055, 0, 31).astype(int)
    ]
    c.fill(0xFFE6A0, 0.75 * (windows & (lit > 0.35)), light=1.0)
    c.fill(0x33405A, 0.5 * (windows & (lit <= 0.35)))


def city(c: Canvas) -> None:
    c.gradient([(0.0, 0x8FB3D9), (1.0, 0xF3DCC8)], 0.0, 0.85, sky=1)
    street = c.rng.uniform(0.8, 0.85)
    for rgb, low, high in ((0x98A7BF, 0.45, 0.72), (0x55627D, 0.25, 0.52)):
        x = -0.05
        while x < 1:
            width, roof = c.rng.uniform(0.11, 0.2), street - c.rng.uniform(low, high)
            _block(c, x, width, roof, street, rgb)
            x += width + c.rng.uniform(0, 0.03)
    c.ground(street, 0x8D8F96, 0.25)


def street(c: Canvas) -> None:
    """Terraced houses of many colours along a road with a pavement, lamps and a dashed line."""
    c.gradient([(0.0, 0x86BFEA), (1.0, 0xE5F1F8)], 0.0, 0.7, sky=1)
    road, x = c.rng.uniform(0.66, 0.71), -0.08
    walls = [0xC95B4B, 0xE2B35A, 0x6E9DB8, 0xD98F7A, 0x8FA86B, 0xB98BB0, 0xE8DCC3]
    while x < 1:
        width, roof = c.rng.uniform(0.2, 0.27), road - c.rng.uniform(0.34, 0.42)
        c.triangle(x + width / 2, roof - 0.14, roof + 0.01, 0.56 * width, 0x7A4436)
        c.box(x, roof, x + width - 0.006, road, int(c.rng.choice(walls)))
        for wx in (0.14, 0.6):
            c.box(x + wx * width, roof + 0.05, x + (wx + 0.26) * width, roof + 0.15, 0xDCEBF2, light=1.0)
        door = x + width * c.rng.choice([0.18, 0.62])
        c.box(door, road - 0.15, door + 0.05, road, 0x5A3A28)
        x += width
    c.ground(road, 0xB9B6AE)
    c.ground(road + 0.055, 0x4A4D55, 0.15)
    middle = road + 0.055 + 0.5 * (0.945 - road)
    dashes = (np.abs(c.y - middle) < 0.014) & ((c.x + c.rng.random()) * 4 % 1 < 0.55)
    c.fill(0xF4F1E4, dashes, 3.0)
    for lamp in c.rng.uniform(0.02, 0.12, 2) + np.array([0.0, 0.85]):
        c.line(lamp, road + 0.05, lamp, road - 0.32, 0.016, 0x2C3138)
        c.disc(lamp, road - 0.34, 0.028, 0xFFF3C4, light=1.0)


def farm(c: Canvas) -> None:
    """A red barn with a silo behind ploughed rows, and a fence before them."""
    c.gradient([(0.0, 0x79C0F0), (1.0, 0xE9F6FB)], 0.0, 0.7, sky=1)
    horizon = c.rng.uniform(0.5, 0.56)
    c.clouds(int(c.rng.integers(0, 3)), 0xFFFFFF, 0.08, horizon - 0.15, 0.9)
    c.ground(horizon + 0.03 * c.wave(2, 0.6, 1.4), 0x9CCB63)
    x, foot = c.rng.choice([0.2, 0.8]) + c.rng.uniform(-0.05, 0.05), horizon + 0.1
    silo = x + c.rng.choice([-1, 1]) * 0.2
    c.disc(silo, foot - 0.36, 0.055, 0xB9C3CC)
    c.box(silo - 0.055, foot - 0.36, silo + 0.055, foot, 0xD3D9DE)
    c.triangle(x, foot - 0.42, foot - 0.22, 0.2, 0x5B3A35)
    c.triangle(x, foot - 0.37, foot - 0.21, 0.16, 0xB5382C)
    c.box(x - 0.16, foot - 0.225, x + 0.16, foot, 0xB5382C)
    c.box(x - 0.06, foot - 0.15, x + 0.06, foot, 0xF3EDE2)
    c.box(x - 0.05, foot - 0.14, x + 0.05, foot, 0x8C2A22)
    c.line(x - 0.05, foot - 0.14, x + 0.05, foot - 0.01, 0.012, 0xF3EDE2)
    c.line(x + 0.05, foot - 0.14, x - 0.05, foot - 0.01, 0.012, 0xF3EDE2)
    field = foot + 0.02
    c.ground(field, 0xC9A24F, 0.15)
    fan = (c.x - 0.5) / (c.y - field + 0.22) * 3.2  # furrows run to the horizon
    c.fill(0x6E9A3A, 0.8 * ((fan % 1) < 0.5) * (c.y > field + 0.01))
    for post in np.linspace(-0.02, 1.02, 7):
        c.box(post - 0.013, field - 0.07, post + 0.013, field + 0.05, 0xF5F0E6)
    for rail in (-0.045, 0.0):
        c.box(0, field + rail, 1, field + rail + 0.018, 0xF5F0E6)


def garden(c: Canvas) -> None:
    """A hedge behind a picket fence, flower beds in bloom, and a lawn."""
    c.gradient([(0.0, 0x8ACBF3), (1.0, 0xEAF7FC)], 0.0, 0.6, sky=1)
    top = c.rng.uniform(0.34, 0.42)
    bushes = (
        top + 0.035 * np.abs(np.sin(2 * np.pi * (2.5 * c.x[0] + c.rng.random()))) + 0.02 * c.wave(3, 3, 8)
    )
    c.ground(bushes, 0x2F7D3B)
    c.fill(0x4FA050, 0.6 * (c.noise(18) > 0.6) * (c.y > bushes))
    fence = top + 0.12
    pickets = (np.abs(c.x * 11 % 1 - 0.5) < 0.32) & (c.y > fence + 0.06 * np.abs(c.x * 11 % 1 - 0.5))
    c.fill(0xFBFBF6, pickets & (c.y < fence + 0.19), 2.0)
    c.box(0, fence + 0.05, 1, fence + 0.075, 0xF1F1EA)
    bed = fence + 0.14
    c.ground(bed + 0.012 * c.wave(3, 2, 5), 0x3F8A3A)
    for row in (0.02, 0.055, 0.09):
        for x in np.arange(0, 1.05, 0.075) + c.rng.uniform(-0.02, 0.02):
            petals = int(c.rng.choice([0xE8334A, 0xF7C92B, 0xEE6FB0, 0xFFFFFF, 0x9A55D6]))
            at = bed + row + c.rng.uniform(-0.01, 0.01)
            c.disc(x + (0.03 if row == 0.055 else 0), at, 0.024, petals)
            c.disc(x + (0.03 if row == 0.055 else 0), at, 0.008, 0xF6B93B)
    c.ground(bed + 0.13 + 0.01 * c.wave(2), 0x7CC653, 0.2)


def jungle(c: Canvas) -> None:
    """Dense leaves on all sides, hanging vines, shafts of light between trunks."""
    c.gradient([(0.0, 0x4E9A4F), (0.6, 0xC9E58F), (1.0, 0x5DA04C)], sky=0.35)
    for x in c.rng.uniform(0, 1, 5):
        c.box(x - 0.03, 0, x + 0.03, 0.85, 0x4B6B3A, 8.0)
    for _ in range(3):
        x, deep = c.rng.uniform(0.1, 0.9), c.rng.uniform(0.35, 0.55)
        vine = np.abs(c.x - x - 0.025 * np.sin(14 * c.y)) < 0.009
        c.fill(0x2E6B2B, vine * (c.y < deep))
    c.ground(c.rng.uniform(0.78, 0.84) + 0.03 * c.wave(3), 0x2B5A2A, 0.3)
    for rgb, reach in ((0x2F7D35, 0.30), (0x1D5C2C, 0.22), (0x3F9A3F, 0.16)):
        for _ in range(16):
            at, edge = c.rng.uniform(0, 1), c.rng.integers(0, 4)
            root = [(at, 0.0), (0.0, at), (1.0, at), (at, 1.0)][edge]
            inward = [(0.0, 1.0), (1.0, 0.35), (-1.0, 0.35), (0.0, -0.7)][edge]
            lean = c.rng.uniform(-0.6, 0.6)
            _leaf(c, root, (inward[0] + lean * inward[1], inward[1] + lean * abs(inward[0])), reach, rgb)


def _leaf(c: Canvas, root, towards, length: float, rgb: int) -> None:
    """A pointed leaf with a paler rib."""
    dx, dy = np.array(towards) / np.hypot(*towards)
    along = ((c.x - root[0]) * dx + (c.y - root[1]) * dy) / length
    across = ((c.x - root[0]) * -dy + (c.y - root[1]) * dx) / length
    half = 0.3 * np.sqrt(np.clip(along, 0, 1)) * np.clip(1 - along, 0, 1) * 1.6
    inside = (along > 0) & (along < 1)
    c.fill(rgb, c.soft((half - np.abs(across)) * length) * inside, 7.0)
    c.fill(0x8CCB6A, 0.5 * c.soft((0.08 * half - np.abs(across)) * length) * (inside & (half > 0.02)))


def sky(c: Canvas) -> None:
    c.gradient([(0.0, 0x3E97E8), (1.0, 0xA9DAFA)], sky=1)
    c.clouds(int(c.rng.integers(5, 8)), 0xFFFFFF, 0.1, 1.0, 0.95)

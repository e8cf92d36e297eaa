"""Procedural scenes with captions: the material on which the embedded micro CLIP is pretrained.

A scene is a plain background with one to four geometric objects. Captions come from a small grammar that covers
colour, shape, size, position, count, relation and absence. Everything is a function of the given random generator.
"""

import random
from dataclasses import dataclass
from math import cos, pi, sin

from PIL import Image, ImageDraw

SIDE = 64  # pixels

COLOURS = {
    "red": [(255, 0, 0), (220, 20, 60), (200, 20, 20)],
    "green": [(0, 255, 0), (0, 150, 0), (50, 205, 50)],
    "blue": [(0, 0, 255), (30, 80, 220), (0, 0, 160)],
    "yellow": [(255, 255, 0), (250, 220, 30)],
    "black": [(0, 0, 0), (20, 20, 20)],
    "white": [(255, 255, 255), (245, 245, 245)],
    "gray": [(128, 128, 128), (150, 150, 150), (105, 105, 105)],
    "brown": [(165, 42, 42), (139, 69, 19), (120, 60, 30)],
    "teal": [(0, 128, 128), (20, 140, 130)],
    "orange": [(255, 140, 0), (250, 110, 20)],
    "purple": [(128, 0, 128), (140, 40, 190)],
    "pink": [(255, 105, 180), (255, 160, 200)],
    "cyan": [(0, 255, 255), (90, 210, 250)],
}
SHAPES = ("circle", "rectangle", "triangle", "square", "ellipse", "star", "diamond", "pentagon", "hexagon", "cross",
          "ring", "crescent", "heart", "line", "arrow")
COMMON_SHAPES = ("circle", "rectangle", "triangle", "square")
NUMBERS = ("zero", "one", "two", "three", "four")
TRUE, FALSE = "true", "false"


@dataclass(frozen=True)
class Thing:
    """One drawn object: its names, its colour, and its box in pixels (centre and half sides)."""

    shape: str
    colour: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    w: float
    h: float

    @property
    def size(self) -> str:
        side = max(self.w, self.h)
        return "small" if side < 8 else "large" if side > 13 else "medium"

    @property
    def place(self) -> str:
        col = "left" if self.x < 24 else "right" if self.x > 40 else ""
        row = "top" if self.y < 24 else "bottom" if self.y > 40 else ""
        return f"{row} {col}".strip() or "center"


def _jitter(rgb, rng, amount=12):
    return tuple(min(255, max(0, c + rng.randint(-amount, amount))) for c in rgb)


def _thing(rng: random.Random, taken: list[Thing], background, shape=None, colour=None, limit=18.0) -> Thing | None:
    shape = shape or rng.choice(COMMON_SHAPES if rng.random() < 0.6 else SHAPES)
    for _ in range(20):
        name = colour or rng.choice(list(COLOURS))
        rgb = _jitter(rng.choice(COLOURS[name]), rng)
        if sum(abs(a - b) for a, b in zip(rgb, background)) < 120:
            continue
        w = rng.uniform(3.5, limit)
        h = rng.uniform(3.5, limit) if shape in ("rectangle", "ellipse", "triangle", "line", "arrow", "diamond") else w
        if shape == "triangle" and rng.random() < 0.7:
            h = w * 0.87
        x, y = rng.uniform(w, SIDE - w), rng.uniform(h, SIDE - h)
        if all(abs(x - t.x) > w + t.w or abs(y - t.y) > h + t.h for t in taken):
            return Thing(shape, name, rgb, x, y, w, h)
    return None


def make_scene(rng: random.Random) -> tuple[Image.Image, list[Thing]]:
    """Draws one 64 x 64 RGB scene; returns it with its objects (at least one)."""
    if rng.random() < 0.75:
        background = tuple(rng.randint(215, 255) for _ in range(3))
    else:
        background = tuple(rng.randint(0, 255) for _ in range(3))
    things: list[Thing] = []
    kind = rng.random()
    if kind < 0.55:
        wanted = 1
    elif kind < 0.9:
        wanted = rng.choice((2, 2, 3))
    else:  # a group of equal objects, to count
        wanted = rng.choice((2, 3, 4))
    shape = colour = None
    while not things or len(things) < wanted:
        thing = _thing(rng, things, background, shape, colour, limit=18.0 if wanted == 1 else 13.0)
        if thing is None:
            if things:
                break
            continue
        things.append(thing)
        if kind >= 0.9:
            shape, colour = thing.shape, thing.colour
    return _draw(things, background, scale=rng.choice((1, 2, 3))), things


def _star(n, x, y, w, h, inner, turn=-pi / 2):
    steps = 2 * n if inner < 1 else n
    return [(x + w * r * cos(turn + 2 * pi * i / steps), y + h * r * sin(turn + 2 * pi * i / steps))
            for i in range(steps) for r in ((inner if steps > n and i % 2 else 1.0),)]


def _draw(things, background, scale) -> Image.Image:
    image = Image.new("RGB", (SIDE * scale, SIDE * scale), background)
    pen = ImageDraw.Draw(image)
    for t in things:
        x, y, w, h = (v * scale for v in (t.x, t.y, t.w, t.h))
        box = (x - w, y - h, x + w, y + h)
        if t.shape in ("circle", "ellipse"):
            pen.ellipse(box, fill=t.rgb)
        elif t.shape in ("rectangle", "square"):
            pen.rectangle(box, fill=t.rgb)
        elif t.shape == "triangle":
            pen.polygon([(x, y - h), (x - w, y + h), (x + w, y + h)], fill=t.rgb)
        elif t.shape == "star":
            pen.polygon(_star(5, x, y, w, h, 0.42), fill=t.rgb)
        elif t.shape == "diamond":
            pen.polygon([(x, y - h), (x + w, y), (x, y + h), (x - w, y)], fill=t.rgb)
        elif t.shape == "pentagon":
            pen.polygon(_star(5, x, y, w, h, 1), fill=t.rgb)
        elif t.shape == "hexagon":
            pen.polygon(_star(6, x, y, w, h, 1), fill=t.rgb)
        elif t.shape == "cross":
            pen.rectangle((x - w, y - h / 3, x + w, y + h / 3), fill=t.rgb)
            pen.rectangle((x - w / 3, y - h, x + w / 3, y + h), fill=t.rgb)
        elif t.shape == "ring":
            pen.ellipse(box, outline=t.rgb, width=max(2, int(w * 0.35)))
        elif t.shape == "crescent":
            pen.ellipse(box, fill=t.rgb)
            pen.ellipse((x - w * 0.4, y - h, x + w * 1.6, y + h), fill=background)
        elif t.shape == "heart":
            pen.ellipse((x - w, y - h, x, y), fill=t.rgb)
            pen.ellipse((x, y - h, x + w, y), fill=t.rgb)
            pen.polygon([(x - w * 0.95, y - h * 0.35), (x + w * 0.95, y - h * 0.35), (x, y + h)], fill=t.rgb)
        elif t.shape == "line":
            pen.line((x - w, y - h, x + w, y + h), fill=t.rgb, width=2 * scale)
        elif t.shape == "arrow":
            pen.rectangle((x - w, y - h / 5, x + w * 0.3, y + h / 5), fill=t.rgb)
            pen.polygon([(x + w * 0.1, y - h), (x + w, y), (x + w * 0.1, y + h)], fill=t.rgb)
    return image if scale == 1 else image.resize((SIDE, SIDE), Image.Resampling.BOX)


def _noun(t: Thing, rng: random.Random, detail=0.5) -> str:
    size = f"{t.size} " if rng.random() < detail else ""
    return f"{size}{t.colour} {t.shape}"


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeio" else "a ") + noun


def describe(things: list[Thing], rng: random.Random) -> str:
    """One true caption that names every object: the text of the contrastive loss."""
    kinds = {(t.shape, t.colour) for t in things}
    if len(things) > 1 and len(kinds) == 1:
        t = things[0]
        plural = "es" if t.shape.endswith("s") else "s"
        return f"{NUMBERS[len(things)]} {t.colour} {t.shape}{plural}"
    nouns = [article(_noun(t, rng, 0.4)) for t in things]
    if len(things) == 1:
        t = things[0]
        place = f"at the {t.place}" if rng.random() < 0.5 else ""
        lead = rng.choice(("", "", "there is ", "the image contains ", "a picture of ", "this is "))
        return f"{lead}{nouns[0]} {place}".strip()
    if len(things) == 2 and rng.random() < 0.6:
        a, b = things
        if abs(a.x - b.x) > abs(a.y - b.y):
            relation = "left of" if a.x < b.x else "right of"
        else:
            relation = "above" if a.y < b.y else "below"
        return f"{nouns[0]} {relation} {nouns[1]}"
    return ", ".join(nouns[:-1]) + f" and {nouns[-1]}"


def state(things: list[Thing], rng: random.Random, truth: bool) -> str:
    """A short statement about the scene that is true or false as asked: presence, absence, attribute or count."""
    shapes, colours = {t.shape for t in things}, {t.colour for t in things}
    present = rng.random() < 0.5  # does the statement speak of something that is there?
    what = rng.random()
    if what < 0.35:
        pool = shapes if present else set(COMMON_SHAPES if rng.random() < 0.7 else SHAPES) - shapes
        noun = rng.choice(sorted(pool or set(SHAPES) - shapes))
    elif what < 0.75:
        pool = colours if present else set(COLOURS) - colours
        noun = rng.choice(sorted(pool)) + rng.choice((" shape", " shape", " object"))
    else:
        pairs = {(t.colour, t.shape) for t in things}
        if present:
            colour, shape = rng.choice(sorted(pairs))
        else:
            t = rng.choice(things)
            other = [(c, t.shape) for c in COLOURS] + [(t.colour, s) for s in SHAPES]
            colour, shape = rng.choice([p for p in other if p not in pairs])
        noun = f"{colour} {shape}"
    if present == truth:
        form = rng.choice(("there is {a}", "{a} is present", "the image contains {a}", "{a} is in the image", "{a}"))
    else:
        form = rng.choice(("there is no {n}", "no {n} is present", "the image does not contain {a}", "there is not {a}",
                           "no {n} is in the image", "{a} is not present", "no {n}"))
    return form.format(a=article(noun), n=noun)


def attribute(things: list[Thing], rng: random.Random) -> str:
    """A true sentence that ends in the attribute it speaks of: for the captioning loss."""
    t = rng.choice(things)
    sentences = []
    if [o.shape for o in things].count(t.shape) == 1:
        sentences += [f"the color of the {t.shape} is {t.colour}", f"the {t.shape} is {t.colour}"]
    if [o.colour for o in things].count(t.colour) == 1:
        sentences += [f"the {t.colour} shape is {article(t.shape)}", f"the {t.colour} object is {article(t.shape)}"]
    if len(things) == 1:
        sentences += [f"the shape is {article(t.shape)}", f"the color is {t.colour}", f"the shape is {t.size}",
                      f"the shape is at the {t.place}"]
    sentences += [f"the image contains {NUMBERS[len(things)]} shapes" if len(things) > 1 else
                  "the image contains one shape"]
    return rng.choice(sentences)


def verdict(things: list[Thing], rng: random.Random) -> str:
    """A statement followed by whether it matches the picture: image-text matching, put as text."""
    truth = rng.random() < 0.5
    return f"{state(things, rng, truth)} : {TRUE if truth else FALSE}"

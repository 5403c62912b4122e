"""The picture that a link to the site shows elsewhere: masks that close while a student learns.
Writes nbs/images/card.png."""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
# what social cards ask for; drawn larger, then scaled down
SIZE = (1200, 630)
FINE = 2
PAPER = '#fbfaf7'
INK = '#14213a'
SOFT = '#5b6577'
SHUT = (239, 238, 234)
TOWERS = dict(image=((31, 78, 158), 8), text=((217, 130, 43), 6))  # colour and masks of each


def masks(
    rows: int,  # Masks
    steps: int,  # Columns: time goes to the right
    stay: int,  # Masks that are open at the end
    rng: random.Random,  # Where chance comes from
) -> list:  # `rows` lists of `steps` values, 0 closed, 1 open
    """Logits that drift apart, seen through the stretched sigmoid of a hard-concrete mask: a
    drawing, not a run"""
    stays = set(rng.sample(range(rows), stay))
    late = [rng.uniform(0.06, 0.5) for _ in range(rows)]
    rate = [rng.uniform(2, 4) if r in stays else -rng.uniform(7, 15) for r in range(rows)]

    def value(r, x):
        logit = 2.4 + rng.gauss(0, 0.6 * (1 - x)) + rate[r] * max(0, x - late[r])
        return min(1, max(0, 1.2 / (1 + math.exp(-logit)) - 0.1))

    return [[value(r, t / (steps - 1)) for t in range(steps)] for r in range(rows)]


def card(seed: int = 7) -> Image.Image:
    "The whole picture"
    im = Image.new('RGB', [FINE * n for n in SIZE], PAPER)
    rng = random.Random(seed)
    d = ImageDraw.Draw(im)

    def text(x, y, s, size, fill, bold=0):
        d.text(
            (FINE * x, FINE * y),
            s,
            fill=fill,
            font=ImageFont.load_default(FINE * size),
            stroke_width=FINE * bold,
            stroke_fill=fill,
        )

    text(78, 56, 'tinyclip', 104, INK, 1)
    text(82, 190, 'Small CLIPs out of large ones: affinity mimicking and', 30, SOFT)
    text(82, 228, 'weight inheritance, in notebooks that run on a laptop', 30, SOFT)
    y, pitch, gap = 292, 20, 4
    for colour, rows in TOWERS.values():
        for row in masks(rows, 52, rows // 3, rng):
            for t, v in enumerate(row):
                fill = tuple(round(a + (b - a) * v) for a, b in zip(SHUT, colour))
                d.rounded_rectangle(
                    [
                        FINE * n
                        for n in (82 + t * pitch, y, 82 + (t + 1) * pitch - gap, y + pitch - gap)
                    ],
                    radius=FINE * 3,
                    fill=fill,
                )
            y += pitch
        y += pitch / 2
    return im.resize(SIZE, Image.Resampling.LANCZOS)


if __name__ == '__main__':
    to = ROOT / 'nbs' / 'images' / 'card.png'
    to.parent.mkdir(exist_ok=True)
    card().save(to, optimize=True)
    print(f'{to.relative_to(ROOT)}: {to.stat().st_size / 1e3:.0f} kB')

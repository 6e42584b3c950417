"""Draw simple street scenes and their label maps as a function of (seed, split, index) alone.

The areas of the eight classes span three orders of magnitude: a road to the horizon, buildings with
windows, trees and verges, cars, poles, pedestrians, and a round red sign in every tenth scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Colour = Sequence[float] | NDArray[np.float64]  # red, green, blue, 0 to 255
Point = tuple[float, float]

CLASSES = ("road", "building", "sky", "vegetation", "car", "pole", "person", "sign")
ROAD, BUILDING, SKY, VEGETATION, CAR, POLE, PERSON, SIGN = range(8)
BONNET = 255  # the bonnet of the camera's car is void
# Rare objects are in scenes of fixed numbers, so that small sets have every class too.
SIGN_EVERY, PERSON_EVERY, BONNET_EVERY = 10, 2, 3

# strength of a class's texture, and its grain in pixels of a scene of height 128
_TEXTURE = {ROAD: (9, 1), BUILDING: (9, 3), SKY: (12, 24), VEGETATION: (34, 2), CAR: (5, 2)}
_FACADES = ((168, 142, 118), (150, 98, 82), (186, 178, 164), (128, 126, 132), (198, 172, 120))
_PAINTS = ((44, 54, 84), (200, 202, 206), (110, 112, 118), (122, 34, 38), (36, 38, 40))
_CLOTHES = ((30, 60, 130), (190, 140, 40), (90, 40, 100), (40, 44, 50), (200, 90, 120))


def draw_scene(
    seed: int, split: int, index: int, size: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw a scene.

    Args:
        seed: any integer.
        split: number of the split.
        index: number of the scene in its split.
        size: (height, width) in pixels.

    Returns:
        (image, label map): uint8 [H, W, 3] in RGB, and uint8 [H, W].
    """
    key = np.array([seed & (2**64 - 1), (split << 32) | index], np.uint64)
    random = np.random.Generator(np.random.Philox(key=key))
    scene = _Scene.at_random(random, size)
    scene.draw_background()
    scene.draw_roadside()
    scene.draw_traffic(with_person=index % PERSON_EVERY == 1)
    if index % SIGN_EVERY == 4:
        scene.draw_sign()
    if index % BONNET_EVERY == 2:
        scene.draw_bonnet()
    return scene.finished()


@dataclass
class _Scene:
    """The street's geometry in pixels. All slopes are of lines through the vanishing point."""

    random: np.random.Generator
    canvas: Canvas
    height: int
    width: int
    horizon: float
    centre: float  # x of the vanishing point
    kerb: tuple[float, float]  # slope of the road's edge, left and right
    wall: tuple[float, float]  # slope of the buildings' foot
    roof: tuple[float, float]  # slope of the roofs' line

    @classmethod
    def at_random(cls, random: np.random.Generator, size: tuple[int, int]) -> _Scene:
        """Return a random street for an image of `size` (height, width) in pixels."""
        height, width = size
        unit = height / width

        def pair(low: float, high: float) -> tuple[float, float]:
            left, right = random.uniform(low, high, 2) * unit
            return float(left), float(right)

        horizon = height * random.uniform(0.39, 0.47)
        centre = width * random.uniform(0.4, 0.6)
        slopes = pair(0.46, 0.62), pair(0.1, 0.26), pair(0.4, 0.95)
        return cls(random, Canvas(size), height, width, horizon, centre, *slopes)

    def draw_background(self) -> None:
        self._draw_sky()
        self._draw_ground()
        for side in (0, 1):
            self._draw_buildings(side)

    def draw_roadside(self) -> None:
        for _ in range(self.random.integers(1, 4)):
            self._draw_tree(*self._beside_road(0.1, 0.4))
        for _ in range(self.random.integers(1, 3)):
            self._draw_pole(*self._beside_road(0.14, 0.34))

    def draw_traffic(self, with_person: bool) -> None:
        for depth in sorted(self.random.uniform(0.1, 0.4, self.random.integers(1, 4))):
            self._draw_car(depth * self.height)
        if with_person:
            self._draw_person(*self._on_foot())

    def draw_sign(self) -> None:
        """Draw a traffic sign on its pole, beside the road."""
        x, foot = self._beside_road(0.14, 0.22)
        radius = self.height * self.random.uniform(0.045, 0.058)
        top = self.horizon - self.height * self.random.uniform(0.0, 0.1)
        thick = self.height * 0.008
        self.canvas.box(x - thick, top, x + thick, foot, POLE, (120, 122, 126))
        self.canvas.oval(x, top, radius, radius, SIGN, (214, 22, 30))
        bar = radius * 0.6, radius * 0.18
        self.canvas.box(x - bar[0], top - bar[1], x + bar[0], top + bar[1], SIGN, (246, 244, 240))

    def draw_bonnet(self) -> None:
        lift = self.height * self.random.uniform(0.05, 0.09)
        middle = self.width / 2, self.height + lift * 0.2
        self.canvas.oval(*middle, self.width * 0.42, lift, BONNET, (34, 36, 42))

    def finished(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return image and label map as arrays, with texture, light and camera noise."""
        label = np.array(self.canvas.label)
        blurred = self.canvas.image.filter(ImageFilter.GaussianBlur(self.height / 256))
        image = np.array(blurred).astype(np.float64)
        for kind, (strength, grain) in _TEXTURE.items():
            noise = self._noise(grain) * strength
            image += np.where(label == kind, noise, 0.0)[..., None]
        light = self.random.uniform(0.75, 1.15) * self.random.uniform(0.94, 1.06, 3)
        image = image * light + self.random.normal(0.0, 5.0, image.shape)
        return np.clip(image, 0, 255).astype(np.uint8), label

    def _draw_sky(self) -> None:
        top, low = np.array([96, 142, 206]), np.array([206, 220, 234])
        grey = self.random.uniform(0, 1) * np.array([40, 20, -30])
        for y in range(int(self.horizon) + 1):
            share = y / self.horizon
            self.canvas.box(0, y, self.width, y, SKY, top + (low - top) * share + grey)

    def _draw_ground(self) -> None:
        tone = self.random.uniform(84, 112)
        verge = 70 + self.random.uniform(-15, 15), 112 + self.random.uniform(-20, 20), 52
        ground = [self._edge(0, 0.0), (self.centre, self.horizon), self._edge(1, 0.0)]
        bottom = [(float(self.width), float(self.height)), (0.0, float(self.height))]
        self.canvas.polygon([*ground, *bottom], VEGETATION, verge)
        road = [self._edge(0, self.kerb[0]), (self.centre, self.horizon - 1)]
        self.canvas.polygon(
            [*road, self._edge(1, self.kerb[1]), *bottom], ROAD, (tone, tone, tone + 5)
        )
        self._draw_lane_marks()

    def _draw_lane_marks(self) -> None:
        depth, lean = 0.12, self.random.uniform(-0.3, 0.3)
        while depth < 0.6:
            ends = [depth * self.height, depth * 1.25 * self.height]
            left, right = ([(self.centre + d * (lean + side), self.horizon + d) for d in ends]
                           for side in (-0.03, 0.03))  # fmt: skip
            self.canvas.polygon([*left, *reversed(right)], ROAD, (212, 210, 202))
            depth *= 1.6

    def _draw_buildings(self, side: int) -> None:
        far = self.random.uniform(0.04, 0.14) * self.width
        near = float(self.centre if side == 0 else self.width - self.centre)
        cuts = np.linspace(far, near, self.random.integers(3, 5))
        for close, away in zip(cuts[1:], cuts[:-1], strict=True):
            rise = self.roof[side] * self.random.uniform(0.8, 1.25)
            self._draw_facade(side, float(away), float(close) + 1, rise)

    def _draw_facade(self, side: int, away: float, close: float, rise: float) -> None:
        colour = np.array(_FACADES[self.random.integers(len(_FACADES))]) * self.random.uniform(
            0.8, 1.1
        )
        lift = self.height * 0.07

        def at(share: float, storey: float) -> Point:
            distance = away + (close - away) * share
            foot = self.horizon + self.wall[side] * distance
            roof = self.horizon - rise * distance - lift
            return self._x(side, distance), roof + (foot - roof) * storey

        self.canvas.polygon([at(0, 0), at(1, 0), at(1, 1), at(0, 1)], BUILDING, colour)
        pane = self.random.choice([0.35, 0.5, 1.45])  # dark glass, or lit
        columns, storeys = self.random.integers(2, 5), self.random.integers(3, 6)
        for column in np.arange(columns) / columns:
            for storey in np.arange(storeys) / storeys:
                x0, x1 = column + 0.25 / columns, column + 0.75 / columns
                y0, y1 = storey + 0.25 / storeys, storey + 0.7 / storeys
                window = [at(x0, y0), at(x1, y0), at(x1, y1), at(x0, y1)]
                self.canvas.polygon(window, BUILDING, colour * pane)

    def _draw_tree(self, x: float, foot: float) -> None:
        depth = foot - self.horizon
        crown = depth * self.random.uniform(0.35, 0.6)
        top = foot - depth * self.random.uniform(1.3, 1.9)
        trunk = max(1.0, depth * 0.05)
        self.canvas.box(x - trunk, top, x + trunk, foot, VEGETATION, (84, 66, 46))
        for _ in range(9):
            dx, dy = self.random.normal(0, crown * 0.5, 2)
            green = self.random.uniform(70, 120)
            radius = crown * self.random.uniform(0.35, 0.6)
            self.canvas.oval(
                x + dx,
                top + dy * 0.8,
                radius,
                radius,
                VEGETATION,
                (green * 0.6, green, green * 0.4),
            )

    def _draw_pole(self, x: float, foot: float) -> None:
        depth = foot - self.horizon
        thick = max(self.height * 0.008, depth * 0.035)
        top = max(self.height * 0.06, foot - depth * self.random.uniform(2.2, 3.0))
        grey = self.random.uniform(50, 100)
        self.canvas.box(x - thick, top, x + thick, foot, POLE, (grey, grey, grey + 4))
        arm = (self.centre - x) * 0.12
        self.canvas.box(
            min(x, x + arm), top, max(x, x + arm), top + thick, POLE, (grey, grey, grey)
        )

    def _draw_car(self, depth: float) -> None:
        paint = np.array(_PAINTS[self.random.integers(len(_PAINTS))]) * self.random.uniform(
            0.8, 1.2
        )
        x = self.centre + depth * self.random.uniform(-0.9, 0.9)
        foot, half, tall = self.horizon + depth, depth * 0.5, depth * 0.62
        for wheel in (-0.75, 0.75):
            self.canvas.box(
                x + half * (wheel - 0.18), foot - tall * 0.3, x + half * (wheel + 0.18), foot, CAR,
                (18, 18, 20),
            )  # fmt: skip
        belt, roof = foot - tall * 0.55, foot - tall
        cabin = [(x - half * 0.85, belt), (x - half * 0.6, roof), (x + half * 0.6, roof)]
        self.canvas.polygon([*cabin, (x + half * 0.85, belt)], CAR, paint * 0.8)
        glass = [(x - half * 0.68, belt), (x - half * 0.5, roof + tall * 0.08)]
        glass += [(x + half * 0.5, roof + tall * 0.08), (x + half * 0.68, belt)]
        self.canvas.polygon(glass, CAR, (58, 70, 80))
        self.canvas.box(x - half, belt, x + half, foot - tall * 0.12, CAR, paint)
        for lamp in (-0.85, 0.85):
            self.canvas.oval(
                x + half * lamp, belt + tall * 0.14, half * 0.1, half * 0.1, CAR, (200, 40, 36)
            )

    def _draw_person(self, x: float, foot: float) -> None:
        tall = (foot - self.horizon) * self.random.uniform(0.85, 1.05)
        half = tall * 0.15
        cloth = _CLOTHES[self.random.integers(len(_CLOTHES))]
        hip, neck = foot - tall * 0.45, foot - tall * 0.82
        for leg in (-0.55, 0.55):
            self.canvas.box(
                x + half * (leg - 0.4), hip, x + half * (leg + 0.4), foot, PERSON, (36, 38, 58)
            )
        self.canvas.polygon(
            [(x - half, neck), (x + half, neck), (x + half * 0.8, hip), (x - half * 0.8, hip)],
            PERSON,
            cloth,
        )
        self.canvas.oval(x, neck - tall * 0.09, tall * 0.08, tall * 0.09, PERSON, (216, 168, 140))

    def _on_foot(self) -> Point:
        if self.random.random() < 0.5:
            return self._beside_road(0.16, 0.3)
        depth = self.height * self.random.uniform(0.18, 0.34)  # crosses the road
        return self.centre + depth * self.random.uniform(-1.2, 1.2), self.horizon + depth

    def _beside_road(self, near: float, far: float) -> Point:
        """Return a random place on the verge.

        Its depth below the horizon is between `near` and `far`, as shares of the height.
        """
        side = int(self.random.integers(2))
        depth = self.height * self.random.uniform(near, far)
        inner = depth / self.kerb[side]
        outer = min(depth / self.wall[side], self.width * 0.5)
        distance = inner * 1.04 + max(0.0, outer - inner) * self.random.uniform(0.0, 0.35)
        room = (self.centre if side == 0 else self.width - self.centre) - self.height * 0.07
        if distance > room:  # outside the image: move it towards the horizon
            depth, distance = depth * room / distance, room
        return self._x(side, distance), self.horizon + depth

    def _x(self, side: int, distance: float) -> float:
        return self.centre - distance if side == 0 else self.centre + distance

    def _edge(self, side: int, slope: float) -> Point:
        """Return where the line of `slope` from the vanishing point leaves the image."""
        distance = self.centre if side == 0 else self.width - self.centre
        return self._x(side, distance), self.horizon + slope * distance

    def _noise(self, grain: float) -> NDArray[np.float64]:
        """Return smooth noise of about unit variance, in blobs of `grain` pixels."""
        step = max(1.0, grain * self.height / 128)
        shape = int(self.height / step) + 2, int(self.width / step) + 2
        coarse = Image.fromarray(self.random.normal(0.0, 1.0, shape).astype(np.float32))
        fine = coarse.resize((self.width, self.height), Image.Resampling.BICUBIC)
        return np.array(fine, np.float64)


class Canvas:
    """An image and its label map, on which every shape is drawn together."""

    def __init__(self, size: tuple[int, int]) -> None:
        height, width = size
        self.image = Image.new("RGB", (width, height))
        self.label = Image.new("L", (width, height))
        self._brush = ImageDraw.Draw(self.image)
        self._pen = ImageDraw.Draw(self.label)

    def polygon(self, points: Sequence[Point], kind: int, colour: Colour) -> None:
        """Fill a polygon of class `kind`."""
        self._brush.polygon(points, fill=_rgb(colour))
        self._pen.polygon(points, fill=kind)

    def box(self, x0: float, y0: float, x1: float, y1: float, kind: int, colour: Colour) -> None:
        """Fill the upright rectangle between two corners."""
        self._brush.rectangle((x0, y0, x1, y1), fill=_rgb(colour))
        self._pen.rectangle((x0, y0, x1, y1), fill=kind)

    def oval(self, x: float, y: float, rx: float, ry: float, kind: int, colour: Colour) -> None:
        """Fill an ellipse around (x, y) with the radii `rx` and `ry`."""
        corners = (x - rx, y - ry, x + rx, y + ry)
        self._brush.ellipse(corners, fill=_rgb(colour))
        self._pen.ellipse(corners, fill=kind)


def _rgb(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (int(min(255, max(0, value))) for value in colour)
    return red, green, blue

# SPDX-License-Identifier: Apache-2.0
"""Captioned scenes drawn by a program: a dataset whose captions can be checked in the pixels.

A scene is one to three flat shapes on a plain background. Everything about it follows from
``(seed, index)``, so a dataset needs no storage and a run can resume anywhere. No two splits share
a scene: a scene's content (all but its positions) is hashed, and the hash says where it belongs.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from t2p_fast.data.captions import Claims, ObjectClaim, RelationClaim, write_caption

Split = Literal["train", "validation", "test"]

OBJECT_COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (245, 220, 50),
    "purple": (150, 60, 190),
    "orange": (245, 135, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
BACKGROUND_COLORS: dict[str, tuple[int, int, int]] = {
    "gray": (130, 130, 130),
    "pink": (245, 180, 200),
    "cyan": (130, 220, 230),
    "brown": (120, 85, 60),
}
# Radii in pixels of a 64-pixel picture; a shape fits in the square of twice its radius.
RADII: dict[str, int] = {"small": 8, "medium": 12, "big": 16}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
TEXTURES = ("solid", "striped", "dotted", "checkered")
# The second tone of a texture is the same colour, this much darker.
TEXTURE_SHADE = 0.65

_SUPERSAMPLE = 8
# Of 16 hashes, those below the first bound are test, those below the second validation. There are
# few scenes of one object, so more of them are held out: a handful would say little.
_SPLIT_BOUNDS = {1: (3, 4)}
_DEFAULT_SPLIT_BOUNDS = (1, 2)
_SPLIT_SEEDS: dict[Split, int] = {"train": 0, "test": 1, "validation": 2}


@dataclass(frozen=True)
class SceneObject:
    """One shape; ``x`` and ``y`` are its centre in pixels of a 64-pixel picture."""

    shape: str
    color: str
    size: str
    texture: str
    x: int
    y: int

    @property
    def radius(self) -> int:
        return RADII[self.size]


@dataclass(frozen=True)
class Scene:
    """Objects in drawing order, a background, and relations between objects by position."""

    objects: tuple[SceneObject, ...]
    background: str
    relations: tuple[RelationClaim, ...]


@dataclass(frozen=True)
class Vocabulary:
    """What scenes may contain, and where.

    Attributes:
        shapes, colors, sizes, textures, relations, backgrounds: words drawn uniformly.
        object_counts: number of objects, drawn uniformly (repeat an entry to weight it).
        lattice: object centres lie on multiples of this many pixels (of a 64-pixel picture).
    """

    shapes: tuple[str, ...] = SHAPES
    colors: tuple[str, ...] = tuple(OBJECT_COLORS)
    sizes: tuple[str, ...] = tuple(RADII)
    textures: tuple[str, ...] = TEXTURES
    relations: tuple[str, ...] = ("above", "below", "left of", "right of", "inside")
    backgrounds: tuple[str, ...] = tuple(BACKGROUND_COLORS)
    object_counts: tuple[int, ...] = (1, 2, 3)
    lattice: int = 1


VOCABULARIES: dict[str, Vocabulary] = {
    "full": Vocabulary(),
    # Objects on the grid of the tokens: few enough distinct patches for a small tokenizer.
    "simple": Vocabulary(
        shapes=("circle", "square", "triangle", "star", "ring", "cross"),
        sizes=("small", "big"),
        textures=("solid",),
        relations=("above", "below", "left of", "right of"),
        object_counts=(1, 2, 2),
        lattice=8,
    ),
    # What a small generator learns from scratch on two cores: the embedded weights.
    "basic": Vocabulary(
        shapes=("circle", "square", "triangle", "star"),
        colors=("red", "green", "blue", "yellow"),
        sizes=("small", "big"),
        textures=("solid",),
        relations=("above", "below", "left of", "right of"),
        backgrounds=("gray", "cyan"),
        object_counts=(1, 2),
        lattice=16,
    ),
}


@dataclass(frozen=True)
class SceneSample:
    """A picture, its caption, the scene behind it, and what the caption claims of it."""

    image: NDArray[np.uint8]  # [size, size, 3]
    caption: str
    scene: Scene
    claims: Claims


class SceneDataset:
    """Scenes by index: ``dataset[i]`` is a :class:`SceneSample`, the same on every machine.

    Args:
        vocabulary: a name in ``VOCABULARIES`` or a :class:`Vocabulary`.
        split: ``"train"``, ``"validation"`` or ``"test"``; no content occurs in two of them.
        size: side of the square pictures in pixels, a multiple of 16.
        seed: another seed is another stream of scenes.
        length: what ``len()`` says; indices beyond it are refused.
    """

    def __init__(
        self,
        vocabulary: str | Vocabulary = "basic",
        *,
        split: Split = "train",
        size: int = 64,
        seed: int = 0,
        length: int = 1 << 31,
    ) -> None:
        if isinstance(vocabulary, str):
            if vocabulary not in VOCABULARIES:
                raise ValueError(
                    f"SceneDataset: vocabulary is {vocabulary!r}, expected one of "
                    f"{sorted(VOCABULARIES)}"
                )
            vocabulary = VOCABULARIES[vocabulary]
        if split not in _SPLIT_SEEDS:
            raise ValueError(
                f"SceneDataset: split is {split!r}, expected one of {', '.join(_SPLIT_SEEDS)}"
            )
        if size < 16 or size % 16:
            raise ValueError(f"SceneDataset: size is {size}, expected a multiple of 16")
        self.vocabulary = vocabulary
        self.split = split
        self.size = size
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[SceneSample]:
        return (self[i] for i in range(self.length))

    def __getitem__(self, index: int) -> SceneSample:
        if not 0 <= index < self.length:
            raise IndexError(f"SceneDataset: index is {index}, expected 0 <= index < {self.length}")
        rng = random.Random((self.seed << 40) ^ (index << 2) ^ _SPLIT_SEEDS[self.split])
        # Drawn before the split is looked at: single objects are as frequent in every split.
        count = rng.choice(self.vocabulary.object_counts)
        while True:
            scene = sample_scene(self.vocabulary, rng, count)
            if split_of(scene) == self.split:
                break
        claims = _draw_claims(scene, self.vocabulary, rng)
        return SceneSample(render(scene, self.size), write_caption(claims, rng), scene, claims)


def sample_scene(vocabulary: Vocabulary, rng: random.Random, count: int) -> Scene:
    """Draws a scene of ``count`` objects that do not touch and whose relations hold clearly."""
    background = rng.choice(vocabulary.backgrounds)
    while True:
        kinds: list[tuple[str, str, str, str]] = []
        while len(kinds) < count:
            kind = (
                rng.choice(vocabulary.shapes),
                rng.choice(vocabulary.colors),
                rng.choice(vocabulary.sizes),
                rng.choice(vocabulary.textures),
            )
            # Two objects of one shape and colour could not be told apart by a caption.
            if all(kind[:2] != other[:2] for other in kinds):
                kinds.append(kind)
        relations = tuple(
            RelationClaim(i, rng.choice(vocabulary.relations), i + 1) for i in range(count - 1)
        )
        for _ in range(30):
            objects = tuple(
                SceneObject(*kind, *_draw_centre(RADII[kind[2]], vocabulary.lattice, rng))
                for kind in kinds
            )
            if _is_valid(objects, relations):
                return Scene(objects, background, relations)


def relation_holds(relation: str, a: SceneObject, b: SceneObject) -> bool:
    """Whether ``a`` stands in ``relation`` to ``b``: beside it by more than it is off the axis."""
    return relation_holds_at(relation, (a.x, a.y, a.radius), (b.x, b.y, b.radius))


def relation_holds_at(
    relation: str, a: tuple[float, float, float], b: tuple[float, float, float]
) -> bool:
    """`relation_holds` for bare ``(x, y, radius)``."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if relation == "inside":
        return a[2] < b[2] and max(abs(dx), abs(dy)) <= b[2] - a[2]
    along, across = {
        "above": (-dy, abs(dx)),
        "below": (dy, abs(dx)),
        "left of": (-dx, abs(dy)),
        "right of": (dx, abs(dy)),
    }[relation]
    return along > across


def render(scene: Scene, size: int = 64) -> NDArray[np.uint8]:
    """Draws a scene as a ``[size, size, 3]`` picture with anti-aliased edges."""
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUND_COLORS[scene.background]
    # Large objects first, so that what is inside another stays visible.
    for item in sorted(scene.objects, key=lambda o: -o.radius):
        radius = item.radius * size // 64
        coverage = shape_mask(item.shape, radius)[..., None]
        color = np.array(OBJECT_COLORS[item.color], np.float32)
        if item.texture != "solid":
            shade = texture_mask(item.texture, radius)[..., None]
            color = color + shade * (np.array(second_tone(item.color), np.float32) - color)
        top, left = item.y * size // 64 - radius, item.x * size // 64 - radius
        window = image[top : top + 2 * radius, left : left + 2 * radius]
        window += coverage * (color - window)
    return np.rint(image).astype(np.uint8)


def second_tone(color: str) -> tuple[int, int, int]:
    """The other tone of a textured object of this colour."""
    # Darker black is black, and a dark white would be the gray of a background.
    if color in ("black", "white"):
        return (75, 75, 75) if color == "black" else (195, 195, 195)
    r, g, b = OBJECT_COLORS[color]
    return (round(r * TEXTURE_SHADE), round(g * TEXTURE_SHADE), round(b * TEXTURE_SHADE))


@lru_cache(maxsize=256)
def shape_mask(shape: str, radius: int) -> NDArray[np.float32]:
    """Share of each pixel that a shape covers, ``[2 * radius, 2 * radius]`` in [0, 1]."""
    fine = 2 * radius * _SUPERSAMPLE
    grid = (np.arange(fine) + 0.5) / fine * 2 - 1
    inside = _contains(shape, grid[None, :], grid[:, None])
    blocks = inside.reshape(2 * radius, _SUPERSAMPLE, 2 * radius, _SUPERSAMPLE)
    return np.asarray(blocks.mean((1, 3)), np.float32)


@lru_cache(maxsize=64)
def texture_mask(texture: str, radius: int) -> NDArray[np.float32]:
    """Where a texture shows its second tone, ``[2 * radius, 2 * radius]`` of 0 and 1."""
    if texture == "solid":
        return np.zeros((2 * radius, 2 * radius), np.float32)
    grid = np.arange(2 * radius)
    period = max(4, radius // 2)
    column, row = grid[None, :] % period, grid[:, None] % period
    if texture == "striped":
        pattern = np.broadcast_to(row < period / 2, (2 * radius, 2 * radius))
    elif texture == "checkered":
        pattern = (row < period / 2) ^ (column < period / 2)
    else:  # dotted
        pattern = (column - period / 2 + 0.5) ** 2 + (row - period / 2 + 0.5) ** 2 < (
            0.32 * period
        ) ** 2
    return np.ascontiguousarray(pattern, np.float32)


def _contains(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points of the square [-1, 1]^2 (y grows downwards) lie in a shape."""
    if shape == "circle":
        return x**2 + y**2 <= 0.92**2
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.82
    if shape == "diamond":
        return abs(x) + abs(y) <= 0.97
    if shape == "triangle":
        return (y <= 0.8) & (abs(x) * 1.72 <= (y + 0.94) * 0.97)
    if shape == "ring":
        return (x**2 + y**2 <= 0.95**2) & (x**2 + y**2 >= 0.5**2)
    if shape == "cross":
        return ((abs(x) <= 0.3) | (abs(y) <= 0.3)) & (np.maximum(abs(x), abs(y)) <= 0.92)
    if shape == "star":
        # A five-pointed star is the points that lie on the inner side of at least four of the
        # five lines through its edges.
        count = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.int64)
        for k in range(5):
            angle = 2 * np.pi * k / 5
            count += x * np.sin(angle) + (y - 0.06) * np.cos(angle) <= 0.31 * 0.97
        return count >= 4
    if shape == "heart":
        u, v = x * 1.18, -y * 1.12 + 0.18
        return (u**2 + v**2 - 0.95) ** 3 - 1.1 * u**2 * v**3 <= 0
    raise ValueError(f"shape_mask: shape is {shape!r}, expected one of {SHAPES}")


def _draw_centre(radius: int, lattice: int, rng: random.Random) -> tuple[int, int]:
    low, high = -(-radius // lattice), (64 - radius) // lattice
    return rng.randint(low, high) * lattice, rng.randint(low, high) * lattice


def _is_valid(objects: tuple[SceneObject, ...], relations: tuple[RelationClaim, ...]) -> bool:
    nested = {(r.subject, r.object) for r in relations if r.relation == "inside"}
    for i, a in enumerate(objects):
        for j, b in enumerate(objects[:i]):
            apart = max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius
            if not apart and (i, j) not in nested and (j, i) not in nested:
                return False
    for r in relations:
        a, b = objects[r.subject], objects[r.object]
        if not relation_holds(r.relation, a, b):
            return False
        # What is inside must stand out, and what holds it must have room in the middle.
        if r.relation == "inside" and (
            a.radius * 2 > b.radius
            or a.color == b.color
            or b.shape not in ("circle", "square", "diamond")
            or max(abs(a.x - b.x), abs(a.y - b.y)) > 2
        ):
            return False
    return True


def content(scene: Scene) -> str:
    """What a scene shows, all but where its objects stand."""
    objects = [(o.shape, o.color, o.size, o.texture) for o in scene.objects]
    return repr((objects, scene.background, [r.relation for r in scene.relations]))


def split_of(scene: Scene) -> Split:
    """The split that a scene belongs to, wherever its objects stand."""
    test, validation = _SPLIT_BOUNDS.get(len(scene.objects), _DEFAULT_SPLIT_BOUNDS)
    hashed = zlib.crc32(content(scene).encode()) % 16
    return "test" if hashed < test else "validation" if hashed < validation else "train"


def _draw_claims(scene: Scene, vocabulary: Vocabulary, rng: random.Random) -> Claims:
    """Chooses what the caption says: shape and colour always, the rest now and then."""
    objects = tuple(
        ObjectClaim(
            shape=o.shape,
            color=o.color,
            size=o.size if rng.random() < 0.6 else None,
            texture=o.texture
            if len(vocabulary.textures) > 1 and (o.texture != "solid" or rng.random() < 0.2)
            else None,
        )
        for o in scene.objects
    )
    background = scene.background if rng.random() < 0.7 else None
    relations = scene.relations
    if len(scene.objects) == 2 and rng.random() < 0.1:
        relations = ()
    return Claims(objects, relations, background)

# SPDX-License-Identifier: Apache-2.0
"""Prompt accuracy: reads a picture of a scene back and checks what its caption says of it.

No network is involved. :func:`read_scene` analyses by synthesis: on a plain canvas it lays, again
and again, the shape that explains most of what still differs from the picture, until little does.
:func:`score_scene` compares what was found with what a caption claims.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray

from t2p_fast.data.captions import Claims, ObjectClaim, parse_caption
from t2p_fast.data.scenes import (
    BACKGROUND_COLORS,
    OBJECT_COLORS,
    RADII,
    SHAPES,
    TEXTURES,
    relation_holds_at,
    second_tone,
    shape_mask,
    texture_mask,
)

Image = NDArray[np.uint8] | torch.Tensor
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Spectra = NDArray[np.complex64]
Window = tuple[slice, slice]

ATTRIBUTES = ("shape", "color", "size", "texture", "relation", "background", "count")
MAIN_ATTRIBUTES = ("color", "shape", "size", "relation")
# A worse match than this is a blob of a colour, not a shape.
MIN_IOU = 0.6

_SIZE = 64
# Objects may stick out of the picture by this many pixels.
_PAD = 4
_SIDE = _SIZE + 2 * _PAD
# Shapes are searched at these radii, then fitted at all radii, offsets and blurs nearby.
_COARSE_RADII = (8, 10, 12, 14, 16)
_FINE_RADII = range(6, 19)
_OFFSET = 2
# A big object paler than this may be two small ones and the gap between them.
_PATCHY = 0.85
_BLURS = (0.0, 1.0, 1.6)
_FINE_SIDE = 2 * max(_FINE_RADII) + 4
# Pixels nearer to the canvas than this show nothing.
_VISIBLE = 25.0
# Distances of pixels from blends of canvas and colour: where a rival loses, where all colours do.
_RIVAL_OFF_LINE = 40.0
_OFF_LINE = 90.0
# The opacity of objects, as generated pictures show them.
_OPACITY = (0.7, 1.1)
# What an object must explain, in opaque pixels and as a share of its area.
_MIN_GAIN = 15.0
_MIN_GAIN_SHARE = 0.2
_MAX_OBJECTS = 6
# The share of pixels nearest to a background's colour that makes it the background.
_MIN_BACKGROUND = 0.2
# A texture is seen at this contrast of its tones and correlation with its pattern.
_MIN_CONTRAST = 0.15
_MIN_LIKENESS = 0.5

_COLORS = tuple(OBJECT_COLORS)
# Each colour, its second tone and what lies halfway, [colors * 3, 3].
_TONES = np.array(
    [
        [(1 - s) * a + s * b for a, b in zip(OBJECT_COLORS[c], second_tone(c), strict=True)]
        for c in _COLORS
        for s in (0.0, 0.5, 1.0)
    ],
    np.float32,
)


@dataclass(frozen=True)
class FoundObject:
    """An object read from a picture.

    Attributes:
        shape: the best shape, or ``None`` where no shape matches to ``MIN_IOU``.
        color, size, texture: words of the captions' language.
        x, y, radius: centre and half the side of its square, in pixels of a 64-pixel picture.
        iou: intersection over union of the object's pixels with the ideal shape, in [0, 1].
    """

    shape: str | None
    color: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    iou: float


@dataclass(frozen=True)
class SceneReading:
    """What is in a picture: the objects that explain most first; background None if unclear."""

    objects: tuple[FoundObject, ...]
    background: str | None


@dataclass(frozen=True)
class SceneScore:
    """How much of a caption is right: counts by attribute (a name in ``ATTRIBUTES``).

    Attributes:
        right: how many of the stated values are right.
        stated: how many values the caption states; an attribute it is silent on has no entry.
        reading: what was read from the picture.
    """

    right: dict[str, int]
    stated: dict[str, int]
    reading: SceneReading

    @property
    def perfect(self) -> bool:
        """Whether all that is stated is right, the number of objects included."""
        return self.right == self.stated


@dataclass(frozen=True)
class PromptAccuracy:
    """Prompt accuracy over many pictures; every number is a share in [0, 1].

    Attributes:
        accuracy: right / stated over colour, shape, size and relation together.
        background: right / stated over backgrounds; NaN if no caption states one.
        count: share of pictures with exactly the stated number of objects.
        perfect: share of pictures with everything right, count included.
        attributes: right / stated for each attribute that was stated.
        stated: how often each attribute was stated.
    """

    accuracy: float
    background: float
    count: float
    perfect: float
    attributes: dict[str, float]
    stated: dict[str, int]
    pictures: int


def prompt_accuracy(images: Iterable[Image], captions: Sequence[str | Claims]) -> PromptAccuracy:
    """Scores pictures against the captions they were drawn from.

    Args:
        images: pictures as `read_scene` takes them; a batch ``[n, ...]`` is iterated.
        captions: one caption, or its claims, a picture.

    Raises:
        ValueError: if there are no pictures, or not as many captions, or a caption cannot be
            parsed; and as `read_scene` and `score_reading`.
    """
    pictures = list(images)
    if len(pictures) != len(captions):
        raise ValueError(
            f"prompt_accuracy: got {len(pictures)} images and {len(captions)} captions, "
            "expected as many"
        )
    if not pictures:
        raise ValueError("prompt_accuracy: images is empty, expected at least one")
    scores = [score_scene(i, c) for i, c in zip(pictures, captions, strict=True)]
    right, stated = (
        {name: sum(counts.get(name, 0) for counts in part) for name in ATTRIBUTES}
        for part in ([s.right for s in scores], [s.stated for s in scores])
    )
    attributes = {name: right[name] / stated[name] for name in ATTRIBUTES if stated[name]}
    return PromptAccuracy(
        accuracy=sum(right[n] for n in MAIN_ATTRIBUTES) / sum(stated[n] for n in MAIN_ATTRIBUTES),
        background=attributes.get("background", float("nan")),
        count=attributes["count"],
        perfect=sum(s.perfect for s in scores) / len(scores),
        attributes=attributes,
        stated={name: n for name, n in stated.items() if n},
        pictures=len(scores),
    )


def score_scene(image: Image, claims: Claims | str) -> SceneScore:
    """Checks the claims of a caption in a picture: `read_scene`, then `score_reading`."""
    if isinstance(claims, str):
        claims = parse_caption(claims)
    return score_reading(read_scene(image), claims)


def score_reading(reading: SceneReading, claims: Claims) -> SceneScore:
    """Checks claims in what was read from a picture.

    Found objects are assigned to claimed ones so that as many of the claims as possible are
    right. What is claimed of an object that was not found is wrong. A relation is right only if
    both its objects were found (each right in its shape or its stated colour) and it holds by
    `relation_holds_at`.

    Raises:
        ValueError: if claims has no or more than 6 objects.
    """
    if not 0 < len(claims.objects) <= _MAX_OBJECTS:
        raise ValueError(
            f"score_reading: claims has {len(claims.objects)} objects, expected 1 to {_MAX_OBJECTS}"
        )
    found = reading.objects
    # Any claim may have nothing (-1) assigned.
    slots = [*range(len(found)), *[-1] * len(claims.objects)]
    matches = [[_match(claim, o) for o in found] + [{}] for claim in claims.objects]
    best: tuple[int, int, float] = (-1, -1, 0.0)
    chosen: tuple[int, ...] = ()
    for order in dict.fromkeys(permutations(slots, len(claims.objects))):
        agreed = sum(sum(matches[i][j].values()) for i, j in enumerate(order))
        holding = sum(_relations_hold(claims, order, matches, found))
        quality = sum(found[j].iou for j in order if j >= 0)
        if (agreed, holding, quality) > best:
            best, chosen = (agreed, holding, quality), order

    right: dict[str, int] = {}
    stated: dict[str, int] = {}

    def count(name: str, is_right: bool) -> None:
        right[name] = right.get(name, 0) + is_right
        stated[name] = stated.get(name, 0) + 1

    for i, (claim, j) in enumerate(zip(claims.objects, chosen, strict=True)):
        for name in ("shape", "color", "size", "texture"):
            if getattr(claim, name) is not None:
                count(name, matches[i][j].get(name, False))
    for holds in _relations_hold(claims, chosen, matches, found):
        count("relation", holds)
    if claims.background is not None:
        count("background", claims.background == reading.background)
    count("count", len(found) == len(claims.objects))
    return SceneScore(right, stated, reading)


def _match(claim: ObjectClaim, found: FoundObject) -> dict[str, bool]:
    stated = {n: getattr(claim, n) for n in ("shape", "color", "size", "texture")}
    return {n: value == getattr(found, n) for n, value in stated.items() if value is not None}


def _relations_hold(
    claims: Claims,
    order: tuple[int, ...],
    matches: list[list[dict[str, bool]]],
    found: tuple[FoundObject, ...],
) -> list[bool]:
    held = []
    for relation in claims.relations:
        pair = (relation.subject, relation.object)
        identified = all(
            matches[i][order[i]].get("shape") or matches[i][order[i]].get("color") for i in pair
        )
        places = ((o.x, o.y, o.radius) for o in (found[order[i]] for i in pair))
        held.append(identified and relation_holds_at(relation.relation, *places))
    return held


def read_scene(image: Image) -> SceneReading:
    """Finds the objects and the background of a picture.

    Args:
        image: a square picture: numpy uint8 ``[h, w, 3]``, or torch floating point ``[3, h, w]``
            in [0, 1]. It is scaled to 64 x 64 pixels, the size at which sizes are judged.

    Raises:
        TypeError: if it is neither array nor tensor, or of another dtype.
        ValueError: if it is of another shape, or its values are not finite or not in [0, 1]
            (an overshoot of 0.25 is clipped).
    """
    pixels = _to_pixels(image)
    background, canvas = _read_background(pixels)
    pixels, canvas = (
        np.pad(p, ((_PAD, _PAD), (_PAD, _PAD), (0, 0)), mode="edge") for p in (pixels, canvas)
    )
    found: list[FoundObject] = []
    evidence = _Evidence(*np.zeros((2, len(_COLORS), _SIDE, _SIDE), np.float32))
    _update(evidence, pixels, canvas, np.s_[:, :])
    proposals = [_propose(evidence, c) for c in range(len(_COLORS))]
    while len(found) < _MAX_OBJECTS:
        color = max(range(len(_COLORS)), key=lambda c: proposals[c].gain)
        chosen = proposals[color]
        if not chosen.gain:
            break
        found.append(_explain(pixels, canvas, evidence, color, chosen))
        for i, p in enumerate(proposals):
            gap = max(abs(p.x - chosen.x), abs(p.y - chosen.y)) - p.radius - chosen.radius
            if not p.gain or gap < _OFFSET:
                proposals[i] = _propose(evidence, i)
    return SceneReading(tuple(found), background)


def _to_pixels(image: Image) -> Floats:
    """A picture as float32 ``[64, 64, 3]`` in [0, 255]."""
    if isinstance(image, torch.Tensor):
        if not image.is_floating_point():
            raise TypeError(
                f"read_scene: image is a tensor of {image.dtype}, expected a floating dtype"
            )
        if image.ndim != 3 or image.shape[0] != 3 or image.shape[1] != image.shape[2]:
            raise ValueError(
                f"read_scene: image is a tensor {list(image.shape)}, expected [3, size, size]"
            )
        planes = image.detach().to("cpu", torch.float32)
        if planes.numel():
            low, high = planes.min().item(), planes.max().item()
            if not (low >= -0.25 and high <= 1.25):
                raise ValueError(
                    f"read_scene: image has values from {low:.3g} to {high:.3g}, expected [0, 1]"
                )
        planes = planes.clamp(0, 1) * 255
    elif isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"read_scene: image is an array of {image.dtype}, expected uint8")
        if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
            raise ValueError(
                f"read_scene: image is an array {list(image.shape)}, expected [size, size, 3]"
            )
        planes = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)
    else:
        raise TypeError(
            f"read_scene: image is a {type(image).__name__}, expected an array or a tensor"
        )
    size = planes.shape[1]
    if size < 16:
        raise ValueError(f"read_scene: image is {size} x {size}, expected at least 16 x 16")
    if size != _SIZE:
        # Area means keep edges where they are; bilinear does when growing.
        mode = "area" if size > _SIZE else "bilinear"
        planes = torch.nn.functional.interpolate(planes[None], size=(_SIZE, _SIZE), mode=mode)[0]
    return np.asarray(planes.permute(1, 2, 0).contiguous().numpy(), np.float32)


def _read_background(pixels: Floats) -> tuple[str | None, Floats]:
    """The most frequent background colour by nearest palette colour, and a canvas of it."""
    palette = np.concatenate([np.array([*BACKGROUND_COLORS.values()], np.float32), _TONES])
    nearest = ((palette**2).sum(1) - 2 * pixels @ palette.T).argmin(-1)
    counts = np.bincount(nearest.ravel(), minlength=len(palette))[: len(BACKGROUND_COLORS)]
    winner = int(counts.argmax())
    if counts[winner] < _MIN_BACKGROUND * nearest.size:
        return None, np.broadcast_to(palette[winner], pixels.shape).copy()
    color = np.median(pixels[nearest == winner], axis=0)
    return tuple(BACKGROUND_COLORS)[winner], np.broadcast_to(color, pixels.shape).copy()


@dataclass(frozen=True)
class _Evidence:
    """What each pixel says of an object of each colour on the canvas, ``[colors, side, side]``.

    ``coverage`` is how much of the pixel the colour covers, ``weight`` whether the pixel is
    explained by that colour and the canvas at all; outside the picture nothing is.
    """

    coverage: Floats
    weight: Floats


def _update(evidence: _Evidence, pixels: Floats, canvas: Floats, window: Window) -> None:
    """Recomputes the evidence in a window of the picture, in place."""
    difference = pixels[window] - canvas[window]
    visible = (difference**2).sum(-1) > _VISIBLE**2
    shown, below = difference[visible], canvas[window][visible]
    # A blend of canvas C and tone T is C + alpha (T - C): project onto that line.
    squared = (shown**2).sum(-1, keepdims=True)
    along = shown @ _TONES.T - (shown * below).sum(-1, keepdims=True)
    length = (_TONES**2).sum(-1) - 2 * below @ _TONES.T + (below**2).sum(-1, keepdims=True)
    length = length.clip(1)
    # Sharpened and generated pictures overshoot.
    alpha = (along / length).clip(0, 1.25)
    off_line = (squared - 2 * alpha * along + alpha**2 * length).reshape(-1, len(_COLORS), 3)
    # Where the second tone is itself a blend of colour and canvas, it is the colour's edge.
    tone = (off_line + np.array([0, 64, 64], np.float32)).argmin(-1)[..., None]
    alpha = np.take_along_axis(alpha.reshape(off_line.shape), tone, -1)[..., 0]
    nearest = np.take_along_axis(off_line, tone, -1)[..., 0].clip(0)
    best = nearest.min(-1, keepdims=True)
    weight = np.exp(-(nearest - best) / _RIVAL_OFF_LINE**2 - best / _OFF_LINE**2)

    known = np.zeros((_SIDE, _SIDE), np.float32)
    known[_PAD:-_PAD, _PAD:-_PAD] = 1
    whole = (slice(None), *window)
    evidence.coverage[whole] = 0
    evidence.weight[whole] = known[window]
    evidence.coverage[whole][:, visible] = alpha.T.clip(0, 1.1)
    evidence.weight[whole][:, visible] = weight.T * known[window][visible]


@dataclass(frozen=True)
class _Proposal:
    """An object that would explain ``gain`` pixels; ``x`` and ``y`` count the padding."""

    gain: float
    shape: str = ""
    radius: int = 0
    y: int = 0
    x: int = 0
    opacity: float = 0.0
    # [_FINE_SIDE, _FINE_SIDE]: the blurred shape in the middle, opacity included.
    template: Floats | None = None


def _template(shape: str, radius: int, blur: float, side: int) -> Floats:
    """A blurred shape in the middle of a ``[side, side]`` square."""
    image = np.zeros((side, side), np.float32)
    start = side // 2 - radius
    image[start : start + 2 * radius, start : start + 2 * radius] = shape_mask(shape, radius)
    if blur:
        steps = np.arange(side)
        kernel = np.exp(-((steps[:, None] - steps) ** 2) / (2 * blur**2))
        kernel /= kernel.sum(1, keepdims=True)
        image = (kernel @ image @ kernel.T).astype(np.float32)
    return image


def _halve(image: Floats) -> Floats:
    """Means of 2 x 2 pixels."""
    *rest, height, width = image.shape
    blocks = image.reshape(*rest, height // 2, 2, width // 2, 2)
    return np.asarray(blocks.mean((-3, -1)), np.float32)


@lru_cache(maxsize=1)
def _coarse_templates() -> tuple[Spectra, Bools]:
    """At half the resolution: spectra of shapes and their squares, and where centres may lie."""
    steps, spectra, fits = np.arange(0, _SIDE, 2), [], []
    for radius in _COARSE_RADII:
        near = (steps >= radius) & (steps <= _SIDE - radius)
        for shape in SHAPES:
            image = _template(shape, radius, _BLURS[1], _SIDE)
            image = _halve(np.roll(image, (-_SIDE // 2, -_SIDE // 2), (0, 1)))
            spectra.append(np.fft.rfft2(np.stack([image, image**2])).conj())
            fits.append(near[:, None] & near)
    return np.stack(spectra, 1).astype(np.complex64), np.stack(fits)


@lru_cache(maxsize=len(_FINE_RADII))
def _fine_templates(radius: int) -> Floats:
    """All shapes in all blurs, ``[shapes * blurs, _FINE_SIDE**2]``."""
    images = [_template(s, radius, b, _FINE_SIDE) for s in SHAPES for b in _BLURS]
    return np.stack(images).reshape(len(images), -1)


def _gain(dot: Floats, energy: Floats) -> tuple[Floats, Floats]:
    """How much a template of the best opacity lowers the squared error, and that opacity."""
    opacity: Floats = (dot / (energy + 1e-3)).clip(*_OPACITY)
    return opacity * (2 * dot - opacity * energy), opacity


def _propose(evidence: _Evidence, color: int) -> _Proposal:
    """The shape, size and place that explain most of a colour, by least squares."""
    weight = evidence.weight[color]
    target = weight * evidence.coverage[color]
    if (target > 0.4).sum() < _MIN_GAIN:
        return _Proposal(0.0)
    spectra, fits = _coarse_templates()
    halves = np.fft.rfft2(_halve(np.stack([target, weight]))).astype(np.complex64)
    dot, energy = np.fft.irfft2(halves[:, None] * spectra, s=(_SIDE // 2, _SIDE // 2))
    gains = np.where(fits, _gain(dot, energy)[0], -np.inf)
    best = _refine(target, weight, gains)
    if best.radius > 1.5 * _COARSE_RADII[0] and best.opacity < _PATCHY:
        part = _refine(target, weight, gains[: len(SHAPES)])
        if part.gain > 0.8 * best.gain:
            return part
    return best


def _refine(target: Floats, weight: Floats, gains: Floats) -> _Proposal:
    """The best object, at full resolution, near the best of the coarse ones."""
    kind, y, x = (int(i) for i in np.unravel_index(gains.argmax(), gains.shape))
    y, x, radius = 2 * y, 2 * x, _COARSE_RADII[kind // len(SHAPES)]
    half = _FINE_SIDE // 2 + _OFFSET
    radii = [r for r in _FINE_RADII if abs(r - radius) <= _OFFSET]
    templates = np.concatenate([_fine_templates(r) for r in radii])
    # Products this small are computed without threads, which would only wait for each other.
    batches = templates.reshape(-1, 6, _FINE_SIDE**2)
    patches = []
    for plane in (target, weight):
        patch = np.pad(plane, half)[y : y + 2 * half, x : x + 2 * half]
        windows = np.lib.stride_tricks.sliding_window_view(patch, (_FINE_SIDE, _FINE_SIDE))
        patches.append(windows.reshape(-1, _FINE_SIDE**2).T)
    dot, energy = (
        (t @ p).reshape(len(templates), -1)
        for t, p in zip((batches, batches**2), patches, strict=True)
    )
    gains, opacities = _gain(dot, energy)
    kind, place = (int(i) for i in np.unravel_index(gains.argmax(), gains.shape))
    gain = float(gains[kind, place])
    if gain < max(_MIN_GAIN, _MIN_GAIN_SHARE * float((templates[kind] ** 2).sum())):
        return _Proposal(0.0)
    dy, dx = divmod(place, 2 * _OFFSET + 1)
    y, x, opacity = y + dy - _OFFSET, x + dx - _OFFSET, float(opacities[kind, place])
    which_radius, which_shape, _ = np.unravel_index(kind, (len(radii), len(SHAPES), len(_BLURS)))
    template = opacity * templates[kind].reshape(_FINE_SIDE, _FINE_SIDE)
    return _Proposal(gain, SHAPES[which_shape], radii[which_radius], y, x, opacity, template)


def _grow(mask: Bools, within: Bools, steps: int) -> Bools:
    """What can be reached from a mask in a number of steps without leaving another mask."""
    reached = mask & within
    for _ in range(steps):
        wider = reached.copy()
        wider[1:] |= reached[:-1]
        wider[:-1] |= reached[1:]
        wider[:, 1:] |= reached[:, :-1]
        wider[:, :-1] |= reached[:, 1:]
        reached = wider & within
    return reached


def _explain(
    pixels: Floats, canvas: Floats, evidence: _Evidence, color: int, proposal: _Proposal
) -> FoundObject:
    """Draws a proposal on the canvas, brings the evidence up to date, and describes it."""
    assert proposal.template is not None
    half = _FINE_SIDE // 2
    template = np.zeros((_SIDE + 2 * half, _SIDE + 2 * half), np.float32)
    y, x = proposal.y, proposal.x
    template[y : y + 2 * half, x : x + 2 * half] = proposal.template
    template = template[half:-half, half:-half]
    weight = evidence.weight[color]
    colored = weight * evidence.coverage[color]
    # The object's own pixels, its bumps included, but no neighbour's of its colour. What goes on
    # far beyond its outline is no such shape, so it counts against it, but may be another object.
    near = _grow(template > 0.4, colored > 0.25, 4)
    wide = _grow(near, colored > 0.25, proposal.radius // 2)
    own = np.where(wide | (template > 0.1), colored, 0)
    # Pixels that neither colour nor canvas explains (something lies on top) count neither way.
    ideal = template * weight
    iou = float(np.minimum(own, ideal).sum() / max(float(np.maximum(own, ideal).sum()), 1e-6))

    size = min(RADII, key=lambda s: abs(RADII[s] - proposal.radius))
    texture = _read_texture(pixels, template, (template > 0.4) & (colored > 0.4), color, size)

    covered = (template > 0.4) & (weight < 0.5)
    top = pixels[covered]
    touched = _grow(near | (template > 0.1), np.ones_like(near), 1)
    canvas[touched] = pixels[touched]
    tones = _TONES[3 * color : 3 * color + 3]
    canvas[covered] = tones[((top[:, None] - tones) ** 2).sum(-1).argmin(1)]
    rows, columns = (np.flatnonzero(touched.any(axis)) for axis in (1, 0))
    _update(evidence, pixels, canvas, np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return FoundObject(
        shape=proposal.shape if iou >= MIN_IOU else None,
        color=_COLORS[color],
        size=size,
        texture=texture,
        x=float(x - _PAD),
        y=float(y - _PAD),
        radius=float(proposal.radius),
        iou=iou,
    )


@lru_cache(maxsize=8)
def _texture_patterns(radius: int) -> tuple[tuple[str, ...], Floats]:
    """Every texture in every phase over the whole picture, ``[n, side * side]``."""
    names, patterns = [], []
    period = max(4, radius // 2)
    for texture in TEXTURES:
        if texture == "solid":
            continue
        cell = texture_mask(texture, radius)[:period, :period]
        repeats = -(-_SIDE // period)
        phases = [np.roll(cell, (y, x), (0, 1)) for y in range(period) for x in range(period)]
        # Stripes look the same in many of them.
        for phase in {p.tobytes(): p for p in phases}.values():
            names.append(texture)
            patterns.append(np.tile(phase, (repeats, repeats))[:_SIDE, :_SIDE].ravel())
    return tuple(names), np.stack(patterns)


def _read_texture(pixels: Floats, template: Floats, inner: Bools, color: int, size: str) -> str:
    """The texture whose pattern, in its best phase, correlates best with the two tones."""
    if inner.sum() < 16:
        return "solid"
    first, axis = _TONES[3 * color], _TONES[3 * color + 2] - _TONES[3 * color]
    tones = ((pixels[inner] - first) @ axis / (axis @ axis)).clip(-0.5, 1.5)
    names, patterns = _texture_patterns(RADII[size])
    signals = np.concatenate([tones[None], patterns[:, inner.ravel()]])
    # What follows the blurred outline is background shining through, not texture.
    for nuisance in (np.ones_like(tones), template[inner] - template[inner].mean()):
        share = np.einsum("kp,p->k", signals, nuisance) / ((nuisance**2).sum() + 1e-6)
        signals = signals - np.outer(share, nuisance)
    tones, shades = signals[0], signals[1:]
    spread = np.sqrt((shades**2).sum(1)) + 1e-6
    fit = np.einsum("kp,p->k", shades, tones) / spread
    best = int(fit.argmax())
    # Contrast is 1 for a true texture and 0 for a plain colour; blur and noise leave less.
    contrast = fit[best] / spread[best]
    likeness = fit[best] / (np.sqrt((tones**2).sum()) + 1e-6)
    return names[best] if contrast > _MIN_CONTRAST and likeness > _MIN_LIKENESS else "solid"

# SPDX-License-Identifier: Apache-2.0
"""The little language of scene captions: claims to words, and words back to claims."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus"),
    "diamond": ("diamond",),
    "heart": ("heart",),
}
COLOR_WORDS = {
    c: (c,) for c in ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
}
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "middle-sized"),
    "big": ("big", "large", "huge"),
}
TEXTURE_WORDS = {
    "solid": ("solid", "plain"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "chequered"),
}
RELATION_WORDS = {
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "inside": ("inside", "within"),
}
_OPPOSITES = {
    "above": "below", "below": "above", "left of": "right of", "right of": "left of",
}  # fmt: skip
BACKGROUND_WORDS = {
    "gray": ("gray", "grey"),
    "pink": ("pink",),
    "cyan": ("cyan",),
    "brown": ("brown",),
}
_FILLERS = {"a", "an", "the", "one", "and", "with", "which", "is", "it", "background"}


@dataclass(frozen=True)
class ObjectClaim:
    """What a caption says of one object; ``None`` where it is silent."""

    shape: str
    color: str | None = None
    size: str | None = None
    texture: str | None = None


@dataclass(frozen=True)
class RelationClaim:
    """``objects[subject]`` stands in ``relation`` to ``objects[object]``."""

    subject: int
    relation: str
    object: int


@dataclass(frozen=True)
class Claims:
    """All that a caption says of a picture."""

    objects: tuple[ObjectClaim, ...]
    relations: tuple[RelationClaim, ...] = ()
    background: str | None = None


def write_caption(claims: Claims, rng: random.Random, *, subject_first: bool = False) -> str:
    """Puts claims into words; the wording varies with ``rng``.

    Relations must form a chain: object 0 to 1, then 1 to 2. ``subject_first`` leaves out the form
    "B with A above it".
    """
    nouns = [_noun(o, rng) for o in claims.objects]
    if len(nouns) == 1:
        text = nouns[0]
    elif not claims.relations:
        text = ", ".join(nouns[:-1]) + " and " + nouns[-1]
    else:
        first = rng.choice(RELATION_WORDS[claims.relations[0].relation])
        if len(nouns) == 2:
            text = (
                f"{nouns[0]} {first} {nouns[1]}"
                if rng.random() < 0.75 or subject_first
                else f"{nouns[1]} with {nouns[0]} {first} it"
            )
        else:
            second = rng.choice(RELATION_WORDS[claims.relations[1].relation])
            text = f"{nouns[0]} {first} {nouns[1]}, which is {second} {nouns[2]}"
    if claims.background is not None:
        word = rng.choice(BACKGROUND_WORDS[claims.background])
        text = rng.choice(
            (
                f"{text} on a {word} background",
                f"{text} on {word}",
                f"{text}, {word} background",
                f"{word} background, {text}",
            )
        )
    return text


def turn_relation(claims: Claims) -> Claims | None:
    """What is said of two objects, said the wrong way round: above becomes below.

    ``None`` if there are not two objects, one beside the other.
    """
    if len(claims.objects) != 2 or not claims.relations:
        return None
    relation = claims.relations[0]
    if relation.relation not in _OPPOSITES:
        return None
    turned = replace(relation, relation=_OPPOSITES[relation.relation])
    return replace(claims, relations=(turned,))


def in_reading_order(claims: Claims) -> Claims:
    """The same said of two objects in the order of reading: what is above or left comes first."""
    turned = turn_relation(claims)
    if turned is None or claims.relations[0].relation in ("above", "left of"):
        return claims
    return replace(turned, objects=turned.objects[::-1])


def _noun(claim: ObjectClaim, rng: random.Random) -> str:
    words = []
    if claim.size is not None:
        words.append(rng.choice(SIZE_WORDS[claim.size]))
    if claim.texture is not None:
        words.append(rng.choice(TEXTURE_WORDS[claim.texture]))
    if claim.color is not None:
        words.append(rng.choice(COLOR_WORDS[claim.color]))
    words.append(rng.choice(SHAPE_WORDS[claim.shape]))
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join((article, *words))


def _by_word(table: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: name for name, words in table.items() for word in words}


_SHAPES, _COLORS, _SIZES = _by_word(SHAPE_WORDS), _by_word(COLOR_WORDS), _by_word(SIZE_WORDS)
_TEXTURES, _BACKGROUNDS = _by_word(TEXTURE_WORDS), _by_word(BACKGROUND_WORDS)
_RELATIONS = _by_word(RELATION_WORDS)
_RELATION_PATTERN = re.compile(
    r"\b(" + "|".join(sorted(_RELATIONS, key=len, reverse=True)) + r")\b"
)
_BACKGROUND_PATTERN = re.compile(
    r"(?:\b(?:on|against|with)\s+(?:a\s+|an\s+)?)?"
    r"\b(" + "|".join(_BACKGROUNDS) + r")(\s+background)?\b"
)


def parse_caption(text: str) -> Claims:
    """Reads a caption of this language back into claims.

    Raises:
        ValueError: if a word is not of the language, or no object is named; the message names it.
    """
    rest = text.lower().strip().rstrip(".")
    background = None
    found = _BACKGROUND_PATTERN.search(rest)
    if found is not None:
        background = _BACKGROUNDS[found.group(1)]
        rest = rest[: found.start()] + " " + rest[found.end() :]
    rest = _RELATION_PATTERN.sub(lambda m: "@" + _RELATIONS[m.group(1)].replace(" ", "_"), rest)
    objects: list[ObjectClaim] = []
    relations: list[RelationClaim] = []
    pending: str | None = None
    attributes: dict[str, str] = {}
    for word in re.findall(r"[@\w-]+", rest):
        if word.startswith("@"):
            pending = word[1:].replace("_", " ")
        elif word in _SHAPES:
            objects.append(ObjectClaim(_SHAPES[word], **attributes))
            attributes = {}
            if pending is not None and len(objects) > 1:
                relations.append(RelationClaim(len(objects) - 2, pending, len(objects) - 1))
                pending = None
        elif word == "it" and pending is not None and len(objects) >= 2:
            # "B with A above it": A was named last and is the subject.
            relations.append(RelationClaim(len(objects) - 1, pending, len(objects) - 2))
            pending = None
        elif word in _COLORS:
            attributes["color"] = _COLORS[word]
        elif word in _SIZES:
            attributes["size"] = _SIZES[word]
        elif word in _TEXTURES:
            attributes["texture"] = _TEXTURES[word]
        elif word not in _FILLERS:
            raise ValueError(f"parse_caption: {word!r} is not a word of scene captions: {text!r}")
    if not objects:
        raise ValueError(f"parse_caption: no shape is named in {text!r}")
    if attributes or pending is not None:
        loose = ", ".join(attributes.values()) or pending
        raise ValueError(f"parse_caption: {loose!r} belongs to no shape in {text!r}")
    if len(objects) == 2 and relations and relations[0].subject == 1:
        objects.reverse()
        relations = [RelationClaim(0, relations[0].relation, 1)]
    return Claims(tuple(objects), tuple(relations), background)

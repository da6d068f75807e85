"""Letters of 17 scripts in the styles of the Noto fonts: many classes, and scripts held out.

The Debian packages `fonts-noto-core` and `fonts-noto-extra` (SIL Open Font License 1.1, 85 MB) are
downloaded with `apt-get download` and read without installing them. A class is a letter; its images
are the letter in every style (weight, width) of the script's sans and serif families, each turned,
sheared and scaled a little at random, so that no two differ by their strokes alone. Like Omniglot
(Lake et al. 2015), but with designs in place of writers: letters of one family are one hand.

Scripts with letters that look like another's (Greek and Cyrillic beside Latin), and the capitals of
those that have some, are left out.
"""

import dataclasses
import hashlib
import io
import math
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from moe_jax.data.builders.labelled_images import ClassifiedImages, LabelledImagesBuilder
from moe_jax.data.builders.packages import Packages, origin
from moe_jax.errors import UserError

PACKAGES = ("fonts-noto-core", "fonts-noto-extra")
HELD_OUT_FRACTION = 1 / 9
"""Share of a training script's styles in `validation`, and again in `test`."""

_ALTERNATIVE = "dataset=mnist5k needs only pip"
_DRAWN_SIZE = 64
"""Of the font, in pixels: larger than the image, so that turned strokes stay smooth."""
_GLYPH_SHARE = 0.75
"""Of the image's side, for the longer side of an upright letter."""
_TURN, _SHEAR, _SHRINK = math.radians(15), 0.2, 0.25
"""The largest turn to either side, the largest shear, and the largest loss of size."""


@dataclasses.dataclass(frozen=True)
class Script:
    """The letters of a script, from `first` to `last` in Unicode, and the families that draw them."""

    first: str
    last: str
    families: tuple[str, ...]

    @property
    def letters(self) -> str:
        """All in order, without vowel signs and marks.

        By Unicode 3.2: letters that came later are rare, and some fonts lack them.
        """
        span = map(chr, range(ord(self.first), ord(self.last) + 1))
        return "".join(c for c in span if unicodedata.ucd_3_2_0.category(c) in ("Ll", "Lo"))


def _script(first: str, last: str, name: str) -> Script:
    return Script(first, last, (f"NotoSans{name}", f"NotoSerif{name}"))


TRAINING_SCRIPTS = (
    _script("a", "z", ""),
    _script("\u0905", "\u0939", "Devanagari"),
    _script("\u0985", "\u09b9", "Bengali"),
    _script("\u0a05", "\u0a39", "Gurmukhi"),
    _script("\u0b85", "\u0bb9", "Tamil"),
    _script("\u0c05", "\u0c39", "Telugu"),
    _script("\u0c85", "\u0cb9", "Kannada"),
    _script("\u0d05", "\u0d39", "Malayalam"),
    _script("\u0d85", "\u0dc6", "Sinhala"),
    _script("\u0e01", "\u0e2e", "Thai"),
    _script("\u1000", "\u1021", "Myanmar"),
    _script("\u10d0", "\u10f0", "Georgian"),
)
FEW_SHOT_SCRIPTS = (
    _script("\u0561", "\u0586", "Armenian"),
    _script("\u05d0", "\u05ea", "Hebrew"),
    _script("\u0a85", "\u0ab9", "Gujarati"),
    _script("\u0e81", "\u0eae", "Lao"),
    _script("\u1780", "\u17b3", "Khmer"),
)
LETTERS = "".join(script.letters for script in (*TRAINING_SCRIPTS, *FEW_SHOT_SCRIPTS))
"""Of each class; those of the training scripts come first."""


def split_styles(styles: Sequence[str], few_shot: bool) -> dict[str, list[str]]:
    """Divides the styles of a script's families, by the sha256 of their names.

    Args:
      styles: such as `NotoSansThai-Bold`.
      few_shot: half of the styles are for `few_shot`, whose images a classifier of a few examples
        is made from, and half for `few_shot_test`. Otherwise there are `train`, `validation`
        and `test`.
    """
    ranked = sorted(styles, key=lambda style: hashlib.sha256(style.encode()).digest())
    if few_shot:
        half = len(ranked) // 2
        return {"few_shot": ranked[:half], "few_shot_test": ranked[half:]}
    count = max(1, round(HELD_OUT_FRACTION * len(ranked)))
    return {
        "train": ranked[2 * count :],
        "validation": ranked[:count],
        "test": ranked[count : 2 * count],
    }


def drawn(letter: str, font: ImageFont.FreeTypeFont, side: int, seed: bytes) -> np.ndarray:
    """White on black, turned, sheared and scaled as the seed says, in the middle.

    Returns:
      uint8 [side, side, 1].
    """
    left, top, right, bottom = font.getbbox(letter)
    random = np.random.default_rng(np.frombuffer(hashlib.sha256(seed).digest(), np.uint32))
    turn, shear = random.uniform(-1, 1, 2) * (_TURN, _SHEAR)
    size = _GLYPH_SHARE * random.uniform(1 - _SHRINK, 1)
    picture = Image.new("L", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 2))
    ImageDraw.Draw(picture).text((1 - left, 1 - top), letter, fill=255, font=font)
    # Pillow wants the place in the letter of each place in the image.
    fine = 2 * side
    scale = max(picture.size) / (size * fine)
    cosine, sine = scale * math.cos(turn), scale * math.sin(turn)
    matrix = np.array([[cosine, shear * cosine - sine], [sine, shear * sine + cosine]])
    offset = np.array(picture.size) / 2 - matrix @ (fine / 2, fine / 2)
    coefficients = np.column_stack([matrix, offset]).ravel().tolist()
    placed = picture.transform(
        (fine, fine), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    return np.asarray(placed.reduce(2))[..., None]


class Glyphs(LabelledImagesBuilder):
    """520 letters of 12 scripts to train on and 191 of 5 others for few-shot classification.

    Splits: `train`, `validation` and `test` have all letters of the training scripts, in different
    styles; `few_shot` and `few_shot_test` those of the other scripts, in different styles.
    """

    SIDE = 28
    CLASSES = tuple(map(unicodedata.name, LETTERS))
    SUMMARY = "Letters of 17 scripts in the styles of the Noto fonts, 28 x 28."

    def collect(
        self, downloads: pathlib.Path
    ) -> tuple[dict[str, ClassifiedImages], dict[str, Any]]:
        """Downloads the fonts and draws their letters.

        Raises:
          UserError: they cannot be downloaded, or a family is not among them.
        """
        packages = Packages(self.name, _ALTERNATIVE, downloads)
        archives = packages.fetch(PACKAGES)
        fonts = _fonts(packages, list(archives.values()))
        progress = tqdm.tqdm(total=len(fonts), desc="Drawing letters", unit="style")
        images: dict[str, list[np.ndarray]] = {}
        labels: dict[str, list[int]] = {}
        for script in (*TRAINING_SCRIPTS, *FEW_SHOT_SCRIPTS):
            styles = [style for style in fonts if style.partition("-")[0] in script.families]
            for split, chosen in split_styles(styles, script in FEW_SHOT_SCRIPTS).items():
                for style in sorted(chosen):
                    for letter, image in _letters(style, fonts[style], script, self.SIDE):
                        images.setdefault(split, []).append(image)
                        labels.setdefault(split, []).append(LETTERS.index(letter))
                    progress.update()
        progress.close()
        splits = {
            split: ClassifiedImages(np.stack(images[split]), np.array(labels[split], np.int64))
            for split in images
        }
        return splits, origin(archives)


def _fonts(packages: Packages, archives: Sequence[pathlib.Path]) -> Mapping[str, bytes]:
    """The font file of each style of the scripts' families."""
    families = {f for script in (*TRAINING_SCRIPTS, *FEW_SHOT_SCRIPTS) for f in script.families}
    fonts = {}
    for archive in archives:
        with packages.open(archive) as opened:
            for member in opened:
                match = re.fullmatch(r".*/((Noto\w+)-\w+)\.[ot]tf", member.name)
                if match is None or match[2] not in families:
                    continue
                file = opened.extractfile(member)
                if file is not None:
                    fonts[match[1]] = file.read()
    if missing := families - {style.partition("-")[0] for style in fonts}:
        raise UserError(
            f"dataset={packages.dataset} could not be prepared, because the packages "
            f"{' and '.join(PACKAGES)} lack the fonts {', '.join(sorted(missing))}; {_ALTERNATIVE}."
        )
    return fonts


def _letters(
    style: str, file: bytes, script: Script, side: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Each letter that the font has, drawn."""
    known = TTFont(io.BytesIO(file), lazy=True).getBestCmap()
    # Not Raqm, which Pillow may lack; a letter by itself needs no layout.
    layout = ImageFont.Layout.BASIC
    font = ImageFont.truetype(io.BytesIO(file), _DRAWN_SIZE, layout_engine=layout)
    for letter in script.letters:
        if ord(letter) in known:
            yield letter, drawn(letter, font, side, f"{style} {letter}".encode())

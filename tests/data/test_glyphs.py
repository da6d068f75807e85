"""Glyphs from fonts with two letters, which are boxes of known shape."""

import io

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import ImageFont

from moe_jax.data.builders import glyphs
from moe_jax.data.builders.glyphs import Script, drawn, split_styles
from moe_jax.data.sources import prepare_dataset
from moe_jax.errors import UserError
from tests.data.package_clients import install_debian_store, write_tar

STYLES = [f"W{weight}" for weight in range(9)]


def font(letters: str) -> bytes:
    """Each letter is a box, 600 units wide and 300 high."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 300), (600, 300), (600, 0)):
        pen.lineTo(corner)
    pen.closePath()
    box = pen.glyph()
    names = [".notdef", *(f"letter{ord(letter)}" for letter in letters)]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): f"letter{ord(letter)}" for letter in letters})
    builder.setupGlyf(dict.fromkeys(names, box))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({})
    builder.setupOS2()
    builder.setupPost()
    file = io.BytesIO()
    builder.save(file)
    return file.getvalue()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Fonts of two scripts of two letters, in the packages of the real ones."""
    monkeypatch.setattr(glyphs, "TRAINING_SCRIPTS", (Script("a", "b", ("NotoA", "NotoB")),))
    monkeypatch.setattr(glyphs, "FEW_SHOT_SCRIPTS", (Script("x", "y", ("NotoX",)),))
    monkeypatch.setattr(glyphs, "LETTERS", "abxy")
    monkeypatch.setattr(glyphs.Glyphs, "CLASSES", ("A", "B", "X", "Y"))
    folder = tmp_path / "store"
    folder.mkdir()
    path = "./usr/share/fonts/truetype/noto/"
    core = {f"{path}NotoA-{style}.ttf": font("ab") for style in STYLES}
    extra = {f"{path}NotoX-{style}.ttf": font("xy") for style in STYLES}
    extra |= {f"{path}NotoB-W0.ttf": font("a"), f"{path}NotoOther-W0.ttf": b"not read"}
    write_tar(folder / "fonts-noto-core_1-1_all.deb", core, "w")
    write_tar(folder / "fonts-noto-extra_1-1_all.deb", extra, "w")
    install_debian_store(folder, monkeypatch)
    return folder


def test_scripts_are_held_out_and_styles_are_divided(store, tmp_path):
    builder = prepare_dataset("glyphs", str(tmp_path / "data"))
    labels = {
        split: np.bincount([example["label"] for example in builder.as_data_source(split)])
        for split in builder.info.splits
    }
    # 10 styles of the first script, of which one lacks b; 9 of the second.
    of_a, of_b = sum(labels[split] for split in ("train", "validation", "test"))
    assert (of_a, of_b) == (10, 9)
    assert labels["validation"][0] == labels["test"][0] == 1
    assert labels["few_shot"].tolist() == [0, 0, 4, 4]
    assert labels["few_shot_test"].tolist() == [0, 0, 5, 5]
    facts = builder.info.metadata
    assert facts["domains"]["B"] == {"bytes": 9 * 28**2, "documents": 9}
    assert facts["packages"]["fonts-noto-core"]["version"] == "1-1"


def test_fonts_that_are_missing_are_named(store, tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "FEW_SHOT_SCRIPTS", (Script("x", "y", ("NotoX", "NotoZ")),))
    with pytest.raises(UserError, match="lack the fonts NotoZ; dataset=mnist5k needs only pip"):
        prepare_dataset("glyphs", str(tmp_path / "data"))


def test_a_drawn_letter_has_its_size_and_depends_on_the_seed_alone():
    face = ImageFont.truetype(io.BytesIO(font("a")), 64)
    images = [drawn("a", face, 28, seed) for seed in (b"0", b"0", b"1")]
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != images[2]).any()
    for seed in range(20):
        image = drawn("a", face, 28, str(seed).encode()).astype(float)
        assert image.shape == (28, 28, 1) and image.max() == 255
        # The side of 600 units is 0.5625 to 0.75 of 28 pixels; shear keeps the area.
        assert (15 * 7.5 * 0.8) < image.sum() / 255 < (21 * 10.5 * 1.1)
        assert not image[[0, -1]].any() and not image[:, [0, -1]].any()
        # In the middle.
        where = np.argwhere(image[:, :, 0] > 0)
        np.testing.assert_allclose((where.min(axis=0) + where.max(axis=0)) / 2, 13.5, atol=1)


def test_splits_depend_on_names_alone():
    styles = [f"NotoX-{style}" for style in STYLES]
    for few_shot in (False, True):
        splits = split_styles(styles, few_shot)
        assert split_styles(styles[::-1], few_shot) == splits
        assert sorted(style for chosen in splits.values() for style in chosen) == styles


def test_classes_are_letters_and_no_letter_is_twice_there():
    assert len(set(glyphs.LETTERS)) == len(glyphs.LETTERS) == len(set(glyphs.Glyphs.CLASSES)) == 711
    training = sum(len(script.letters) for script in glyphs.TRAINING_SCRIPTS)
    assert training == 520
    assert glyphs.Glyphs.CLASSES[0] == "LATIN SMALL LETTER A"
    assert glyphs.Glyphs.CLASSES[training] == "ARMENIAN SMALL LETTER AYB"
    assert all(" LETTER " in n or " CHARACTER " in n or "VOWEL" in n for n in glyphs.Glyphs.CLASSES)

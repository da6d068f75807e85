import dataclasses
import enum
import json

import pytest

from configs import quickstart
from moe_jax import configuration
from moe_jax.component import Component
from moe_jax.errors import UserError
from moe_jax.models.decoder_lm import DecoderLMConfig


class Color(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Shape(Component):
    """A base, of which a picture takes any."""


@dataclasses.dataclass
class Square(Shape):
    side: float = 1.0


@dataclasses.dataclass
class Circle(Shape):
    radius: float = 1.0


@dataclasses.dataclass
class Paint(Component):
    color: Color = Color.RED
    coats: int = 1


@dataclasses.dataclass
class Picture(Component):
    name: str = "untitled"
    framed: bool = False
    price: float = 0.5
    shape: Shape = dataclasses.field(default_factory=Square)
    paint: Paint = dataclasses.field(default_factory=Paint)
    tags: tuple[str, ...] = ()
    weights: dict[str, float] = dataclasses.field(default_factory=dict)


def through_json(config):
    return configuration.decode(json.loads(json.dumps(configuration.encode(config))))


def test_round_trip_keeps_swapped_components_enums_tuples_and_dicts():
    picture = Picture(
        name="é",
        shape=Circle(2.5),
        paint=Paint(Color.BLUE, 3),
        tags=("a", "b"),
        weights={"x": 0.1},
    )
    again = through_json(picture)
    assert again == picture
    assert again.paint.color is Color.BLUE
    assert isinstance(again.shape, Circle)


def test_the_quickstart_round_trips_and_is_valid():
    config = quickstart.get_config()
    config.validate()
    tree = json.loads(json.dumps(configuration.encode(config)))
    assert configuration.decode(tree) == config


def test_an_unknown_field_is_named():
    tree = {**configuration.encode(Paint()), "coat": 2}
    with pytest.raises(
        UserError,
        match=r"Paint has no field 'coat'; the nearest is 'coats', and other fields are color",
    ):
        configuration.decode(tree)


def test_an_unknown_choice_is_named():
    tree = {**configuration.encode(Paint()), "color": "green"}
    with pytest.raises(UserError, match=r"Paint.color is 'green'; it must be one of red, blue"):
        configuration.decode(tree)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Picture(name=3), "config.name is 3, of type int; it must be str"),
        (Picture(framed=1), "config.framed is 1, of type int; it must be bool"),
        (Picture(price="1"), "config.price is '1', of type str; it must be float"),
        (Picture(price=True), "config.price is True, of type bool; it must be float"),
        (Picture(paint=Paint(coats=1.0)), "config.paint.coats is 1.0, of type float"),
        (Picture(paint=Paint(coats=True)), "config.paint.coats is True, of type bool"),
        (Picture(paint=Paint(color="red")), "config.paint.color is 'red', of type str.*Color"),
        (Picture(paint=Square()), r"config.paint is Square.*it must be Paint"),
        (Picture(shape="square"), "config.shape is 'square', of type str; it must be Shape"),
        (Picture(shape=Circle(radius="big")), "config.shape.radius is 'big'"),
    ],
)
def test_a_wrong_type_is_named(picture, message):
    with pytest.raises(UserError, match=message):
        configuration.check_types(picture)


def test_right_types_pass():
    configuration.check_types(Picture(price=1, shape=Circle(), tags=("a",)))


def test_differences_are_paths_with_both_values():
    old, new = (
        configuration.encode(picture)
        for picture in (Picture(), Picture(price=2.0, shape=Circle(), tags=("a",)))
    )
    assert list(configuration.differences(old, old)) == []
    assert set(map(str, configuration.differences(old, new))) == {
        "('config.price', 0.5, 2.0)",
        f"('config.shape.type', '{__name__}:Square', '{__name__}:Circle')",
        "('config.shape.side', 1.0, None)",
        "('config.shape.radius', None, 1.0)",
        "('config.tags', [], ['a'])",
    }


def test_items_of_tuples_are_checked():
    config = DecoderLMConfig(experts_by_layer=(4, "a"))
    with pytest.raises(
        UserError, match=r"config.experts_by_layer\[1\] is 'a', of type str; it must"
    ):
        configuration.check_types(config)
    config.experts_by_layer = 4
    with pytest.raises(
        UserError, match=r"config.experts_by_layer is 4, of type int; it must be tup"
    ):
        configuration.check_types(config)

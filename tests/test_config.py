"""The configuration: what decides a result, what only its speed, and that all of it is a flag."""

import dataclasses
import inspect
import json
import re

import pytest

from fedjax_dp import config as config_lib
from fedjax_dp.config import Config, ExecutionConfig, config_hash, identity, names

SECTIONS = {
    field.name: field.default_factory
    for field in dataclasses.fields(Config)
    if field.default_factory is not dataclasses.MISSING
}
SPEED = {f"execution.{f.name}" for f in dataclasses.fields(ExecutionConfig)} | {
    "eval_every",
    "checkpoint_every",
}
FIELDS = [
    *(f"{name}.{f.name}" for name, make in SECTIONS.items() for f in dataclasses.fields(make)),
    *(f.name for f in dataclasses.fields(Config) if f.name not in SECTIONS),
]


def other(value):
    """A value of the same type that is not `value`."""
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else value + 1


def changed(name):
    config = Config()
    *sections, field = name.split(".")
    target = getattr(config, sections[0]) if sections else config
    setattr(target, field, other(getattr(target, field)))
    return config


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_decides_the_result_or_is_only_speed(name):
    config = changed(name)
    assert config != Config()
    mine, plain = identity(config), identity(Config())
    if name in SPEED:
        assert mine == plain
        assert config_hash(config) == config_hash(Config())
    else:
        assert {key for key in plain if mine[key] != plain[key]} == {name}
        assert config_hash(config) != config_hash(Config())


def test_every_section_is_a_dataclass_of_plain_values():
    """Flags know strings, numbers and booleans; None and tuples cannot be set back by one."""
    assert {type(getattr(Config(), name)) for name in SECTIONS} == set(SECTIONS.values())
    for make in (*SECTIONS.values(), Config):
        for field in dataclasses.fields(make):
            value = getattr(make(), field.name)
            assert type(value) in (str, int, float, bool) or field.name in SECTIONS, field.name


@pytest.mark.parametrize("make", [*SECTIONS.values(), Config])
def test_every_field_is_explained(make):
    # Python 3.13 strips the indentation that older ones keep.
    explained = re.findall(r"^ {4}(\w+): ", inspect.cleandoc(make.__doc__), re.MULTILINE)
    assert explained == [field.name for field in dataclasses.fields(make)]


def test_the_identity_reads_back_from_a_file():
    assert json.loads(json.dumps(identity(Config()))) == identity(Config())


def test_sections_are_not_shared():
    config = Config()
    config.privacy.l2_clip_norm = 7.0
    assert Config().privacy.l2_clip_norm == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", ()), ("a", ("a",)), (" a , b c,", ("a", "b c")), (",,", ())],
)
def test_names_are_separated_by_commas(text, expected):
    assert names(text) == expected


@pytest.mark.parametrize("name", ["eval_every", "checkpoint_every"])
def test_an_interval_is_at_least_one(name):
    config_lib.check(Config(**{name: 1}))
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"Expected {name} >= 1, got {value}"):
            config_lib.check(Config(**{name: value}))

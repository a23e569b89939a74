"""Recipes are complete, overrides reach every field and refuse what does not fit."""

from __future__ import annotations

import pytest

from pipelines.recipes import RECIPES, SplitConfig, recipe, to_json


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_builds_and_is_written_down(name: str):
    made = recipe(name)
    assert made.name == name
    assert f'"name": "{name}"' in to_json(made)


def test_overrides_change_one_field_and_nothing_else():
    changed = recipe("world-smoke", ["ranker_train.epochs=7", "towers.temperature=1", "popular_days=null"])
    plain = recipe("world-smoke")
    assert changed.ranker_train.epochs == 7
    assert changed.towers.temperature == 1.0
    assert changed.popular_days is None
    assert changed.towers_train == plain.towers_train
    assert changed.spec == plain.spec


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("ranker_train.epoch=7", "has no field 'epoch'"),
        ("ranker_train.epochs", "section.field=value"),
        ("ranker_train.epochs=many", "expected"),
        ("ranker_train.epochs=true", "expected"),
        ("name.x=1", "has no fields of its own"),
    ],
)
def test_a_wrong_override_is_named(override: str, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        recipe("world-smoke", [override])


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ValueError, match="kuairand-pure"):
        recipe("kuairand")


def test_the_split_holds_out_the_last_days_and_refuses_a_short_log():
    split = SplitConfig(test_days=2, validation_days=1).resolve(("d1", "d2", "d3", "d4", "d5"))
    assert (split.train, split.validation, split.test) == (("d1", "d2"), ("d3",), ("d4", "d5"))
    with pytest.raises(ValueError, match="holds out 3"):
        SplitConfig(test_days=2, validation_days=1).resolve(("d1", "d2", "d3"))

"""Options of a search, as Python callers and config files give them."""

import dataclasses
import typing
from typing import Any

import pytest

from raypar.config import SearchSection
from raypar.errors import ConfigError
from raypar.search.config import COST_MODELS, SAMPLERS, SearchConfig
from raypar.search.planners.base import planner_names

WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sampler": ({"sampler": "tpee"}, ["'tpee'", "tpe, gp, cmaes, nsga2", "Did you mean 'tpe'?"]),
    "cost model": ({"cost_model": "learnt"}, ["auto, analytic, learned", "'learned'?"]),
    "no trials": ({"trials": 0}, ["search.trials is 0", "at least 1", "for example 100"]),
    "half a trial": ({"trials": 0.5}, ["search.trials is 0.5"]),
    "true trials": ({"trials": True}, ["search.trials is True"]),
    "no seconds": ({"budget_s": 0}, ["search.budget_s is 0", "above 0", "for example 30"]),
    "all seconds": ({"budget_s": float("inf")}, ["search.budget_s is inf"]),
    "no number": ({"budget_s": float("nan")}, ["search.budget_s is nan"]),
    "no seed": ({"seed": "auto"}, ["search.seed is 'auto'", "for example 0"]),
    "measure": ({"measure": -1}, ["search.measure is -1", "at least 0"]),
    "one text as seeds": ({"seeds": "alpa"}, ["search.seeds is 'alpa'", "('alpa',)"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_is_refused_at_once(case: str) -> None:
    options, told = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        SearchConfig(**options)
    for text in told:
        assert text in str(caught.value)


def test_right_options_are_taken() -> None:
    SearchConfig(sampler="gp", trials=1, budget_s=0.5, measure=0, seeds=(), cost_model="learned")
    SearchConfig(seeds=["alpa", "uniform"])  # type: ignore[arg-type]


def test_config_files_know_the_same_options_and_names() -> None:
    def names(key: str) -> tuple[str, ...]:
        found: tuple[str, ...] = typing.get_args(SearchSection.model_fields[key].annotation)
        return found

    assert names("sampler") == SAMPLERS
    assert names("cost_model") == COST_MODELS
    assert set(planner_names()) <= set(names("planner"))
    mirrored = {f.name for f in dataclasses.fields(SearchConfig)} & set(SearchSection.model_fields)
    defaults = SearchConfig()
    for key in mirrored - {"cache"}:  # on in files only
        assert SearchSection.model_fields[key].default == getattr(defaults, key), key
    assert SearchSection().cache
    assert not defaults.cache

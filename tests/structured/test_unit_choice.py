"""Options of pruning units on a schedule."""

import pytest

from prunekit.allocations.schedules import PruneSchedule
from prunekit.errors import ConfigError
from prunekit.structured.rankers import rankers
from prunekit.structured.unit_choice import choice_of, schedule_of


def test_a_schedule_has_the_defaults_of_the_documentation():
    assert schedule_of(0.5, 10, {}) == PruneSchedule("cubic", 0.5, 10, 0, 1, 0.0)
    options = {"schedule": "linear", "start": 2, "every": 3, "initial": 0.1}
    assert schedule_of(0.5, 10, options) == PruneSchedule("linear", 0.5, 10, 2, 3, 0.1)


def test_an_unknown_option_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="evry: no such option; there are schedule, start"):
        schedule_of(0.5, 10, {"evry": 3})
    with pytest.raises(ConfigError, match="every: 0 is not a whole number"):
        schedule_of(0.5, 10, {"every": 0})


def test_a_choice_has_the_options_given():
    ranker = rankers()["magnitude"]()
    choice = choice_of(ranker, [], {"scope": "layer", "least": 2})
    assert (choice.ranker, choice.scope, choice.least, choice.round_to) == (ranker, "layer", 2, 1)
    assert choice.ranks.size == 1

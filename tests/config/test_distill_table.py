"""``[distill]``: its keys, and how it goes with the training."""

import pytest

from prunekit.config.distill_table import Distill
from tests.support.configs import GOOD

TRAIN = "[train]\nsteps = 90\n"


def test_every_key_is_explained_and_the_defaults_are_those_of_glue(load):
    assert all(field.description for field in Distill.model_fields.values())
    found = load(f"{GOOD}{TRAIN}[distill]\n").distill
    assert found == Distill(prediction=1.0, layers=0.9, temperature=2.0, map="same", rank=8)
    assert found.steps(90) == (0, 90)
    assert load(f"{GOOD}{TRAIN}").distill is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[distill]\n",
            "distill: distills while a model is trained, and there is no table [train]",
        ),
        (
            f"{TRAIN}[distill]\nstart = 90\n",
            "distill.start: 90 is beyond the training, which",
        ),
        (
            f"{TRAIN}[distill]\nend = 91\n",
            "distill.end: 91 is beyond the training, which has 90",
        ),
        (f"{TRAIN}[distill]\nstart = 8\nend = 8\n", "distill: start = 8 is not before end = 8."),
        (
            f"{TRAIN}[distill]\nlayers = 0.0\nprediction = 0.0\n",
            "distill: prediction and layers are",
        ),
        (f"{TRAIN}[distill]\nlayers = -1.0\n", "distill.layers: -1.0 is not possible: at least 0."),
        (
            f"{TRAIN}[distill]\ntemperature = 0.0\n",
            "distill.temperature: 0.0 is not possible: more",
        ),
        (f'{TRAIN}[distill]\nmap = "nearest"\n', 'distill.map: "nearest" is not possible.'),
        (f"{TRAIN}[distill]\nlayer = 1.0\n", 'distill.layer: no such key. Did you mean "layers"?'),
        (f'{TRAIN}[distill]\nprediction = "x"\n', 'distill.prediction: "x" is not a number.'),
    ],
)
def test_mistakes_are_said_with_their_place(mistakes, text, message):
    (said,) = mistakes(f"{GOOD}{text}")
    assert said.partition(": ")[2].startswith(message)


def test_a_mistake_of_the_training_is_said_alone(mistakes):
    assert len(mistakes(f"{GOOD}[train]\nsteps = 0\n[distill]\nend = 9\n")) == 1

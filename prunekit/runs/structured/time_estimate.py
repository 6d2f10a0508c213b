"""Estimates the time of a run that removes units."""

import math

import torch
from prunekit_kernels import gram

from prunekit.models.orientation import features
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.time_estimate import (
    WIDEST,
    TimeEstimate,
    measured_layer,
    seconds_of_product,
    shortest_seconds,
)
from prunekit.statistics import Gram

CPU = torch.device("cpu")


def estimate_time(plan: StructuredPlan) -> TimeEstimate:
    """Measure for about a second; return the time of the whole run."""
    work, width = plan.work, plan.stacks[0].features
    shapes = [
        features(group.reader.linear)
        for groups in plan.groups.values()
        for group in groups
        if isinstance(group, LinearUnitGroup)
    ]
    outputs, inputs = max(shapes, default=(width, width), key=math.prod)
    inputs = min(inputs, WIDEST)
    x, weight = measured_layer(outputs, inputs, plan.device, plan.dtype)
    with torch.no_grad():
        product = seconds_of_product(x, weight)
        total = torch.zeros(inputs, inputs, device=plan.device)
        gathering = shortest_seconds(lambda: gram(x, total), plan.device)
        # Scores and refits are solved in float64 in main memory.
        square = torch.eye(inputs, dtype=torch.float64)
        solving = shortest_seconds(
            lambda: square @ torch.cholesky_inverse(torch.linalg.cholesky(square)), CPU
        )
    return TimeEstimate(
        {
            "forward": work.forward * product,
            "backward": work.backward * product,
            "gathering": work.gather * gathering / (len(x) * Gram.flops(inputs)),
            "solving": work.solve * solving / (3 * inputs**3),
        }
    )

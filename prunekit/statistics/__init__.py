"""What is measured while calibration tokens pass: one file a statistic."""

from prunekit.statistics.base import Gathered, Starved, Statistic, union
from prunekit.statistics.column_energy import ColumnEnergy
from prunekit.statistics.cross import Cross
from prunekit.statistics.gram import Gram, lower_panels
from prunekit.statistics.sampled_gram import SampledGram

__all__ = [
    "ColumnEnergy",
    "Cross",
    "Gathered",
    "Gram",
    "SampledGram",
    "Starved",
    "Statistic",
    "lower_panels",
    "union",
]

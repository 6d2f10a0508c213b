"""What is measured while calibration tokens pass: one file a statistic."""

from prunekit.statistics.base import StageStatistics, Starved, Statistic, union
from prunekit.statistics.column_energy import ColumnEnergy
from prunekit.statistics.cross import CrossGram
from prunekit.statistics.gram import Gram, lower_panels
from prunekit.statistics.sampled_gram import SampledGram

__all__ = [
    "ColumnEnergy",
    "CrossGram",
    "StageStatistics",
    "Gram",
    "SampledGram",
    "Starved",
    "Statistic",
    "lower_panels",
    "union",
]

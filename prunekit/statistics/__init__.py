"""Statistics of the calibration tokens, one file each."""

from prunekit.statistics.base import StageStatistics, Starved, Statistic, merge, minimal_union
from prunekit.statistics.column_energy import ColumnEnergy
from prunekit.statistics.cross import CrossGram
from prunekit.statistics.gram import Gram, lower_panels
from prunekit.statistics.sampled_gram import SampledGram

__all__ = [
    "ColumnEnergy",
    "CrossGram",
    "Gram",
    "SampledGram",
    "StageStatistics",
    "Starved",
    "Statistic",
    "lower_panels",
    "merge",
    "minimal_union",
]

"""What is measured while calibration tokens pass: one file a statistic."""

from prunekit.statistics.base import Gathered, Starved, Statistic, union
from prunekit.statistics.column_energy import ColumnEnergy
from prunekit.statistics.cross import Cross
from prunekit.statistics.gram import Gram

__all__ = ["ColumnEnergy", "Cross", "Gathered", "Gram", "Starved", "Statistic", "union"]

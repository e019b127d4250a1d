"""What a bank holds: statistics of its filters under the keys, as numbers, tables and figures."""

from mkf.analysis.identification import Identification, identify
from mkf.analysis.statistics import Analysis, LayerStatistics, ModelStatistics, Tally, analyse

__all__ = [
    "Analysis",
    "Identification",
    "LayerStatistics",
    "ModelStatistics",
    "Tally",
    "analyse",
    "identify",
]

"""What a bank holds: statistics of its filters under the keys, as numbers, tables and figures."""

from mkf.analysis.counting import analyze
from mkf.analysis.identification import Identification, identify
from mkf.analysis.natural import NaturalKeys, Reconstruction, natural_keys, reconstruct
from mkf.analysis.similarity import Matching, duplicates, effective_dimension, match
from mkf.analysis.statistics import (
    Analysis,
    FamilyStatistics,
    LayerStatistics,
    ModelStatistics,
    SampledFilters,
    Tally,
)

__all__ = [
    "Analysis",
    "FamilyStatistics",
    "Identification",
    "LayerStatistics",
    "Matching",
    "ModelStatistics",
    "NaturalKeys",
    "Reconstruction",
    "SampledFilters",
    "Tally",
    "analyze",
    "duplicates",
    "effective_dimension",
    "identify",
    "match",
    "natural_keys",
    "reconstruct",
]

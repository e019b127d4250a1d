"""The search for keys in a bank of filters."""

from mkf.search.clusters import Clustering, clusters
from mkf.search.eliminate import Elimination, Step, elbow, eliminate
from mkf.search.objectives import Accuracy, OutputError, Residual

__all__ = ["Accuracy", "Clustering", "Elimination", "OutputError", "Residual", "Step", "clusters", "elbow", "eliminate"]

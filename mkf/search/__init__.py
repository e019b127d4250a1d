"""The search for keys in a bank of filters.

found = mkf.search.clusters(bank, k=8)  # found.keys; minutes for millions of filters, no networks and no images
coder = mkf.search.autoencoder(bank)  # the paper's way: candidates(50) of a one-dimensional code,
found = mkf.search.eliminate(coder.candidates(50), 8, mkf.search.Residual(bank))  # then the eight that are missed most
"""

from mkf.search.autoencoder import Autoencoder, autoencoder
from mkf.search.clusters import Clustering, clusters
from mkf.search.compare import METHODS, Comparison, compare
from mkf.search.eliminate import Elimination, Step, elbow, eliminate
from mkf.search.objectives import Accuracy, OutputError, Residual
from mkf.search.pca import pca
from mkf.search.two_rounds import two_rounds

__all__ = [
    "METHODS",
    "Accuracy",
    "Autoencoder",
    "Clustering",
    "Comparison",
    "Elimination",
    "OutputError",
    "Residual",
    "Step",
    "autoencoder",
    "clusters",
    "compare",
    "elbow",
    "eliminate",
    "pca",
    "two_rounds",
]

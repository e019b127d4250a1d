"""The search for keys in a bank of filters."""

from mkf.search.clusters import Clustering, clusters

__all__ = ["Clustering", "clusters"]

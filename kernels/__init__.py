"""The implementations of mkf's operators: one folder an operator, one file an implementation.

An implementation only computes. What an operator means, which inputs it refuses and how it is chosen stand in
`mkf.ops` and in `registry.py`. `reference.py` is the readable definition that every other file is tested against.
"""

"""The grouped matrix product: rows sorted by group, each group times its own matrix.

`interface` has the one function that the layer calls and chooses among the other files, of which
each is one backend.
"""

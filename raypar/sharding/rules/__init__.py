"""How each op may be split over one mesh axis; one file per family of ops.

A new family is a new file, named in `ALL`.
"""

from raypar.sharding.rules import (
    advanced_indexing,
    bags,
    batchnorm,
    indexing,
    losses,
    matmul,
    ordering,
    pairs,
    pooling,
    random,
    recurrent,
    vision,
)

ALL = (
    matmul,
    vision,
    pooling,
    batchnorm,
    random,
    recurrent,
    indexing,
    advanced_indexing,
    ordering,
    bags,
    pairs,
    losses,
)

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
    pointwise,
    pooling,
    random,
    recurrent,
    views,
    vision,
)

ALL = (
    matmul,
    pointwise,
    views,
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

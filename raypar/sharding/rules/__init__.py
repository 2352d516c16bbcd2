"""How each op may be split over one mesh axis; one file per family of ops.

A new family is a new file, named in `ALL`.
"""

from raypar.sharding.rules import (
    advanced_indexing,
    batchnorm,
    indexing,
    matmul,
    ordering,
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
)

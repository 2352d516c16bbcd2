"""How each op may be split over one mesh axis; one file per family of ops.

A new family is a new file, named in `ALL`.
"""

from raypar.sharding.rules import (
    advanced_indexing,
    attention,
    bags,
    batchnorm,
    constants,
    cross_entropy,
    embedding,
    indexing,
    losses,
    matmul,
    norms,
    ordering,
    pairs,
    parts,
    pointwise,
    pooling,
    random,
    recurrent,
    reductions,
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
    attention,
    constants,
    cross_entropy,
    embedding,
    norms,
    parts,
    reductions,
)

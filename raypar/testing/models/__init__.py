"""The model zoo: small, honest models that every plan has to train exactly.

    for case in raypar.testing.models.cases(hf=False):
        model, batch = case.model_fn(seed=0), case.batch(seed=0)
        case.loss(model, batch).backward()

Each case says what is special about it (randomness, data-dependent shapes, batch statistics, how
its loss adds up), so that a test can choose the models it applies to.
"""

from raypar.testing.models import (
    experts,
    hf,
    language,
    llama,
    recurrent,
    seq2seq,
    tabular,
    tagging,
    vision,
)
from raypar.testing.models._case import (
    Batch,
    Case,
    ModelFn,
    arguments,
    case,
    cases,
    names,
    register,
    tensors,
)

__all__ = [
    "Batch",
    "Case",
    "ModelFn",
    "arguments",
    "case",
    "cases",
    "experts",
    "hf",
    "language",
    "llama",
    "names",
    "recurrent",
    "register",
    "seq2seq",
    "tabular",
    "tagging",
    "tensors",
    "vision",
]

"""A convolutional network on handwritten digits, a data set that scikit-learn ships.

python -m examples.digits                       # in one process, with the accuracy
raypar train examples/digits.yaml               # on Ray
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import raypar as rp

TRAINING_IMAGES = 1536
"""The first so many of the 1797 images are trained on, the rest are for evaluation."""


def digits(part: Literal["train", "test"]) -> Dataset[tuple[Tensor, ...]]:
    """Grey images of 8 × 8 pixels and the digits on them; nothing is downloaded.

    Args:
        part: Which of the two parts.

    Returns:
        (image, digit) pairs: float32 of shape (1, 8, 8) with values in 0..1, and int64.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise rp.ConfigError(
            "examples.digits reads the images that scikit-learn ships, which is not installed: "
            "pip install scikit-learn"
        ) from None
    found: Any = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target, dtype=torch.int64)
    kept = slice(None, TRAINING_IMAGES) if part == "train" else slice(TRAINING_IMAGES, None)
    return TensorDataset(images[kept], labels[kept])


def digit_batches(
    global_batch: int, part: Literal["train", "test"] = "train"
) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches of digits: shuffled anew in every epoch for training, in order for evaluation."""
    return rp.batches(digits(part), global_batch, shuffle=part == "train")


def cnn(channels: int = 16) -> nn.Module:
    """A small convolutional network from (batch, 1, 8, 8) to (batch, 10) logits."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * channels * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def accuracy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Share of images whose digit is the likeliest."""
    return (logits.argmax(-1) == batch[1]).double().mean()


def main() -> None:
    """Trains for three epochs, and tells how many digits of the other part are read rightly."""
    result = rp.Trainer(
        cnn,
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        data=digit_batches(64),
        epochs=3,
        eval_data=digit_batches(87, "test"),
        eval_metrics={"accuracy": accuracy},
        search_config=rp.SearchConfig(stages=2, microbatches=4),
        scaling_config=rp.ScalingConfig(num_workers=0),
    ).fit()
    print(f"accuracy {result.metrics['eval_accuracy']:.1%}, files in {result.path}")


if __name__ == "__main__":
    main()

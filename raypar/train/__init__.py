"""What a user calls to train: the trainer, its data feed, its results."""

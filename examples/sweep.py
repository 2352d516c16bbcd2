"""A sweep with Ray Tune: learning rates and widths, eight trials of two devices each.

python -m examples.sweep                        # needs pip install '.[tune]'

Trials that fall behind are stopped early (ASHA, Li et al. 2020, arXiv 1810.05934), and the next
values are proposed by Optuna. Trials that ask for the same plan share one search.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import raypar as rp
from raypar.tune import trainable

CONFIG = Path(__file__).with_name("sweep.yaml")


def sweep(
    trials: int = 8, storage: str | Path = "runs", overrides: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Runs the sweep, on the Ray that this process is connected to or on one of its own.

    Args:
        trials: How many.
        storage: Folder of the sweep's files.
        overrides: ``key=value`` texts on top of ``sweep.yaml``.

    Returns:
        The best trial's last report: ``loss``, ``config``, ``plan_cached`` and others.

    Raises:
        ConfigError: Ray Tune is not installed.
    """
    from raypar.config import load_config

    config = load_config(CONFIG, overrides)
    run_trial = trainable(config, num_workers=2, report_every=5)
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    steps = config.train.steps
    assert steps is not None
    tuner = tune.Tuner(
        run_trial,
        param_space={
            "optimizer.kwargs.lr": tune.loguniform(1e-4, 1e-1),
            "model.kwargs.width": tune.choice([32, 64]),
        },
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            num_samples=trials,
            search_alg=OptunaSearch(seed=0),
            scheduler=ASHAScheduler(time_attr="step", max_t=steps, grace_period=min(10, steps)),
        ),
        run_config=tune.RunConfig(name="sweep", storage_path=str(Path(storage).absolute())),
    )
    best = tuner.fit().get_best_result()
    if best.metrics is None:
        raise rp.TrainingError("no trial of the sweep reported anything: see its files")
    return dict(best.metrics)


if __name__ == "__main__":
    found = sweep()
    print(f"best loss {found['loss']:.3f} with {found['config']}")

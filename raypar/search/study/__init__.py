"""The study: outer decisions by Optuna, inner ones by exact solvers."""

#!/usr/bin/env bash
# `make dist`: builds wheel and sdist into dist/, installs the wheel into a new environment outside
# the checkout, and tries it there: nothing of the source tree may be needed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
bin=$(cd "${BIN:-.venv/bin}" && pwd)
torch=${TORCH:-torch>=2.11,<2.14}

rm -rf dist
"$bin/python" -m pip wheel --quiet --no-deps --wheel-dir dist .
"$bin/python" -m hatchling build --target sdist --directory dist
ls -l dist

clean=$(mktemp -d "${TMPDIR:-/tmp}/raypar-dist-XXXXXX")
trap 'rm -rf "$clean"' EXIT
"$python" -m venv "$clean/venv"
"$clean/venv/bin/python" -m pip install --quiet "$torch"
"$clean/venv/bin/python" -m pip install --quiet dist/raypar-*.whl
cd "$clean"
export PATH="$clean/venv/bin:$PATH"
unset PYTHONPATH

raypar --version
raypar config > config.yaml
raypar doctor
python - <<'EOF'
import importlib.resources

import torch
import raypar as rp

assert importlib.resources.files("raypar").joinpath("py.typed").is_file()
assert "site-packages" in rp.__file__, rp.__file__


def model_fn():
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))


def loss_fn(output, batch):
    return output.square().mean()


batch = torch.randn(8, 8)
graph = rp.capture(model_fn, batch, loss_fn)
plan = rp.plan(graph, rp.Cluster.local(2), rp.SearchConfig(stages=2, microbatches=2))
print(rp.explain(plan, graph))
result = rp.Trainer(
    model_fn,
    loss_fn=loss_fn,
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    data=[batch],
    plan=plan,
    steps=5,
    scaling_config=rp.ScalingConfig(num_workers=0),
).fit()
assert result.metrics["loss"] < batch.square().mean()
print(f"trained: loss {result.metrics['loss']:.4f}")
EOF
echo "the wheel works in a clean environment"

#!/usr/bin/env bash
# Run the tests:  bash tests/run.sh [--all] [pytest arguments]      --all adds the long tier
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tier=(-m "not long")
if [ "${1:-}" = --all ]; then tier=(); shift; fi

source ./setup.sh test
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if "$PYTHON" -I -c 'import ruff' 2>/dev/null; then
    "$PYTHON" -m ruff check --quiet .
    "$PYTHON" -m ruff format --check --quiet .
else
    echo "tests/run.sh: the style is not checked, since $PYTHON has no ruff (pip install '.[dev]')" >&2
fi
"$PYTHON" -m pytest ${tier[@]+"${tier[@]}"} --doctest-modules --durations=10 "$@" \
    *.py distributed grading kernels report support exercises/make.py tests

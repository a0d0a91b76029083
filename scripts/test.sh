#!/usr/bin/env bash
# Lint, types and tests; `--slow` adds the tests that take minutes. Other arguments go to pytest.
EXTRAS="deepspeed dev" source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [ "${1:-}" = "--slow" ]; then
  shift
  set -- -m "slow or not slow" "$@"
fi
ruff format --check .
ruff check .
mypy
mypy --disallow-untyped-defs --cache-dir .mypy_cache/typed *.py common data diffusion moe_ops \
  checkpoint routing sampling evaluation training page scripts
for script in scripts/*.sh scripts/*/*.sh .ci/run; do bash -n "$script"; done
OMP_NUM_THREADS=1 python -m pytest "$@"

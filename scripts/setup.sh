#!/usr/bin/env bash
# Make .venv with what requirements.txt names, and requirements-NAME.txt for every NAME in EXTRAS;
# does nothing when all of that is there and up to date. Sourced by demo.sh, test.sh and experiments:
#   EXTRAS="deepspeed dev" source scripts/setup.sh
# Another Python: PYTHON=python3.12 bash scripts/demo.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

files=(requirements.txt)
for name in ${EXTRAS:-}; do files+=("requirements-$name.txt"); done
missing=()
for file in "${files[@]}"; do
  cmp -s "$file" ".venv/requirements/$file" || missing+=("$file")
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "setup: installing ${missing[*]} into .venv (some minutes)"
  [ -x .venv/bin/pip ] || "${PYTHON:-python3}" -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check "${missing[@]/#/--requirement=}"
  mkdir -p .venv/requirements
  cp "${missing[@]}" .venv/requirements/
fi
# shellcheck disable=SC1091
source .venv/bin/activate

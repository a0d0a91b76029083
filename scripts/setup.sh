#!/usr/bin/env bash
# Make .venv with what requirements*.txt name; does nothing when it is already up to date.
# Sourced by demo.sh and test.sh. Another Python: PYTHON=python3.12 bash scripts/demo.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted=$(cat requirements*.txt | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "setup: installing requirements.txt, -deepspeed.txt and -dev.txt into .venv (some minutes)"
  "${PYTHON:-python3}" -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check \
    -r requirements.txt -r requirements-deepspeed.txt -r requirements-dev.txt
  echo "$wanted" > .venv/installed
fi
# shellcheck disable=SC1091
source .venv/bin/activate

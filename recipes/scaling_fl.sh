#!/usr/bin/env bash
# The first command in the README of the paper's code. JOB_NAME=NAME of an earlier run continues that run.
# Settings may follow, as in `recipes/scaling_fl.sh site_ids=[0,0,0,0] train_path=data/agnews/train.csv`.
# With TOY=FOLDER, which recipes/make_toy.py makes, nothing is downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -z ${TOY:-} ]] || set -- model="$TOY/model" train_path="$TOY/agnews/train.csv" test_path="$TOY/agnews/test.csv" "$@"
JOB_NAME=${JOB_NAME:-$(date +%Y%m%d_%H%M%S)}
exec ./run-local.sh scripts/train_federated.py with recipes/scaling_fl.yaml job_name="$JOB_NAME" \
  checkpoints_dir="checkpoints/$JOB_NAME" "$@"

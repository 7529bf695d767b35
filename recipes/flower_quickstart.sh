#!/usr/bin/env bash
# Flower's quickstart with Hugging Face, then its published figures beside those of this run.
# Settings may follow, as in `recipes/flower_quickstart.sh num_rounds=5 sites_per_round=0.2`.
# With TOY=FOLDER, which recipes/make_toy.py makes, nothing is downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -z ${TOY:-} ]] || set -- model="$TOY/model" train_path="$TOY/imdb/train.csv" test_path="$TOY/imdb/test.csv" "$@"
./run-local.sh scripts/train_federated.py with recipes/flower_quickstart.yaml "$@"
./run-local.sh recipes/flower_quickstart.py

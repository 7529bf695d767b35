#!/usr/bin/env bash
# FlowerTune's baseline for code: 200 rounds of LoRA beside Mistral 7B in 4 bits, 2 of 10 sites each.
# Settings may follow, as in `recipes/flowertune_code.sh num_rounds=5 base_dtype=bfloat16`.
# With TOY=FOLDER, which recipes/make_toy.py makes, no model and no data are downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -z ${TOY:-} ]] || set -- model="$TOY/llm" train_path="$TOY/instruct/code.parquet" "$@"
export EXTRAS=${EXTRAS:-quantise} # with quantise=None, EXTRAS=llm is enough
exec ./run-local.sh scripts/train_federated.py with recipes/flowertune.yaml recipes/flowertune_code.yaml "$@"

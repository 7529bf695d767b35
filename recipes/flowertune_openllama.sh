#!/usr/bin/env bash
# FlowerTune's first README: 100 rounds of LoRA beside OpenLLaMA 7B in 4 bits, 2 of 20 sites each, then a question.
# Settings may follow, as for the other two commands of its page:
#   recipes/flowertune_openllama.sh model=openlm-research/open_llama_3b_v2 quantise=8
#   recipes/flowertune_openllama.sh num_rounds=50 sites_per_round=0.25
# SWEEP=1 trains all its eight runs: both models, in 8 and 4 bits, with 10 and 20 % of the sites. QUESTION= asks another.
# With TOY=FOLDER, which recipes/make_toy.py makes, no model and no data are downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
question=("${QUESTION:-What is the ideal 1-day plan in London?}") settings=(recipes/flowertune.yaml recipes/flowertune_openllama.yaml)
models=openlm-research/open_llama_7b_v2,openlm-research/open_llama_3b_v2
if [[ -n ${TOY:-} ]]; then
  settings+=(model="$TOY/llm" train_path="$TOY/instruct/alpaca.parquet")
  models=$TOY/llm,$TOY/llm-small
  question+=(--max-new-tokens 8)
fi
export EXTRAS=${EXTRAS:-quantise} # with quantise=None, EXTRAS=llm is enough
if [[ -n ${SWEEP:-} ]]; then
  exec ./run-local.sh scripts/sweep.py with "${settings[@]}" model="$models" quantise=8,4 sites_per_round=0.1,0.2 "$@"
fi
./run-local.sh scripts/train_federated.py with "${settings[@]}" "$@"
./run-local.sh recipes/ask.py "${question[@]}"

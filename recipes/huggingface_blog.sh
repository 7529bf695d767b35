#!/usr/bin/env bash
# The Hugging Face blog's federation: a process for each site, which meet at MASTER_ADDR:MASTER_PORT.
# Without RANK, this starts all WORLD_SIZE of them (2) on this machine, each on a GPU of its own or on the CPU. With one
# GPU, WORLD_SIZE=1 recipes/huggingface_blog.sh site_ids=[0,0] trains both sites in one process, to the same weights.
# Over machines: RANK=0 WORLD_SIZE=2 MASTER_ADDR=10.0.0.1 recipes/huggingface_blog.sh on 10.0.0.1, RANK=1 on the other.
# Settings may follow. With TOY=FOLDER, which recipes/make_toy.py makes, nothing is downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -z ${TOY:-} ]] || set -- model="$TOY/model" train_path="$TOY/imdb/train.csv" test_path="$TOY/imdb/test.csv" "$@"
export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500} WORLD_SIZE=${WORLD_SIZE:-2}
export DOCKER_NETWORK=${DOCKER_NETWORK:-host}
program=(./run-local.sh scripts/train_federated.py with recipes/huggingface_blog.yaml)
[[ -z ${RANK:-} ]] || exec "${program[@]}" "$@"

./run-local.sh -c pass # only one of them may install
processes=()
for ((rank = 0; rank < WORLD_SIZE; rank++)); do
  RANK=$rank "${program[@]}" "site_ids=[$rank]" "$@" &
  processes+=($!)
done
trap 'kill "${processes[@]}"' INT TERM
status=0
for process in "${processes[@]}"; do
  wait "$process" || status=$?
done
wait # also for those that the trap ended
exit "$status"

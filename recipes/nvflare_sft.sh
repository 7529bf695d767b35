#!/usr/bin/env bash
# NVFlare's example with trl's SFTTrainer: prepares Dolly, Alpaca and OASST1, then trains on Dolly a centralised run, one
# site, and one site whose messages are float16, and prints their losses by step beside each other.
# MODE=peft trains LoRA in place of all weights. Settings may follow, as in
#   recipes/nvflare_sft.sh train_path=data/nvflare/oasst1/training.jsonl test_path=data/nvflare/oasst1/validation.jsonl
# With TOY=FOLDER, which recipes/make_toy.py makes, no model and no data are downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${MODE:=sft} in
  sft) settings=(recipes/nvflare_sft.yaml) ;;
  peft) settings=(recipes/nvflare_sft.yaml recipes/nvflare_peft.yaml) ;;
  *) echo "error: MODE: expected sft or peft, got $MODE" >&2 && exit 1 ;;
esac
hub=https://huggingface.co/datasets target=data/nvflare
dolly=$hub/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl
alpaca=$hub/tatsu-lab/alpaca/resolve/main/data/train-00000-of-00001-a09b74b3ef9c3b56.parquet
oasst1=$hub/OpenAssistant/oasst1/resolve/main/data/train-00000-of-00001-b42a775f407cee45.parquet
oasst1_validation=$hub/OpenAssistant/oasst1/resolve/main/data/validation-00000-of-00001-134b8fd0c89408b6.parquet
if [[ -n ${TOY:-} ]]; then
  target=data/nvflare-toy
  dolly=$TOY/instruct/dolly.jsonl alpaca=$TOY/instruct/alpaca.parquet
  oasst1=$TOY/instruct/oasst1.parquet oasst1_validation=$TOY/instruct/oasst1-validation.parquet
  set -- model="$TOY/llm" train_path="$target/dolly/training.jsonl" test_path="$target/dolly/validation.jsonl" \
    log_every_steps=1 "$@"
fi
export EXTRAS=${EXTRAS:-llm}

prepare() { # NAME SOURCE [options]; does not replace files
  [[ ! -e $target/$1/validation.jsonl ]] || return 0
  ./run-local.sh scripts/prepare_data.py --source "$2" --train-path "$target/$1/training.jsonl" \
    --validation-path "$target/$1/validation.jsonl" --overwrite "${@:3}"
}
prepare dolly "$dolly"
prepare alpaca "$alpaca"
prepare oasst1 "$oasst1" --validation-source "$oasst1_validation"
./run-local.sh scripts/train_centralised.py with "${settings[@]}" "$@"
./run-local.sh scripts/train_federated.py with "${settings[@]}" "$@"
./run-local.sh scripts/train_federated.py with "${settings[@]}" "$@" comm_dtype=float16
./run-local.sh recipes/nvflare_sft.py

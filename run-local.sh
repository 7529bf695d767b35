#!/usr/bin/env bash
# Run Python on this machine with everything that it needs: ./run-local.sh scripts/train_federated.py with ...
# In a container where a Docker engine answers, in a virtual environment where none does or RUNTIME=venv.
# Paths in the arguments are relative to this folder. Settings in .env count where the environment has none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

read_env() {
  local line key value
  while IFS= read -r line || [[ -n $line ]]; do
    line=${line%$'\r'}
    [[ $line =~ ^[[:space:]]*([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] || continue
    key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    case $value in
      \"*\") value=${value:1:${#value}-2} ;;
      \'*\') value=${value:1:${#value}-2} ;;
      *) value=${value%%[[:space:]]#*} ;;
    esac
    [[ -n ${!key+set} ]] || export "$key=$value"
  done <"$1"
}
[[ ! -f .env ]] || read_env .env
export RANKS=${RANKS:-auto}

if [[ ${RUNTIME:-} != venv ]] && docker info >/dev/null 2>&1; then
  echo "run-local: in a container (RUNTIME=venv takes a virtual environment)" >&2
  # Compose takes the files of COMPOSE_FILE by itself. What the container leaves belongs to this user.
  HOST_UID=$(id -u) HOST_GID=$(id -g)
  export HOST_UID HOST_GID
  export DATA_MOUNT_DIR=${DATA_MOUNT_DIR:-./data} HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
  mkdir -p runs checkpoints "$DATA_MOUNT_DIR" "$HF_HOME"
  project=$(id -un | tr '[:upper:]' '[:lower:]' | tr -cd 'a-z0-9_-')-$(printf '%s\0' "$@" | cksum | cut -d' ' -f1)
  docker compose --project-name "scaling-fl-$project" build --quiet main
  exec docker compose --project-name "scaling-fl-$project" run --rm --service-ports main "$@"
fi

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "run-local: Python 3.11 or newer is needed, and $python is not: PYTHON=/path/to/python3.11 would do" >&2
  exit 1
fi
wanted=$(cat pyproject.toml constraints.txt demo-requirements.txt <(echo "${EXTRAS:-}") | cksum)
if [[ ! -x .venv/bin/python || $(cat .venv/installed 2>/dev/null) != "$wanted" ]]; then
  echo "run-local: installing into .venv (once, and again when pyproject.toml or a constraint changes)" >&2
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".[dev${EXTRAS:+,$EXTRAS}]"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps --require-hashes --requirement demo-requirements.txt
  echo "$wanted" >.venv/installed
fi
echo "run-local: in the virtual environment .venv (no Docker engine answers, or RUNTIME=venv)" >&2
exec .venv/bin/python "$@"

#!/usr/bin/env bash
# Run Python on this machine with everything that it needs: ./run-local.sh scripts/train_federated.py with ...
# In a container where Docker answers, in a virtual environment where it does not or RUNTIME=venv.
# ./run-local.sh dashboard shows the runs that are recorded in MongoDB.
# Paths in the arguments are relative to this folder. Settings in .env count where the environment has none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { echo "run-local: $1" >&2 || true; } # standard error may be closed

fail() {
  say "$1"
  exit 1
}

# Nothing in .env is executed, nothing but a leading ~/ expanded, and an empty value is as good as none.
read_env() {
  local LC_ALL=C # any byte may stand in a password
  local line key value number=0 space='[[:space:]]*'
  local nothing="^$space(#|\$)" setting="^$space(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)\$"
  local quoted="^$space(\"([^\"]*)\"|'([^']*)')$space(#.*)?\$" bare="^$space(.*[^[:space:]])?$space\$"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ ! $line =~ $nothing ]] || continue
    [[ $line =~ $setting ]] || fail "line $number of .env is not KEY=value" # shown, it might give a secret away
    key=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
    if [[ $value =~ $quoted ]]; then
      value=${BASH_REMATCH[2]}${BASH_REMATCH[3]}
    else
      [[ ${value%%[[:space:]]#*} =~ $bare ]]
      value=${BASH_REMATCH[1]}
      [[ $value != \~/* ]] || value=$HOME/${value:2}
    fi
    [[ -z $value || -n ${!key+set} ]] || export "$key=$value"
  done <"$1"
}
[[ ! -f .env ]] || read_env .env

if [[ ${RUNTIME:-} != venv ]] && docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1; then
  say "in a container (RUNTIME=venv takes a virtual environment)"
  if [[ ${1:-} == dashboard ]]; then
    [[ -n ${SACRED_USER:-} && -n ${SACRED_PASSWORD:-} ]] ||
      fail "SACRED_USER and SACRED_PASSWORD are needed: those of the MongoDB that is about to start"
    exec docker compose --env-file /dev/null --profile=dashboard up
  fi
  # What the container leaves belongs to this user.
  HOST_UID=${HOST_UID:-$(id -u)} HOST_GID=${HOST_GID:-$(id -g)}
  export HOST_UID HOST_GID IMAGE=${IMAGE:-scaling-fl:$HOST_UID}
  export DATA_MOUNT_DIR=${DATA_MOUNT_DIR:-./data} HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
  export SACRED_RUNS_DIR=${SACRED_RUNS_DIR:-./runs}
  [[ ${DEBUG:-} != 1 ]] || export COMPOSE_FILE=${COMPOSE_FILE:-docker-compose.yaml:docker-compose.debug.yaml}
  # Docker would make a missing folder as root.
  mkdir -p checkpoints "$SACRED_RUNS_DIR" "$DATA_MOUNT_DIR" "$HF_HOME"
  user=$(id -un | tr '[:upper:]' '[:lower:]' | tr -cd 'a-z0-9_-')
  project=scaling-fl-$user-$(printf '%s\0' "$@" | cksum | cut -d' ' -f1)
  # A container with the network of this machine, or of another container, has no ports to publish, and would listen to
  # other machines for a debugger.
  case ${DOCKER_NETWORK:-} in
    host | container:* | service:*) options=(--env DEBUG_HOST=127.0.0.1) ;;
    *) options=(--service-ports) ;;
  esac
  # .env has been read: Compose would understand its quotes and dollars in another way.
  compose=(docker compose --env-file /dev/null --project-name "$project" --profile=main)
  "${compose[@]}" build --quiet main >&2
  exec "${compose[@]}" run --rm "${options[@]}" main "$@"
fi

if [[ ${1:-} == dashboard ]]; then
  [[ -n ${SACRED_HOST:-} ]] || fail "SACRED_HOST is needed: the MongoDB whose runs are to be seen"
  omniboard=(omniboard)
  command -v omniboard >/dev/null || omniboard=(npm exec --yes --package=omniboard@2.16.1 -- omniboard)
  command -v "${omniboard[0]}" >/dev/null || fail "npm is needed for the dashboard, and not here: Node.js brings it"
  export PORT=${DASHBOARD_PORT:-9000} OMNIBOARD_CONFIG=$PWD/docker/omniboard.js
  say "the dashboard is about to be at http://127.0.0.1:$PORT"
  exec "${omniboard[@]}"
fi

# The Compose file that waits for a debugger means the same without Compose.
separator=${COMPOSE_PATH_SEPARATOR:-:}
files=$separator${COMPOSE_FILE:-}$separator
case $files in
  *"$separator"docker-compose.debug.yaml"$separator"* | */docker-compose.debug.yaml"$separator"*)
    export DEBUG=${DEBUG:-1} ;;
esac
[[ ${DEBUG:-} != 1 ]] || RANKS=${RANKS:-1} # the debugger's rank trains all sites, to the same bits
export RANKS=${RANKS:-auto}
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
wanted=$(cat pyproject.toml constraints.txt ./*-requirements.txt <(echo "$(pwd -P) ${EXTRAS:-}") | cksum)
if [[ ! -x .venv/bin/python || $(cat .venv/installed 2>/dev/null) != "$wanted" ]]; then
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
      fail "PYTHON: expected Python 3.11 or newer, got $python. Set PYTHON=/path/to/python3.11"
    [[ -x .venv/bin/python ]] || rm -f .venv/bin/python* # links to a Python that is gone
    "$python" -m venv .venv
  fi
  say "installing into .venv (once, and again when pyproject.toml, a constraint or EXTRAS changes)"
  pip=(.venv/bin/python -m pip --quiet --disable-pip-version-check install)
  # Python compiles and keeps what it imports, a part of all: pip would need a minute or two more for the rest.
  [[ -n ${PYTHONDONTWRITEBYTECODE:-} ]] || pip+=(--no-compile)
  "${pip[@]}" --constraint constraints.txt pip # that of Python 3.11 looks for packages a minute longer
  "${pip[@]}" --constraint constraints.txt --editable ".[dev${EXTRAS:+,$EXTRAS}]"
  for extra in demo ${EXTRAS:+${EXTRAS//,/ }}; do
    [[ ! -f $extra-requirements.txt ]] ||
      "${pip[@]}" --no-deps --require-hashes --requirement "$extra-requirements.txt"
  done
  echo "$wanted" >.venv/installed
fi
say "in the virtual environment .venv (Docker does not answer, or RUNTIME=venv)"
exec .venv/bin/python "$@"

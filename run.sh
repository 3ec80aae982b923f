#!/usr/bin/env bash
# Train a GPT to a target loss on this machine:  ./run.sh [--track NAME] [--OPTION VALUE ...]   (./run.sh --help)
# Run the tests:                                 ./run.sh test [PYTEST ARGUMENTS]
# The first call makes .venv beside this file and installs the pinned dependencies into it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv

fail() { echo "error: $*" >&2; exit 2; }

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"; return
        fi
    done
    fail "no Python 3.11 or newer with the venv module found; install one, or name it: PYTHON=/path/to/python3.12 ./run.sh"
}

install() {  # into .venv, once for each state of the requirements
    local stamp=$venv/.installed wanted
    wanted=$(cat "$here"/requirements*.txt)
    [[ -f $stamp && -x $venv/bin/python && $(<"$stamp") == "$wanted" ]] && return
    local quiet=-qq
    [[ -t 2 ]] && quiet=  # someone is watching: show pip's progress
    local python; python=$(find_python)
    echo "installing the pinned dependencies into .venv with $("$python" --version) (once; torch is large) ..." >&2
    [[ -x $venv/bin/python ]] || "$python" -m venv --clear "$venv" >&2
    "$venv/bin/python" -m pip install $quiet --disable-pip-version-check -r "$here/requirements.txt" >&2 \
        || fail "the dependencies did not install; the lines above say why. Run ./run.sh again when that is mended"
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -n | head -n 1 || true)
    if [[ ${capability%%.*} =~ ^(9|10)$ ]]; then  # chips that FlashAttention 4 is chosen for; older ones have 2 in torch
        "$venv/bin/python" -m pip install $quiet -c "$here/requirements.txt" -r "$here/requirements-flash.txt" >&2 \
            || echo "FlashAttention 4 did not install; going on with the attention built into torch" >&2
    fi
    echo "$wanted" > "$stamp"
}

install
if [[ ${1:-} == test ]]; then
    shift
    cd "$here"
    exec "$venv/bin/python" -m pytest "$@"
fi
exec "$venv/bin/python" "$here/train_gpt.py" "$@"  # starts torchrun itself where there are several GPUs

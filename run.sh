#!/usr/bin/env bash
# The door: installs once into .venv beside this file, then trains or runs a verb.
# Written for bash 3.2, which is what macOS has: no mapfile, no ${x,,}, no =~.
set -euo pipefail
# With these cd prints, and Python does not look beside its script or takes another one's library
unset CDPATH PYTHONSAFEPATH PYTHONHOME

door=${BASH_SOURCE[0]}
while [[ -L $door ]]; do  # a link to this file from elsewhere; macOS had no readlink -f for long
    link=$(readlink "$door")
    [[ $link == /* ]] || link=$(dirname "$door")/$link
    door=$link
done
here=$(cd -- "$(dirname -- "$door")" && pwd)
venv=$here/.venv

usage() {
    cat <<'END'
Train a GPT to a target loss against the clock, on this machine, and use what was trained.

  ./run.sh [OPTIONS]          train this machine's track: gpt2-small on GPUs, else laptop-counts
  ./run.sh --track NAME       train another one: see tracks/
  ./run.sh --text FILE        train on your own text, a file or a folder
  ./run.sh VERB [OPTIONS]     one of these; each has --help

  train         what ./run.sh does without a verb; --help lists every option of training
  test          the tests; takes pytest's arguments
  plan          tokens, memory, time, money and loss of a training before its first step
  data          fetch what a source has ahead of time
  sft           teach a run's model to answer, by conversations
  dpo           teach it which of two answers is better, beside what it was before
  orpo          the same without that, from a base model
  grpo          reinforcement learning: teach it by what its own answers are worth
  teach-demo    all of that in minutes, with a model of a million parameters
  sample        text from a run's model, with prompts and settings of yours
  chat          the same as a conversation in the terminal
  serve         the same for other programs, by OpenAI's protocol, and for a browser
  eval          bits per byte, multiple choice and other tasks, of a run's model or of two
  report        one HTML page about a run, or about several side by side
  export        write a model for transformers, llama.cpp or torchtitan
  import        make a run of a Llama or Qwen3 that transformers has written
  records       add, check, compare, plot and list results
  benchmarks    time kernels, steps, loaders, start-up; ablations; other programs side by side

Progress goes to stderr, results to stdout. The first call installs the pinned dependencies.
Exit status: 0 done, 2 something to put right (one line says what), 3 target not reached,
1 something nobody expected (one line says where the report is; --debug shows it at once).
END
}

fail() { echo "error: $*" >&2; exit 2; }

# apart COMMAND: without modules from PYTHONPATH or from the folder that one is in.
apart() { PYTHONPATH='' PYTHONSAFEPATH=1 "$@"; }

find_python() {
    # An array, since a path may have spaces in it
    local candidates=(python3 python3.13 python3.12 python3.11)
    [[ -n ${PYTHON:-} ]] && candidates=("$PYTHON")
    local candidate check='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
    for candidate in "${candidates[@]}"; do
        if apart "$candidate" -c "$check" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer with the venv module found; install one, or name it:" \
        "PYTHON=/path/to/python3.12 ./run.sh"
}

# venv_works: whether .venv's Python starts and finds its packages. It does not once the Python that
# made it has been removed, or upgraded to a version with another folder for packages.
venv_works() {
    local check='import sys; ours = [p for p in sys.path if p.startswith(sys.prefix)]
sys.exit(not any(p.endswith("site-packages") for p in ours))'
    [[ -x $venv/bin/python ]] && "$venv/bin/python" -c "$check" >/dev/null 2>&1
}

# pip_install FILE: the requirements in FILE, kept to the versions that requirements.txt pins.
pip_install() {
    local quiet=-qq
    [[ -t 2 ]] && quiet=  # someone is watching: show pip's progress
    # PIP_USER=0: where pip is set to install for the user, it refuses to install into .venv
    PIP_USER=0 apart "$venv/bin/python" -m pip install $quiet --disable-pip-version-check \
        -c "$here/requirements.txt" -r "$1" >&2
}

compile_c="from base.places import cache_folder
from kernels import native; native.build_all(cache_folder(), print)"

# require NAME: install requirements-NAME.txt (the core's for "core") once for each state of it.
require() {
    local file=$here/requirements-$1.txt
    [[ $1 == core ]] && file=$here/requirements.txt
    [[ -f $file ]] || return 0
    local stamp=$venv/.installed-$1
    local wanted; wanted=$(<"$file")
    if [[ -f $stamp ]] && [[ $(<"$stamp") == "$wanted" ]] && venv_works; then
        return 0
    fi
    if ! venv_works; then
        local python; python=$(find_python)
        apart "$python" -m venv --clear "$venv" >&2 \
            || fail "$venv was not made; the lines above say why. Mend that and start again"
    fi
    echo "installing ${file##*/} into .venv (once) ..." >&2
    export STOPWATCH_INSTALLED=1  # which base/clock.py leaves out of what a start takes
    pip_install "$file" \
        || fail "${file##*/} did not install; the lines above say why. Mend that and start again"
    if [[ $1 == core ]]; then
        try_flash_attention
        # C files; else they are compiled when they are first used
        PYTHONPATH=$here PYTHONSAFEPATH=1 "$venv/bin/python" -c "$compile_c" >&2 || true
    fi
    echo "$wanted" > "$stamp" || fail "$stamp cannot be written; make room and start again"
}

# FlashAttention 4 is for Hopper and Blackwell; on older GPUs torch has FlashAttention 2 built in.
try_flash_attention() {
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
        | sort -n | head -n 1 || true)
    case ${capability%%.*} in
        9 | 10) ;;
        *) return 0 ;;
    esac
    pip_install "$here/requirements-flash.txt" \
        || echo "FlashAttention 4 did not install; going on with torch's attention" >&2
}

verb=train
case ${1:-} in
    -h | --help | help) usage; exit ;;
    "" | -*) ;;  # options of train
    *) verb=$1; shift ;;
esac

# PyTorch cannot be loaded there
pwd -P >/dev/null 2>&1 || fail "the folder you are in has been deleted; change to another one"

case $verb in
    train)
        require core
        exec "$venv/bin/python" "$here/door.py" train "$@"  # a process for each GPU
        ;;
    test)
        require core
        require records
        require serve
        require test
        [[ " $* " == *" slow "* ]] && require slow
        cd "$here"
        if [[ $# == 0 ]]; then  # the whole suite: lint first
            "$venv/bin/ruff" check -q . && "$venv/bin/ruff" format -q --check . \
                || fail "ruff found what is above; ruff format and ruff check --fix mend most of it"
        fi
        unset PYTHONPATH
        exec "$venv/bin/python" -m pytest "$@"
        ;;
    plan | data | sft | dpo | orpo | grpo | teach-demo | sample | chat | serve | eval | report \
        | export | import | records | benchmarks)
        require core
        [[ $verb == benchmarks ]] && require records  # its statistics and pictures
        [[ "$verb ${1:-}" == "benchmarks serving" ]] && require serve
        [[ " $verb $* " == " plan "*" --chart "* ]] && require records
        [[ $verb == eval && ${1:-} == --harness ]] && require harness
        case $verb in  # without .jsonl they are given parquet, from a file or from the Hub
            sft | dpo | orpo | grpo)
                [[ " $* " == *" --data "* && "$*" != *.jsonl* ]] && require data ;;
        esac
        require "$verb"
        exec "$venv/bin/python" "$here/door.py" "$verb" "$@"
        ;;
    *)
        fail "unknown verb $verb; ./run.sh --help lists them, options begin with --"
        ;;
esac

#!/usr/bin/env bash
# One command for each job; every one first sets up .venv beside this file, once.
#
#   ./run.sh setup                          environment and native library, nothing else
#   ./run.sh train [options]                python caps.py train, e.g. --model alexcaps --epochs 20
#   ./run.sh test [pytest options]          the tests
#   ./run.sh ddp [N] [options]              train on N processes (default: one a GPU, else 2) through torchrun
#   ./run.sh ddp N [torchrun options] -- [options]        ... with --nnodes, --node-rank, --rdzv-endpoint, ...
#   ./run.sh eval|predict|export|summary|diagram|report [options]      the other modes of caps.py
#
# PYTHON names the interpreter that makes .venv (python3). VENV names another environment folder.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${VENV:-$here/.venv}
venv=${venv/#\~\//$HOME/}

fail() { echo "run.sh: $*" >&2; exit 2; }

# Whether $venv is an environment that can install packages; one whose making failed half way has no pip.
usable() {
    "$venv/bin/python" -c 'import os, pip, sys; sys.exit(not os.path.samefile(sys.prefix, sys.argv[1]))' "$venv" 2>/dev/null
}

setup() {
    local stamp=$venv/.caps-setup
    [ -x "$venv/bin/python" ] && cmp -s "$stamp" "$here/setup.py" && return
    case $(uname -s) in MINGW*|MSYS*|CYGWIN*)
        fail "native Windows: use WSL, or python caps.py where the packages that setup.py lists are installed" ;;
    esac
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "$python is not Python 3.10 or later; name one: PYTHON=python3.12 ./run.sh ..."
    if ! usable && ! { "$venv/bin/python" -m ensurepip --default-pip >/dev/null 2>&1 && usable; }; then
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$python cannot make environments (on Debian: apt install python3-venv)"
        local clear=  # nothing is deleted in a folder that VENV names
        [ ! -e "$venv/pyvenv.cfg" ] || [ -L "$venv" ] || [ "$venv" != "$here/.venv" ] || clear=--clear
        "$python" -m venv $clear "$venv" && usable ||
            fail "cannot make an environment in $venv; remove it, or name another: VENV=..."
    fi
    echo "run.sh: installing into $venv, some minutes" >&2
    local quiet=--quiet  # pip's progress is for a terminal, never for a mode's output
    [ ! -t 2 ] || quiet=
    # Under its earlier name this project is another distribution, which would keep a claim on caps.py.
    ! "$venv/bin/python" -m pip show caps 2>/dev/null | grep -qxF "Editable project location: $here" ||
        "$venv/bin/python" -m pip uninstall --quiet --yes caps
    # The library is built at first use: a build here would need torch before its own installation.
    CAPS_BUILD=0 "$venv/bin/python" -m pip install $quiet --disable-pip-version-check -e "$here[test]" >&2 ||
        fail "pip could not install the packages that setup.py lists"
    echo "run.sh: compiling the native operators, once" >&2
    "$venv/bin/python" -c 'import caps; caps.backend()' || fail "caps.py does not start in $venv"
    cp "$here/setup.py" "$stamp"
}

ddp() {
    local gpus processes torchrun_options=() threads
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT ${!TORCHELASTIC_@}  # an earlier launcher's
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    processes=$((gpus > 1 ? gpus : 2))
    [[ ${1--} = -* || $1 =~ ^[0-9]{1,4}$ ]] || fail "ddp '$1': expected a number of processes, or options"
    [[ ${1--} = -* ]] || { processes=$((10#$1)); shift; }
    [ "$processes" -ge 1 ] || fail "ddp $processes: expected at least 1 process"
    local word
    for word in "$@"; do
        [ "$word" = -- ] || continue
        while [ "$1" != -- ]; do torchrun_options+=("$1"); shift; done
        shift
        break
    done
    [ ${#torchrun_options[@]} -gt 0 ] || torchrun_options=(--standalone)
    local joined=" ${torchrun_options[*]//=/ } " host=1
    [[ ! $joined =~ node.rank\ [1-9] ]] || host=0
    if [[ ! $joined =~ rdzv.backend ]]; then
        # torchrun ends in a traceback where another program listens at the port that this machine is to open.
        if [[ $host = 1 && ${joined//_/-} =~ --(master-port|rdzv-endpoint)\ ([^\ ]*:)?([0-9]+)\  ]]; then
            "$venv/bin/python" -c 'import socket, sys; socket.create_server(("", int(sys.argv[1])))' \
                "${BASH_REMATCH[3]}" 2>/dev/null || fail "port ${BASH_REMATCH[3]} is in use here; name another one"
        fi
        [[ ! $joined =~ rdzv.endpoint ]] || torchrun_options+=(--rdzv-backend c10d --rdzv-conf "is_host=$host")
    fi
    threads=$(($(nproc) / processes))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    # What can be refused is refused here, once; and the library is built before the ranks ask for it.
    if [ $host = 1 ]; then
        LOCAL_WORLD_SIZE=$processes "$venv/bin/python" "$here/caps.py" train "$@" --check >/dev/null
    else
        "$venv/bin/python" -c 'import caps; caps.backend()'
    fi
    # A store for each attempt: in a shared one gloo finds the addresses of processes that are no more.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 CAPS_JOB=$$-$(date +%s)
    # A mistake that comes to light in training is not repeated by a restart: see forgo_restarts in extras/machine.py.
    CAPS_RUNNING=$(mktemp) || fail "no temporary file can be made"
    export CAPS_RUNNING
    exec "$venv/bin/python" -c '
import os, sys
from torch.distributed.run import main
try:
    main(sys.argv[1:])
    sys.exit(0 if os.path.exists(os.environ["CAPS_RUNNING"]) else 2)
finally:
    if os.path.exists(os.environ["CAPS_RUNNING"]):
        os.remove(os.environ["CAPS_RUNNING"])' --nproc-per-node "$processes" --max-restarts 3 \
        "${torchrun_options[@]}" "$here/caps.py" train "$@"
}

mode=${1:-help}
[ $# -eq 0 ] || shift
case $mode in
    setup) setup ;;
    test) setup; cd "$here"; exec "$venv/bin/python" -m pytest "$@" ;;
    ddp) setup; ddp "$@" ;;
    train|eval|predict|export|summary|diagram|report) setup; exec "$venv/bin/python" "$here/caps.py" "$mode" "$@" ;;
    help|-h|--help) sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" ;;
    *) fail "unknown job '$mode'; see ./run.sh help" ;;
esac

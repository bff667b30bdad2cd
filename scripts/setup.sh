#!/usr/bin/env bash
# Makes .venv with everything that training needs (--dev: and testing). Does nothing when nothing has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dev=false
for argument in "$@"; do
    case "$argument" in
        --dev) dev=true ;;
        *) echo "usage: scripts/setup.sh [--dev]" >&2; exit 2 ;;
    esac
done

fail() { echo "setup: $1" >&2; exit 1; }

python=""
for candidate in python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
[ -n "$python" ] || fail "no Python 3.11 or newer. On Debian and Ubuntu: apt install python3.11-venv g++ git"
version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
packages="apt install python$version-venv g++ git"
# DeepSpeed compiles its communication and optimizer kernels on first use.
command -v g++ >/dev/null || fail "g++ is missing (DeepSpeed compiles kernels on first use). On Debian and Ubuntu: $packages"
command -v git >/dev/null || fail "git is missing. On Debian and Ubuntu: $packages"

# Half-made (interrupted, or its interpreter is gone): start over.
if [ -e .venv ] && ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    echo "setup: .venv is broken, making a new one"
    rm -rf .venv
fi
if [ ! -e .venv ]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "this Python cannot make virtual environments. On Debian and Ubuntu: $packages"
    "$python" -m venv .venv
fi

# $1: requirements file. The stamp is written last, so that an interrupted installation is done again.
install() {
    local stamp=".venv/.installed-$1" hash
    hash="$(sha256sum "$1")"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$hash" ]; then
        echo "setup: installing $1 (minutes, the first time)"
        # torch first and by its pin alone: pip then takes a CPU build where its configuration offers one, and the rest builds on it.
        if grep -q '^torch==' "$1"; then
            .venv/bin/pip install --quiet --quiet --disable-pip-version-check "$(grep '^torch==' "$1")"
        fi
        .venv/bin/pip install --quiet --quiet --disable-pip-version-check -r "$1"
        echo "$hash" >"$stamp"
    fi
}

install requirements.txt
if $dev; then
    install requirements-dev.txt
fi

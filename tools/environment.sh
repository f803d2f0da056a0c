# Sourced by the tools, never run: makes the virtual environment with the project and its checkers.
# Sets root (the project) and venv, and puts the environment first in PATH. Needs only Python and git.

project_root() {
    CDPATH='' cd -- "$(dirname -- "$0")" || return 1
    while [ ! -f pyproject.toml ] && [ "$PWD" != / ]; do cd ..; done
    pwd
}

root=$(project_root)
venv=${DMSYNC_VENV:-$root/.venv}
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*" >&2; }

die() {
    say "$(basename -- "$0"): $*"
    exit 1
}

can_install_packages() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }

# install_packages PACKAGE...: Debian packages, without questions and without their suggestions.
install_packages() {
    say "installing $*"
    DEBIAN_FRONTEND=noninteractive apt-get -qq update &&
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >&2
}

find_python() {
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed"
}

make_venv() {
    python=$(find_python) || exit 1
    # Debian ships the module venv without what it needs to bring pip along.
    if ! "$python" -c 'import ensurepip' >/dev/null 2>&1; then
        can_install_packages || die "python3-venv is missing: install it (apt-get install python3-venv)"
        install_packages python3-venv || die "python3-venv could not be installed"
    fi
    "$python" -m venv "$venv" || die "no virtual environment could be made in $venv"
}

# The stamp is a copy of what was installed from: a changed pyproject.toml or a moved project installs again.
stamp_text() { printf '%s\n' "$root" && cat "$root/pyproject.toml"; }

prepare_environment() {
    stamp=$venv/installed-from
    [ -x "$venv/bin/python" ] || make_venv
    if [ "$(stamp_text)" != "$(cat "$stamp" 2>/dev/null)" ]; then
        say "installing the project into $venv"
        "$venv/bin/python" -m pip install -q -e "$root[dev]" || die "pip could not install the project"
        stamp_text >"$stamp"
    fi
    PATH=$venv/bin:$PATH
    export PATH
    cd "$root" || exit 1
}

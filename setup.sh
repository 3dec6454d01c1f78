# Sourced by train.sh and tests/run.sh: leaves in $PYTHON an interpreter that has all of pyproject.toml.
# The first of `python` and `python3` on PATH that has torch 2.8 or newer, and that pip may install into, is
# used as it is, and only what it lacks is added: an active virtual, conda or pyenv environment, or the Python
# of a container, but not the Python of the system (PEP 668). Otherwise .venv is made beside this file, with
# the versions of constraints.txt. A second start finds its stamp and installs nothing.
# $1: an extra of pyproject.toml, such as test; may be empty.
# In bash 3.2 (macOS) `set -u` rejects an empty "${array[@]}", and `set -e` overlooks a subshell that fails.

extra=${1:-}
checkout=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

refuse() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# The path of interpreter $1, or nothing if it is not to be used. -I: ignore modules in the caller's folder.
usable() {
    "$1" -I -c '
import os, sys, sysconfig
from importlib.metadata import version
recent = sys.version_info >= (3, 10) and tuple(map(int, version("torch").split(".")[:2])) >= (2, 8)
marked = os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))
system = marked and sys.prefix == sys.base_prefix
if recent and not system and os.access(sysconfig.get_path("purelib"), os.W_OK):
    print(sys.executable)' 2>/dev/null || true
}

make_venv() {
    local python
    for python in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null && break
        python=''
    done
    [ -n "$python" ] \
        || refuse "Python 3.10 to 3.14 is needed (the pinned torch has no others); none is on PATH"
    "$python" -m venv --clear --without-pip "$checkout/.venv" \
        || refuse "$python cannot make $checkout/.venv (on Debian and Ubuntu: apt install python3-venv)"
}

pip_install() {
    if "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1; then
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
    elif command -v uv >/dev/null; then
        uv pip install --quiet --python "$PYTHON" "$@"
    else
        refuse "$PYTHON has no pip, and neither ensurepip nor uv is there to install with" \
            "(on Debian and Ubuntu: apt install python3-venv)"
    fi
}

writable_or_refuse() {
    [ -w "$1" ] || refuse "cannot write in $1: use a copy of the checkout in a folder of your own, or" \
        "activate an environment that has torch 2.8 or newer and that you may install into"
}

own=$checkout/.venv/bin/python
PYTHON=$(usable python)
PYTHON=${PYTHON:-$(usable python3)}
pinned=()
if [ "${PYTHON:-$own}" = "$own" ]; then
    PYTHON=$own
    pinned=(--constraint constraints.txt)
    if ! "$PYTHON" -c '' 2>/dev/null; then # none, or its base interpreter is gone
        writable_or_refuse "$checkout"
        make_venv
    fi
fi

versions=$(cat "$checkout/pyproject.toml" "$checkout/constraints.txt" | cksum | cut -d' ' -f1)
stamp=$(dirname "$PYTHON")/.ttrl-$versions-$extra
if [ ! -e "$stamp" ]; then
    writable_or_refuse "$(dirname "$PYTHON")"
    echo "installing what pyproject.toml names into $(dirname "$(dirname "$PYTHON")") ..." >&2
    (cd "$checkout" && pip_install ${pinned[@]+"${pinned[@]}"} ".${extra:+[$extra]}") || exit $?
    touch "$stamp"
fi

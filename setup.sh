# Sourced by train.sh and tests/run.sh: leaves in $PYTHON an interpreter that has all of pyproject.toml.
# The first of `python` and `python3` on PATH that has torch 2.8 or newer, and that lacks nothing or that pip
# may install into, is used as it is, and only what it lacks is added: an active virtual, conda or pyenv
# environment, or the Python of a container. Into the Python of the system (PEP 668) pip may not. Otherwise
# .venv is made beside this file, with the versions of constraints.txt.
# Where nothing is missing, nothing is installed: no pip, no network and no place to write in are needed.
# $1: extras of pyproject.toml, such as "test dev"; may be empty.
# In bash 3.2 (macOS) `set -u` rejects an empty "${array[@]}", and `set -e` overlooks a subshell that fails.

extras=${1:-}
checkout=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

refuse() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# The path of interpreter $1, then, if it lacks anything, what pip has to be called with, a word a line.
# Nothing if it is not to be used. -I: ignore modules in the caller's folder.
survey() {
    "$1" -I -c '
import ast, os, re, sys, sysconfig
from importlib.metadata import version
checkout, extras = sys.argv[1:]
project, pins = (open(os.path.join(checkout, name)).read() for name in ("pyproject.toml", "constraints.txt"))
requirements = []
for name in ["dependencies", *extras.split()]:
    array = re.search(rf"^{name} = (\[.*?\])( #.*)?$", project, re.M | re.S)
    requirements += ast.literal_eval(array[1]) # TOML, which Python 3.10 cannot read, writes it as Python does
own = sys.executable == os.path.join(checkout, ".venv", "bin", "python")
def satisfied(requirement):
    from packaging.requirements import Requirement
    wanted = Requirement(requirement)
    if wanted.marker and not wanted.marker.evaluate():
        return True
    pin = re.search(rf"^{wanted.name}(==\S+)", pins, re.M) if own else None
    allowed = wanted.specifier & (pin[1] if pin else "")
    return allowed.contains(version(wanted.name), prereleases=True)
try:
    complete = all(map(satisfied, requirements))
except ImportError: # there is no such package, or no packaging to compare versions with
    complete = False
to_install = [] if complete else [*(["--constraint", "constraints.txt"] if own else []), *requirements]
recent = lambda: sys.version_info >= (3, 10) and tuple(map(int, version("torch").split(".")[:2])) >= (2, 8)
marked = os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))
system = marked and sys.prefix == sys.base_prefix
if own or recent() and (complete or not system and os.access(sysconfig.get_path("purelib"), os.W_OK)):
    print(sys.executable, *to_install, sep="\n")' "$checkout" "$extras"
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

# What pip says is shown only if it fails: it may warn once for each package of an index that is not there.
pip_install() {
    local install said
    if "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1; then
        install=("$PYTHON" -m pip install --quiet --no-input --disable-pip-version-check)
    elif command -v uv >/dev/null; then
        install=(uv pip install --quiet --python "$PYTHON")
    else
        refuse "$PYTHON has no pip, and neither ensurepip nor uv is there to install with" \
            "(on Debian and Ubuntu: apt install python3-venv)"
    fi
    said=$("${install[@]}" "$@" 2>&1) || {
        echo "$said" >&2
        refuse "what is missing could not be installed, as the lines above say; where there is no network," \
            "activate an environment that lacks nothing"
    }
}

writable_or_refuse() {
    [ -w "$1" ] || refuse "cannot write in $1: use a copy of the checkout in a folder of your own, or" \
        "activate an environment that has torch 2.8 or newer and that you may install into"
}

own=$checkout/.venv/bin/python
found=$(survey python 2>/dev/null || true)
found=${found:-$(survey python3 2>/dev/null || true)}
if [ -z "$found" ]; then
    if ! "$own" -c '' 2>/dev/null; then # none, or its base interpreter is gone
        writable_or_refuse "$checkout"
        make_venv
    fi
    found=$(survey "$own")
fi

PYTHON=${found%%$'\n'*}
if [ "$found" != "$PYTHON" ]; then
    writable_or_refuse "$(dirname "$PYTHON")"
    echo "installing what pyproject.toml names into $(dirname "$(dirname "$PYTHON")") ..." >&2
    IFS=$'\n' read -r -d '' -a words <<<"${found#*$'\n'}" || true # false is the end of the text
    (cd "$checkout" && pip_install "${words[@]}") || exit $?
fi

# Sourced by train.sh and tests/run.sh: leaves in $PYTHON an interpreter that has all of pyproject.toml.
# An active virtual environment with torch 2.8 or newer (a GPU box) is used as it is, only what it lacks is added;
# otherwise .venv is made, with the versions of constraints.txt. A second start finds its stamp and installs nothing.
# $1: an extra of pyproject.toml, such as test; may be empty.

extra=${1:-}
pip_install() { "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"; }

if [ -n "${VIRTUAL_ENV:-}" ] && "$VIRTUAL_ENV/bin/python" - <<'PY' 2>/dev/null
import sys, torch
sys.exit(tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 8))
PY
then
    PYTHON=$VIRTUAL_ENV/bin/python
    pinned=()
else
    PYTHON=$PWD/.venv/bin/python
    pinned=(--constraint constraints.txt)
    if [ ! -x "$PYTHON" ]; then
        python=$(command -v python3 || command -v python) || { echo "Python 3.10 or newer is needed, none was found" >&2; exit 2; }
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
            || { echo "Python 3.10 or newer is needed, $python is $("$python" --version)" >&2; exit 2; }
        "$python" -m venv .venv
    fi
fi

stamp=$(dirname "$PYTHON")/.ttrl-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)-$extra
if [ ! -e "$stamp" ]; then
    echo "installing what pyproject.toml names into $(dirname "$(dirname "$PYTHON")") ..." >&2
    pip_install "${pinned[@]}" ".${extra:+[$extra]}"
    touch "$stamp"
fi

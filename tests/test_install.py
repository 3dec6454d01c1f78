"""Installing elsewhere: the pinned versions exist for other machines, and setup.sh and train.sh work on them.

The scripts run for real, in a copy of the checkout. Stubs of pip, ensurepip and uv note how they are called.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import packaging
import pytest
from conftest import ROOT, command, execute

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest requires it there

# -----------------------------------------------------------------------------------------------------------
# the versions, as resolved on another machine

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
PLATFORMS = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "aarch64-apple-darwin"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = list(PROJECT["optional-dependencies"])
INDEX = "https://pypi.org/simple"


def elsewhere():
    """The environment of a machine that has PyPI and nothing else: wheels on this disk are not found."""
    ours = [name for name in os.environ if name.startswith(("PIP_", "UV_")) and name != "PIP_CERT"]
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": INDEX, "MACOSX_DEPLOYMENT_TARGET": "14.0"}


def uv(*arguments):
    return execute(
        [sys.executable, "-m", "uv", "--no-config", "--quiet", *arguments], env=elsewhere(), cwd=ROOT
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    pytest.importorskip("uv")
    try:
        urllib.request.urlopen(f"{INDEX}/pip/", timeout=20).close()
    except urllib.error.HTTPError:
        raise
    except OSError as error:
        pytest.skip(f"no network: {INDEX} answers {error}")
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_every_machine_finds_a_wheel_of_everything(python, platform, cache):
    """All extras at once: versions that suit all of them suit each of them."""
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    found = uv("pip", "compile", "pyproject.toml", *extras, "--constraint", "constraints.txt",
               "--only-binary", ":all:", "--python-version", python, "--python-platform", platform,
               "--python", sys.executable, "--default-index", INDEX, "--cache-dir", cache)  # fmt: skip
    assert "torch==2.13.0\n" in found.stdout
    assert "triton==3.7.1\n" in found.stdout or "linux" not in platform


@pytest.fixture(scope="module")
def empty(cache, tmp_path_factory):
    """The python of an empty environment with the newest pip, whose dry run downloads metadata only."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    uv("venv", "--seed", "--python", sys.executable, "--default-index", INDEX, "--cache-dir", cache, folder)
    return folder / "bin" / "python"


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_pip_resolves_this_machine_and_builds_the_project(extra, empty):
    arguments = "-m pip install --dry-run --quiet --use-feature=fast-deps -c constraints.txt --report -"
    done = execute([empty, *arguments.split(), f".[{extra}]" if extra else "."], env=elsewhere(), cwd=ROOT)
    found = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    versions = {metadata["name"]: metadata["version"] for metadata in found}
    assert {"ttrl", "transformers"} <= versions.keys() and versions["torch"] == "2.13.0"


def test_flash_attn_is_in_no_extra():
    """Its build imports torch, which pip hides from it."""
    assert "flash" not in str(PROJECT)


# ----------------------------------------------------------------------------------------------------------
# setup.sh

TOOLS = "bash basename dirname mount".split()
# Notes its arguments, and leaves the metadata of what it was asked for, in the version of constraints.txt.
PIP_STUB = f"""import os, pathlib, re, shutil, sys, sysconfig
open(os.environ["NOTES"], "a").write(" ".join(sys.argv[1:]) + "\\n")
print("WARNING: Location 'file:///nowhere' is ignored", file=sys.stderr)
if os.path.exists(os.environ["NOTES"] + ".broken") and sys.argv[1] == "install":
    sys.exit("ERROR: No matching distribution found")
packages = pathlib.Path(sysconfig.get_path("purelib"))
pins = dict(re.findall("(?m)^(.+)==(.+)$", pathlib.Path("constraints.txt").read_text()))
for name in pins.keys() & {{re.split("[<>=;]", word)[0] for word in sys.argv}}:
    found = list(packages.glob(f"{{name}}-*"))
    if found and "--constraint" in sys.argv:
        shutil.rmtree(found.pop())
    if not found:
        metadata = packages / f"{{name}}-{{pins[name]}}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Name: {{name}}\\nVersion: {{pins[name]}}")
if not (packages / "packaging").exists():
    (packages / "packaging").symlink_to({os.path.dirname(packaging.__file__)!r})
"""
ENSUREPIP = f"""import pathlib, sysconfig
folder = pathlib.Path(sysconfig.get_path("purelib"), "pip")
folder.mkdir()
(folder / "__main__.py").write_text({PIP_STUB!r})
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def site_packages(venv):
    (packages,) = venv.glob("lib/python*/site-packages")
    return packages


class Machine:
    """A copy of the checkout in a folder with spaces, and a PATH with a Python without packages only."""

    def __init__(self, folder):
        self.folder, self.bin, self.notes = folder, folder / "bin", folder / "notes"
        self.checkout = folder / "a folder with spaces" / "check out"
        self.own = self.checkout / ".venv" / "bin" / "python"
        junk = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, self.checkout, ignore=junk)
        for name in ("python", "python3"):  # -S: without its packages
            executable(self.bin / name, f'exec "{os.path.realpath(sys.executable)}" -S "$@"')
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name))
        self.ensurepip(ENSUREPIP)
        self.path = [self.bin]

    def ensurepip(self, text):
        """Put a module in place of the standard library's."""
        (self.folder / "modules").mkdir(exist_ok=True)
        (self.folder / "modules" / "ensurepip.py").write_text(text)

    def venv(self, folder, torch=None, pip=True):
        """Activate a virtual environment with a torch of that version, as far as its metadata says."""
        subprocess.run([self.bin / "python", "-m", "venv", "--without-pip", folder], check=True)
        packages = site_packages(folder)
        if torch:
            about = packages / f"torch-{torch}.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Name: torch\nVersion: {torch}")
        if pip:
            (packages / "pip").mkdir()
            (packages / "pip" / "__main__.py").write_text(PIP_STUB)
        self.path = [folder / "bin", self.bin]
        return folder

    def bash(self, *arguments, prefix=(), code=0, **options):
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        kept |= {"PATH": ":".join(map(str, self.path)), "NOTES": str(self.notes)}
        kept |= {"PYTHONPATH": str(self.folder / "modules")}
        line = [*prefix, shutil.which("bash"), *arguments]
        return execute(line, code, env=kept, **{"cwd": self.folder, **options})

    def setup(self, extras="", **options):
        """Source setup.sh: (the interpreter that it chose, stderr)."""
        script = 'set -euo pipefail; source "$1/setup.sh" "$2"; echo "$PYTHON"'
        done = self.bash("-c", script, "setup", self.checkout, extras, **options)
        return Path(done.stdout.strip()), done.stderr

    def installed(self):
        """What pip or uv were asked to install, a line a call."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [line for line in lines if line != "--version"]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def all_of(*extras):
    """Every requirement of pyproject.toml, as words of a command line."""
    return " ".join(sum(map(PROJECT["optional-dependencies"].get, extras), PROJECT["dependencies"]))


PIP = "install --quiet --no-input --disable-pip-version-check"
PINNED = "--constraint constraints.txt"


def pinned(*extras):
    """What pip is asked for where the versions are those of constraints.txt."""
    return f"{PIP} {PINNED} {all_of(*extras)}"


def test_a_new_machine_gets_the_pinned_versions_once(machine):
    assert machine.setup("test")[0] == machine.own and machine.installed() == [pinned("test")]
    assert machine.setup("test") == machine.setup() == (machine.own, "") and len(machine.installed()) == 1
    assert machine.setup("test dev")[0] == machine.own
    assert machine.installed()[1:] == [pinned("test", "dev")]


def test_its_venv_follows_the_pins_and_mends_a_loss(machine):
    machine.setup()
    pins = machine.checkout / "constraints.txt"
    pins.write_text(re.sub("tqdm==.*", "tqdm==4.66.0", pins.read_text()))
    machine.setup()
    shutil.rmtree(*site_packages(machine.checkout / ".venv").glob("safetensors-*"))
    machine.setup()
    assert machine.setup() == (machine.own, "") and machine.installed() == [pinned()] * 3


FOUND = ["a venv without pip", "a venv without a python", "an empty venv", "its own venv, active",
         "python3.12", "an old torch", "no torch", "the system's torch"]  # fmt: skip


@pytest.mark.parametrize("found", FOUND)
def test_the_pinned_versions_go_into_its_own_venv_whatever_is_found(machine, found):
    """A half-made venv does not block, and another environment is left alone."""
    venv = machine.checkout / ".venv"
    if found == "a venv without pip":  # what Debian's python3 -m venv leaves behind without python3-venv
        machine.venv(venv, pip=False)
        machine.path = [machine.bin]
    elif found == "a venv without a python":  # its Python was updated away
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").symlink_to("/nowhere/python3.9")
    elif found == "an empty venv":
        venv.mkdir()
    elif found == "its own venv, active":
        machine.venv(venv, "2.13.0")
    elif found == "python3.12":
        (machine.bin / "python3").rename(machine.bin / "python3.12")
        (machine.bin / "python").unlink()
    else:
        torch = {"an old torch": "2.7.1", "no torch": None, "the system's torch": "2.13.0"}[found]
        other = machine.venv(machine.folder / "env", torch)
        if found == "the system's torch":
            make_system(other)
    assert machine.setup()[0] == machine.own and machine.installed() == [pinned()]


def test_without_pip_and_ensurepip_it_says_what_to_do_until_it_is_done(machine):
    machine.ensurepip("raise SystemExit(1)")
    for _ in range(2):
        said = machine.setup(code=2)[1].splitlines()[-1]
        assert said.startswith("setup: ") and "has no pip" in said and "apt install python3-venv" in said
    machine.ensurepip(ENSUREPIP)
    machine.setup()
    assert machine.installed() == [pinned()]


def test_what_pip_says_is_shown_only_if_it_fails(machine):
    machine.venv(machine.folder / "env", "2.13.0")
    broken = machine.folder / "notes.broken"
    broken.touch()
    ours, *pips, last = machine.setup(code=2)[1].splitlines()
    assert ours == f"installing what pyproject.toml names into {machine.folder / 'env'} ..."
    assert pips == ["WARNING: Location 'file:///nowhere' is ignored", "ERROR: No matching distribution found"]
    assert last.startswith("setup: what is missing could not be installed, as the lines above say; ")
    broken.unlink()
    assert machine.setup()[1] == f"{ours}\n"


def test_uv_installs_where_pip_is_not_to_be_had(machine):
    machine.ensurepip("raise SystemExit(1)")
    executable(machine.bin / "uv", 'echo "uv $*" >> "$NOTES"')
    own, _ = machine.setup()
    assert machine.installed() == [f"uv pip install --quiet --python {own} {PINNED} {all_of()}"]


@pytest.mark.parametrize("old", ["none at all", "3.9"])
def test_without_a_suitable_python_it_says_so(machine, old):
    for name in ("python", "python3"):
        (machine.bin / name).unlink()
        if old == "3.9":
            executable(machine.bin / name, "exit 1")
    assert "Python 3.10 to 3.14 is needed" in machine.setup(code=2)[1]
    assert not (machine.checkout / ".venv").exists()


# ----------------------------------------------------------------------------------------------------------
# active environments


@pytest.mark.parametrize("kind", ["virtual or conda environment", "pyenv"])
@pytest.mark.parametrize("torch", ["2.8.0", "2.13.0+cpu", "2.9.0a0+145a3a7.nv25.10"])
def test_an_active_environment_with_torch_is_used(machine, kind, torch):
    venv = machine.venv(machine.folder / "my env", torch)
    if kind == "pyenv":  # on PATH lies a script that looks for the real one
        machine.path = [machine.folder / "shims", machine.bin]
        executable(machine.folder / "shims" / "python", f'exec "{venv}/bin/python" "$@"')
    assert machine.setup("test")[0] == venv / "bin" / "python"
    assert machine.setup("test")[1] == "" and machine.installed() == [f"{PIP} {all_of('test')}"]
    assert not (machine.checkout / ".venv").exists()


SYSTEM = """import sys, sysconfig
sys.base_prefix = sys.prefix
get_path = sysconfig.get_path
sysconfig.get_path = lambda name, *args, **kw: sys.prefix if name == "stdlib" else get_path(name, *args, **kw)
"""


def make_system(venv):
    """It is no virtual environment any more, and pip may not install into it (PEP 668)."""
    (site_packages(venv) / "sitecustomize.py").write_text(SYSTEM)
    (venv / "EXTERNALLY-MANAGED").touch()


@pytest.mark.parametrize("why", ["no pip", "the system's", "read-only"])
def test_where_nothing_is_missing_nothing_is_asked_for(machine, why):
    """It needs neither pip nor a network nor a place to write in; without one package it does."""
    venv = machine.venv(machine.folder / "env", "2.11.0+cu130")
    machine.setup("test")
    packages = site_packages(venv)
    shutil.rmtree(packages / "pip")
    machine.ensurepip("raise SystemExit(1)")
    if why == "the system's":
        make_system(venv)
    prefix = isolated("--mount", first=READ_ONLY.format(venv)) if why == "read-only" else ()
    assert machine.setup("test", prefix=prefix) == (venv / "bin" / "python", "")
    shutil.rmtree(*packages.glob("mpmath-*"))
    assert "has no pip" in machine.setup("test", prefix=prefix, code=2)[1]
    assert (machine.checkout / ".venv").exists() == (why != "no pip") and len(machine.installed()) == 1


MISSING = ["nowhere", "tqdm>=99", "torch>=2.9.1"]
THERE = ["nowhere; sys_platform == 'plan9'", "tqdm[notebook]>=4", "torch>=2.9"]


@pytest.mark.parametrize("dependency", MISSING + THERE)
def test_what_counts_as_missing(machine, dependency):
    machine.venv(machine.folder / "env", "2.9.1a0+145a3a7.nv25.10")  # NVIDIA's containers have such
    machine.setup()
    project = machine.checkout / "pyproject.toml"
    project.write_text(project.read_text().replace("dependencies = [", f'dependencies = ["{dependency}",'))
    machine.setup()
    assert machine.installed()[1:] == [f"{PIP} {dependency} {all_of()}"] * (dependency in MISSING)


def test_the_style_is_checked_where_ruff_is(machine):
    packages = site_packages(with_everything(machine))
    (packages / "ruff.py").write_text("raise ImportError if __name__ == 'ruff' else SystemExit('bad style')")
    run = machine.checkout / "tests" / "run.sh"
    assert "the style is not checked" in machine.bash(run, "--version").stderr
    (packages / "ruff.py").write_text("if __name__ == '__main__': raise SystemExit('bad style')")
    assert machine.bash(run, "--version", code=1).stderr == "bad style\n"


# ----------------------------------------------------------------------------------------------------------
# the file system, the network, the shell


def isolated(*spaces, first="pass"):
    """A command prefix: run the command in new Linux namespaces, after some Python. Skips if not allowed."""
    unshare = ["unshare", "--user", "--map-root-user", *spaces]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip(f"{' '.join(unshare)} is not allowed here")
    code = f"import os, sys\n{first}\nos.execv(sys.argv[1], sys.argv[1:])"
    return [*map(shutil.which, unshare[:1]), *unshare[1:], os.path.realpath(sys.executable), "-c", code]


READ_ONLY = """for how in ("--bind", "-oremount,ro,bind"):
    assert os.system(f"mount {{how}} '{0}' '{0}'") == 0"""


@pytest.mark.parametrize("active", [False, True], ids=["", "active environment"])
def test_a_read_only_checkout(machine, active):
    """One sentence, unless there is another place to install into. A mount is read-only for root too."""
    prefix = isolated("--mount", first=READ_ONLY.format(str(machine.checkout)))
    if active:
        machine.venv(machine.folder / "env", "2.13.0")
        machine.setup(prefix=prefix)
        assert machine.installed() == [f"{PIP} {all_of()}"]
    else:
        said = machine.setup(prefix=prefix, code=2)[1]
        assert said.startswith(f"setup: cannot write in {machine.checkout}: ") and len(said.splitlines()) == 1
    assert not (machine.checkout / ".venv").exists()


def with_everything(machine):
    """Activate an environment that finds the packages of this Python."""
    venv = machine.venv(machine.folder / "env", "2.13.0", pip=False)
    installed = [path for path in sys.path if path.endswith("-packages")]
    (site_packages(venv) / "these.pth").write_text("\n".join(installed))
    return venv


def test_the_tests_start_without_a_network_where_nothing_is_missing(machine):
    with_everything(machine)
    done = machine.bash(machine.checkout / "tests" / "run.sh", "--version", prefix=isolated("--net"))
    assert done.stdout.startswith("pytest ") and "installing" not in done.stderr


def from_elsewhere(machine, ranks, few_questions, prefix=()):
    """Evaluate with relative paths, from a folder with modules of the names that torch and ttrl.py import."""
    with_everything(machine)
    here = machine.folder / "here"
    here.mkdir()
    shutil.copy(few_questions, here / "mine.json")
    for module in ("questions", "random", "torch"):
        (here / f"{module}.py").write_text("raise SystemExit('a module of the caller')")
    flags = "--data mine.json --out out --eval-only --eval-samples 2 --max-new-tokens 4".split()
    done = machine.bash(machine.checkout / "train.sh", "--nproc", ranks, *flags, prefix=prefix, cwd=here)
    assert "6 questions" in done.stdout and (here / "out" / "evaluation.json").exists()
    assert not (machine.checkout / "out").exists() and f"ranks    {ranks} " in done.stdout
    return done.stderr


def test_relative_paths_are_those_of_the_caller(machine, few_questions):
    from_elsewhere(machine, 1, few_questions)


@pytest.mark.parametrize("given", ["--nproc=0", "--nproc=two", "--nproc -1", "--nproc"])
def test_a_wrong_number_of_processes_is_refused(machine, given):
    done = machine.bash(machine.checkout / "train.sh", "--dry-run", *given.split(), code=2)
    assert "train.sh: --nproc is the number of processes, 1 or more, not " in done.stderr


OFFLINE = """import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 0x49))  # SIOCSIFFLAGS: up, loopback, running
socket.sethostname("nowhere-xyz")"""


@pytest.mark.parametrize("start", ["train.sh", "tests"])
def test_processes_meet_where_the_host_name_does_not_resolve(machine, start, few_questions):
    """They would wait for each other without end. The name is not even looked up."""
    prefix = isolated("--uts", "--net", first=OFFLINE)
    if start == "train.sh":
        said = from_elsewhere(machine, 2, few_questions, prefix)
    else:
        said = execute([*prefix, *command("--data", few_questions, "--dry-run", ranks=2)]).stderr
    assert "Unable to resolve hostname" not in said


@pytest.mark.parametrize("script", ["train.sh", "setup.sh", "tests/run.sh", ".ci/run"])
def test_an_array_may_be_empty_in_bash_3_2(script):
    """Under set -u its "${array[@]}" is an unbound variable there; ${array[@]+"${array[@]}"} is not."""
    code = "\n".join(line.partition("# ")[0] for line in (ROOT / script).read_text().splitlines())
    unguarded = re.sub(r'\$\{(\w+)\[@\]\+"\$\{\1\[@\]\}"\}', "", code)
    filled = set(re.findall(r"(?:\bread .*-a )?\b(\w+)(?:=\([^)]| <<<)", code))
    filled -= set(re.findall(r"\b(\w+)=\(\)", code))
    assert set(re.findall(r"\$\{(\w+)\[[@*]\][^-]", unguarded)) <= filled

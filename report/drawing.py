"""The parts of an HTML page: escaped text, curves, and votes as stacked bars.

Text by models and strangers is untrusted: `text` escapes markup and names control characters.
"""

import html
import math
import re
from collections import Counter
from itertools import groupby

import grading

MOST_BARS, MOST_POINTS = 100, 200  # of a question's votes, and of a curve; more are thinned out evenly
LONGEST_TEXT, LONGEST_ANSWER = 2000, 60  # characters; longer texts lose their middle

# -----------------------------------------------------------------------------------------------------------
# text

# Control and format characters: terminal codes, marks that change the writing direction, lone surrogates.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def text(value, longest=None):
    """A string as inert HTML: escapes markup, names hidden characters, shortens the middle.

    >>> text("<b>\\x1b[2J")
    '&lt;b&gt;[U+001B][2J'
    """
    return html.escape(shorten_middle(visible(value), longest))


def visible(value):
    return HIDDEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", str(value).replace("\r\n", "\n"))


def shorten_middle(shown, longest):
    """The start and end of a text, at most `longest` characters, with a note on what is left out.

    >>> shorten_middle("abcdefghij", 4)
    'ab … ij'
    """
    if longest is None or len(shown) <= longest:
        return shown
    half = longest // 2
    left_out = f"\n… {len(shown) - 2 * half:,} characters left out …\n" if longest > 200 else " … "
    return shown[:half] + left_out + shown[-half:]


def code(value, longest=LONGEST_ANSWER):
    return "<span class=soft>none</span>" if value is None else f"<code>{text(value, longest)}</code>"


def marked(response, answer):
    """A response as HTML, with the last occurrence of its answer marked."""
    shown = shorten_middle(visible(response), LONGEST_TEXT)
    wanted = re.escape(visible(answer)) if answer else r"(?!)"
    boxed = list(re.finditer(rf"\\boxed\s*\{{\s*({wanted})\s*\}}", shown))
    places = boxed or list(re.finditer(rf"(?<!\w)({wanted})(?!\w)", shown))
    if not places:
        return html.escape(shown)
    start, end = places[-1].span(1)
    parts = [html.escape(part) for part in (shown[:start], shown[start:end], shown[end:])]
    return f"{parts[0]}<mark>{parts[1]}</mark>{parts[2]}"


# -----------------------------------------------------------------------------------------------------------
# pictures

LEFT, RIGHT, TOP, BOTTOM = 34, 352, 8, 160  # the plot in a picture of 360 x 180 units


def chart(title, curves, top, last_step, errors=()):
    """A figure with curves {label: [(step, value)]}, from step 0 to last_step.

    The y-axis runs from 0 to `top`, or to the largest value if that is None. errors: (step, value, standard
    error) of a band around the first curve.
    """
    top = top or 1.05 * max(value for points in curves.values() for _, value in points) or 1
    last_step = max(1, last_step)

    def x(step):
        return f"{LEFT + (RIGHT - LEFT) * step / last_step:.1f}"

    def y(value):
        return f"{BOTTOM - (BOTTOM - TOP) * min(max(value / top, 0), 1):.1f}"

    marks = [f'<path class="grid" d="M{LEFT} {y(v)}H{RIGHT}"/><text x="{LEFT - 5}" y="{float(y(v)) + 4:.1f}" '
             f'text-anchor="end">{v:g}</text>' for v in ticks(top)]  # fmt: skip
    marks += [
        f'<text x="{x(v)}" y="175" text-anchor="middle">{v:g}</text>' for v in ticks(last_step) if v % 1 == 0
    ]
    if errors:
        upper = [f"{x(step)} {y(value + error)}" for step, value, error in errors]
        lower = [f"{x(step)} {y(value - error)}" for step, value, error in reversed(errors)]
        marks.append(f'<path class="band c0" d="M{"L".join(upper + lower)}Z"/>')
    key = []
    for index, (label, points) in enumerate(curves.items()):
        places = [f"{x(step)} {y(value)}" for step, value in thinned(points, MOST_POINTS)]
        marks.append(f'<path class="curve c{index}" d="M{"L".join(places)}"/>')
        if len(places) <= 24:
            marks.append(f'<path class="dots c{index}" d="{"".join(f"M{place}h0" for place in places)}"/>')
        key.append(f'<li><i class="c{index}"></i>{text(label)} {points[0][1]:.3g} → {points[-1][1]:.3g}</li>')
    return (
        f'<figure><figcaption>{text(title)}</figcaption><svg viewBox="0 0 360 180" aria-hidden="true">'
        f'{"".join(marks)}</svg><ul class="key">{"".join(key)}</ul></figure>'
    )


def ticks(top):
    """At most six round numbers from 0 to top.

    >>> ticks(1), ticks(160)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 50.0, 100.0, 150.0])
    """
    power = 10.0 ** math.floor(math.log10(top / 5))
    step = next(m * power for m in (1, 2, 5, 10) if top / (m * power) <= 5 + 1e-9)
    return [round(index * step, 10) for index in range(int(top / step + 1e-9) + 1)]


def thinned(items, most):
    """At most `most` of the items, evenly spaced, including the first and the last.

    >>> thinned([0, 1, 2, 3, 4], 3)
    [0, 2, 4]
    """
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def size(line):
    """The number of responses in a line of votes.jsonl, including those without an answer."""
    return sum(line["votes"].values()) + line.get("other", 0) + line["none"]


def votes(name, lines, truth, kind, planned):
    """A question's votes as stacked bars, one per line of votes.jsonl: (small picture, large one, legend).

    name: an id by which the large picture reuses the small one. planned: the number of bars at the end of the
    run. The true answer is at the bottom, then the three most frequent others, then the rest; the strip below
    has the color of the pseudo-label.
    """
    if not lines:
        return "", "", ""
    classes, labels = classes_of(lines, truth, kind)
    shown = thinned(lines, MOST_BARS)
    tallies = [tally(line, classes) for line in shown]
    marks = [classes.get(line["label"]) for line in shown]
    height = max(map(size, lines))
    strip = max(1, round(height / 10))
    tops, paths = [height] * len(shown), {}
    for css in labels:
        tops = [top - counts[css] for top, counts in zip(tops, tallies, strict=True)]
        if any(counts[css] for counts in tallies):
            paths[css] = f"M0 {height}{runs(tops)}V{height}z" + marked_runs(marks, css, height + strip, strip)
    # Each color is painted down to the baseline, then those below are painted over it.
    drawn = "".join(f'<path class="{css}" d="{path}"/>' for css, path in reversed(paths.items()))
    gaps = f'<path class="gap" d="M0 {height / 2:g}H{len(shown)}"/>'
    width = max(len(shown), min(planned, MOST_BARS))
    svg = f'<svg class="bars" viewBox="0 0 {width} {height + 2 * strip}" preserveAspectRatio="none" width='
    first, last = lines[0], lines[-1]
    key = [f'<li><i class="{css}"></i>{labels[css]} {tallies[0][css]} → {tallies[-1][css]}</li>'
           for css in paths]  # fmt: skip
    key.append(f'<li><i class="n"></i>no answer {first["none"]} → {last["none"]}</li>')
    steps = f'<li class="soft">step {first["step"]} → {last["step"]}:</li>'
    return (
        f'{svg}"{24 * width}" aria-hidden="true"><g id="{name}">{drawn}{gaps}</g></svg>',
        f'{svg}"{64 * width}" aria-hidden="true"><use href="#{name}"/></svg>',
        f'<ul class="key">{steps}{"".join(key)}</ul>',
    )


def tally(line, classes):
    """The number of votes per color in a line of votes.jsonl."""
    counts = Counter(o=line.get("other", 0))
    for spelling, count in line["votes"].items():
        counts[classes[spelling]] += count
    return counts


def runs(tops):
    """The upper edge of bars of width 1, as part of an SVG path.

    >>> runs([7, 7, 3])
    'V7h2V3h1'
    """
    return "".join(f"V{top}h{len(list(same))}" for top, same in groupby(tops))


def marked_runs(marks, css, y, height):
    """Boxes below the bars whose label has the color `css`."""
    boxes, x = "", 0
    for mark, same in groupby(marks):
        width = len(list(same))
        boxes += f"M{x} {y}h{width}v{height}h-{width}z" if mark == css else ""
        x += width
    return boxes


def classes_of(lines, truth, kind):
    """The CSS class of each spelling that got votes, and {CSS class: its label}, from bottom to top."""
    total = Counter()
    for line in lines:
        total.update(line["votes"])
        total.update({line["label"]: 0} if line["label"] is not None else {})
    spellings = [truth, *(spelling for spelling, _ in total.most_common())]
    groups = [[spellings[index] for index in group] for group in grading.classes(spellings, kind)]
    groups = groups[truth is not None :]  # the first class holds the true answer
    groups.sort(key=lambda group: -sum(total[spelling] for spelling in group))
    labels = {} if truth is None else {"t": f"{code(truth)} (true)"}
    labels.update({css: code(group[0]) for css, group in zip("abc", groups, strict=False)})
    labels["o"] = "others"
    classes = dict.fromkeys(total, "t")
    for css, group in zip([*"abc"] + ["o"] * len(groups), groups, strict=False):
        classes.update(dict.fromkeys(group, css))
    return classes, labels

r"""Parse LaTeX or plain text to a tree: parse("2x") is ("product", (("number", 2), ("symbol", "x"))).

A recursive-descent parser for the formulas in answers: numbers, letters, + - * / ^, fractions, roots,
factorials, binomials, absolute values and elementary functions. Anything else (sums, integrals, limits) is
rejected, and so are ambiguous spellings (`\sin x/2`, `3 4`). Parsing takes linear time and never evaluates
text as code.

    tree = ("number", Fraction) | ("symbol", name) | ("constant", "pi" | "e" | "i")
         | ("sum" | "product", (tree, ...)) | ("power" | "quotient" | "binomial", tree, tree)
         | ("call", function, tree) | ("log", base tree, tree) | ("opaque", name, (tree, ...))
"""

import re
from fractions import Fraction

MAX_DEPTH = 24  # nesting of brackets, exponents and arguments


class NotFormula(ValueError):
    """The text is not a formula, or one that is too large."""


GREEK = """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi
    omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega
""".split()
LETTERS = {*GREEK, "varepsilon", "vartheta", "varphi", "ell", "hbar"}
CIRCULAR = "sin cos tan cot sec csc".split()
ANGLED = [*CIRCULAR, "cis"]  # functions of an angle
FUNCTIONS = {*ANGLED, *(f"arc{name}" for name in CIRCULAR), *"sinh cosh tanh ln lg exp".split()}
FUNCTION = "(?:" + "|".join(sorted(FUNCTIONS)) + "|log)(?![a-z])"
NEXT_FACTOR = r"[A-Za-z(\[{]|\\\{|\\(?!over|choose|mid|times|cdot|div|rfloor|rceil|circ|in(?![a-z]))[A-Za-z]+"
DECIMAL = r"\d+\.\d*|\.\d+|\d+"
MIXED = r"\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))|(?<=\s)(\d+)\s*/\s*(\d+)(?![\d.])"
DOTTED = r"\\dot\s?\{?(\d)\}?"
REPEATING = rf"(\d*)\.(\d*)(?:\\(?:overline|bar)(?:\{{(\d+)\}}|(\d))|\((\d+)\)|{DOTTED}(?:(\d*){DOTTED})?)"


def parse(text: str):
    r"""The tree of a formula. Raises NotFormula.

    >>> parse("2x")
    ('product', (('number', Fraction(2, 1)), ('symbol', 'x')))
    >>> parse("5 1/2") == parse(r"5\frac12") == ("number", Fraction(11, 2))
    True
    """
    parser = _Parser(text)
    tree = parser.group()
    if parser.text[parser.at :].strip():
        raise NotFormula(text)
    return tree


class _Parser:
    def __init__(self, text: str):
        self.text, self.at, self.depth, self.bars, self.angle = text, 0, 0, 0, False

    def match(self, pattern: str) -> re.Match | None:
        """Match a pattern at the current position and move past it."""
        match = re.compile(rf"\s*({pattern})").match(self.text, self.at)
        self.at = match.end() if match else self.at
        return match

    def take(self, pattern: str) -> str | None:
        match = self.match(pattern)
        return match[1] if match else None

    def sees(self, pattern: str) -> bool:
        return re.compile(rf"\s*({pattern})").match(self.text, self.at) is not None

    def another_factor(self) -> bool:
        """Whether a factor without a sign comes next; a number counts only after a bracket or a factorial."""
        bar = not self.bars and self.sees(r"\|")  # inside bars, it closes the absolute value
        behind_bracket = self.text[: self.at].rstrip()[-1:] in (")", "!")
        return bar or self.sees(NEXT_FACTOR) or (behind_bracket and self.sees(r"[\d.]"))

    def inside(self, rule, closing: str | None = None):
        """Apply a rule one level deeper, and require the closing bracket, if given."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotFormula("nested too deep")
        tree = rule()
        if closing and self.take(closing) is None:
            raise NotFormula(f"{closing} is missing")
        self.depth -= 1
        return tree

    def group(self):
        """The content of braces, or the whole text: a sum, or two joined by \\over or \\choose."""
        tree = self.sum()
        if self.take(r"\\over(?![a-z])"):
            return ("quotient", tree, self.sum())
        return ("binomial", tree, self.sum()) if self.take(r"\\choose(?![a-z])") else tree

    def sum(self):
        terms, sign = [], self.take(r"[+-]")
        while True:
            term = self.product()
            terms.append(negative(term) if sign == "-" else term)
            sign = self.take(r"[+-]")
            if sign is None:
                return terms[0] if len(terms) == 1 else ("sum", tuple(terms))

    def product(self, in_argument: bool = False):
        """Consecutive factors; `x2` and `3 4` are rejected, `(3)4` is a product."""
        result = [self.factor()]
        while True:
            if not in_argument and self.take(r"\*(?!\*)|\\cdot(?![a-z])|\\times(?![a-z])"):
                result.append(self.factor(signed=True))
            elif not in_argument and self.take(r"/|\\div(?![a-z])"):
                result = [("quotient", _product(result), self.factor(signed=True))]
            elif self.another_factor():
                if in_argument and self.sees(r"\\(?:" + FUNCTION + ")"):
                    break
                result.append(self.factor())
            else:
                break
        return _product(result)

    def factor(self, signed: bool = False):
        sign = self.take(r"[+-]") if signed else None
        base = self.postfix(self.base())
        if self.take(r"\^"):
            base = self.postfix(("power", base, self.inside(self.exponent)))
            if self.sees(r"\^"):
                raise NotFormula("a tower of exponents")
        return negative(base) if sign == "-" else base

    def postfix(self, base):
        """Factorials and degrees; a degree sign converts to radians only in the argument of a function."""
        while True:
            if self.take(r"!(?!\s*!)"):
                base = ("call", "factorial", base)
            elif self.take(r"\^?\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})|\\degree(?![a-z])"):
                if self.angle:
                    base = ("product", (base, ("quotient", ("constant", "pi"), ("number", Fraction(180)))))
            else:
                return base

    def exponent(self):
        sign, digits = self.take(r"-"), self.take(r"\d+")
        tree = ("number", Fraction(int(digits))) if digits else self.argument()
        return negative(tree) if sign else tree

    def argument(self):
        """The argument of \\frac, \\sqrt or ^: a group in braces, one digit, one letter or one command."""
        if self.take(r"\{"):
            return self.inside(self.group, r"\}")
        if self.sees(r"\d"):
            return ("number", Fraction(int(self.take(r"\d"))))
        if self.sees(r"\\(?:frac|sqrt|pi|[a-z]+)|[A-Za-z(]"):
            return self.inside(self.base)
        raise NotFormula("an argument is missing")

    def base(self):
        if self.sees(r"[\d.]"):
            return self.number()
        for opening, closing in ("(", ")"), ("[", "]"), ("{", "}"), (r"\{", r"\}"):
            if self.take(re.escape(opening)):
                return self.inside(self.group if opening == "{" else self.sum, re.escape(closing))
        if self.take(r"\|"):
            self.bars += 1
            inside = self.inside(self.sum, r"\|")
            self.bars -= 1
            return ("call", "abs", inside)
        for name in "floor", "ceil":
            if self.take(rf"\\l{name}(?![a-z])"):
                return ("call", name, self.inside(self.sum, rf"\\r{name}(?![a-z])"))
        letter = self.take(r"[A-Za-z]")
        if letter:
            return self.symbol(letter)
        command = self.take(r"\\[A-Za-z]+")
        if command is None:
            raise NotFormula("no formula begins here")
        return self.command(command[1:])

    def number(self):
        r"""A decimal, a repeating decimal, or a mixed number: an integer, then `\frac34` or ` 3/4`."""
        repeating = self.match(REPEATING)
        text = None if repeating else self.take(DECIMAL)
        if repeating:
            whole, fixed, braced, single, bracketed, dot, between, last = repeating.groups()[1:]
            period = braced or single or bracketed or dot + (between + last if last else "")
            value = _repeating(whole, fixed, period)
        elif text is None:
            raise NotFormula("a point alone")
        elif "." in text and self.take(r"\.\.\."):
            value = _endless(*text.split("."))
        else:
            value, end = Fraction(text), self.at
            mixed = self.match(MIXED) if text.isdigit() else None
            if mixed:
                a, b, c, d, e, f = mixed.groups()[1:]
                top, bottom = int(a or b or e), int(c or d or f)
                if 0 < top < bottom:
                    value += Fraction(top, bottom)
                else:
                    self.at = end
        if self.sees(r"[\d.]"):
            raise NotFormula("a number behind a number")
        return ("number", value)

    def symbol(self, name: str):
        """A letter with its index and primes; e and i are constants, f, g, h before a bracket functions."""
        if self.take(r"_"):
            index = self.take(r"\{[A-Za-z0-9, ]{1,12}\}|[A-Za-z0-9]")
            if index is None:
                raise NotFormula("an index that is no name")
            name += "_" + index.strip("{}").replace(" ", "")
        primes = self.take(r"'+|\^\s*\{\s*(?:\\prime\s*)+\}|\^\s*\\prime(?![a-z])")
        if primes:
            name += "'" * (primes.count("'") or primes.count("prime"))
        if name in ("e", "i"):
            return ("constant", name)
        if name[0] in "fgh" and self.take(r"\^\s*\{\s*-\s*1\s*\}(?=\s*\()"):
            name += "^{-1}"
        if name[0] in "fgh" and self.take(r"\("):
            arguments = [self.inside(self.sum)]
            while self.take(","):
                arguments.append(self.inside(self.sum))
            if not self.take(r"\)"):
                raise NotFormula("a function without its bracket")
            return ("opaque", name, tuple(arguments))
        return ("symbol", name)

    def command(self, name: str):
        if name == "pi":
            return ("constant", "pi")
        if name in LETTERS:
            return self.symbol("\\" + name)
        if name == "frac":
            return ("quotient", self.argument(), self.argument())
        if name == "binom":
            return ("binomial", self.argument(), self.argument())
        if name == "sqrt":
            return self.root()
        if name == "hat":
            letter = self.take(r"\{?\s*[A-Za-z]\s*\}?")
            return ("symbol", f"\\hat {(letter or '').strip('{ }')}")
        if name == "log":
            base = self.argument() if self.take("_") else None
            return self.call(lambda tree: ("log", base, tree) if base else ("call", "log", tree))
        if name in FUNCTIONS:
            return self.call(lambda tree: ("call", name, tree), name)
        raise NotFormula(f"\\{name} is not known here")

    def root(self):
        index = self.inside(self.sum, r"\]") if self.take(r"\[") else ("number", Fraction(2))
        digits = self.take(r"\d+")  # people write \sqrt12 for the root of 12
        radicand = ("number", Fraction(int(digits))) if digits else self.argument()
        return ("power", radicand, ("quotient", ("number", Fraction(1)), index))

    def call(self, build, name: str = ""):
        r"""A function of what follows: `\sin 2x`, `\sin^2 x`. Brackets hold the argument: `\sin(x)y`."""
        power = self.inside(self.exponent) if self.take(r"\^") else None
        inverse = power == ("number", Fraction(-1))
        if inverse and name in CIRCULAR:
            name, power = f"arc{name}", None
            build = lambda tree: ("call", name, tree)  # noqa: E731
        elif inverse:
            raise NotFormula("an inverse or a reciprocal")
        outer, self.angle = self.angle, name in ANGLED
        if self.sees(r"[({|]"):
            tree = self.postfix(self.inside(self.base))
        else:
            tree = self.inside(lambda: self.product(in_argument=True))
            if self.sees(r"(?:/|\*|\\cdot|\\times)(?!\s*\\(?:" + FUNCTION + "))"):
                raise NotFormula("an argument whose end is not clear")
        self.angle = outer
        result = build(tree)
        return ("power", result, power) if power else result


def negative(tree):
    """-tree; the result of a number is a number."""
    return ("number", -tree[1]) if tree[0] == "number" else ("product", (("number", Fraction(-1)), tree))


def _product(factors):
    return factors[0] if len(factors) == 1 else ("product", tuple(factors))


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    r"""0.\overline{45}, 0.1\dot{4}2\dot{3} and 0.(3) as fractions."""
    start = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
    return start + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))


def _endless(whole: str, digits: str) -> Fraction:
    """0.777... and 0.2727... as fractions. Raises NotFormula if nothing repeats, as in 1.73..."""
    for start in range(len(digits) - 2):
        rest = digits[start:]
        for length in range(1, len(rest) // 2 + 1):
            if rest == (rest[:length] * len(rest))[: len(rest)]:
                return _repeating(whole, digits[:start], rest[:length])
    raise NotFormula("digits that are not known")


def substitute(tree, values: dict):
    """The tree with symbols replaced by the trees in `values`."""
    if tree[:1] == ("symbol",):
        return values.get(tree[1], tree)
    return tuple(substitute(part, values) if isinstance(part, tuple) else part for part in tree)

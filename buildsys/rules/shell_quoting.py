"""Where in a shell script does the value of a template stand?

`shlex.quote` makes one word of any text, but only where the shell reads words. Between quotes,
in a comment, in backquotes, in `${...}`, in arithmetic and in a here-document its result is
read otherwise, and a value could run a command after all. Templates with a value there are
refused. The scanner knows POSIX sh well enough to be sure of a yes; where it is not sure
(`case` inside `$(...)`, `$'...'`) it says no.
Source: POSIX.1-2024, Shell Command Language, 2.2 (Quoting), 2.6 and 2.7.4.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from buildsys.errors import StepError

if TYPE_CHECKING:
    import jinja2

HERE_DOCUMENT = re.compile(
    r"""<<(-?)[ \t]*(?:'([^'\n]+)'|"([^"\n]+)"|\\?([^\s;&|<>()'"\\`$]+))(?=[\s;&|)])"""
)
CASE = re.compile(r"case\s")
WORD_BEFORE = " \t\n;&|()"
WORDS = "plain"
PLACES = {
    "'": "between single quotes",
    '"': "between double quotes",
    "#": "in a comment",
    "`": "in backquotes",
    "{": "in ${...}",
    "((": "in arithmetic",
    "<<": "in a here-document",
}
REMEDY = "Assign it first, NAME={{ value }}, and write $NAME there: values are quoted already."


def check_values_stand_unquoted(
    environment: jinja2.Environment, source: str, template: str
) -> None:
    """Raises StepError, with the line, for a value where its quotes would not be read as quotes."""
    shell = ShellScanner(template)
    for line, kind, text in environment.lex(source):
        if kind == "data":
            shell.read(text, line)
        elif kind == "variable_begin":
            shell.value(line)


class ShellScanner:
    """Reads a script piece by piece and knows what the shell would be in the middle of.

    `nesting` holds what is open, innermost last: "plain" (words are read, also inside `$(`) or
    a key of `PLACES`.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        self.nesting = [WORDS]
        self.before = "\n"  # the character before, for comments and escapes
        self.documents: list[tuple[str, bool]] = []  # here-documents announced on this line
        self.line = ""  # what is read of the present line of a here-document

    def value(self, line: int) -> None:
        """A value stands here: it is one word, or it is refused."""
        place = PLACES.get(self.nesting[-1])
        if self.before == "\\":
            place = "after a backslash"
        if self.before == "<<":
            place = "as the end mark of a here-document"
        if place:
            message = f"{self.template}:{line}: a value stands {place}"
            raise StepError(message, remedy=REMEDY)
        self.before = "x"

    def read(self, text: str, line: int) -> None:
        """Literal text of the template."""
        at = 0
        while at < len(text):
            taken = self._step(text, at, line + text.count("\n", 0, at))
            at += taken
            # An escape at the very end of a piece takes whatever comes after it.
            self.before = text[at - 1] if at <= len(text) else "\\"
        if self.nesting[-1] == WORDS and text.rstrip(" \t").endswith("<<"):
            self.before = "<<"

    def _step(self, text: str, at: int, line: int) -> int:
        mode, char = self.nesting[-1], text[at]
        if mode == "<<":
            return self._document(char)
        if mode == "#":
            return self._close(char == "\n", text, at, line)
        if mode == "'":
            return self._close(char == "'")
        if char == "\\":
            return 2
        if mode in ('"', "`", "{"):
            if mode == '"' and char in "$`":
                return self._dollar(text, at) if char == "$" else self._open("`")
            return self._close(char == {'"': '"', "`": "`", "{": "}"}[mode])
        if mode == "((":
            return 1 + self._close(text.startswith("))", at)) if char == ")" else 1
        return self._words(text, at, line)

    def _words(self, text: str, at: int, line: int) -> int:
        char = text[at]
        if char == "\n":
            return self._end_of_line()
        if char == "#" and self.before in WORD_BEFORE:
            return self._open("#")
        if char in "'\"`":
            if char == "'" and self.before == "$":
                raise StepError(f"{self.template}:{line}: $'...' is not POSIX sh")
            return self._open(char)
        if char == "$":
            return self._dollar(text, at)
        if char == "(":
            return self._open(WORDS)
        if char == ")" and len(self.nesting) > 1:
            return self._close(True)
        if text.startswith("<<", at):
            return self._announce(text, at)
        if len(self.nesting) > 1 and self.before in WORD_BEFORE and CASE.match(text, at):
            raise StepError(f"{self.template}:{line}: `case` inside parentheses is not understood")
        return 1

    def _dollar(self, text: str, at: int) -> int:
        for opening, mode in (("$((", "(("), ("$(", WORDS), ("${", "{")):
            if text.startswith(opening, at):
                self.nesting.append(mode)
                return len(opening)
        return 1

    def _announce(self, text: str, at: int) -> int:
        if text.startswith("<<<", at):
            return 3
        match = HERE_DOCUMENT.match(text, at)
        if match is None:
            return 2
        self.documents.append((match[2] or match[3] or match[4], match[1] == "-"))
        return match.end() - at

    def _end_of_line(self) -> int:
        if self.documents:
            self.nesting.append("<<")
            self.line = ""
        return 1

    def _document(self, char: str) -> int:
        if char != "\n":
            self.line += char
            return 1
        mark, tabs = self.documents[0]
        if (self.line.lstrip("\t") if tabs else self.line) == mark:
            self.documents.pop(0)
            if not self.documents:
                self.nesting.pop()
        self.line = ""
        return 1

    def _open(self, mode: str) -> int:
        self.nesting.append(mode)
        return 1

    def _close(self, now: bool, text: str = "", at: int = 0, line: int = 0) -> int:
        """Leave what is innermost. A comment's newline is read again, by what is around it."""
        if not now:
            return 1
        was = self.nesting.pop()
        return self._step(text, at, line) if was == "#" else 1

"""YAML text -> nodes, built from the parser's events.

A recipe may come from a stranger. Events are consumed one by one, so nothing here recurses;
size, depth and what aliases expand to are capped; tags, duplicate keys and everything that
YAML 1.2 does not have are refused with their place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NoReturn

import yaml

from buildsys.errors import Location, RecipeError
from buildsys.recipe.nodes import MAX_DEPTH, Items, Node, Scalar, Table
from buildsys.recipe.scalars import resolve

MAX_BYTES = 16 * 2**20
MAX_ALIASED = 10_000
# YAML 1.1 takes U+0085, U+2028 and U+2029 for line ends and 1.2 does not: refused as well.
CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]"
)
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_nodes(path: str) -> Table:
    """The recipe file `path` as a mapping.

    Raises RecipeError for a file that cannot be read, is not UTF-8, is too large, or is not
    a YAML mapping. Places name the file as it was given.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (pathlib costs 9 ms at start-up)
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path} is larger than {MAX_BYTES >> 20} MiB: this is no recipe")
    return parse(decode(data, path), path)


def decode(data: bytes, file: str) -> str:
    """UTF-8 with or without a byte order mark; RecipeError at the first other byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise RecipeError(
            "this is not UTF-8 text",
            remedy="save the recipe as UTF-8",
            location=Location(file, line, column),
        ) from error


def parse(text: str, file: str) -> Table:
    """YAML text -> nodes; `file` is what places call it."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    bad = CONTROL.search(text)
    if bad is not None:
        line = text.count("\n", 0, bad.start())
        column = bad.start() - (text.rfind("\n", 0, bad.start()) + 1)
        raise RecipeError(
            f"a recipe is text, and this is the control character {bad.group()!r}",
            location=Location(file, line + 1, column + 1),
        )
    try:
        root = TreeBuilder(file, lines).build(yaml.parse(text, Loader=LOADER))
    except yaml.MarkedYAMLError as error:
        raise syntax_error(error, file, lines) from error
    if root is None:
        raise RecipeError(f"{file} is empty", remedy="a recipe begins with `qbuild: 1`")
    if not isinstance(root, Table):
        raise RecipeError("a recipe is a mapping of names to values", location=root.where)
    return root


def syntax_error(error: yaml.MarkedYAMLError, file: str, lines: list[str]) -> RecipeError:
    """The parser's complaint with its place, in words that say what to do where we know."""
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line, mark.column) if mark is not None else (0, 0)
    if line >= len(lines):
        line, column = len(lines) - 1, len(lines[-1])
    elif not lines[line].strip() and error.context_mark is not None:
        # The text ended in the middle of something: point at where that began.
        line, column = error.context_mark.line, error.context_mark.column
    shown = lines[line]
    place = Location(file, line + 1, column + 1, shown)
    context = f" {error.context}" if error.context else ""
    remedy = None
    if "\t" in shown[: column + 1]:
        remedy = "YAML is indented with spaces, never with tabs"
    elif column < len(shown) and shown[column] in "%@`":
        remedy = f"put quotes around a text that begins with {shown[column]}"
    elif "mapping values are not allowed" in (error.problem or ""):
        remedy = "a text with ': ' in it needs quotes"
    return RecipeError(f"YAML:{context} {error.problem}", remedy=remedy, location=place)


class Open:
    """A list or mapping whose end has not come yet."""

    __slots__ = ("anchor", "entries", "is_table", "items", "key", "keys", "where")

    def __init__(self, is_table: bool, where: Location, anchor: str | None) -> None:
        self.is_table = is_table
        self.where = where
        self.anchor = anchor
        self.items: list[Node] = []
        self.entries: dict[str, Node] = {}
        self.keys: dict[str, Location] = {}
        self.key: tuple[str, Location] | None = None

    def wants_key(self) -> bool:
        return self.is_table and self.key is None

    def closed(self) -> Node:
        if not self.is_table:
            return Items(tuple(self.items), self.where)
        return Table(self.entries, self.keys, self.where)


class TreeBuilder:
    """Turns the events of one document into nodes."""

    def __init__(self, file: str, lines: list[str]) -> None:
        self.file = file
        self.lines = lines
        self.stack: list[Open] = []
        self.anchors: dict[str, Node] = {}
        self.sizes: dict[str, int] = {}
        self.aliased = 0
        self.root: Node | None = None
        self.documents = 0

    def place(self, mark: Any) -> Location:
        text = self.lines[mark.line] if mark.line < len(self.lines) else ""
        return Location(self.file, mark.line + 1, mark.column + 1, text)

    def fail(self, message: str, where: Location, remedy: str | None = None) -> NoReturn:
        raise RecipeError(message, remedy=remedy, location=where)

    def build(self, events: Iterable[Any]) -> Node | None:
        for event in events:
            if isinstance(event, yaml.ScalarEvent):
                self.scalar(event)
            elif isinstance(event, yaml.CollectionStartEvent):
                self.open(event)
            elif isinstance(event, yaml.CollectionEndEvent):
                self.close()
            elif isinstance(event, yaml.AliasEvent):
                self.alias(event)
            elif isinstance(event, yaml.DocumentStartEvent):
                self.document(event)
        return self.root

    def document(self, event: yaml.DocumentStartEvent) -> None:
        self.documents += 1
        if self.documents > 1:
            self.fail("a recipe is one YAML document", self.place(event.start_mark))

    def scalar(self, event: yaml.ScalarEvent) -> None:
        where = self.place(event.start_mark)
        self.refuse_tag(event, where)
        unquoted = event.implicit[0]
        parent = self.stack[-1] if self.stack else None
        if parent is not None and parent.wants_key():
            if unquoted and event.value == "<<":
                self.fail(
                    "merge keys (<<) are not part of YAML 1.2", where, "use `extends`, or an alias"
                )
            self.key(parent, event.value, where)
            return
        if self.stack or event.value or not unquoted:
            try:
                value = resolve(event.value) if unquoted else event.value
            except ValueError as error:
                self.fail(str(error), where, "put quotes around it if it is a text")
            self.add(Scalar(value, where), event.anchor)

    def key(self, parent: Open, name: str, where: Location) -> None:
        """Keys are always texts: `on`, `null` and `12` are names like any other."""
        if name in parent.keys:
            first = parent.keys[name]
            self.fail(f"the key '{name}' is here twice: first in line {first.line}", where)
        parent.key = (name, where)
        parent.keys[name] = where

    def open(self, event: yaml.CollectionStartEvent) -> None:
        where = self.place(event.start_mark)
        self.refuse_tag(event, where)
        if self.stack and self.stack[-1].wants_key():
            self.fail("a key must be a text, not a list or a mapping", where)
        if len(self.stack) >= MAX_DEPTH:
            self.fail(f"nested more than {MAX_DEPTH} deep", where)
        is_table = isinstance(event, yaml.MappingStartEvent)
        self.stack.append(Open(is_table, where, event.anchor))

    def close(self) -> None:
        done = self.stack.pop()
        self.add(done.closed(), done.anchor)

    def add(self, node: Node, anchor: str | None = None) -> None:
        if anchor is not None:
            self.anchors[anchor] = node
            self.sizes[anchor] = count(node, MAX_ALIASED)
        if not self.stack:
            self.root = node
            return
        parent = self.stack[-1]
        if not parent.is_table:
            parent.items.append(node)
        elif parent.key is not None:
            parent.entries[parent.key[0]] = node
            parent.key = None

    def alias(self, event: yaml.AliasEvent) -> None:
        where = self.place(event.start_mark)
        if self.stack and self.stack[-1].wants_key():
            self.fail("a key must be a text, not an alias", where)
        if event.anchor not in self.anchors:
            inside = any(event.anchor == parent.anchor for parent in self.stack)
            self.fail(
                f"the alias *{event.anchor} stands inside its own anchor"
                if inside
                else f"there is no anchor &{event.anchor} before this alias",
                where,
            )
        self.aliased += self.sizes[event.anchor]
        if self.aliased > MAX_ALIASED:
            self.fail(f"aliases expand to more than {MAX_ALIASED} values", where)
        node = self.anchors[event.anchor]
        if len(self.stack) + height(node) > MAX_DEPTH:
            self.fail(f"nested more than {MAX_DEPTH} deep", where)
        self.add(node)

    def refuse_tag(self, event: Any, where: Location) -> None:
        if event.tag is not None:
            name = str(event.tag).replace("tag:yaml.org,2002:", "!!")
            self.fail(f"YAML tags are not part of recipes: {name}", where)


def count(node: Node, limit: int) -> int:
    """How many values a node holds, counted up to `limit`."""
    total, waiting = 0, [node]
    while waiting and total <= limit:
        total += 1
        top = waiting.pop()
        if isinstance(top, Items):
            waiting.extend(top.items)
        elif isinstance(top, Table):
            waiting.extend(top.entries.values())
    return total


def height(node: Node) -> int:
    """How deep a node is; it was built under the cap, so this recursion is short."""
    if isinstance(node, Scalar):
        return 0
    inner = node.items if isinstance(node, Items) else tuple(node.entries.values())
    return 1 + max((height(child) for child in inner), default=0)

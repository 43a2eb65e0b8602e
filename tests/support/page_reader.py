"""Reads a page as a browser would, as far as its elements, attributes and words."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input", "base", "area", "col", "embed", "source"}


@dataclass
class Seen:
    """One element: its name, attributes, and what it holds in order."""

    name: str
    attributes: dict[str, str]
    content: list[Seen | str] = field(default_factory=list)

    @property
    def children(self) -> list[Seen]:
        """Elements directly below."""
        return [child for child in self.content if isinstance(child, Seen)]

    @property
    def text(self) -> str:
        """Its own text, without that of elements below."""
        return "".join(child for child in self.content if isinstance(child, str))

    def all(self, *names: str) -> list[Seen]:
        """Elements below with one of the names, in order; all of them without a name."""
        found = []
        for child in self.children:
            if not names or child.name in names:
                found.append(child)
            found += child.all(*names)
        return found

    def of_class(self, name: str) -> list[Seen]:
        """Elements below that have the class."""
        return [e for e in self.all() if name in e.attributes.get("class", "").split()]

    def words(self) -> str:
        """All text, in order, with one blank between pieces."""
        parts = (c if isinstance(c, str) else c.words() for c in self.content)
        return " ".join(" ".join(parts).split())


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Seen("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"an attribute twice in {tag}"
        element = Seen(tag, {name: value or "" for name, value in attrs})
        self.open[-1].content.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> ends {self.open[-1].name}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].content.append(data)


def read_page(text: str) -> Seen:
    """The tree of a page; fails where an element is left open or closed twice."""
    assert text.startswith("<!DOCTYPE html>\n")
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root], "an element is left open"
    (html,) = reader.root.children
    return html

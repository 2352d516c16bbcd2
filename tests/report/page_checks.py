"""What any page must be: well-formed, complete in itself, and without others' markup."""

import re
from html.parser import HTMLParser

VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})
LOADS = frozenset({"src", "href", "xlink:href", "action", "data", "poster", "srcset", "formaction"})


class Page(HTMLParser):
    """Reads a page; `errors` tells what is wrong with its form.

    Attributes:
        elements: (tag, attributes) of every element, in order.
        errors: What is not well-formed.
        text: All text outside of scripts and styles.
        scripts: Text of every script.
        styles: Text of every style.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.errors: list[str] = []
        self.text, self.scripts, self.styles = "", [""], [""]
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.errors += [f"<{tag}> is never closed" for tag in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            self.errors.append(f"<{tag}> has an attribute twice: {names}")
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
            {"script": self.scripts, "style": self.styles}.get(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1] != tag:
            self.errors.append(f"</{tag}> closes {self._open[-1:]} at {self.getpos()}")
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        where = self._open[-1] if self._open else ""
        if where in ("script", "style"):
            {"script": self.scripts, "style": self.styles}[where][-1] += data
        else:
            self.text += data

    def tags(self, name: str) -> list[dict[str, str]]:
        """Attributes of all elements of a name."""
        return [attributes for tag, attributes in self.elements if tag == name]


def checked(text: str) -> Page:
    """The page, after all that holds for any."""
    page = Page(text)
    assert page.errors == []
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag}> has a handler: {name}={value}"
            if name in LOADS:
                assert value.startswith("#"), f"<{tag}> loads {value!r}"
    for style in (*page.styles, *(a.get("style", "") for _, a in page.elements)):
        assert not re.search(r"url\(|@import", style)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(set(ids)) == len(ids)
    for attributes in (*page.tags("a"), *page.tags("use")):
        assert attributes["href"][1:] in ids, attributes
    return page

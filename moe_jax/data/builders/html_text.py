"""The readable text of an HTML page of documentation."""

import html.parser
import re

_INVISIBLE = {"head", "nav", "script", "style"}
# What Sphinx, DocBook, Publican and AsciiDoc call the parts repeated on every page.
_PAGE_FURNITURE = {"docnav", "footer", "headerlink", "navfooter", "navheader", "sphinxsidebar"}
_BLOCKS = re.compile(
    "address|article|blockquote|body|br|caption|d[dlt]|div|figure|h[1-6r]|li|ol|p|pre|section|"
    "table|t[dhr]|ul"
)
_MAIN = re.compile(r"<(?:div|main)[^>]*role=\"main\"")


class _TextExtractor(html.parser.HTMLParser):
    """Collects text, with a blank line between block elements."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped_tag: str | None = None
        self._skipped_depth = 0
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped_tag is not None:
            self._skipped_depth += tag == self._skipped_tag
            return
        labels = {
            word for key, value in attrs if key in ("class", "id") for word in (value or "").split()
        }
        if tag in _INVISIBLE or labels & _PAGE_FURNITURE:
            self._skipped_tag, self._skipped_depth = tag, 1
            return
        self._preformatted += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._skipped_tag is not None:
            self._skipped_depth -= tag == self._skipped_tag
            if self._skipped_depth == 0:
                self._skipped_tag = None
            return
        self._preformatted -= tag == "pre"
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._skipped_tag is not None:
            return
        if not self._preformatted:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith("\n"):
                data = data.lstrip()
        if data:
            self.parts.append(data)

    def _break(self, tag: str) -> None:
        if _BLOCKS.fullmatch(tag):
            self.parts.append("\n\n")


def html_to_text(page: str) -> str:
    """Returns the text of `page`: paragraphs separated by blank lines, `<pre>` kept as it is.

    Scripts, navigation and footers are left out. A page with a `role="main"` element is read from
    there on.
    """
    main = _MAIN.search(page)
    extractor = _TextExtractor()
    extractor.feed(page[main.start() :] if main else page)
    extractor.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(extractor.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip()

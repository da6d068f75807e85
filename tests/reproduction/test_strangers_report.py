"""A claim's record may be a stranger's: its values are text, never scripts, paths or tracebacks."""

import html.parser
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from moe_jax.errors import UserError
from moe_jax.reproduction import publication, report

ROOT = pathlib.Path(__file__).parents[2]
RECORD = json.loads((ROOT / publication.FOLDER / "cpu/capacity.json").read_text())
PICTURE = ROOT / publication.FOLDER / "cpu/capacity.png"
HOSTILE = (
    "</td><script>document.title='taken'</script><img src=x onerror=alert(1)> `<script>` | "
    "<!-- end of verdicts --> [x](javascript:alert(1))\n\n# <script>alert(2)</script>"
)


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to every value of a JSON tree that is no tree itself, the first of a list only."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from places(value, (*path, name))
    elif isinstance(tree, list):
        for value in tree[:1]:
            yield from places(value, (*path, 0))
    else:
        yield path


def changed(path: tuple, value: Any) -> dict[str, Any]:
    record = json.loads(json.dumps(RECORD))
    node = record
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    return record


def folder_of(record: Any, root: pathlib.Path) -> pathlib.Path:
    folder = root / "report"
    folder.mkdir()
    (folder / "capacity.json").write_text(json.dumps(record))
    shutil.copy(PICTURE, folder / "capacity.png")
    return folder


class Tags(html.parser.HTMLParser):
    """Collects the tags, attributes and addresses of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found |= {tag} | {name for name, _ in attributes}
        self.found |= {
            (value or "").partition(":")[0] for name, value in attributes if name == "href"
        }


def tags_of(page: str) -> set[str]:
    parser = Tags()
    parser.feed(page)
    return parser.found


PATHS = sorted(set(places(RECORD)), key=str)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_no_text_of_a_record_becomes_a_script(tmp_path, path):
    folder = folder_of(changed(path, HOSTILE), tmp_path)
    try:
        report.write_reports(folder)
    except UserError as error:
        assert str(folder) in str(error)
        return
    page = (folder / "report.html").read_text()
    assert not tags_of(page) & {"script", "onerror", "javascript", "iframe", "svg", "onload"}
    markdown = (folder / "report.md").read_text()
    outside_code = "".join(markdown.split("`")[::2])
    assert (
        "<script" not in outside_code and "<!--" not in outside_code and "<img" not in outside_code
    )


@pytest.mark.parametrize("value", [None, 5, [], {}, True, "1e999", ["x"]], ids=repr)
@pytest.mark.parametrize("path", PATHS[::3], ids=lambda path: ".".join(map(str, path)))
def test_a_value_of_another_kind_is_text_or_one_sentence(tmp_path, path, value):
    folder = folder_of(changed(path, value), tmp_path)
    try:
        report.write_reports(folder)
    except UserError as error:
        assert str(folder) in str(error) and str(error).endswith(".")


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "5", '"x"', "{}", "{", "\xff", '{"name": 1}']
)
def test_a_file_that_is_no_record_is_named(tmp_path, content):
    (tmp_path / "capacity.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"capacity\.json is no claim's record"):
        report.write_reports(tmp_path)


@pytest.mark.parametrize("field", ["name", "profile"])
@pytest.mark.parametrize("value", ["../../x", "/tmp/x", "a/b", "..", "", "a b", "C:\\x", "x\n"])
def test_names_never_become_paths(tmp_path, field, value):
    folder = folder_of({**RECORD, field: value}, tmp_path)
    root = tmp_path / "project"
    root.mkdir()
    (root / "README.md").write_text("<!-- verdicts -->\n<!-- end of verdicts -->\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"{field} is .*no name of letters"):
        publication.publish(folder, root)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_another_file_is_not_published(tmp_path):
    folder = folder_of(RECORD, tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (folder / "capacity.png").unlink()
    (folder / "capacity.png").symlink_to(secret)
    root = tmp_path / "project"
    root.mkdir()
    with pytest.raises(UserError, match=r"capacity\.png is no file of the report"):
        publication.publish(folder, root)
    assert not list(root.rglob("*.png"))

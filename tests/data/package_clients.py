"""Stand-ins for the clients of packages, and packages for them."""

import gzip
import io
import os
import pathlib
import tarfile


def write_tar(path: pathlib.Path, files: dict[str, str | bytes], mode: str) -> None:
    """Packs files; those whose names say so are compressed."""
    with tarfile.open(path, mode) as tar:
        for name, text in files.items():
            content = text.encode() if isinstance(text, str) else text
            if name.endswith(("gz", "dz")):
                content = gzip.compress(content)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def install_clients(folder: pathlib.Path, scripts: dict[str, str], monkeypatch) -> None:
    """Puts shell scripts of these names before all other commands."""
    folder.mkdir()
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def install_debian_store(store: pathlib.Path, monkeypatch) -> None:
    """An apt-get that downloads from `store`, whose packages `NAME_VERSION.deb` are plain tars."""
    scripts = {"apt-get": f'cp {store}/"$2"_* .', "dpkg-deb": 'cat "$2"'}
    install_clients(store.parent / "bin", scripts, monkeypatch)

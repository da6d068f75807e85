"""A bucket of Google Cloud Storage in memory, which fsspec and TensorStore both see.

fsspec, through which epath reads and writes small files, gets `Bucket`. TensorStore, through which
Orbax reads and writes arrays, has a client of its own and gets a server that answers it.
"""

import contextlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """Refuses what object stores cannot do."""

    protocol = ("gcs", "gs")
    store: dict = {}  # noqa: RUF012 - as in fsspec.
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://"))

    def _open(self, path, mode="rb", **options):
        assert mode in ("rb", "wb"), "objects cannot grow"
        return super()._open(path, mode, **options)


class _Server(http.server.BaseHTTPRequestHandler):
    """What TensorStore asks of Google's JSON API; nothing is written by two at a time."""

    def _answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _request(self) -> tuple[str, str, dict[str, str]]:
        """Bucket, object and query of /[upload/]storage/v1/b/BUCKET/o[/OBJECT]."""
        url = urllib.parse.urlsplit(self.path)
        parts = url.path.removeprefix("/upload").split("/")
        name = urllib.parse.unquote("/".join(parts[6:]))
        return parts[4], name, dict(urllib.parse.parse_qsl(url.query))

    def do_GET(self):
        bucket, name, query = self._request()
        files = Bucket().store
        if not name:
            prefix = f"/{bucket}/{query.get('prefix', '')}"
            items = [
                self._metadata(path.removeprefix(f"/{bucket}/"), len(file.getvalue()))
                for path, file in sorted(files.items())
                if path.startswith(prefix)
            ]
            return self._answer(200, json.dumps({"items": items}).encode())
        file = files.get(f"/{bucket}/{name}")
        if file is None:
            return self._answer(404)
        content = file.getvalue()
        headers = {"x-goog-generation": "1", "x-goog-stored-content-length": str(len(content))}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else len(content) - int(last)
            stop = min(int(last) + 1, len(content)) if first and last else len(content)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            return self._answer(206, content[start:stop], headers)
        return self._answer(200, content, headers)

    def do_POST(self):
        bucket, _, query = self._request()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        Bucket().pipe_file(f"/{bucket}/{query['name']}", content)
        self._answer(200, json.dumps(self._metadata(query["name"], len(content))).encode())

    def do_DELETE(self):
        bucket, name, _ = self._request()
        found = Bucket().store.pop(f"/{bucket}/{name}", None)
        self._answer(404 if found is None else 204)

    @staticmethod
    def _metadata(name: str, size: int) -> dict[str, str]:
        return {"name": name, "size": str(size), "generation": "1"}

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def empty_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[epath.Path]:
    """A folder in an empty bucket; TensorStore may be told of one bucket only in a process."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    with http.server.ThreadingHTTPServer(("localhost", 0), _Server) as server:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://localhost:{server.server_port}")
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "nobody's")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        folder = epath.Path("gs://bucket/run")
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            server.shutdown()
            thread.join()

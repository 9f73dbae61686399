"""A Hugging Face Hub of our own on two ports: the site with its API, and the place where it keeps large files.

As huggingface.co answers: listings with sizes and digests, large files by a redirect to another host, byte ranges,
commit, size and digest in headers, Xet headers, error codes for what is private, gated or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
_STEP = 1 << 20


@dataclass
class Hub:
    """``repositories``: name to file name to bytes; files of 4 KiB and more are large.

    ``gated``, ``private``: names; the latter are shown to ``token``. ``cut``: after how many bytes each coming transfer
    of a large file is cut off; with ``reset`` not closed but broken. ``stall``: how many bytes of a large file are sent
    before the Hub goes quiet. ``whole``: ranges are ignored. ``broken``: the status with which everything is answered.
    ``swap``: bytes sent in place of others. ``edit`` changes listings. ``log``: what was asked of the site (``S``) and
    of the store (``C``), as ``(where, method, path, range, authorization)``.
    """

    repositories: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    token: str = "hf_right"
    cut: list[int] = field(default_factory=list)
    reset: bool = False
    stall: int | None = None
    whole: bool = False
    broken: int = 0
    swap: dict[bytes, bytes] = field(default_factory=dict)
    edit: Callable[[dict[str, Any]], None] = dict
    log: list[tuple[str, str, str, str | None, str | None]] = field(default_factory=list)
    url: str = ""
    store: str = ""
    awake: threading.Event = field(default_factory=threading.Event)

    def asked(self, where: str, method: str = "GET") -> list[tuple[str, str | None]]:
        """Path and range of the requests made of the site or of the store."""
        return [(path, span) for at, verb, path, span, _ in self.log if (at, verb) == (where, method)]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(data: bytes) -> bool:
    return len(data) >= 4096


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    where: str

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.where, self.command, path, self.headers["Range"], self.headers["Authorization"]))
        if self.hub.broken:
            self._send(self.hub.broken, b"down")
        elif self.where == "C":
            self._file(path)
        elif path.startswith("/api/models/") and path.endswith("/revision/main"):
            self._listing(path.removeprefix("/api/models/").removesuffix("/revision/main"))
        elif "/resolve/" in path:
            name, _, rest = path[1:].partition("/resolve/")
            self._resolve(name, *rest.split("/", 1))
        else:
            self._refuse(404, "EntryNotFound", "Sorry, we can't find the page you are looking for.")

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self._send(status, body, X_Error_Code=code, X_Error_Message=message, Content_Type="application/json")

    def _known(self, name: str) -> dict[str, bytes] | None:
        shown = name not in self.hub.private or self.headers["Authorization"] == f"Bearer {self.hub.token}"
        files = self.hub.repositories.get(name) if shown else None
        if files is None:
            self._refuse(401, "RepoNotFound", "Repository not found")
        return files

    def _listing(self, name: str) -> None:
        files = self._known(name)
        if files is None:
            return
        siblings: list[dict[str, Any]] = []
        for file, data in files.items():
            siblings.append({"rfilename": file, "size": len(data), "blobId": git_sha1(data)})
            if is_large(data):
                siblings[-1]["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 135}
        listing = {
            "_id": "0", "id": name, "modelId": name, "sha": COMMIT, "private": name in self.hub.private,
            "gated": "auto" if name in self.hub.gated else False, "tags": ["gguf"], "downloads": 0, "likes": 0,
            "siblings": siblings,
        }  # fmt: skip
        self.hub.edit(listing)
        self._send(200, json.dumps(listing).encode(), Content_Type="application/json")

    def _resolve(self, name: str, revision: str, file: str) -> None:
        files = self._known(name)
        if files is None:
            return
        if name in self.hub.gated:
            self._refuse(403, "GatedRepo", f"Access to model {name} is restricted")
        elif revision not in ("main", COMMIT) or file not in files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        elif is_large(data := files[file]):
            key = sha256(data)
            self._send(
                302, Location=f"{self.hub.store}/{key}", X_Repo_Commit=COMMIT, X_Linked_Size=str(len(data)),
                X_Linked_Etag=f'"{key}"', ETag=f'"{git_sha1(data)}"', X_Xet_Hash=key,
                Link=f'<{self.hub.url}/api/models/{name}/xet-read-token/{COMMIT}>; rel="xet-auth"',
            )  # fmt: skip
        else:
            self._send(200, data, X_Repo_Commit=COMMIT, ETag=f'"{git_sha1(data)}"')

    def _file(self, path: str) -> None:
        held = (data for files in self.hub.repositories.values() for data in files.values())
        data = next(data for data in held if sha256(data) == path[1:])
        data = self.hub.swap.get(data, data)
        begin, total, span = 0, len(data), self.headers["Range"]
        if span and not self.hub.whole:
            begin = int(span.removeprefix("bytes=").removesuffix("-"))
            data = data[begin:]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{total - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        most = self.hub.cut.pop(0) if self.hub.cut else len(data)
        stop = min(most, len(data) if self.hub.stall is None else self.hub.stall)
        for start in range(0, stop, _STEP):
            self.wfile.write(data[start : min(start + _STEP, stop)])
        if stop < len(data):
            self.wfile.flush()
            if self.hub.stall is not None:
                self.hub.awake.wait(60)
            if self.hub.reset:
                time.sleep(1.0)  # what is still under way would be lost
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what some tests are about."""


@contextmanager
def serve(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """A Hub with these repositories, for as long as it is needed."""
    hub = Hub(repositories)
    servers = [
        _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub, "where": where})) for where in ("S", "C")
    ]
    hub.url, hub.store = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.awake.set()
        for server in servers:
            server.shutdown()
            server.server_close()

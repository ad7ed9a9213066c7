"""The Hugging Face hub in tests: caches as its client lays them out, and a small server that its client talks to."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(hf_home: Path, name: str, model: Path, commit: str = COMMIT, branch: str = "main") -> Path:
    """Put the files of a model folder into a cache as if they had been downloaded; returns the snapshot's folder."""
    repo = hf_home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / branch).write_text(commit)
    for file in model.iterdir():
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@contextmanager
def hub_server(models: dict[str, Path], gated: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """A hub with the models of `models` (name -> folder); yields its address and the list of requests it got."""
    requests: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            requests.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
            name, action, revision, *file = "/".join(path[:2]), *(path[2:] or ["revision", "main"])
            if name in gated:
                return self.answer(403, b"{}", X_Error_Code="GatedRepo")
            if name not in models:
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            if revision not in ("main", COMMIT):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            files = {each.name: each.read_bytes() for each in models[name].iterdir()}
            tree = [{"type": "file", "path": key, "size": len(files[key]), "oid": _oid(files[key])} for key in files]
            if action == "tree":
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            if action == "revision":
                info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": key} for key in files]}
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            content = files[file[0]]
            return self.answer(200, content, ETag=f'"{_oid(content)}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def hub_environment(hf_home: Path, endpoint: str | None = None) -> dict[str, str]:
    """The environment of a process with that cache, and the hub at `endpoint`; None: without a network."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    where = {"HF_HUB_OFFLINE": "1"} if endpoint is None else {"HF_ENDPOINT": endpoint}
    return environment | where | {"HF_HOME": str(hf_home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

"""What wandb has of a run: read from its files, and sent by `wandb sync` to a server of our own."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.spawn import STOP_S

KEY = "k" * 40


def wandb_history(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, values) of every history record in a folder's .wandb file: leveldb's log of 32 KiB blocks, in protobuf."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    data, at, parts, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = data[at + 7 : at + 7 + size], at + 7 + size
        parts = part if kind in (1, 2) else parts + part
        if kind in (1, 4):
            record = wandb_internal_pb2.Record.FromString(parts)
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                found.append((int(items["_step"]), {k: v for k, v in items.items() if not k.startswith("_")}))
    return found


class Server(ThreadingHTTPServer):
    """As much of wandb's server as `wandb sync` needs of it: it keeps the steps of one run's history, line by line.

    status: what it answers to everything; 200 works.
    """

    daemon_threads = True

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = status
        self.steps: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """A client that leaves is no error."""

    def answer(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        if path == "/graphql":
            return {"data": self._query(request.get("operationName"), request.get("variables") or {})}
        if path.endswith("/file_stream"):
            chunk = request.get("files", {}).get("wandb-history.jsonl")
            if chunk is not None:
                self.steps[chunk["offset"] :] = [json.loads(line)["_step"] for line in chunk["content"]]
        return {}

    def _query(self, name: str | None, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": "halocline", "entity": {"id": "e", "name": "us"}}
        if name == "Viewer":
            return {"viewer": {"id": "v", "entity": "us", "flags": "{}", "teams": {"edges": []}}}
        if name == "UpsertBucket":
            bucket = {"id": "r", "name": variables["name"], "displayName": "a run", "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": len(self.steps)}, "inserted": True}}
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": self._so_far(variables["name"]) if self.steps else None}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/file/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def _so_far(self, run_id: str) -> dict[str, Any]:
        last = json.dumps({"_step": self.steps[-1]})
        run = {"id": "r", "name": run_id, "displayName": "a run", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}'}
        counts = {"historyLineCount": len(self.steps), "eventsLineCount": 0, "logLineCount": 0}
        return {**run, **counts, "summaryMetrics": last, "historyTail": json.dumps([last]), "eventsTail": "[]"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        is_json = "json" in self.headers.get("Content-Type", "")
        request = json.loads(body) if is_json and body and self.command == "POST" else {}
        answer = (
            self.server.answer(self.path, request) if self.server.status == 200 else {"errors": [{"message": "no"}]}
        )
        text = json.dumps(answer).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        self.do_POST()

    def do_PUT(self) -> None:
        self.do_POST()


@contextmanager
def serving(status: int = 200) -> Iterator[Server]:
    """A server on this machine while the context lasts."""
    with Server(status) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def sync(run_dir: Path, server: Server) -> None:
    """`wandb sync` of everything in a run's folder, as a person does it."""
    environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}
    command = [sys.executable, "-m", "wandb", "sync", str(run_dir / "wandb")]
    done = subprocess.run(command, env=environment, cwd=run_dir, capture_output=True, text=True, timeout=STOP_S)
    assert "panic" not in done.stderr, done.stderr

"""Listens to the texts that a server sends to its nodes, as the front end does: a WebSocket client of the standard library."""

from __future__ import annotations

import base64
import os
import socket
import struct
import threading
import time
from types import TracebackType

TEXT = 3  # the host's kind of binary message: 4 bytes length of the node's id, the id, the text
LINE_BREAK = "  \n"  # in Markdown, as one of the front end's renderers reads a text
CONTINUED, BINARY, CLOSE, PING = 0, 2, 8, 9


class NodeTexts:
    """The latest text of every node while this context is open, by node id; `history` has all in order."""

    def __init__(self, port: int):
        self.history: list[tuple[str, str]] = []
        self._socket = socket.create_connection(("127.0.0.1", port))
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /ws?clientId=texts HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        if b"101" not in self._stream.readline():
            raise ConnectionError("The server does not speak WebSocket.")
        while self._stream.readline().strip():
            pass
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> NodeTexts:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)

    def of(self, node: str, seconds: float = 5.0) -> str:
        """The latest text of a node; "" if none has come after some seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and node not in dict(self.history):
            time.sleep(0.05)
        return dict(self.history).get(node, "")

    def _listen(self) -> None:
        message, kind = b"", 0
        while head := self._stream.read(2):
            code, size = head[0] & 15, head[1] & 127
            if size > 125:
                size = int.from_bytes(self._stream.read(2 if size == 126 else 8), "big")
            part = self._stream.read(size)
            if code == CLOSE:
                return
            if code == PING:
                continue
            message, kind = (message + part, kind) if code == CONTINUED else (part, code)
            if head[0] & 128 and kind == BINARY and struct.unpack(">I", message[:4])[0] == TEXT:
                length = struct.unpack(">I", message[4:8])[0]
                text = message[8 + length :].decode().replace(LINE_BREAK, "\n")
                self.history.append((message[8 : 8 + length].decode(), text))

"""A process between a client and a QEMU's QMP, which keeps one answer to itself.

What it takes are its socket's path, QEMU's, and the command whose first answer the client is never
told. File descriptors pass.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys


def relay(listening: socket.socket, qmp: str, command: str) -> None:
    """Serve one client after the other; of the first such command the answer is kept."""
    kept = None
    while True:
        client, _ = listening.accept()
        with client, socket.socket(socket.AF_UNIX) as qemu:
            qemu.connect(qmp)
            answers = b""
            poll = select.poll()
            for end in (client, qemu):
                poll.register(end, select.POLLIN)
            while True:
                ready = {fd for fd, _ in poll.poll()}
                if client.fileno() in ready:
                    data, fds, _, _ = socket.recv_fds(client, 1 << 16, 16)
                    if not data:
                        break
                    asked = json.loads(data) if data.strip() else {}
                    if kept is None and asked.get("execute") == command:
                        kept = asked["id"]
                    socket.send_fds(qemu, [data], fds)
                    for fd in fds:
                        os.close(fd)
                if qemu.fileno() in ready:
                    answers += qemu.recv(1 << 16)
                    *lines, answers = answers.split(b"\n")
                    for line in lines:
                        if kept is None or json.loads(line).get("id") != kept:
                            client.sendall(line + b"\n")


if __name__ == "__main__":
    path, *others = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{path}.new")
        listening.listen()
        os.rename(f"{path}.new", path)
        relay(listening, *others)

"""Asks a listener over its socket, by names that are its own and by those of strangers."""

import socket

FOREIGN = ("evil.example", "evil.example:80", "10.evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "")
OWN = ("localhost", "localhost:1", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:1")
ORIGIN = "http://evil.example"


def answer(port: int, host: str, path: str, body: str = "", origin: str = ORIGIN) -> tuple[int, str]:
    """The status and the whole text of an answer."""
    method = "POST" if body else "GET"
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", f"Origin: {origin}", "Connection: close"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"] if body else []
    with socket.create_connection(("127.0.0.1", port), timeout=30) as asking:
        asking.sendall("\r\n".join([*lines, "", body]).encode())
        text = b"".join(iter(lambda: asking.recv(65536), b"")).decode(errors="replace")
    return int(text.split()[1]), text


def check_names(port: int, path: str, body: str = "") -> None:
    """That strangers' names are refused, its own are answered, and no page from elsewhere may read what is answered."""
    for hosts, codes in ((FOREIGN, (400, 403)), (OWN, (200,))):
        for host in hosts:
            code, text = answer(port, host, path, body)
            assert code in codes and "access-control-allow-origin" not in text.lower(), (host, text[:500])

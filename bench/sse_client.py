"""A minimal HTTP/1.1 client for server-sent events on asyncio streams: standard library only."""

import asyncio
import json


class HttpError(Exception):
    def __init__(self, status, body):
        super().__init__(f"HTTP {status}: {body[:300]!r}")
        self.status = status
        self.body = body


async def _head(reader):
    line = await reader.readline()
    if not line:
        raise ConnectionError("the server closed the connection before it answered")
    status = int(line.split()[1])
    headers = {}
    while (line := await reader.readline()) not in (b"\r\n", b"\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return status, headers


async def _pieces(reader, headers):
    """The body as it arrives: chunked, of known length, or up to the end of the connection."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while True:
            size = int((await reader.readline()).split(b";")[0], 16)
            data = await reader.readexactly(size)
            await reader.readline()
            if size == 0:
                return
            yield data
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while data := await reader.read(65536):
            yield data


def _request(method, path, host, body):
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + (body or b"")


async def fetch(address, method, path, payload=None):
    """(status, body) of one request on a connection of its own."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        body = None if payload is None else json.dumps(payload).encode()
        writer.write(_request(method, path, f"{address[0]}:{address[1]}", body))
        await writer.drain()
        status, headers = await _head(reader)
        return status, b"".join([piece async for piece in _pieces(reader, headers)])
    finally:
        writer.close()


async def stream(address, path, payload):
    """Yields the JSON of each event, then the string "[DONE]" if it came. Leaving the loop closes the connection."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(_request("POST", path, f"{address[0]}:{address[1]}", json.dumps(payload).encode()))
        await writer.drain()
        status, headers = await _head(reader)
        if status != 200:
            raise HttpError(status, b"".join([piece async for piece in _pieces(reader, headers)]))
        buffer = b""
        async for piece in _pieces(reader, headers):
            buffer += piece
            while b"\n\n" in buffer:
                event, buffer = buffer.split(b"\n\n", 1)
                for line in event.split(b"\n"):
                    if line.startswith(b"data: "):
                        data = line[6:].decode()
                        yield data if data == "[DONE]" else json.loads(data)
    finally:
        writer.close()


def metrics(page):
    """Sum over labels of each series of a Prometheus page: name -> value."""
    values = {}
    for line in page.decode().splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            values[name] = values.get(name, 0.0) + float(value)
    return values

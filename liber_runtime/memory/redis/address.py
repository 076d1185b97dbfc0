"""The URL of a Redis store, read and checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from liber_runtime.exceptions import ConfigurationError

DEFAULT_PORT = 6379

_WHOLE = ("replicas", "wait_milliseconds", "buckets")
_FILES = ("ca", "cert", "key")
_PASSWORD_FILE = "password_file"
_PARAMETERS = ("name", *_WHOLE, "timeout_seconds", *_FILES, _PASSWORD_FILE)


@dataclass(frozen=True)
class Address:
    """Where a store is, and how it is talked to.

    Attributes:
        nodes: (host, port) of servers to ask; of a cluster any of its nodes.
        database: number; 0 on a cluster.
        username: of the server's access control list; empty for the default user.
        password: empty for none.
        tls: whether connections are encrypted.
        files: paths of the certificate authority (``ca``), of our certificate (``cert``) and of its key (``key``).
        name: of the store, the beginning of every key.
        replicas: how many must have a write before it is acknowledged; None for what the cluster has, at most 1.
        wait_milliseconds: how long they are waited for.
        timeout_seconds: how long a call goes on trying while servers are away.
        buckets: how many the users of a new store are divided into.
    """

    nodes: tuple[tuple[str, int], ...]
    database: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    files: tuple[tuple[str, str], ...] = ()
    name: str = "liber"
    replicas: int | None = None
    wait_milliseconds: int = 5_000
    timeout_seconds: float = 30.0
    buckets: int = 128

    def __str__(self) -> str:
        """As messages show it: without the password."""
        nodes = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.nodes)
        return f"redis{'s' if self.tls else ''}://{nodes}/{self.database}?name={self.name}"

    def connection_options(self) -> dict[str, Any]:
        """What a connection of redis-py to any of the servers is made with."""
        # One reply may lawfully take as long as the wait for replicas; a server that hangs longer is left for another.
        patience = max(min(self.timeout_seconds / 3, 10.0), self.wait_milliseconds / 1000 + 1)
        options: dict[str, Any] = {
            "db": self.database,
            "username": self.username or None,
            "password": self.password or None,
            "socket_timeout": patience,
            "socket_connect_timeout": min(self.timeout_seconds, 3.0),
            "protocol": 2,
        }
        names = {"ca": "ssl_ca_certs", "cert": "ssl_certfile", "key": "ssl_keyfile"}
        return options | {names[kind]: path for kind, path in self.files}


def parse_address(url: str) -> Address:
    """Reads ``redis[s]://user:password@host:port[,host:port...]/db?name=liber&replicas=1``.

    User and password are percent-encoded. A password may lie in a file instead, ``?password_file=/run/secrets/...``, so
    that none is in an environment; the line's end is no part of it. All other parameters are named in `Address`.

    Raises:
        ConfigurationError: anything that is not understood, or a file that is not there or cannot be read.
    """
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    credentials, _, hosts = authority.rpartition("@")
    username, _, password = credentials.partition(":")
    shown = f"{scheme}://{hosts}/{path}"
    values = _parse_parameters(query, shown)
    nodes = tuple(_parse_node(node, shown) for node in hosts.split(","))
    if path and not path.isdecimal():
        raise ConfigurationError(f"store {shown}: database {path!r} is not a number; write {scheme}://host:port/0")
    files = tuple((kind, values.pop(kind)) for kind in _FILES if kind in values)
    if files and scheme != "rediss":
        raise ConfigurationError(f"store {shown}: parameter {files[0][0]} is for TLS; write rediss://")
    for kind, file in files:
        if not Path(file).is_file():
            raise ConfigurationError(f"store {shown}: there is no file {file} ({kind}); name a PEM file")
    password = unquote(password)
    if (file := values.pop(_PASSWORD_FILE, None)) is not None:
        if password:
            raise ConfigurationError(f"store {shown}: a password and a {_PASSWORD_FILE} are given; leave one out")
        password = _read_password(Path(file), shown)
    return Address(
        nodes,
        int(path or 0),
        unquote(username),
        password,
        scheme == "rediss",
        files,
        **values,
    )


def _parse_parameters(query: str, shown: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _PARAMETERS:
            raise ConfigurationError(
                f"store {shown}: parameter {name!r} is unknown; there are {', '.join(_PARAMETERS)}"
            )
        if name in values:
            raise ConfigurationError(f"store {shown}: parameter {name} is given twice")
        if name == "name" and not re.fullmatch(r"[\w.-]{1,64}", value, re.ASCII):
            raise ConfigurationError(f"store {shown}: name {value!r} must be 1 to 64 letters, digits, '.', '-' or '_'")
        values[name] = value
        if name in _WHOLE:
            least = 0 if name == "replicas" else 1
            if not value.isdecimal() or not least <= int(value) <= 1_000_000:
                raise ConfigurationError(f"store {shown}: {name}={value} must be a whole number from {least}")
            values[name] = int(value)
        if name == "timeout_seconds":
            if not re.fullmatch(r"\d+(\.\d+)?", value) or not float(value):
                raise ConfigurationError(f"store {shown}: timeout_seconds={value} must be a positive number")
            values[name] = float(value)
    if values.get("buckets", 1) > 4096:
        raise ConfigurationError(
            f"store {shown}: buckets={values['buckets']} is more than 4096; 128 suit most clusters"
        )
    return values


def _read_password(file: Path, shown: str) -> str:
    try:
        password = file.read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigurationError(
            f"store {shown}: {_PASSWORD_FILE} {file} cannot be read ({reason}); name a file with the password in it"
        ) from None
    if not password:
        raise ConfigurationError(f"store {shown}: {_PASSWORD_FILE} {file} is empty; write the password into it")
    return password


def _parse_node(node: str, shown: str) -> tuple[str, int]:
    matched = re.fullmatch(r"(\[[^\]]+\]|[^:\[\]]+)(?::(\d{1,5}))?", node)
    if matched is None or int(matched[2] or 1) > 65535:
        raise ConfigurationError(
            f"store {shown}: server {node!r} is not understood; write redis://host:port/0?name=liber"
        )
    return matched[1].strip("[]"), int(matched[2] or DEFAULT_PORT)

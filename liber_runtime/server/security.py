"""Who may call a server, and what of it: TLS for gRPC, and a key for all that changes the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from liber_runtime.credentials import CONTROL_HEADER, check_control_key, read_authority, read_certificate
from liber_runtime.exceptions import ConfigurationError

RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")
"""Triton's names of what asks for the control key. Loading and unloading models is not all that a stranger could harm
with: over shared memory a caller has Triton read and write any region of this machine by its name, those included
through which it talks with its own models, and logging and trace have it write until the disk is full."""


@dataclass(frozen=True)
class Security:
    """What a server demands of its callers; by default nothing.

    Attributes:
        certificate: PEM; with it gRPC is served over TLS only, and HTTP, for which Triton has no TLS, on this machine
            only.
        key: the certificate's private key, PEM.
        client_ca: PEM; with it gRPC is for callers only whose certificate one of these authorities has issued.
        control_key: without it nobody but the supervisor loads or unloads models, lists the repository, or uses shared
            memory, trace or logging, over gRPC or HTTP. Scoring needs no key.
    """

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    control_key: str = field(default="", repr=False)

    @property
    def headers(self) -> Mapping[str, str]:
        """What a call of model control over HTTP has to carry."""
        return {CONTROL_HEADER: self.control_key} if self.control_key else {}

    def check(self) -> None:
        """Looks at all the files.

        Raises:
            ConfigurationError: a file is missing or unusable, they do not belong together, or the control key will not
                do.
        """
        if (self.certificate is None) != (self.key is None):
            raise ConfigurationError("--tls-certificate and --tls-key need each other; name both or neither")
        if self.certificate is not None and self.key is not None:
            read_certificate(self.certificate, self.key, "--tls-certificate", "--tls-key")
        if self.client_ca is not None:
            if self.certificate is None:
                raise ConfigurationError("--tls-client-ca needs --tls-certificate and --tls-key; name them too")
            read_authority(self.client_ca, "--tls-client-ca")
        if self.control_key:
            check_control_key(self.control_key)

    def arguments(self) -> list[str]:
        """The options of tritonserver; they hold the control key, which Triton takes in no other way."""
        options = []
        if self.certificate is not None and self.key is not None:
            options += [
                f"--grpc-use-ssl{'-mutual' if self.client_ca else ''}=true",
                f"--grpc-server-cert={self.certificate.absolute()}",
                f"--grpc-server-key={self.key.absolute()}",
            ]
        if self.client_ca is not None:
            options.append(f"--grpc-root-cert={self.client_ca.absolute()}")
        if self.control_key:
            restricted = f"{','.join(RESTRICTED)}:{CONTROL_HEADER}={self.control_key}"
            options += [f"--grpc-restricted-protocol={restricted}", f"--http-restricted-api={restricted}"]
        return options

"""One set of certificates for all servers, made by openssl, in the layout that QEMU and nbdkit share."""

from __future__ import annotations

from pathlib import Path

from scripts.benchmark.house import House
from scripts.benchmark.process import run


def certificates(house: House) -> Path:
    """A folder with ca-cert.pem, server-cert.pem and server-key.pem for 127.0.0.1."""
    folder = house.folder / "pki"
    if folder.exists():
        return folder
    folder.mkdir(mode=0o700)
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    ec = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca_key, ca = folder / "ca-key.pem", folder / "ca-cert.pem"
    key, request = folder / "server-key.pem", folder / "server.csr"
    run(["openssl", "req", "-x509", *ec, "-keyout", ca_key, "-out", ca, "-subj", "/CN=bench", "-days", "2"], house.log)
    run(["openssl", "req", *ec, "-keyout", key, "-out", request, "-subj", "/CN=127.0.0.1"], house.log)
    signer = ("-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "2", "-extfile", folder / "names")
    run(["openssl", "x509", "-req", *signer, "-in", request, "-out", folder / "server-cert.pem"], house.log)
    return folder


def with_certificates(house: House, uri: str) -> str:
    """The URI of a TLS server, with the folder that libnbd takes the authority from."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme if scheme.startswith('nbds') else 'nbds'}://{rest}?tls-certificates={certificates(house)}"

"""Who may speak to whom in one run: an authority of the run's own, and a certificate a rank that says its role.

X.509 (RFC 5280) by `cryptography`; keys on the curve P-256. The authority's key is never written.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, ConfigDict

VALID_DAYS = 30


class Identity(BaseModel):
    """What a rank shows, and by what it knows others.

    Attributes:
        key: Its private key, PEM.
        certificate: PEM; its common name is `rank-<number>`, its organizational unit the role.
        authority: The authority's certificate, PEM.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    certificate: str
    authority: str

    @classmethod
    def read(cls, folder: Path, rank: int) -> "Identity":
        """A rank's own."""
        return cls.model_validate_json(_path(folder, rank).read_bytes())


@contextlib.contextmanager
def identities(folder: Path, roles: Sequence[str]) -> Iterator[None]:
    """While the body runs, ranks find their identities in the folder; see `issue`."""
    issue(folder, roles)
    try:
        yield
    finally:
        for rank in range(len(roles)):
            _path(folder, rank).unlink(missing_ok=True)


def issue(folder: Path, roles: Sequence[str]) -> None:
    """Leave an identity for each rank, readable by its owner alone. Those of an earlier run are known no longer.

    Args:
        folder: The job's.
        roles: Of each rank.
    """
    authority_key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "headrace")])
    authority = (
        _builder(name, name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    for rank, role in enumerate(roles):
        key = ec.generate_private_key(ec.SECP256R1())
        names = [
            x509.NameAttribute(NameOID.COMMON_NAME, name_of(rank)),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
        ]
        certificate = (
            _builder(x509.Name(names), name, key.public_key())
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name_of(rank))]), critical=False)
            .sign(authority_key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        identity = Identity(
            key=key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode(),
            certificate=certificate.public_bytes(pem).decode(),
            authority=authority.public_bytes(pem).decode(),
        )
        path = _path(folder, rank)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(identity.model_dump_json())


def name_of(rank: int) -> str:
    """The common name in a rank's certificate."""
    return f"rank-{rank}"


def who(certificate: bytes) -> tuple[int, str]:
    """The rank and the role that a certificate says, PEM; TLS has seen to it that it is the authority's."""
    subject = x509.load_pem_x509_certificate(certificate).subject
    name = subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    role = subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)[0].value
    return int(str(name).removeprefix("rank-")), str(role)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=VALID_DAYS))
    )


def _path(folder: Path, rank: int) -> Path:
    return folder / f"identity-rank-{rank}.json"

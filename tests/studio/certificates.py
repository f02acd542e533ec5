"""A certificate authority of the tests and a certificate that may sign Content Credentials."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

USES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


def make_certificates(folder, signer="Test signer"):
    """Write chain.pem, key.pem and root.pem; return their paths."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _sign(_builder("Test root", "Test root", root_key, "key_cert_sign", "crl_sign", is_authority=True), root_key)
    builder = _builder(signer, "Test root", key, "digital_signature").add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
    )
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
    leaf = _sign(builder.add_extension(authority, critical=False), root_key)
    files = {
        "chain.pem": leaf,
        "root.pem": root,
        "key.pem": key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / "chain.pem", folder / "key.pem", folder / "root.pem"


def _builder(name, issuer, key, *uses, is_authority=False):
    now = datetime.datetime.now(datetime.UTC)
    named = [[x509.NameAttribute(NameOID.COMMON_NAME, one)] for one in (name, issuer)]
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests")
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([*named[0], organization]))
        .issuer_name(x509.Name([*named[1], organization]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        .add_extension(x509.KeyUsage(**{use: use in uses for use in USES}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _sign(builder, key):
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

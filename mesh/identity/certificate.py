"""X.509 certificates of a cluster: what the authority signs, what a site asks for, and how both are checked.

One authority, no intermediates. A site's certificate carries its names twice over: as what TLS compares (see
`COMMON_NAME` and `tls_name`), and as the URI `isthmus://CLUSTER-ID/SITE`, which is what everything else reads.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.errors import ConfigError
from mesh.identity.errors import Damaged, Expired, ForeignCluster, NotYetValid
from mesh.identity.keys import PrivateKey, PublicKey, fingerprint

#: Every site answers to this name, so that TLS can call a seed whose site is not known yet.
COMMON_NAME = "peer.isthmus"
SCHEME = "isthmus://"
#: Site names are what `mesh up --site` takes: safe in a URI, a file name and a terminal.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
#: So that a certificate with the longest names still fits a greeting (see `seal`).
CLUSTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
CLUSTER_ID_BYTES = 16
MAX_CERTIFICATE_BYTES = 900
MAX_REQUEST_BYTES = 900
#: A site's certificate is renewed after two thirds of this.
SITE_VALIDITY_S = 365 * 86400
AUTHORITY_VALIDITY_S = 20 * 365 * 86400
#: A site whose clock is behind accepts a new certificate all the same.
BACKDATED_S = 3600


def check_site(site: str) -> str:
    """The name itself. Raises ConfigError where no site can be called so."""
    if not NAME.fullmatch(site):
        raise ConfigError(f"site {site!r}: write up to 63 letters, digits, '.', '_' or '-', a letter or digit first")
    return site


def tls_name(site: str) -> str:
    """The DNS name that only this site's certificate has: to call one site only (`ssl_target_name_override`)."""
    return f"s{hashlib.sha256(site.encode()).hexdigest()[:32]}.isthmus"


@dataclass(frozen=True)
class SiteCertificate:
    """A certificate that the authority signed, taken apart. Made by `Anchor.check` only."""

    der: bytes
    site: str
    public_key: PublicKey
    fingerprint: bytes
    not_before_s: int
    not_after_s: int

    @property
    def key_id(self) -> bytes:
        """8 bytes that stand for the key in datagrams."""
        return self.fingerprint[:8]

    @cached_property
    def pem(self) -> bytes:
        """For TLS."""
        return to_pem(self.der)

    def check_time(self, now: float) -> None:
        """Raises NotYetValid or Expired."""
        if now < self.not_before_s:
            raise NotYetValid(
                f"certificate of {self.site}: valid in {self.not_before_s - now:.0f} s; set the clock right"
            )
        if now > self.not_after_s:
            raise Expired(f"certificate of {self.site}: expired {now - self.not_after_s:.0f} s ago; it must be renewed")

    def wants_renewal(self, now: float) -> bool:
        """Whether two thirds of its time are over."""
        return now > self.not_before_s + (self.not_after_s - self.not_before_s) * 2 / 3


class Anchor:
    """The authority's certificate: the one thing that a site trusts."""

    def __init__(self, der: bytes) -> None:
        """Raises Damaged where this is not an authority's certificate."""
        if type(der) is not bytes or not 0 < len(der) <= MAX_CERTIFICATE_BYTES:
            raise Damaged("authority certificate: wrong size")
        try:
            certificate = x509.load_der_x509_certificate(der)
            key = certificate.public_key()
            certificate.verify_directly_issued_by(certificate)
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
            uri = _only_uri(certificate)
            name = str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
        except Exception as error:  # cryptography raises a dozen unrelated classes for what is not a certificate
            raise Damaged(f"authority certificate: not readable ({type(error).__name__})") from None
        identifier = uri.removeprefix(SCHEME)
        if not constraints.ca or not _p256(key) or not re.fullmatch(r"[0-9a-f]{32}", identifier):
            raise Damaged("authority certificate: not the certificate of a cluster")
        if not CLUSTER_NAME.fullmatch(name):
            raise Damaged("authority certificate: no cluster can have this name")
        assert isinstance(key, ec.EllipticCurvePublicKey)
        self.der = der
        self.name = name
        self.cluster_id = bytes.fromhex(identifier)
        self.public_key: PublicKey = key
        self.fingerprint = fingerprint(key)
        self._certificate = certificate

    @property
    def cluster(self) -> str:
        """Name and id: no two clusters share it. What gossip and every signature are bound to."""
        return f"{self.name}.{self.cluster_id.hex()}"

    @cached_property
    def pem(self) -> bytes:
        """The root certificate for TLS."""
        return to_pem(self.der)

    def check(self, der: bytes, now: float | None) -> SiteCertificate:
        """Take a site's certificate apart. `now` in seconds since 1970; None leaves its time unchecked.

        Raises Damaged, ForeignCluster, NotYetValid or Expired. Whether its key is revoked is not checked here.
        """
        if type(der) is not bytes or not 0 < len(der) <= MAX_CERTIFICATE_BYTES:
            raise Damaged("certificate: wrong size")
        try:
            certificate = x509.load_der_x509_certificate(der)
            key = certificate.public_key()
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
            uri = _only_uri(certificate)
            not_before = int(certificate.not_valid_before_utc.timestamp())
            not_after = int(certificate.not_valid_after_utc.timestamp())
        except Exception as error:  # as above
            raise Damaged(f"certificate: not readable ({type(error).__name__})") from None
        cluster_id, _, site = uri.removeprefix(SCHEME).partition("/")
        if cluster_id != self.cluster_id.hex():
            raise ForeignCluster("certificate: of another cluster")
        try:
            certificate.verify_directly_issued_by(self._certificate)
        except Exception:  # InvalidSignature, or an algorithm that the authority does not use
            raise Damaged("certificate: not signed by this cluster's authority") from None
        if (
            constraints.ca
            or not isinstance(key, ec.EllipticCurvePublicKey)
            or not _p256(key)
            or not NAME.fullmatch(site)
        ):
            raise Damaged("certificate: not that of a site")
        checked = SiteCertificate(der, site, key, fingerprint(key), not_before, not_after)
        if now is not None:
            checked.check_time(now)
        return checked


def make_authority_certificate(key: PrivateKey, name: str, cluster_id: bytes, now: float) -> bytes:
    """A self-signed certificate (DER) for a new cluster. Raises ConfigError where no cluster can be called so."""
    if not CLUSTER_NAME.fullmatch(name):
        raise ConfigError(f"cluster {name!r}: write up to 32 letters, digits, '.', '_' or '-', a letter or digit first")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, subject, key.public_key(), now - BACKDATED_S, now + AUTHORITY_VALIDITY_S)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    builder = builder.add_extension(_names([], f"{SCHEME}{cluster_id.hex()}"), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def make_site_certificate(key: PrivateKey, anchor: Anchor, site: str, holder: PublicKey, not_before_s: float) -> bytes:
    """A site's certificate (DER), signed with the authority's `key`; valid for a year from one hour after its start."""
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, anchor.name)])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_site(site))])
    until = not_before_s + BACKDATED_S + SITE_VALIDITY_S
    builder = _builder(subject, issuer, holder, not_before_s, until)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
    )
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(anchor.public_key), critical=False
    )
    names = _names([COMMON_NAME, tls_name(site)], f"{SCHEME}{anchor.cluster_id.hex()}/{site}")
    builder = builder.add_extension(names, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def make_csr(key: PrivateKey, site: str) -> bytes:
    """A request (DER) for a certificate; its signature proves that the asker holds the key. Raises ConfigError."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_site(site))])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def check_csr(der: bytes) -> tuple[str, PublicKey]:
    """Site and key of a request whose signature holds. Raises Damaged."""
    if type(der) is not bytes or not 0 < len(der) <= MAX_REQUEST_BYTES:
        raise Damaged("certificate request: wrong size")
    try:
        request = x509.load_der_x509_csr(der)
        names = [str(attribute.value) for attribute in request.subject]
        key = request.public_key()
        holds = request.is_signature_valid
    except Exception as error:  # as in Anchor
        raise Damaged(f"certificate request: not readable ({type(error).__name__})") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not _p256(key):
        raise Damaged("certificate request: the key is not of P-256")
    if not holds:
        raise Damaged("certificate request: the asker does not hold the key")
    if len(names) != 1 or not NAME.fullmatch(names[0]):
        raise Damaged("certificate request: no site can have this name")
    return names[0], key


def to_pem(der: bytes) -> bytes:
    """A certificate in PEM."""
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def from_pem(pem: bytes) -> bytes:
    """The inverse of `to_pem`. Raises Damaged."""
    try:
        return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    except ValueError:
        raise Damaged("certificate: not PEM") from None


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PublicKey, start_s: float, end_s: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(int(start_s), UTC))
        .not_valid_after(datetime.fromtimestamp(int(end_s), UTC))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _names(dns: Iterable[str], uri: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([*(x509.DNSName(name) for name in dns), x509.UniformResourceIdentifier(uri)])


def _only_uri(certificate: x509.Certificate) -> str:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    return str(uri)


def _p256(key: object) -> bool:
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)

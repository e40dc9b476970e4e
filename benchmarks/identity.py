"""What identity costs: microseconds for each thing that is done for a datagram, an entry, a greeting or a call.

    python -m benchmarks.identity [--repeat N] [--json]

Processor time of one thread; the median of five runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from benchmarks.command import command
from mesh.identity.authority import Authority
from mesh.identity.certificate import make_csr
from mesh.identity.invitation import Invitation
from mesh.identity.seal import OVERHEAD_BYTES, SiteSealer
from mesh.identity.site import Joining, SiteIdentity

RUNS = 5
BODY_BYTES = 300


def measure(repeat: int) -> dict[str, float]:
    """Operation -> microseconds, over two sites that know each other."""
    now = time.time()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        oslo = Authority.create_cluster(here / "oslo", "bench", "oslo", now)
        authority = Authority.load(here / "oslo")
        joining = Joining(here / "lima", Invitation.parse(authority.invite(now, ["127.0.0.1:7700"])), "lima")
        lima = joining.finish(authority.redeem(joining.request, now), now)
        return _measure(repeat, authority, oslo, lima, now)


def _measure(repeat: int, authority: Authority, oslo: SiteIdentity, lima: SiteIdentity, now: float) -> dict[str, float]:
    ours, theirs = (SiteSealer(identity, wall=lambda: now) for identity in (oslo, lima))
    oslo.directory.learn(lima.certificate.der, now)
    lima.directory.learn(oslo.certificate.der, now)
    body, message = bytes(BODY_BYTES), bytes(BODY_BYTES)
    signer, checker = lima.prover(lambda: now), oslo.prover(lambda: now)
    sealed: deque[bytes] = deque()

    def seal() -> None:
        sealed.append(theirs.seal(body, address="oslo:1", site="oslo", now=0.0))

    def open_() -> None:
        ours.open(sealed.popleft(), source="lima:1", now=0.0)

    hellos: list[bytes] = []
    proofs: list[tuple[bytes, bytes]] = []
    count = 0

    def sign() -> None:
        nonlocal count
        count += 1
        said = message + count.to_bytes(8)
        proofs.append((said, signer.sign(said)))

    def verify() -> None:
        said, proof = proofs.pop()
        checker.verify("lima", said, proof)

    known = (message, signer.sign(message))
    checker.verify("lima", *known)
    token = authority.create_token("ada", "submit", now)
    word = lima.assertion(oslo.certificate.fingerprint, now)
    csr = make_csr(lima.key, "lima")

    def fresh_pair() -> None:
        SiteSealer(oslo, wall=lambda: now).seal(body, address="lima:1", site="lima", now=0.0)

    operations: dict[str, Callable[[], object]] = {
        "seal": seal,
        "open": open_,
        "seal_first": fresh_pair,
        "sign": sign,
        "verify": verify,
        "verify_again": lambda: checker.verify("lima", *known),
        "hello_make": lambda: hellos.append(theirs._hello(b"", "oslo:1", now)),
        "hello_answer": lambda: ours.open(hellos.pop(), source=f"lima:{len(hellos) + 1}", now=0.0),
        "certificate_check": lambda: oslo.anchor.check(lima.certificate.der, now),
        "token_verify": lambda: oslo.verify_token(token, now),
        "assertion_verify": lambda: oslo.verify_assertion(word, now),
        "enrolment_issue": lambda: authority.issue(csr, "lima", now),
    }
    rare = {"hello_make", "hello_answer", "enrolment_issue", "seal_first"}
    taken: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(RUNS):
        for name, operation in operations.items():
            times = min(repeat, 100) if name in rare else repeat
            start = time.process_time()
            for _ in range(times):
                operation()
            taken[name].append((time.process_time() - start) / times * 1e6)
    return {name: round(statistics.median(times), 2) for name, times in taken.items()}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="microseconds for what identity does")
    parser.add_argument("--repeat", type=int, default=2000, help="times each operation is done in a run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not 1 <= options.repeat <= 10**6:
        parser.error("--repeat: write 1 to 1000000")
    result = measure(options.repeat)
    if options.json:
        print(json.dumps({"microseconds": result, "body_bytes": BODY_BYTES, "overhead_bytes": OVERHEAD_BYTES}))
        return 0
    for name, microseconds in result.items():
        print(f"{name:20} {microseconds:10.1f} us")
    return 0


if __name__ == "__main__":
    command(main)

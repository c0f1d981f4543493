"""Certificates for tests, by openssl: an authority, and what it signs."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@dataclass
class Authority:
    """One that signs; files are in `folder`."""

    folder: Path
    name: str = "ca"

    def __post_init__(self) -> None:
        self.cert, self._key = self.folder / f"{self.name}.pem", self.folder / f"{self.name}.key"
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", self._key,
                "-out", self.cert, "-days", 2, "-subj", f"/CN={self.name}")  # fmt: skip

    def sign(self, name: str, alternative: str = "", days: int = 2) -> tuple[Path, Path]:
        """Certificate and key with this common name and, if given, these alternative names (`DNS:alice,URI:...`)."""
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        request, names = self.folder / f"{name}.csr", self.folder / f"{name}.names"
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key, "-out", request,
                "-subj", f"/CN={name}")  # fmt: skip
        names.write_text(f"subjectAltName={alternative}\n" if alternative else "basicConstraints=CA:FALSE\n")
        openssl("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self._key, "-CAcreateserial", "-out", cert,
                "-days", days, "-extfile", names)  # fmt: skip
        return cert, key

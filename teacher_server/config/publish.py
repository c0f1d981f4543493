"""The section `publish` of a teacher: who may replace its weights while it serves, and what may be kept of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from teacher_server.config.files import Settings

TenantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class PublishConfig(Settings):
    """Lets students publish revisions of a teacher (docs/operate/publishing.md).

    Attributes:
        tenants: tenants that may publish; without tokens or client certificates, whoever calls itself so.
        keep: revisions that stay on disk, the serving one among them; older ones are deleted.
        max_gb: GiB of the files of one revision. The disk holds at most `keep` + 2 of them: one more while it is received, one more while
            replicas change.
        folder: folder of the revisions. All machines that run edges, replicas or `up` must see it; each server needs a folder of its own.
        upload_s: longest time, in seconds, from the first word of a publication until all of its files are there; then its call is broken
            off.
    """

    tenants: Annotated[tuple[TenantName, ...], Field(min_length=1)]
    keep: Annotated[int, Field(ge=1, le=1000)] = 2
    max_gb: Annotated[float, Field(gt=0, le=100_000)] = 8.0
    folder: Path = Path("~/.local/share/lyceum/revisions")
    upload_s: Annotated[float, Field(gt=0, le=86_400)] = 3600.0

    @property
    def max_bytes(self) -> int:
        """Of one revision."""
        return round(self.max_gb * 2**30)

    def folder_of(self, teacher: str) -> Path:
        """Where the revisions of a teacher are."""
        return self.folder.expanduser().absolute() / teacher

"""The kinds of artifacts that this version of the language knows. A new kind is one file and one line here."""

from __future__ import annotations

from teacher_wire.artifacts.kinds.base import ArtifactKind
from teacher_wire.artifacts.kinds.byte_table import ByteTableKind
from teacher_wire.artifacts.kinds.layer_basis import LayerBasisKind
from teacher_wire.artifacts.kinds.output_head import OUTPUT_HEAD, OutputHeadKind
from teacher_wire.core.errors import CapabilityError
from teacher_wire.core.info import BYTE_TABLE, LAYER_BASIS

KINDS: dict[str, ArtifactKind] = {
    OUTPUT_HEAD: OutputHeadKind(),
    LAYER_BASIS: LayerBasisKind(),
    BYTE_TABLE: ByteTableKind(),
}


def kind_of(name: str) -> ArtifactKind:
    """The kind of that name.

    Raises:
        CapabilityError: this side does not know it.
    """
    if name not in KINDS:
        raise CapabilityError("unknown kind of artifact", field="kind", value=ascii(name[:64]), limit="|".join(KINDS))
    return KINDS[name]

"""The language both houses speak: contract, codec, client. Never loads torch or ray."""

__version__ = "0.1.0"  # of the whole distribution, semantic; CHANGELOG.md
PROTOCOL = 2  # both sides must have the same; teacher.proto says how they find out

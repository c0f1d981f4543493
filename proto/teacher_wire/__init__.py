"""The language both houses speak: contract, codec, client. Never loads torch or ray."""

PROTOCOL = 2

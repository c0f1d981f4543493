"""Labels over the wire: bytes, assembly of chunks and the server's side of a stream."""

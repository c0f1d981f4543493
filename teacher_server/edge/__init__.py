"""The product's endpoint: our own grpc.aio server with TLS, tokens, health; a Serve deployment puts it on a node."""

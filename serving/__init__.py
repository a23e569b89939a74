"""One request: hydrate, retrieve, filter, rank, arrange, respond; and the gRPC server in front of it."""

"""The wire between a primary and its replica site: documents, framing, HTTPS client, TLS and a private CA."""

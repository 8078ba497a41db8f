"""The replica site: who may do what, replicas side by side, commits, and the HTTPS server over it."""

"""Counters of replicas and edges, and what operators and Prometheus see of them."""

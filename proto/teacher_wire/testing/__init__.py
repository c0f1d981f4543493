"""Fakes that speak the real wire, shipped so that users test without a GPU."""

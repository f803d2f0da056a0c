"""The sans-I/O protocol dmsync/1: bytes in, events out. protocol/WIRE.md."""

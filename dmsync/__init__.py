"""dmsync: git for live data. The command is `dm`; the folders are the layers, top to bottom:
surfaces, transports, engine, storage and wire, core, errors."""

__version__ = "0.1.0"

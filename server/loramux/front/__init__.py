"""The front process: it owns the requests and starts, watches and replaces the other processes.

No torch in here: the front knows the engine and the ingest process only by their command lines and
by ``loramux.wire``.
"""

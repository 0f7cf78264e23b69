"""HTTP for the api: the server and its limits, the plain port, worker processes, the access log, and answers."""

"""The Trio process: both transports, hub, wire, broker, on real sockets where sockets matter."""

"""Wire messages, journal, session, ZeroMQ server and client, gateway, replay, command line."""

"""Why memory ran out: from a message, a log or a recorded snapshot."""

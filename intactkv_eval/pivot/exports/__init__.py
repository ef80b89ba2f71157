"""PivotKV in the formats of servers: one server, one file."""

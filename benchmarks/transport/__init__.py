"""The transport beside what it is made of and what others use: raw sockets, UCX's own tool, gloo, one plain stream."""

"""Processes that end in time and reach nothing: the sandbox for programs that nobody trusts."""

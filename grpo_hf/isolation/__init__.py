"""Processes that end in time: workers for verifiers, and sandboxes that reach nothing, for programs that nobody trusts."""

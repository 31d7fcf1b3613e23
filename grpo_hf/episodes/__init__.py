"""Tools and environments: episodes of several turns, whose token ids are only ever appended to."""

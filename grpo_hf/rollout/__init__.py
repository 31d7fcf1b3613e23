"""From dataset rows to scored, packed updates: prompts, engines, and the stream that Trainer draws from."""

"""From updates to the next model, pure: decode, check, sum, step."""

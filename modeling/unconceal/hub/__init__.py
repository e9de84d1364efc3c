"""Push to the Hub, convert published checkpoints, export."""

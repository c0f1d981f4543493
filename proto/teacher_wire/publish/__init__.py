"""New weights for a teacher: messages, codec, and both ends of a Publish call."""

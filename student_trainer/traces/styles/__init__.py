"""The forms in which a teacher may write its reasoning: JSON with quotes, JSON with offsets, or free text; each asked for, bounded and read here."""

"""What travels, as frozen dataclasses, and the errors; the floor that imports nobody."""

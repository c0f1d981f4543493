from pathlib import Path


def tiny_converter_path() -> Path:
    """The stand-in for llama.cpp's converter."""
    return Path(__file__).with_name("tiny_converter.py")

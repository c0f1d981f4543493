"""The teacher's house: serves labels over gRPC from models that Ray Serve places. Never imports student_trainer."""

from teacher_wire import __version__

__all__ = ["__version__"]

"""The teacher's house: serves labels over gRPC from models that Ray Serve places. Never imports student_trainer."""

__version__ = "0.1.0"

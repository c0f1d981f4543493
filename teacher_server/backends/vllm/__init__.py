"""Teachers computed by vLLM's engine; the only room that imports vllm."""

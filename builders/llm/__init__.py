"""The LLM that writes: its checkpoint, TensorRT-LLM engines of it, and the model repository that serves it."""
